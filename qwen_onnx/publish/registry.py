"""OCI registries: https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md.

Blobs first, each only when the registry does not have it; the tag last, in one request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from pydantic_core import from_json

from qwen_onnx.errors import PublishError
from qwen_onnx.processes.network import is_loopback
from qwen_onnx.publish.addresses import RegistryAddress
from qwen_onnx.publish.bundle import Bundle, Item, checked_blocks
from qwen_onnx.publish.faults import FAULTS
from qwen_onnx.publish.manifest import EMPTY, LARGEST, MANIFEST_TYPE, digest_text, make_manifest, read_manifest
from qwen_onnx.publish.receipt import Receipt
from qwen_onnx.publish.registry_auth import Login
from qwen_onnx.sources.remote import RemoteFile
from qwen_onnx.sources.transfer import Progress, teller
from qwen_onnx.sources.web import PASSING, Ranges, bounded, make_client, reaching, reading

PLAIN = "--plain-http allows it for a registry, where you trust the network"
Content = Callable[[], Iterator[bytes]]


class Registry:
    """One repository of a registry. Use it as a context manager.

    Args:
        plain_http: speak http to a host beyond this machine; to this machine it is always http.
        write: ask for the right to push.
    """

    def __init__(self, address: RegistryAddress, *, plain_http: bool, write: bool) -> None:
        self._address, self.where = address, str(address)
        scheme = "http" if plain_http or is_loopback(address.host) else "https"
        self._base = httpx.URL(f"{scheme}://{address.host}")
        self._client = make_client(FAULTS, str(self._base), plain_http=plain_http, hint=PLAIN)
        self._ranges = Ranges(FAULTS)
        actions = "pull,push" if write else "pull"
        self._login = Login(self._client, self._base, address.host, f"repository:{address.repository}:{actions}")

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def has_blob(self, digest: str, size: int) -> bool:
        """Whether the repository holds a blob of this digest and size."""
        with self._send("HEAD", self._path("blobs", digest)) as response:
            if response.status_code == httpx.codes.NOT_FOUND:
                return False
            self._expect(response, httpx.codes.OK)
            return bool(response.headers.get("Content-Length") == str(size))

    def put_blob(self, digest: str, size: int, content: Content) -> None:
        """Upload a blob in one request; the registry keeps it only when its digest is right."""
        with self._send("POST", self._path("blobs", "uploads/")) as response:
            self._expect(response, httpx.codes.ACCEPTED)
            location = response.headers.get("Location")
        if not location:
            raise PublishError("the registry does not say where to upload to", where=self.where)
        url = self._base.join(location)
        url = url.copy_merge_params({"digest": digest})
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        with self._send("PUT", url, headers=headers, content=content) as response:
            self._expect(response, httpx.codes.CREATED)

    def put_manifest(self, manifest: bytes, reference: str) -> None:
        """Put a manifest under a tag: from now on readers see the new package."""
        headers = {"Content-Type": MANIFEST_TYPE}
        with self._send(
            "PUT", self._path("manifests", reference), headers=headers, content=lambda: iter([manifest])
        ) as r:
            self._expect(r, httpx.codes.CREATED)

    def manifest(self, reference: str) -> bytes:
        """The manifest of a tag or digest, compared with the digest that was asked for or announced."""
        headers = {"Accept": MANIFEST_TYPE}
        with self._send("GET", self._path("manifests", reference), headers=headers) as response:
            self._expect(response, httpx.codes.OK)
            data = bounded(response, LARGEST, "the manifest", FAULTS)
            announced = response.headers.get("Docker-Content-Digest", "")
        for digest in (reference, announced):
            if digest.startswith("sha256:") and digest != digest_text(data):
                raise PublishError("the manifest arrived with a digest other than the one announced", where=self.where)
        return data

    @contextmanager
    def blob(self, file: RemoteFile, offset: int) -> Iterator[Iterator[bytes]]:
        """The bytes of the blob ``file.place`` from ``offset`` on; the caller compares the digest.

        Raises:
            Interrupted: the connection broke, or the registry is busy.
        """
        with (
            reading(self.where, FAULTS),
            self._answered(
                "GET", self._path("blobs", file.place), headers=self._ranges.headers(file, offset)
            ) as answer,
        ):
            if answer.status_code not in PASSING:
                self._expect(answer, httpx.codes.OK, httpx.codes.PARTIAL_CONTENT)
            yield self._ranges.blocks(answer, file, offset)

    def _path(self, kind: str, rest: str) -> httpx.URL:
        return self._base.join(f"/v2/{self._address.repository}/{kind}/{rest}")

    @contextmanager
    def _send(
        self, method: str, url: httpx.URL, *, headers: dict[str, str] | None = None, content: Content | None = None
    ) -> Iterator[httpx.Response]:
        with reaching(self.where, FAULTS), self._answered(method, url, headers=headers, content=content) as response:
            yield response

    @contextmanager
    def _answered(
        self, method: str, url: httpx.URL, *, headers: dict[str, str] | None = None, content: Content | None = None
    ) -> Iterator[httpx.Response]:
        """Send a request, and once more when the registry wants a (fresh) login first."""
        for attempt in (1, 2):
            # an upload may be told to go to another host: that one gets no login of ours
            own = (url.scheme, url.host, url.port) == (self._base.scheme, self._base.host, self._base.port)
            options: dict[str, Any] = {"content": content()} if content else {}
            request = self._client.build_request(
                method, url, headers={**(headers or {}), **(self._login.headers() if own else {})}, **options
            )
            response = self._client.send(request, stream=True, follow_redirects=method in ("GET", "HEAD"))
            try:
                challenge = response.headers.get("WWW-Authenticate")
                if response.status_code == httpx.codes.UNAUTHORIZED and own and challenge and attempt == 1:
                    self._login.answer(challenge)
                    continue
                yield response
                return
            finally:
                response.close()

    def _expect(self, response: httpx.Response, *statuses: int) -> None:
        """PublishError, unless the registry answered with one of ``statuses``."""
        status = response.status_code
        if status in statuses:
            return
        code = _error_code(response)
        if status == httpx.codes.UNAUTHORIZED:
            raise self._login.refused("the registry wants a login, or another one")
        if status == httpx.codes.FORBIDDEN:
            raise self._login.refused(f"the registry denies it ({code or status})")
        if status == httpx.codes.NOT_FOUND:
            raise PublishError(f"not there ({code or status})", where=self.where, hint="is the name and the tag right?")
        hint = "the same command goes on where this one stopped" if status >= 500 or status == 429 else None
        raise PublishError(f"the registry answered {status}{f' ({code})' if code else ''}", where=self.where, hint=hint)


def _error_code(response: httpx.Response) -> str | None:
    """The code of an OCI error, e.g. DIGEST_INVALID. The message beside it is the server's and not repeated."""
    if response.request.method == "HEAD":
        return None
    try:
        code = from_json(bounded(response, 1 << 16, "the error", FAULTS))["errors"][0]["code"]
    except (ValueError, LookupError, TypeError, PublishError):
        return None
    return code if isinstance(code, str) and re.fullmatch(r"[A-Z_]{1,64}", code) else None


def send_to_registry(bundle: Bundle, address: RegistryAddress, progress: Progress, *, plain_http: bool) -> Receipt:
    """Push a package.

    Raises:
        PublishError: the registry cannot be reached or refuses, or a file changed since it was verified; the tag
            then stays what it was.
    """
    if ":" in address.reference:
        raise PublishError("publish under a tag, not a digest", where=str(address), hint="oci://HOST/REPOSITORY:TAG")
    sent = present = 0
    manifest = make_manifest(bundle)
    with Registry(address, plain_http=plain_http, write=True) as registry:
        for item in bundle.items:
            if registry.has_blob(f"sha256:{item.sha256}", item.size):
                present += item.size
            else:
                progress(f"{item.name} ({item.size / 1e6:,.1f} MB)")
                registry.put_blob(f"sha256:{item.sha256}", item.size, _content(item, progress))
                sent += item.size
        if not registry.has_blob(digest_text(EMPTY), len(EMPTY)):
            registry.put_blob(digest_text(EMPTY), len(EMPTY), lambda: iter([EMPTY]))
        registry.put_manifest(manifest, address.reference)
    return Receipt(bundle.digest, str(address), sent, present, manifest=digest_text(manifest))


def _content(item: Item, progress: Progress) -> Content:
    return lambda: checked_blocks(item, teller(item.name, item.size, progress))


class RegistrySource:
    """A tag or a digest of a repository."""

    def __init__(self, registry: Registry, reference: str) -> None:
        self._registry, self._reference = registry, reference

    def listing(self) -> list[RemoteFile]:
        """The files of the manifest."""
        return read_manifest(self._registry.manifest(self._reference), self._registry.where)

    @contextmanager
    def read(self, file: RemoteFile, offset: int) -> Iterator[Iterator[bytes]]:
        """The bytes of a layer from ``offset`` on."""
        with self._registry.blob(file, offset) as blocks:
            yield blocks

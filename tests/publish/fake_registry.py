"""An OCI registry that keeps to the Distribution specification, with the logins that registries ask for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import uuid
from typing import Any
from urllib.parse import quote

from tests.publish.fake_server import BLOCK, Handler

NAME = r"/v2/([a-z0-9/._-]+)"
USER, PASSWORD, TOKEN = "maker", "right-password", "short-lived-token"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class FakeRegistry(Handler):
    """https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md, pull and push.

    Attributes:
        login: ``basic``, ``bearer`` or nothing.
        redirects: blobs come from another origin.
        spoil: what is done to the bytes of a blob on the way out.
        uploaded: digests of finished uploads, in order.
        stalls: an upload over one block is read and then not answered until this is set.
        slow: blobs are cut off after so many bytes.
    """

    port: int
    login: str | None = None
    redirects = False
    spoil: Any = staticmethod(lambda data: data)
    blobs: dict[str, bytes]
    manifests: dict[str, bytes]
    uploads: set[str]
    uploaded: list[str]
    stalls: threading.Event | None = None
    cut: int | None = None

    def answer(self, path: str, query: dict[str, str]) -> None:
        if path == "/token":
            self._token(query)
        elif path.startswith("/storage/"):
            self._out(self.blobs[path.rsplit("/", 1)[1]])
        elif not self._logged_in():
            self.body()
        elif match := re.fullmatch(rf"{NAME}/blobs/uploads/(.*)", path):
            self._upload(match[1], match[2], query)
        elif match := re.fullmatch(rf"{NAME}/blobs/(sha256:[0-9a-f]{{64}})", path):
            self._blob(match[2])
        elif match := re.fullmatch(rf"{NAME}/manifests/(.+)", path):
            self._manifest(match[2])
        else:
            self._fault(404, "NAME_UNKNOWN")

    def _fault(self, status: int, code: str, **headers: str) -> None:
        # registries like to repeat what they were sent
        message = f"{code} for {self.headers.get('Authorization')}"
        self.send_json({"errors": [{"code": code, "message": message}]}, status, **headers)

    def _logged_in(self) -> bool:
        basic = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        wanted = {None: None, "basic": basic, "bearer": f"Bearer {TOKEN}"}[self.login]
        if wanted is None or self.headers.get("Authorization") == wanted:
            return True
        challenge = 'Basic realm="fake"'
        if self.login == "bearer":
            realm = f"http://127.0.0.1:{self.port}/token"
            challenge = f'Bearer realm="{realm}",service="fake",scope="repository:models/tiny:pull,push"'
        self._fault(401, "UNAUTHORIZED", WWW_Authenticate=challenge)
        return False

    def _token(self, query: dict[str, str]) -> None:
        basic = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != basic or query.get("service") != "fake" or "scope" not in query:
            self._fault(401, "UNAUTHORIZED")
        else:
            self.send_json({"token": TOKEN})

    def _upload(self, name: str, session: str, query: dict[str, str]) -> None:
        if self.command == "POST":
            self.body()
            key = uuid.uuid4().hex
            self.uploads.add(key)
            # relative and with a query of its own, as the specification allows
            self.send(202, Location=f"/v2/{name}/blobs/uploads/{key}?state={quote('a/b=')}")
            return
        if session not in self.uploads or query.get("state") != "a/b=":
            self._fault(404, "BLOB_UPLOAD_UNKNOWN")
            return
        data = self.body()
        if self.stalls and len(data) > BLOCK:
            self.stalls.wait(30)
        if digest_of(data) != query["digest"]:
            self._fault(400, "DIGEST_INVALID")
            return
        self.uploads.remove(session)
        self.blobs[query["digest"]] = data
        self.uploaded.append(query["digest"])
        self.send(201, Location=f"/v2/{name}/blobs/{query['digest']}")

    def _blob(self, digest: str) -> None:
        if digest not in self.blobs:
            self._fault(404, "BLOB_UNKNOWN")
        elif self.redirects and self.command == "GET":
            self.send(307, Location=f"http://localhost:{self.port}/storage/{digest}")
        else:
            self._out(self.blobs[digest])

    def _out(self, data: bytes) -> None:
        data = self.spoil(data)
        if self.cut is not None and len(data) > self.cut and not self.headers.get("Range") and self.command == "GET":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: self.cut])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        else:
            self.send_ranged(data)

    def _manifest(self, reference: str) -> None:
        if self.command == "PUT":
            data = self.body()
            manifest = json.loads(data)
            wanted = [entry["digest"] for entry in (manifest["config"], *manifest["layers"])]
            if any(digest not in self.blobs for digest in wanted):
                self._fault(400, "MANIFEST_BLOB_UNKNOWN")
                return
            self.manifests[reference] = self.manifests[digest_of(data)] = data
            self.send(201, Docker_Content_Digest=digest_of(data))
        elif reference in self.manifests:
            data = self.manifests[reference]
            kind = "application/vnd.oci.image.manifest.v1+json"
            self.send(200, data, Content_Type=kind, Docker_Content_Digest=digest_of(data))
        else:
            self._fault(404, "MANIFEST_UNKNOWN")

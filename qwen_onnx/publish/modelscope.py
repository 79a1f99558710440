"""ModelScope, through its own client; ``MODELSCOPE_ENDPOINT`` moves it, as it moves the client.

The client's ``upload_folder`` commits in batches: readers would see mixtures. We use its requests one by one, so that
all blobs are there before one commit names them.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from pydantic import SecretStr

from qwen_onnx.artifact.manifest import read_manifest
from qwen_onnx.errors import PublishError
from qwen_onnx.publish.addresses import HubAddress
from qwen_onnx.publish.bundle import Bundle, CheckedFile, Item, checked_bytes
from qwen_onnx.publish.credentials import MODELSCOPE_TOKEN, missing
from qwen_onnx.publish.faults import FAULTS
from qwen_onnx.publish.hubs import HubReader, is_same, obsolete_files, require_same, status_fault, unreachable
from qwen_onnx.publish.receipt import Receipt
from qwen_onnx.sources.hub import endpoint_of
from qwen_onnx.sources.remote import RemoteFile
from qwen_onnx.sources.transfer import Progress, teller
from qwen_onnx.sources.web import require_encrypted, secret

# the hub writes them into every repository
OWN = (".gitattributes", "configuration.json")
MAIN, MODEL = "master", "model"


def send_to_modelscope(bundle: Bundle, address: HubAddress, progress: Progress, *, private: bool) -> Receipt:
    """Publish a package by one commit; until then readers see the old one.

    Args:
        private: make the repository private when it is made now.

    Raises:
        PublishError: no token, the hub refuses or cannot be reached, or the repository holds somebody else's files.
    """
    where, token = str(address), secret(MODELSCOPE_TOKEN, FAULTS)
    if not token:
        raise missing(MODELSCOPE_TOKEN, where)
    with _faults(where), ModelScopeSource(address) as source:
        api = _api(token)
        _make_repository(api, bundle, address.repository, private=private)
        before = {file.name: file for file in source.listing()}
        obsolete = obsolete_files(source, before, bundle, where)
        new = [item for item in bundle.items if not is_same(item, before.get(item.name))]
        large = [item for item in new if _by_lfs(item)]
        sent = sum(item.size for item in new if not _by_lfs(item)) + _upload(api, address.repository, large, progress)
        if new or obsolete:
            progress("committing")
            actions = [_create(item) for item in new] + [_action("delete", name) for name in obsolete]
            api.legacy.create_commit(
                repo_id=address.repository,
                repo_type=MODEL,
                operations=actions,
                commit_message="Publish a verified package of qwen-onnx",
                revision=address.revision or MAIN,
            )
        require_same(bundle, {file.name: file for file in source.listing()}, where)
    return Receipt(bundle.digest, where, sent, bundle.size - sent)


def _make_repository(api: Any, bundle: Bundle, repository: str, *, private: bool) -> None:
    if not api.repo_exists(repository, MODEL):
        license = read_manifest(bundle.package.path).plan.license
        # the client would claim Apache-2.0 when it is told nothing
        api.create_repo(repository, MODEL, visibility="private" if private else "public", license=license or "other")


def _by_lfs(item: Item) -> bool:
    """The client's own rule: by suffix and size, but never for files that the hub itself reads."""
    from modelscope_hub.constants import (
        MODEL_LFS_SUFFIX,
        UPLOAD_INLINE_METADATA_PATHS,
        UPLOAD_LFS_FORCE_THRESHOLD_BYTES,
    )

    path = PurePosixPath(item.name)
    if path.name.upper() in {name.upper() for name in UPLOAD_INLINE_METADATA_PATHS}:
        return False
    return item.size > UPLOAD_LFS_FORCE_THRESHOLD_BYTES or path.suffix.lower() in MODEL_LFS_SUFFIX


def _upload(api: Any, repository: str, items: list[Item], progress: Progress) -> int:
    """Send the blobs that the hub does not have; returns their bytes."""
    if not items:
        return 0
    wanted = [{"oid": item.sha256, "size": item.size} for item in items]
    places = api.legacy.validate_blobs(repo_id=repository, repo_type=MODEL, objects=wanted)
    sent = 0
    for item in items:
        if places.get(item.sha256):
            progress(f"{item.name} ({item.size / 1e6:,.1f} MB)")
            place = places.pop(item.sha256)
            # the client sends the token there too: ModelScope stores large files on a host of its own
            require_encrypted(place, "the hub named this place: tell ModelScope", FAULTS)
            with CheckedFile(item, teller(item.name, item.size, progress)) as file:
                api.legacy.upload_blob(upload_url=place, data=file, size=item.size)
            sent += item.size
    return sent


def _create(item: Item) -> dict[str, Any]:
    if _by_lfs(item):
        return _action("create", item.name, type="lfs", size=item.size, sha256=item.sha256)
    content = base64.b64encode(checked_bytes(item)).decode()
    return _action("create", item.name, size=item.size, content=content, encoding="base64")


def _action(action: str, name: str, **fields: Any) -> dict[str, Any]:
    """An action of a commit, as the client writes it."""
    empty = {"type": "normal", "size": 0, "sha256": "", "content": "", "encoding": ""}
    return {"action": action, "path": name, **empty, **fields}


def _api(token: SecretStr | None) -> Any:
    import logging

    from modelscope_hub import HubApi

    # its warnings repeat answers of the server
    logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or None
    if endpoint:
        require_encrypted(endpoint, "let MODELSCOPE_ENDPOINT begin with https", FAULTS)
    # an empty token: use none, not the one that a login saved
    return HubApi(endpoint=endpoint, token=token.get_secret_value() if token else "")


@contextmanager
def _faults(where: str) -> Iterator[None]:
    """Errors of the client as PublishError; their own text and their requests, which hold the token, are cut off."""
    import requests
    from modelscope_hub.errors import APIError, HubError, NetworkError

    try:
        yield
    except PublishError:
        raise
    except APIError as error:
        raise status_fault(error.status_code or 0, MODELSCOPE_TOKEN, where) from None
    except (NetworkError, requests.exceptions.RequestException) as error:
        raise unreachable(error, "MODELSCOPE_ENDPOINT", where) from None
    except (HubError, ValueError, LookupError, AttributeError) as error:
        raise PublishError(f"the hub's answer makes no sense ({type(error).__name__})", where=where) from None


class ModelScopeSource(HubReader):
    """A branch of a repository."""

    def __init__(self, address: HubAddress) -> None:
        super().__init__(address, secret(MODELSCOPE_TOKEN, FAULTS), endpoint_of("modelscope", FAULTS))

    def listing(self) -> list[RemoteFile]:
        """The repository's files with the hub's digests; the hub's own files are left out.

        Raises:
            PublishError: the hub refuses, or gives no digest.
        """
        revision, repository = self._address.revision or MAIN, self._address.repository
        with _faults(self._where):
            api = _api(self._token)
            files = [
                file
                for file in api.list_repo_files(repository, MODEL, revision=revision)
                if file.type == "blob" and file.path not in OWN
            ]
            undigested = [file.path for file in files if not file.sha256]
            if undigested:
                raise PublishError(f"the hub gives no digest for {undigested[0]}", where=self._where)
            return [
                RemoteFile(
                    file.path,
                    file.size,
                    file.sha256,
                    place=api.legacy.get_download_url(repository, MODEL, file.path, revision),
                )
                for file in files
            ]

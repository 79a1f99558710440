"""Download a checkpoint from Hugging Face Hub or ModelScope and verify each byte of it.

Both hubs publish the SHA-256 of their large files; Hugging Face gives the git blob id of the small ones.
The endpoints can be moved with ``HF_ENDPOINT`` and ``MODELSCOPE_ENDPOINT``, as the hubs' own clients do.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from qwen_onnx.catalog.schema import HubSource
from qwen_onnx.errors import ChecksumError, SourceError
from qwen_onnx.files import CHECKSUMS, LICENCE_FILES, file_checksums

Progress = Callable[[str], None]
WANTED = ("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "vocab.json", "merges.txt")
WANTED_TOO = ("*.tiktoken", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", *LICENCE_FILES)
HUGGINGFACE = "https://huggingface.co"
MODELSCOPE = "https://www.modelscope.cn"
TIMEOUT = httpx.Timeout(30.0, connect=10.0)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a hub repository; ``sha256`` or ``git_blob`` (SHA-1 of a git blob), ``size`` in bytes."""

    name: str
    url: str
    size: int
    sha256: str | None = None
    git_blob: str | None = None


def at_hand(source: HubSource, cache: Path) -> Path | None:
    """The folder of a checkpoint that an earlier download left; its bytes are not compared here."""
    return _folder(source, cache) if recorded(source, cache) is not None else None


def download(source: HubSource, cache: Path, progress: Progress) -> tuple[Path, dict[str, str]]:
    """Download a checkpoint, or find it in the cache.

    Returns:
        Its folder and the SHA-256 of each file.

    Raises:
        SourceError: not reachable, no such repository or revision.
        ChecksumError: what arrived is not what the hub announced.
    """
    final = _folder(source, cache)
    known = recorded(source, cache)
    if known is not None:
        if file_checksums(final, without=CHECKSUMS) == known:
            return final, known
        shutil.rmtree(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=final.parent))
    try:
        with httpx.Client(timeout=TIMEOUT, follow_redirects=True, headers=_authorization(source)) as client:
            for file in _list(client, source):
                progress(f"downloading {source.repo}: {file.name} ({file.size / 1e6:,.1f} MB)")
                _download(client, file, staging)
        files = file_checksums(staging, without=CHECKSUMS)
        (staging / CHECKSUMS).write_text(json.dumps(files, indent=1), encoding="utf-8")
        os.replace(staging, final)
    except httpx.HTTPError as error:
        raise _unreachable(source, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return final, files


def _folder(source: HubSource, cache: Path) -> Path:
    return cache / "checkpoints" / f"{source.kind}--{source.repo.replace('/', '--')}--{source.revision}"


def recorded(source: HubSource, cache: Path) -> dict[str, str] | None:
    """SHA-256 by name of a checkpoint that was downloaded before, as they were then; None when it was not."""
    listing = _folder(source, cache) / CHECKSUMS
    if not listing.exists():
        return None
    files: dict[str, str] = json.loads(listing.read_text(encoding="utf-8"))
    return files


def _authorization(source: HubSource) -> dict[str, str]:
    token = os.environ.get("HF_TOKEN") if source.kind == "huggingface" else None
    return {"Authorization": f"Bearer {token}"} if token else {}


def _unreachable(source: HubSource, error: httpx.HTTPError) -> SourceError:
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        cause = {401: "needs a token (HF_TOKEN)", 403: "access denied", 404: "no such repository or revision"}
        what = f"{source.repo}@{source.revision}: {cause.get(status, f'the hub answered {status}')}"
    else:
        what = f"{source.repo}: the hub cannot be reached ({type(error).__name__}: {error})"
    return SourceError(what, hint="go online, or give a local folder: SOURCE=path/to/checkpoint")


def _list(client: httpx.Client, source: HubSource) -> list[RemoteFile]:
    found = _list_huggingface(client, source) if source.kind == "huggingface" else _list_modelscope(client, source)
    kept = [file for file in found if any(fnmatch(file.name, pattern) for pattern in (*WANTED, *WANTED_TOO))]
    if not any(file.name.endswith(".safetensors") for file in kept):
        raise SourceError(f"{source.repo}@{source.revision} holds no safetensors", hint="choose another source")
    return kept


def _list_huggingface(client: httpx.Client, source: HubSource) -> Iterator[RemoteFile]:
    """https://huggingface.co/docs/hub/api: /api/models/{repo}/tree/{revision}."""
    base = os.environ.get("HF_ENDPOINT", HUGGINGFACE).rstrip("/")
    revision = quote(source.revision or "", safe="")
    for item in _json(client, f"{base}/api/models/{source.repo}/tree/{revision}"):
        if item.get("type") == "file":
            url = f"{base}/{source.repo}/resolve/{revision}/{quote(item['path'])}"
            lfs = item.get("lfs") or {}
            yield RemoteFile(item["path"], url, item["size"], lfs.get("oid"), None if lfs else item["oid"])


def _list_modelscope(client: httpx.Client, source: HubSource) -> Iterator[RemoteFile]:
    """The REST interface that the modelscope package uses: /api/v1/models/{repo}/repo/files."""
    base = os.environ.get("MODELSCOPE_ENDPOINT", MODELSCOPE).rstrip("/")
    api = f"{base}/api/v1/models/{source.repo}/repo"
    revision = quote(source.revision or "", safe="")
    answer = _json(client, f"{api}/files?Revision={revision}&Recursive=false")
    for item in (answer.get("Data") or {}).get("Files") or []:
        if item.get("Type") == "blob":
            url = f"{api}?Revision={revision}&FilePath={quote(item['Path'], safe='')}"
            yield RemoteFile(item["Path"], url, item["Size"], item.get("Sha256"))


def _json(client: httpx.Client, url: str) -> Any:
    response = client.get(url)
    response.raise_for_status()
    try:
        return response.json()
    except json.JSONDecodeError as error:
        raise SourceError(f"the hub's answer is not JSON: {url}", hint="is a proxy in between?") from error


def _download(client: httpx.Client, file: RemoteFile, folder: Path) -> None:
    sha256, blob = hashlib.sha256(), hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with client.stream("GET", file.url) as response, (folder / file.name).open("wb") as output:
        response.raise_for_status()
        for chunk in response.iter_bytes(1 << 20):
            output.write(chunk)
            sha256.update(chunk)
            blob.update(chunk)
    expected, found = (file.sha256, sha256.hexdigest()) if file.sha256 else (file.git_blob, blob.hexdigest())
    if expected is None:
        raise ChecksumError(f"the hub gives no checksum for {file.name}", hint="use a local copy: SOURCE=path")
    if found != expected:
        raise ChecksumError(
            f"{file.name} arrived with another checksum than the hub announced", where=file.url, hint="try again"
        )

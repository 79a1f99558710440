"""Download a checkpoint from Hugging Face Hub or ModelScope and verify each byte of it.

Both hubs publish the SHA-256 of their large files; Hugging Face gives the git blob id of the small ones.
The endpoints can be moved with ``HF_ENDPOINT`` and ``MODELSCOPE_ENDPOINT``, as the hubs' own clients do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from qwen_onnx.artifact.store import build_lock
from qwen_onnx.bounded import read_json
from qwen_onnx.catalog.reference import HubName
from qwen_onnx.catalog.sources import HubSource
from qwen_onnx.errors import ChecksumError, QwenOnnxError, SourceError
from qwen_onnx.files import CHECKSUMS, LICENCE_FILES, file_checksums, write_private
from qwen_onnx.records import COMMIT
from qwen_onnx.sources import refs
from qwen_onnx.sources.remote import CHECKPOINT_FAULTS as FAULTS
from qwen_onnx.sources.remote import Faults, RemoteFile, require_safe
from qwen_onnx.sources.transfer import Progress, Transfer
from qwen_onnx.sources.web import PASSING, Ranges, bounded, make_client, reaching, reading, require_encrypted, secret

WANTED = ("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "vocab.json", "merges.txt")
# chat_template.json: where processors kept theirs before transformers 5
TEMPLATES = ("chat_template.jinja", "chat_template.json")
WANTED_TOO = ("*.tiktoken", *TEMPLATES, "special_tokens_map.json", "added_tokens.json", *LICENCE_FILES)
ENDPOINTS = {
    "huggingface": ("HF_ENDPOINT", "https://huggingface.co"),
    "modelscope": ("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn"),
}
# bytes of a listing, of one file of weights, of any other file, and of a checkpoint: the largest Qwen has 1 TB
LARGEST_LISTING, LARGEST_WEIGHTS, LARGEST_OTHER, LARGEST_CHECKPOINT = 32 << 20, 1 << 40, 1 << 28, 4 << 40
Bytes = Annotated[int, Field(ge=0, strict=True)]


class _Large(BaseModel):
    oid: str


class _HuggingFaceState(BaseModel):
    """An answer of /api/models/{repo}/revision/{revision}."""

    sha: str = Field(pattern=f"^{COMMIT}$")


class _HuggingFaceFile(BaseModel):
    """An entry of /api/models/{repo}/tree/{revision}; readers ignore what is new."""

    type: str
    path: str
    size: Bytes = 0
    oid: str
    lfs: _Large | None = None


class _ModelScopeFile(BaseModel):
    Type: str
    Path: str
    Size: Bytes = 0
    Sha256: str | None = None


class _ModelScopeFiles(BaseModel):
    Files: list[_ModelScopeFile] | None = None


class _ModelScopeAnswer(BaseModel):
    """An answer of /api/v1/models/{repo}/repo/files."""

    Data: _ModelScopeFiles | None = None


HUGGINGFACE_LISTING = TypeAdapter(list[_HuggingFaceFile])
HUGGINGFACE_STATE = TypeAdapter(_HuggingFaceState)
MODELSCOPE_LISTING = TypeAdapter(_ModelScopeAnswer)


def endpoint_of(kind: str, faults: Faults = FAULTS) -> str:
    """Base URL of a hub.

    Raises:
        faults.failed: it is moved to a place that is not encrypted.
    """
    variable, usual = ENDPOINTS[kind]
    moved = os.environ.get(variable)
    if not moved:
        return usual
    require_encrypted(moved, f"let {variable} begin with https", faults)
    return moved.rstrip("/")


def settled(source: HubSource, cache: Path) -> HubSource:
    """The source at the commit that its branch was when it was fetched; as it is where none was written down."""
    note = _note(source, cache)
    found = note.read_text(errors="replace") if not source.is_pinned and note.is_file() else ""
    return source.model_copy(update={"revision": found}) if re.fullmatch(COMMIT, found) else source


def settle(source: HubSource, cache: Path, progress: Progress) -> HubSource:
    """The source at one commit: that of an earlier download, else the one that its branch is now, which is kept.

    Where the hub says no commit, the branch stays: the SHA-256 of each file then says what was fetched.
    """
    known = settled(source, cache)
    if source.is_pinned or recorded(known, cache) is not None:
        return known
    try:
        with HubReader(source) as reader:
            commit = reader.commit()
    except SourceError as error:
        if known is source:
            at = f"{source.repo}@{source.revision}"
            progress(f"{at} is not pinned to a commit, but by the SHA-256 of each file: {error.what}")
        return known
    progress(f"{source.repo}@{source.revision} is commit {commit}")
    note = _note(source, cache)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_private(note, commit)
    return source.model_copy(update={"revision": commit})


def at_hand(source: HubSource, cache: Path) -> Path | None:
    """The folder of a checkpoint that an earlier download left; its bytes are not compared here."""
    return _folder(source, cache) if recorded(source, cache) is not None else None


def download(source: HubSource, cache: Path, progress: Progress) -> tuple[Path, dict[str, str]]:
    """Download a checkpoint, or find it in the cache. What an interrupted run finished is not asked for again.

    Returns:
        Its folder and the SHA-256 of each file.

    Raises:
        SourceError: not reachable, no such repository or revision, or its listing cannot be trusted.
        ChecksumError: what arrived is not what the hub announced.
        EnvironmentFault: the disk is full.
    """
    final = _folder(source, cache)
    if (found := _whole(source, cache)) is not None:
        return final, found
    staging = final.with_name(f".{final.name}.part")
    # the lock goes with the folder
    with build_lock(staging / "hub", wait=True, waiting=lambda: progress(f"{source.repo}: another download runs")):
        files = _whole(source, cache)
        if files is None:
            shutil.rmtree(final, ignore_errors=True)
            files = _downloaded(source, staging, progress)
            (staging / "files" / CHECKSUMS).write_text(json.dumps(files, indent=1), encoding="utf-8")
            os.replace(staging / "files", final)
        shutil.rmtree(staging, ignore_errors=True)
    return final, files


def _whole(source: HubSource, cache: Path) -> dict[str, str] | None:
    """What is recorded of an earlier download, when all of it is still there."""
    known = recorded(source, cache)
    return known if known is not None and file_checksums(_folder(source, cache), without=CHECKSUMS) == known else None


def _downloaded(source: HubSource, staging: Path, progress: Progress) -> dict[str, str]:
    """SHA-256 of the files in ``staging/files``; what makes no sense to the next run is removed when it fails."""
    try:
        with HubReader(source) as reader:
            said = f"downloading {source.repo}: "
            transfer = Transfer(reader, reader.where, staging, FAULTS, lambda line: progress(said + line))
            listing = reader.listing()
            transfer.open(sum(file.size for file in listing))
            # of another state of a branch
            for path in transfer.files.iterdir():
                if path.name not in {file.name for file in listing}:
                    path.unlink()
            return dict(sorted((file.name, transfer.fetch(file, file.sha256)) for file in listing))
    except QwenOnnxError as error:
        if isinstance(error, ChecksumError) or not any(staging.glob("*/*")):
            shutil.rmtree(staging)
        raise


def _folder(source: HubSource, cache: Path) -> Path:
    return cache / "checkpoints" / _name(source)


def _note(source: HubSource, cache: Path) -> Path:
    return cache / "refs" / _name(source)


def _name(source: HubSource) -> str:
    return f"{source.kind}--{source.repo.replace('/', '--')}--{source.revision}"


def recorded(source: HubSource, cache: Path) -> dict[str, str] | None:
    """SHA-256 by name of a checkpoint that was downloaded before, as they were then; None when it was not."""
    listing = _folder(source, cache) / CHECKSUMS
    if not listing.exists():
        return None
    files: dict[str, str] = json.loads(listing.read_text(encoding="utf-8"))
    return files


class HubReader:
    """Listing and files of one revision of a repository; use it as a context manager.

    The token goes to the hub's own host and is dropped on the way to another.
    """

    def __init__(self, source: HubSource | HubName) -> None:
        self._source, self._base = source, endpoint_of(source.kind)
        self.where = f"{source.repo}@{source.revision}"
        self._client, self._ranges = make_client(FAULTS, self._base), Ranges(FAULTS)
        token = secret("HF_TOKEN", FAULTS) if source.kind == "huggingface" else None
        if token:
            self._client.headers["Authorization"] = f"Bearer {token.get_secret_value()}"

    def __enter__(self) -> HubReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def commit(self) -> str:
        """The commit that the revision, a branch or a tag, is now.

        Raises:
            SourceError: not reachable, no such repository or revision, or an answer that makes no sense.
        """
        repo, revision = self._source.repo, self._source.revision or ""
        if self._source.kind == "modelscope":
            # its REST interface tells no commits, but its repositories are git's
            url = f"{self._base}/{repo}.git/{refs.QUERY}"
            with self._answered(url, {"User-Agent": refs.AGENT}) as response:
                body = bounded(response, refs.LARGEST, "the list of refs", FAULTS)
            return refs.commit_of(refs.refs_of(body, self.where), revision, self.where)
        url = f"{self._base}/api/models/{repo}/revision/{quote(revision, safe='')}"
        found: str = self._answer(url, HUGGINGFACE_STATE).sha
        return found

    def files(self) -> list[RemoteFile]:
        """Every file at the top of the repository, as it is announced; nothing of it is to be believed yet."""
        return list(self._huggingface() if self._source.kind == "huggingface" else self._modelscope())

    def small(self, file: RemoteFile, most_bytes: int) -> bytes:
        """The bytes of a small file.

        Raises:
            SourceError: it cannot be had, or is larger than ``most_bytes``.
            ChecksumError: it is not what the hub announced.
        """
        with self._answered(file.place, {}) as response:
            body = bounded(response, min(most_bytes, file.size), file.name, FAULTS)
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()
        known = [(file.sha256, hashlib.sha256(body).hexdigest()), (file.git_blob, blob)]
        if not any(wanted for wanted, _ in known) or any(wanted not in (None, found) for wanted, found in known):
            raise ChecksumError(f"{file.name} is not what the hub announced", where=self.where, hint="try again")
        return body

    def listing(self) -> list[RemoteFile]:
        """The files of a checkpoint that a build needs.

        Raises:
            SourceError: not reachable, no such repository or revision, a listing that cannot be trusted, or one
                without weights.
            ChecksumError: a file without a digest.
        """
        kept = [file for file in self.files() if any(fnmatch(file.name, pattern) for pattern in (*WANTED, *WANTED_TOO))]
        require_safe(kept, self.where, FAULTS, bare=True)
        if not any(file.name.endswith(".safetensors") for file in kept):
            raise SourceError(f"{self.where} holds no safetensors", hint="choose another source")
        for file in kept:
            most = LARGEST_WEIGHTS if file.name.endswith(".safetensors") else LARGEST_OTHER
            if file.size > most:
                raise SourceError(f"{file.name} is announced with {file.size:,} bytes", where=self.where)
            if not file.sha256 and not file.git_blob:
                raise ChecksumError(f"the hub gives no checksum for {file.name}", hint="use a local copy: SOURCE=path")
        if sum(file.size for file in kept) > LARGEST_CHECKPOINT:
            raise SourceError(f"more than {LARGEST_CHECKPOINT:,} bytes are announced", where=self.where)
        return kept

    def _huggingface(self) -> Iterator[RemoteFile]:
        """https://huggingface.co/docs/hub/api: /api/models/{repo}/tree/{revision}."""
        repo, revision = self._source.repo, quote(self._source.revision or "", safe="")
        for item in self._answer(f"{self._base}/api/models/{repo}/tree/{revision}", HUGGINGFACE_LISTING):
            if item.type == "file":
                url = f"{self._base}/{repo}/resolve/{revision}/{quote(item.path)}"
                blob = None if item.lfs else item.oid
                yield RemoteFile(item.path, item.size, item.lfs.oid if item.lfs else None, blob, url)

    def _modelscope(self) -> Iterator[RemoteFile]:
        """The REST interface that the modelscope package uses: /api/v1/models/{repo}/repo/files."""
        api = f"{self._base}/api/v1/models/{self._source.repo}/repo"
        revision = quote(self._source.revision or "", safe="")
        answer = self._answer(f"{api}/files?Revision={revision}&Recursive=false", MODELSCOPE_LISTING)
        for item in (answer.Data and answer.Data.Files) or []:
            if item.Type == "blob":
                url = f"{api}?Revision={revision}&FilePath={quote(item.Path, safe='')}"
                yield RemoteFile(item.Path, item.Size, item.Sha256 or None, place=url)

    def _answer(self, url: str, form: TypeAdapter[Any]) -> Any:
        """A small answer in the form given."""
        with self._answered(url, {}) as response:
            body = bounded(response, LARGEST_LISTING, "the listing", FAULTS)
        hint = "is a proxy in between?"
        read_json(body, most_bytes=LARGEST_LISTING, error=SourceError, what="the hub's answer", hint=hint)
        try:
            return form.validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise SourceError(
                f"the hub's answer makes no sense: {place}: {first['msg']}", where=self.where, hint=hint
            ) from None

    @contextmanager
    def read(self, file: RemoteFile, offset: int) -> Iterator[Iterator[bytes]]:
        """The bytes of ``file`` from ``offset`` on; raises ``Interrupted`` when it is worth trying again."""
        with (
            reading(self.where, FAULTS),
            self._client.stream("GET", file.place, headers=self._ranges.headers(file, offset)) as response,
        ):
            self._require(response, *PASSING)
            yield self._ranges.blocks(response, file, offset)

    @contextmanager
    def _answered(self, url: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        with reaching(f"{self.where}: the hub", FAULTS), self._client.stream("GET", url, headers=headers) as response:
            self._require(response)
            yield response

    def _require(self, response: httpx.Response, *others: int) -> None:
        status = response.status_code
        if status in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT, *others):
            return
        raise self._refusal(status, response.headers.get("X-Error-Code", ""))

    def _refusal(self, status: int, code: str) -> SourceError:
        """Why the hub does not answer; ``code`` is Hugging Face's own word for it."""
        repo, page = self._source.repo, f"{self._base}/{self._source.repo}"
        if code == "GatedRepo":
            return SourceError(
                f"{self.where}: access denied: the repository is gated",
                where=page,
                hint=f"accept its terms at {page}, then: export HF_TOKEN=… (a token of that account)",
            )
        # git servers ask for a password where nothing is
        asks = status == httpx.codes.UNAUTHORIZED and self._source.kind == "modelscope"
        absent = status == httpx.codes.NOT_FOUND or asks
        if code == "RepoNotFound" or (absent and not code):
            hint = "check its spelling" + ("; for a private one: export HF_TOKEN=…" if code else "")
            return SourceError(f"{self.where}: no such repository or revision", where=page, hint=hint)
        if code == "RevisionNotFound":
            return SourceError(
                f"{self.where}: no such repository or revision: {repo} has none of that name",
                where=page,
                hint="give a branch, a tag or a commit that its page lists",
            )
        causes = {401: "needs a token (HF_TOKEN)", 403: "access denied"}
        return SourceError(
            f"{self.where}: {causes.get(status, f'the hub answered {status}')}",
            hint="go online, or give a local folder: SOURCE=path/to/checkpoint",
        )

"""Hugging Face Hub, through its own client; ``HF_ENDPOINT`` moves it, as it moves the client.

Large files go by LFS over HTTP and not by Xet: its objects are named by their SHA-256, which we know already, so the
hub says what it has, compares what it gets, and nothing that was not verified can take a file's place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

from pydantic import SecretStr

from qwen_onnx.errors import PublishError
from qwen_onnx.publish.addresses import HubAddress
from qwen_onnx.publish.bundle import Bundle, CheckedFile, Item
from qwen_onnx.publish.credentials import HF_TOKEN, missing
from qwen_onnx.publish.faults import FAULTS
from qwen_onnx.publish.hubs import HubReader, is_same, obsolete_files, require_same, status_fault, unreachable
from qwen_onnx.publish.receipt import Receipt
from qwen_onnx.sources.hub import endpoint_of
from qwen_onnx.sources.remote import MOST_FILES, RemoteFile
from qwen_onnx.sources.transfer import Progress, teller
from qwen_onnx.sources.web import secret

# the hub writes it into every repository
OWN = (".gitattributes",)
MAIN = "main"


def send_to_huggingface(bundle: Bundle, address: HubAddress, progress: Progress, *, private: bool) -> Receipt:
    """Publish a package by one commit; until then readers see the old one.

    Args:
        private: make the repository private when it is made now.

    Raises:
        PublishError: no token, the hub refuses or cannot be reached, or the repository holds somebody else's files.
    """
    where, token = str(address), secret(HF_TOKEN, FAULTS)
    if not token:
        raise missing(HF_TOKEN, where)
    revision = address.revision or MAIN
    with ExitStack() as stack, _faults(where):
        api = _api(token)
        api.create_repo(address.repository, private=private or None, exist_ok=True)
        if revision != MAIN:
            api.create_branch(address.repository, branch=revision, exist_ok=True)
        parent = api.repo_info(address.repository, revision=revision).sha
        source = stack.enter_context(HuggingFaceSource(address, parent))
        before = {file.name: file for file in source.listing()}
        obsolete = obsolete_files(source, before, bundle, where)
        sending = _Sending(progress)
        files = [stack.enter_context(sending.open(item)) for item in bundle.items]
        commit = sending.commit(
            api, address.repository, list(zip(bundle.items, files, strict=True)), obsolete, revision, parent
        )
        after = stack.enter_context(HuggingFaceSource(address, commit))
        stored = {file.name: file for file in after.listing()}
        require_same(bundle, stored, where)
    small = [item for item in bundle.items if not stored[item.name].sha256 and not is_same(item, before.get(item.name))]
    sent = sending.bytes + sum(item.size for item in small)
    return Receipt(bundle.digest, where, sent, bundle.size - sent, revision=commit)


class _Sending:
    """The upload of large files, and the commit that makes them visible with the small ones.

    ``bytes`` counts what was read for the upload of large files; files that the hub has are not read.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress, self._counting, self.bytes = progress, False, 0

    def open(self, item: Item) -> CheckedFile:
        """A file that counts while it is uploaded."""
        tell = teller(item.name, item.size, self._progress)

        def sent(count: int) -> None:
            if self._counting:
                self.bytes += count
                tell(count)

        return CheckedFile(item, sent)

    def commit(
        self,
        api: Any,
        repository: str,
        files: list[tuple[Item, CheckedFile]],
        obsolete: list[str],
        revision: str,
        parent: str,
    ) -> str:
        """Upload and commit; returns the commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = [CommitOperationAdd(item.name, file) for item, file in files]
        self._progress("sending what the hub does not have")
        self._counting = True
        api.preupload_lfs_files(repository, additions, revision=revision, free_memory=False)
        self._counting = False
        deletions = [CommitOperationDelete(name, is_folder=False) for name in obsolete]
        self._progress("committing")
        done = api.create_commit(
            repository,
            [*additions, *deletions],
            commit_message="Publish a verified package of qwen-onnx",
            revision=revision,
            parent_commit=parent,
        )
        oid: str = done.oid
        return oid


def _api(token: SecretStr | None) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, logging

    # its bars and warnings would stand between our lines, and it reads HF_ENDPOINT once, when it is imported
    disable_progress_bars()
    logging.set_verbosity_error()
    own = token.get_secret_value() if token else False
    return HfApi(endpoint_of("huggingface", FAULTS), token=own, library_name="qwen-onnx")


@contextmanager
def _faults(where: str) -> Iterator[None]:
    """Errors of the client as PublishError; their own text and their requests, which hold the token, are cut off."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except PublishError:
        raise
    except HFValidationError:
        raise PublishError("not the name of a repository", where=where, hint="hf://ORG/NAME") from None
    except (HfHubHTTPError, httpx2.HTTPError, RuntimeError, ValueError, LookupError) as error:
        raise _fault(error, where) from None


def _fault(error: BaseException, where: str) -> PublishError:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, PublishError):
        return error
    if isinstance(error, HfHubHTTPError):
        return status_fault(error.response.status_code, HF_TOKEN, where)
    if isinstance(error, httpx2.TransportError):
        return unreachable(error, "HF_ENDPOINT", where)
    # the client wraps what went wrong with one file
    if error.__cause__:
        return _fault(error.__cause__, where)
    return PublishError(f"the hub's answer makes no sense ({type(error).__name__})", where=where)


class HuggingFaceSource(HubReader):
    """A revision of a repository, pinned to its commit when it is first read."""

    def __init__(self, address: HubAddress, commit: str | None = None) -> None:
        super().__init__(address, secret(HF_TOKEN, FAULTS), endpoint_of("huggingface", FAULTS))
        self._commit = commit

    def listing(self) -> list[RemoteFile]:
        """The repository's files with the hub's digests; the hub's own files are left out."""
        from huggingface_hub import RepoFile, hf_hub_url

        repository, endpoint = self._address.repository, endpoint_of("huggingface", FAULTS)
        with _faults(self._where):
            api = _api(self._token)
            if self._commit is None:
                self._commit = api.repo_info(repository, revision=self._address.revision or MAIN).sha
            found = []
            # the client turns pages for as long as the hub has some
            for item in islice(api.list_repo_tree(repository, recursive=True, revision=self._commit), 2 * MOST_FILES):
                if isinstance(item, RepoFile) and item.path not in OWN:
                    url = hf_hub_url(repository, item.path, revision=self._commit, endpoint=endpoint)
                    sha256 = item.lfs.sha256 if item.lfs else None
                    found.append(RemoteFile(item.path, item.size, sha256, None if sha256 else item.blob_id, url))
        return found

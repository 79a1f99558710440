"""What a repository or a folder says of its model before any weights are fetched: names of files, and the small ones.

A row of a model that no recipe describes is made of this alone, so that a plan costs a few requests. What a hub said
of a commit is kept: it cannot change.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from qwen_onnx.bounded import read_bytes, read_record
from qwen_onnx.catalog.reference import HubName, folder_name
from qwen_onnx.catalog.sources import FolderSource, HubSource
from qwen_onnx.errors import SourceError
from qwen_onnx.files import write_private
from qwen_onnx.records import Record
from qwen_onnx.sources.hub import HubReader
from qwen_onnx.sources.plain import require_plain
from qwen_onnx.sources.remote import CHECKPOINT_FAULTS, MOST_FILES, require_safe
from qwen_onnx.sources.transfer import Progress

CONFIG, ADAPTER, TOKENIZER_CONFIG, TEMPLATE, CARD = (
    "config.json",
    "adapter_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
)
SMALL = (CONFIG, ADAPTER, TOKENIZER_CONFIG, TEMPLATE, CARD)
# bytes of one of them, and of what is kept of all; the largest tokenizer_config.json of Qwen has 12 kB
LARGEST_SMALL, LARGEST_FACTS = 4 << 20, 64 << 20
MAIN = {"huggingface": "main", "modelscope": "master"}


class Facts(Record):
    """What is known of a checkpoint.

    Attributes:
        source: the repository at the commit that was found, or the folder by its name.
        where: what messages call it.
        names: files at its top.
        texts: content of the small files that it has.
    """

    where: str
    source: HubSource | FolderSource = Field(discriminator="kind")
    names: tuple[str, ...] = Field(max_length=MOST_FILES)
    texts: dict[str, str]


def of_folder(folder: Path) -> Facts:
    """The facts of a local checkpoint.

    Raises:
        SourceError: there is no such folder, or it holds something other than plain files.
    """
    if folder.is_file():
        hint = f"qwen-onnx optimize MODEL --source {folder}, if it holds the weights of a MODEL of `qwen-onnx list`"
        raise SourceError("a file, not a checkpoint folder", where=str(folder), hint=hint)
    if not folder.is_dir():
        raise SourceError("there is no such folder", where=str(folder), hint="give a folder with config.json")
    require_plain(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if len(names) > MOST_FILES:
        raise SourceError(f"more than {MOST_FILES:,} files", where=str(folder), hint="give a checkpoint folder")
    texts = {
        # links were looked at: what is left leads to a file of the same checkpoint
        name: _text(name, read_bytes((folder / name).resolve(), most_bytes=LARGEST_SMALL, error=SourceError))
        for name in SMALL
        if name in names
    }
    source = FolderSource(kind="folder", name=folder_name(folder))
    return Facts(where=str(folder), source=source, names=tuple(names), texts=texts)


def of_hub(name: HubName, cache: Path, progress: Progress) -> Facts:
    """The facts of a repository, at the commit that its revision is now.

    Raises:
        SourceError: not reachable, no such repository or revision, gated, or a listing that cannot be trusted.
        ChecksumError: a file is not what was announced.
    """
    source = HubSource(kind=name.kind, repo=name.repo, revision=_revision(name, progress))  # type: ignore[arg-type]
    kept = cache / "facts" / f"{source.kind}--{source.repo.replace('/', '--')}--{source.revision}.json"
    if kept.exists():
        return read_record(kept, Facts, most_bytes=LARGEST_FACTS, error=SourceError, hint=f"rm {kept}")
    with HubReader(source) as reader:
        files = reader.files()
        small = require_safe([file for file in files if file.name in SMALL], reader.where, CHECKPOINT_FAULTS, bare=True)
        texts = {file.name: _text(file.name, reader.small(file, LARGEST_SMALL)) for file in small}
    names = tuple(sorted(file.name[:255] for file in files[:MOST_FILES]))
    where = str(HubName(source.kind, source.repo, source.revision))
    facts = Facts(where=where, source=source, names=names, texts=texts)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_private(kept, facts.model_dump_json(indent=1))
    return facts


def _revision(name: HubName, progress: Progress) -> str:
    if name.commit:
        return name.commit
    asked = HubName(name.kind, name.repo, name.revision or MAIN[name.kind])
    with HubReader(asked) as reader:
        found = reader.commit()
    progress(f"{asked} is commit {found}")
    return found


def _text(name: str, body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{name} is not UTF-8: byte {error.start} is wrong", hint="use another copy") from error

"""What a user calls a model: a recipe's id, a repository of a hub, or a checkpoint folder.

Only text is looked at here, and whether a folder exists; nothing is asked of a hub.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qwen_onnx.catalog.load import Catalog
from qwen_onnx.catalog.schema import Row
from qwen_onnx.catalog.sources import HubSource
from qwen_onnx.errors import ConfigError
from qwen_onnx.records import COMMIT, REPOSITORY, digest_of

HUBS = {"huggingface": "huggingface", "hf": "huggingface", "modelscope": "modelscope", "ms": "modelscope"}
NAMED = re.compile(rf"(?:({'|'.join(HUBS)}):)?({REPOSITORY})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")
FORMS = "give an id of `qwen-onnx list`, ORG/NAME[@REVISION], modelscope:ORG/NAME or ./FOLDER"
# characters of an id
LONGEST = 120
# of the folders that Hugging Face's cache is made of
SNAPSHOTS, REPOSITORIES = "snapshots", "models--"


@dataclass(frozen=True)
class HubName:
    """A repository as it was asked for: ``revision`` is a branch, a tag or a commit; None: the hub's main branch."""

    kind: str
    repo: str
    revision: str | None

    def __str__(self) -> str:
        hub = "" if self.kind == "huggingface" else f"{self.kind}:"
        return f"{hub}{self.repo}" + (f"@{self.revision}" if self.revision else "")

    @property
    def commit(self) -> str | None:
        """The revision, when it names one state for ever."""
        return self.revision if self.revision and re.fullmatch(COMMIT, self.revision) else None


def parse(text: str) -> str | HubName | Path:
    """A recipe's id, a repository, or a folder, which begins with ``./``, ``../``, ``~`` or ``/``.

    Raises:
        ConfigError: it is none of them, or could be two.
    """
    if text in (".", "..", "~") or text.startswith(("./", "../", "/", "~/")):
        return Path(text).expanduser()
    found = NAMED.fullmatch(text)
    if found is None:
        if "/" in text or ":" in text or "@" in text:
            raise ConfigError([f"{text[:200]!r} names no model"], hint=FORMS)
        return text
    if not found[1] and Path(text).is_dir():
        raise ConfigError(
            [f"{text} is a folder here, and could be a repository of a hub"],
            hint=f"./{text} for the folder, huggingface:{text} for the hub",
        )
    return HubName(HUBS[found[1] or "huggingface"], found[2], found[3])


def row_of(catalog: Catalog, name: HubName) -> Row | None:
    """The row that builds this repository at this revision; without a revision, that which the row pins."""
    for _, row in catalog.rows.values():
        for source in row.sources:
            same = isinstance(source, HubSource) and source.repo.lower() == name.repo.lower()
            if same and source.kind == name.kind and name.revision in (None, source.revision):  # type: ignore[union-attr]
                return row
    return None


def folder_name(path: Path) -> str:
    """The last part of a path; of Hugging Face's cache the repository, since the last part there is a commit."""
    whole = path.expanduser().resolve()
    if whole.parent.name == SNAPSHOTS and whole.parent.parent.name.startswith(REPOSITORIES):
        return whole.parent.parent.name.removeprefix(REPOSITORIES)
    return whole.name


def id_of(catalog: Catalog, asked: str | HubName | Path) -> str:
    """The id by which artifacts of this model are stored: one safe name, and never that of another model's row.

    Raises:
        ConfigError: a folder has a name of which nothing is left.
    """
    if isinstance(asked, str):
        return asked
    if isinstance(asked, HubName):
        row = row_of(catalog, asked)
        return row.id if row else _safe(f"{asked.repo}--{asked.revision}" if asked.revision else asked.repo)
    made = _safe(folder_name(asked))
    if not made:
        raise ConfigError([f"{asked}: a model cannot be named after this folder"], hint="rename the folder")
    # a folder called qwen3-4b need not hold Qwen's own weights
    return f"local--{made}" if made in catalog.rows else made


def _safe(text: str) -> str:
    """As ``records.Name`` wants it, and as short as a file system does."""
    made = re.sub(r"[^a-z0-9._-]+", "-", text.lower().replace("/", "--")).lstrip("._-")
    return made if len(made) <= LONGEST else f"{made[: LONGEST - 9]}-{digest_of(text)[:8]}"

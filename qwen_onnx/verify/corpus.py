"""Texts for verification in eight domains: of the running Python, of mpmath, and of our own.

Nothing is downloaded. The quantiser calibrates on other files (``export.calibration``): verification has
``EVALUATION_SOURCES``, the topics of odd rank, mpmath's documentation and ``texts/``. A test compares them.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources, util
from itertools import islice, zip_longest
from pathlib import Path

from qwen_onnx.errors import VerificationError

CODE_MODULES = ("argparse", "http.client", "tarfile", "statistics", "difflib", "inspect", "configparser", "ipaddress")
DOCUMENTED_MODULES = ("optparse", "_pydecimal", "pickletools", "subprocess", "typing", "zipfile", "doctest", "random")
CHAT_MODULES = ("shutil", "textwrap", "posixpath", "tempfile", "calendar", "bisect", "heapq", "functools", "string")
EVALUATION_SOURCES = (*CODE_MODULES, *DOCUMENTED_MODULES, *CHAT_MODULES)
"""Standard-library modules whose text is used here and therefore never for calibration."""
REFERENCES = 10  # topics, and functions of mpmath: the longest
SENTENCE_END = re.compile(r"(?<=[.!?।؟])\s+|(?<=[。！？])")
SPEAKERS = {"User": "user", "Assistant": "assistant"}

Message = Mapping[str, str]
RenderChat = Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class Document:
    """One text of a domain; ``source`` names where it comes from."""

    source: str
    text: str

    @property
    def sha256(self) -> str:
        """Digest of the text's UTF-8 bytes."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Window:
    """Token ids of one stretch of text, at most ``VerifyOptions.window`` of them."""

    domain: str
    source: str
    ids: tuple[int, ...]


def module_source(name: str) -> str:
    """Python source of a standard-library module, without running the module.

    Raises:
        VerificationError: this Python was installed without sources.
    """
    # not find_spec: it gives no file for the frozen modules of 3.11 and newer
    path = Path(sysconfig.get_path("stdlib"), *name.split(".")).with_suffix(".py")
    if not path.is_file():
        raise VerificationError(
            f"The source of the standard library's module {name} is missing, and verification reads it.",
            where=str(path),
            hint="run with a CPython that has its .py files",
        )
    return path.read_text(encoding="utf-8")


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of the public functions and classes in ``source``, in order."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            text = ast.get_docstring(node)
            if text:
                yield node.name, text


def topics() -> dict[str, str]:
    """Sections of Python's language reference with odd rank in alphabetical order."""
    from pydoc_data.topics import topics as every

    return {name: every[name] for name in sorted(every)[1::2]}


def _longest(texts: Mapping[str, str], where: str) -> list[Document]:
    long_first = sorted(texts.items(), key=lambda item: (-len(item[1]), item[0]))
    return [Document(f"{where}:{name}", text) for name, text in long_first[:REFERENCES]]


def _documentation() -> list[Document]:
    return [
        Document(
            f"{name} (docstrings)", "\n\n".join(f"{item}: {text}" for item, text in docstrings(module_source(name)))
        )
        for name in DOCUMENTED_MODULES
    ]


def _code() -> list[Document]:
    return [Document(f"{name} (source)", module_source(name)) for name in CODE_MODULES]


def functions() -> dict[str, str]:
    """What mpmath says of the functions of mathematics, with formulas and worked examples; no code of it is run.

    Raises:
        VerificationError: it is not installed.
    """
    package = util.find_spec("mpmath")
    if package is None or package.origin is None:
        raise VerificationError(
            "mpmath is missing, and verification reads its documentation.",
            where="this Python's packages",
            hint="pip install 'qwen-onnx[export]' (mpmath comes with torch)",
        )
    tree = ast.parse(Path(package.origin).with_name("function_docs.py").read_text(encoding="utf-8"))
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def own_text(name: str) -> str:
    """A file of ``texts/``, written for this project."""
    return resources.files("qwen_onnx.verify").joinpath("texts", f"{name}.txt").read_text(encoding="utf-8")


def _own(name: str) -> list[Document]:
    return [Document(f"texts/{name}.txt", own_text(name))]


def conversations() -> list[list[Message]]:
    """The conversations of ``texts/dialogue.txt``: one paragraph each, one line a turn."""
    found: list[list[Message]] = []
    for paragraph in own_text("dialogue").strip().split("\n\n"):
        turns = (line.partition(": ") for line in paragraph.splitlines())
        found.append([{"role": SPEAKERS[speaker], "content": said} for speaker, _, said in turns])
    return found


def _questions(name: str) -> list[Message]:
    turns: list[Message] = []
    for item, text in docstrings(module_source(name)):
        turns += [
            {"role": "user", "content": f"What does `{item}` in Python's module {name.lstrip('_')} do?"},
            {"role": "assistant", "content": text},
        ]
    return turns


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as plain text, for checkpoints without a chat template."""
    names = {role: name for name, role in SPEAKERS.items()}
    return "".join(f"{names[message['role']]}: {message['content']}\n\n" for message in messages)


def _dialogue(render: RenderChat) -> list[Document]:
    everyday = conversations()
    halves = [Document(f"texts/dialogue.txt ({n + 1} of 2)", "".join(map(render, everyday[n::2]))) for n in range(2)]
    return halves + [Document(f"{name} (questions)", render(_questions(name))) for name in CHAT_MODULES]


def languages() -> list[list[str]]:
    """The sentences of each paragraph of ``texts/multilingual.txt``, whose languages follow each other."""
    paragraphs = own_text("multilingual").strip().split("\n\n")
    return [[sentence for sentence in SENTENCE_END.split(paragraph) if sentence] for paragraph in paragraphs]


def _multilingual() -> list[Document]:
    """One sentence of every paragraph in turn: the first windows of the documents hold more than ten languages."""
    rounds = list(zip_longest(*languages(), fillvalue=""))
    step = len(rounds[0]) // 3
    turned = [sentences[n * step :] + sentences[: n * step] for n, sentences in enumerate(rounds)]
    return [
        Document(f"texts/multilingual.txt ({n})", "\n".join(filter(None, sentences)))
        for n, sentences in enumerate(turned, 1)
    ]


def domains(render_chat: RenderChat | None) -> dict[str, list[Document]]:
    """The evaluation texts by domain; ``render_chat`` applies the checkpoint's chat template, if it has one."""
    return {
        "code": _code(),
        "reference": _longest(topics(), "pydoc_data.topics"),
        "docstrings": _documentation(),
        "dialogue": _dialogue(render_chat or transcript),
        "mathematics": _longest(functions(), "mpmath.function_docs"),
        "facts": _own("facts"),
        "prose": _own("prose"),
        "multilingual": _multilingual(),
    }


def _windows_of(domain: str, document: Document, ids: Sequence[int], size: int) -> Iterator[Window]:
    for start in range(0, max(len(ids) - size, 0) + 1, size):
        yield Window(domain, document.source, tuple(ids[start : start + size]))


def windows(domain: str, documents: Sequence[Document], encode: Callable[[str], list[int]], size: int) -> list[Window]:
    """Every window of a domain: the first of each document, then the second of each, and so on.

    A document shorter than ``size`` tokens counts only when no document is longer.
    """
    rows = [list(_windows_of(domain, doc, encode(doc.text), size)) for doc in documents]
    mixed = [window for turn in zip_longest(*rows) for window in turn if window is not None]
    full = [window for window in mixed if len(window.ids) == size]
    return full or [window for window in mixed if len(window.ids) >= 2]


def take(pool: Sequence[Window], start: int, stop: int) -> list[Window]:
    """Windows ``start`` to ``stop`` of a domain's pool, fewer when the text ends."""
    return list(islice(pool, start, stop))

"""What a package folder holds, read when a rule or a check asks for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from qwen_onnx.artifact.checksums import sums_of
from qwen_onnx.artifact.draft_head import DRAFT_HEAD, has_draft_head
from qwen_onnx.artifact.genai_config import GENAI_CONFIG, GenaiConfig, Search
from qwen_onnx.artifact.manifest import Manifest, read_manifest
from qwen_onnx.bounded import read_bytes, read_object
from qwen_onnx.errors import EnvironmentFault, PackageError, QwenOnnxError
from qwen_onnx.package.provenance import Statement, read_statement
from qwen_onnx.package.records import PackageRecord, read_package
from qwen_onnx.runtime.processing.template import TEMPLATE_FILE, TOKENIZER_CONFIG, ChatTemplate
from qwen_onnx.runtime.processing.tokenizer import TextTokenizer

SIDECAR = "foundry_local.json"
INFERENCE = "inference_model.json"
# where Foundry's prompt template takes the user's text
CONTENT = "{Content}"
EXTERNAL = 1  # onnx.TensorProto.DataLocation.EXTERNAL
ROPE_CACHE = "cos_cache"
CONTEXT_NODE, CONTEXT_FILE = "EPContext", "ep_cache_context"
# of a document, of a chat template, and of a graph without its weights: more is not what protobuf takes
MOST_BYTES, MOST_TEMPLATE, MOST_GRAPH = 4 << 20, 1 << 20, (1 << 31) - 1


Found = TypeVar("Found")


class Unreadable(PackageError):
    """A file that others are read by is missing or damaged; the rule ``readable`` tells it."""


class Contents:
    """A view of ``path``, each part read once; every property raises ``Unreadable`` when its file cannot be read.

    Args:
        expect: SHA-256 that its ``SHA256SUMS`` should have.
    """

    def __init__(self, path: Path, expect: str | None = None) -> None:
        self.path, self.expect = path, expect

    def document(self, name: str) -> dict[str, Any]:
        """A JSON object."""
        return read_object(self.path / name, most_bytes=MOST_BYTES, error=Unreadable)

    @cached_property
    def record(self) -> PackageRecord:
        """``package.json``."""
        return _readable(lambda: read_package(self.path).record)

    @cached_property
    def manifest(self) -> Manifest:
        """``manifest.json`` of the artifact; its ``files`` may be more than the package has."""
        return _readable(lambda: read_manifest(self.path))

    @cached_property
    def statement(self) -> Statement:
        """``provenance.intoto.json``."""
        return _readable(lambda: read_statement(self.path))

    @cached_property
    def files(self) -> dict[str, str]:
        """SHA-256 by name of every file but ``SHA256SUMS``."""
        return _readable(lambda: sums_of(self.path))

    @cached_property
    def genai(self) -> GenaiConfig:
        """``genai_config.json``."""
        return GenaiConfig.read(self.path, Unreadable)

    @property
    def search(self) -> Search:
        """Its defaults of generation, without which Foundry Local does not load a model."""
        if self.genai.search is None:
            raise Unreadable(f"{GENAI_CONFIG} lacks search", where=str(self.path))
        return self.genai.search

    @cached_property
    def sidecar(self) -> dict[str, Any]:
        """``foundry_local.json``: model_id, string_properties, int_properties."""
        found = self.document(SIDECAR)
        kinds = {"model_id": str, "string_properties": dict, "int_properties": dict}
        if found.keys() != kinds.keys() or not all(isinstance(found[key], kind) for key, kind in kinds.items()):
            raise Unreadable(f"{SIDECAR} must hold {', '.join(kinds)}", where=str(self.path))
        return found

    @property
    def strings(self) -> dict[str, Any]:
        """String properties for Foundry."""
        found: dict[str, Any] = self.sidecar["string_properties"]
        return found

    @property
    def ints(self) -> dict[str, Any]:
        """Integer properties for Foundry."""
        found: dict[str, Any] = self.sidecar["int_properties"]
        return found

    @cached_property
    def inference(self) -> dict[str, Any]:
        """``inference_model.json``: what the older Foundry Local reads."""
        return self.document(INFERENCE)

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """``tokenizer_config.json``."""
        return self.document(TOKENIZER_CONFIG)

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """``tokenizer.json``."""
        return _readable(lambda: TextTokenizer(self.path))

    @cached_property
    def templates(self) -> list[str]:
        """Sources of the chat templates, each once: none, one, or two that contradict each other."""
        found = [self.tokenizer_config.get("chat_template")]
        separate = self.path / TEMPLATE_FILE
        if os.path.lexists(separate):
            try:
                text = read_bytes(separate, most_bytes=MOST_TEMPLATE, error=Unreadable).decode("utf-8")
            except UnicodeDecodeError as error:
                raise Unreadable(f"{TEMPLATE_FILE} is not UTF-8: {error}", where=str(self.path)) from error
            found.append(text)
        return list(
            dict.fromkeys(source if isinstance(source, str) else json.dumps(source) for source in found if source)
        )

    @cached_property
    def user_prompt(self) -> str:
        """The chat template with one user's message that reads ``{Content}``.

        Raises:
            QwenOnnxError: there is no template, or it refuses that message.
        """
        return ChatTemplate(self.path).render([{"role": "user", "content": CONTENT}])

    @cached_property
    def graph(self) -> Any:
        """The graph in the ONNX file that ``genai_config.json`` names."""
        return self.model.graph

    @cached_property
    def model(self) -> Any:
        """That file, without its external data."""
        return self._loaded(self.genai.graph_file)

    def _loaded(self, name: str) -> Any:
        """An ONNX file without its external data."""
        try:
            import onnx
            from google.protobuf.message import DecodeError
        except ImportError as error:
            raise EnvironmentFault("onnx is not installed", hint="pip install 'qwen-onnx[export]'") from error
        body = read_bytes(self.path / name, most_bytes=MOST_GRAPH, error=Unreadable)
        try:
            return onnx.load_model_from_string(body)
        except DecodeError as error:
            raise Unreadable(f"{name} cannot be read: {error}", where=str(self.path)) from error

    @cached_property
    def external(self) -> dict[str, int]:
        """Bytes that the graphs read from each file beside them, by the name as it stands in the graph."""
        ends: dict[str, int] = {}
        for name in self.graph_files:
            try:
                found = _read_by(self.model if name == self.genai.graph_file else self._loaded(name))
            # an offset that is not a number, a name that is not UTF-8
            except ValueError as error:
                raise Unreadable(f"{name} is damaged: {error}", where=str(self.path)) from error
            ends |= {file: max(end, ends.get(file, 0)) for file, end in found.items()}
        return ends

    @property
    def sees(self) -> bool:
        """Whether it has a vision encoder."""
        return self.genai.model.vision is not None

    @property
    def graph_files(self) -> list[str]:
        """The decoder's ONNX file, those of encoder and embedding, and that of a head which guesses tokens."""
        found = [name for name in self.genai.files if name.endswith(".onnx")]
        return [*found, DRAFT_HEAD] if has_draft_head(self.path) else found

    @cached_property
    def model_files(self) -> list[str]:
        """The ONNX files and what they read."""
        return [*self.graph_files, *self.external]

    @cached_property
    def rope_rows(self) -> int | None:
        """Positions that the cache of rotary embeddings in the graph holds; None when it has no such cache."""
        caches = [tensor for tensor in self.graph.initializer if tensor.name.endswith(ROPE_CACHE)]
        rows = [tensor.dims[0] for tensor in caches if tensor.dims]
        return min(rows, default=None)


def _readable(read: Callable[[], Found]) -> Found:
    """What ``read`` gives; a deliberate error becomes ``Unreadable``."""
    try:
        return read()
    except QwenOnnxError as error:
        raise Unreadable(error.what, where=error.where) from error


def _read_by(model: Any) -> dict[str, int]:
    """See ``Contents.external``."""
    ends: dict[str, int] = {}
    for part in _parts(model):
        kind = part.DESCRIPTOR.name
        if kind == "TensorProto" and (part.data_location == EXTERNAL or part.external_data):
            entry = {item.key: item.value for item in part.external_data}
            end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
            name = entry.get("location", "")
            ends[name] = max(end, ends.get(name, 0))
        elif kind == "NodeProto" and part.op_type == CONTEXT_NODE:
            named = [a.s.decode() for a in part.attribute if a.name == CONTEXT_FILE]
            # an IR of OpenVINO is two files, of which the graph names the first
            pairs = [name for xml in named for name in (xml, xml.removesuffix(".xml") + ".bin")]
            ends.update(dict.fromkeys(pairs if any(".xml" in name for name in named) else named, 0))
    return ends


def _parts(message: Any) -> Iterator[Any]:
    """A protobuf message and every message inside: graphs of nodes, functions and sparse tensors too."""
    waiting = [message]
    while waiting:
        part = waiting.pop()
        yield part
        for field, value in part.ListFields():
            if field.message_type is not None:
                waiting += [value] if hasattr(value, "DESCRIPTOR") else value

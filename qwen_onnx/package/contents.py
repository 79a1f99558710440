"""What a package folder holds, read when a rule asks for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwen_onnx.artifact.manifest import MANIFEST, Manifest
from qwen_onnx.errors import ArtifactError, EnvironmentFault, PackageError
from qwen_onnx.package.records import PackageRecord, read_package
from qwen_onnx.runtime.processing.template import TEMPLATE_FILE, TOKENIZER_CONFIG, ChatTemplate
from qwen_onnx.runtime.processing.tokenizer import TextTokenizer

GENAI_CONFIG = "genai_config.json"
SIDECAR = "foundry_local.json"
INFERENCE = "inference_model.json"
# where Foundry's prompt template takes the user's text
CONTENT = "{Content}"
EXTERNAL = 1  # onnx.TensorProto.DataLocation.EXTERNAL
ROPE_CACHE = "cos_cache"
CONTEXT_NODE, CONTEXT_FILE = "EPContext", "ep_cache_context"


class Unreadable(PackageError):
    """A file that others are read by is missing or damaged; the rule ``readable`` tells it."""


class Contents:
    """A view of ``path``; every property raises ``Unreadable`` when its file cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def document(self, name: str) -> dict[str, Any]:
        """A JSON object."""
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Unreadable(f"{name} cannot be read: {error}", where=str(self.path)) from error
        if not isinstance(found, dict):
            raise Unreadable(f"{name} is not an object", where=str(self.path))
        return found

    @cached_property
    def record(self) -> PackageRecord:
        """``package.json``."""
        try:
            return read_package(self.path).record
        except PackageError as error:
            raise Unreadable(error.what, where=error.where) from error

    @cached_property
    def manifest(self) -> Manifest:
        """``manifest.json`` of the artifact; its ``files`` may be more than the package has."""
        try:
            return Manifest.model_validate_json((self.path / MANIFEST).read_bytes())
        except (OSError, ValidationError) as error:
            raise Unreadable(f"{MANIFEST} cannot be read: {error}", where=str(self.path)) from error

    @cached_property
    def genai(self) -> dict[str, Any]:
        """``genai_config.json`` with the keys that every model has."""
        found = self.document(GENAI_CONFIG)
        try:
            _ = found["model"]["context_length"] + found["model"]["vocab_size"] + found["search"]["max_length"]
            _ = found["model"]["eos_token_id"], found["model"]["decoder"]["filename"] + ""
            _ = [dict(entry) for entry in found["model"]["decoder"]["session_options"]["provider_options"]]
        except (KeyError, TypeError, ValueError) as error:
            raise Unreadable(f"{GENAI_CONFIG} lacks a key: {error}", where=str(self.path)) from error
        return found

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
        try:
            return TextTokenizer(self.path)
        except ArtifactError as error:
            raise Unreadable(error.what, where=error.where) from error

    @cached_property
    def templates(self) -> list[str]:
        """Sources of the chat templates, each once: none, one, or two that contradict each other."""
        found = [self.tokenizer_config.get("chat_template")]
        separate = self.path / TEMPLATE_FILE
        try:
            found.append(separate.read_text(encoding="utf-8") if separate.exists() else None)
        except (OSError, UnicodeDecodeError) as error:
            raise Unreadable(f"{TEMPLATE_FILE} cannot be read: {error}", where=str(self.path)) from error
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
        """The ONNX file that ``genai_config.json`` names, without its external data."""
        try:
            import onnx
            from google.protobuf.message import DecodeError
        except ImportError as error:
            raise EnvironmentFault("onnx is not installed", hint="pip install 'qwen-onnx[export]'") from error
        name = self.genai["model"]["decoder"]["filename"]
        try:
            return onnx.load(str(self.path / name), load_external_data=False).graph
        except (OSError, DecodeError) as error:
            raise Unreadable(f"{name} cannot be read: {error}", where=str(self.path)) from error

    @cached_property
    def external(self) -> dict[str, int]:
        """Bytes that the graph reads from each file beside it, by the name as it stands in the graph."""
        ends: dict[str, int] = {}
        for tensor in _tensors(self.graph):
            if tensor.data_location == EXTERNAL:
                entry = {item.key: item.value for item in tensor.external_data}
                end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
                name = entry.get("location", "")
                ends[name] = max(end, ends.get(name, 0))
        for node in self.graph.node:
            named = [a.s.decode() for a in node.attribute if a.name == CONTEXT_FILE and node.op_type == CONTEXT_NODE]
            # an IR of OpenVINO is two files, of which the graph names the first
            pairs = [name for xml in named for name in (xml, xml.removesuffix(".xml") + ".bin")]
            ends.update(dict.fromkeys(pairs if any(".xml" in name for name in named) else named, 0))
        return ends

    @cached_property
    def model_files(self) -> list[str]:
        """The ONNX file and what it reads."""
        return [self.genai["model"]["decoder"]["filename"], *self.external]

    @cached_property
    def rope_rows(self) -> int | None:
        """Positions that the cache of rotary embeddings in the graph holds; None when it has no such cache."""
        rows = [tensor.dims[0] for tensor in self.graph.initializer if tensor.name.endswith(ROPE_CACHE)]
        return min(rows, default=None)


def _tensors(graph: Any) -> Iterator[Any]:
    """Every constant of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)


def token_ids(value: Any) -> list[Any]:
    """A token id of ``genai_config.json``, which may be a list, as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]

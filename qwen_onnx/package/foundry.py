"""What Foundry Local reads of a package: its id, its configuration, its metadata.

Keys and values are those of foundry-local-sdk 2.2 (``foundry_local_c.h``, FOUNDRY_LOCAL_MODEL_PROP_*) and, for the
profile ``cli1``, of the drop-in folders that its command line read before 2.1.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from qwen_onnx.artifact.genai_config import GENAI_CONFIG
from qwen_onnx.package.contents import CONTENT, INFERENCE, SIDECAR, Contents
from qwen_onnx.package.devices import DEVICES
from qwen_onnx.package.records import PackageRecord
from qwen_onnx.runtime.processing.template import TEMPLATE_FILE, TOKENIZER_CONFIG, ChatTemplate

# pairs of markers by the property that names them, and the keys of genai_config.json that hold their ids
TOOL_MARKERS = ("<tool_call>", "</tool_call>")
REASONING_MARKERS = ("<think>", "</think>")
MARKER_IDS = {
    "tool_call_start": "bot_token_id",
    "tool_call_end": "eot_token_id",
    "reasoning_start": "bor_token_id",
    "reasoning_end": "eor_token_id",
}
# first Foundry Local that takes packages of a profile: register_model() came with 2.1
LEAST_VERSION = {"sdk2": "2.1.0", "cli1": "0.8.0"}
# classes that onnxruntime-genai 0.18 knows, "Fast" behind them or not; with each it goes by tokenizer.json
TOKENIZERS = ("Qwen2Tokenizer", "PreTrainedTokenizer", "TokenizersBackend", "GPT2Tokenizer")
PUBLISHER = "qwen-onnx"
SEES = "vision-language-chat"
# types of genai_config.json for which Foundry Local 2.2 takes pictures; it lacks a mixture's, whose loop is the same
SEEING_TYPES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
TAKEN_AS = {"qwen3_5_moe": "qwen3_5"}
UNVERIFIED = "unverified"


def write_foundry(folder: Path, record: PackageRecord) -> None:
    """Write what Foundry Local needs beside the model's files, and set right what it would trip over.

    ``folder`` holds the artifact's files; ``genai_config.json`` and the tokenizer's are changed, ``foundry_local.json``
    and ``inference_model.json`` are added. What cannot be set right is left for the rules to tell.
    """
    contents = Contents(folder)
    markers = markers_of(contents, record)
    _write(folder / GENAI_CONFIG, _genai_config(contents, record, markers))
    _write_tokenizer_config(contents)
    contents = Contents(folder)
    properties = {
        "model_id": record.id,
        "string_properties": _strings(contents, record, markers),
        "int_properties": _ints(contents, record, markers),
    }
    _write(folder / SIDECAR, properties)
    # as in Microsoft's guide to compiling models: the template with the user's text as {Content}
    template = {"assistant": CONTENT, "prompt": contents.user_prompt} if contents.templates else None
    _write(folder / INFERENCE, {"Name": record.id, "PromptTemplate": template})


def markers_of(contents: Contents, record: PackageRecord) -> dict[str, str]:
    """Markers of tool calls and reasoning by property: single tokens that the chat template writes itself."""
    source = "".join(contents.templates)
    pairs = {"tool_call": TOOL_MARKERS}
    # some templates strip think tags of models that never write any
    if record.kind in ("thinking", "hybrid"):
        pairs["reasoning"] = REASONING_MARKERS
    return {
        f"{name}_{end}": marker
        for name, pair in pairs.items()
        if all(marker in contents.tokenizer.added_tokens and marker in source for marker in pair)
        for end, marker in zip(("start", "end"), pair, strict=True)
    }


def _genai_config(contents: Contents, record: PackageRecord, markers: dict[str, str]) -> dict[str, Any]:
    """Lengths that fit the graph; marker ids for exactly the markers that are declared, none for genai 0.14."""
    longest, search = contents.genai.model.context_length, contents.search
    context = min(longest, contents.manifest.plan.context, contents.rope_rows or longest)
    ids = {key: contents.tokenizer.added_tokens[markers[name]] for name, key in MARKER_IDS.items() if name in markers}
    found = contents.document(GENAI_CONFIG)
    kept = {key: value for key, value in found["model"].items() if key not in MARKER_IDS.values()}
    if contents.sees:
        kept["type"] = TAKEN_AS.get(kept["type"], kept["type"])
    return found | {
        "model": kept | {"context_length": context} | (ids if record.profile == "sdk2" else {}),
        "search": found["search"] | {"max_length": min(search.max_length, context)},
    }


def _write_tokenizer_config(contents: Contents) -> None:
    """Without a template, which Foundry prefers while our runtime takes the file of its own: only that stays.

    With a class that onnxruntime-genai knows: it refuses others, such as transformers' for a Qwen3.5.
    """
    config = dict(contents.tokenizer_config)
    if contents.templates:
        (contents.path / TEMPLATE_FILE).write_text(ChatTemplate(contents.path).source, encoding="utf-8")
        config.pop("chat_template", None)
    if (named := config.get("tokenizer_class")) and not is_known_tokenizer(named):
        config["tokenizer_class"] = TOKENIZERS[0]
    _write(contents.path / TOKENIZER_CONFIG, config)


def is_known_tokenizer(name: object) -> bool:
    """Whether onnxruntime-genai has a tokenizer for that class."""
    return isinstance(name, str) and name.removesuffix("Fast") in TOKENIZERS


def display_name(contents: Contents, record: PackageRecord) -> str:
    """What Foundry's users see; an artifact without a PASS says so."""
    name = f"{contents.manifest.plan.title} ({record.precision}, {record.target})"
    return f"{name}, {UNVERIFIED}" if record.unverified else name


def _strings(contents: Contents, record: PackageRecord, markers: dict[str, str]) -> dict[str, str]:
    device = DEVICES[record.target]
    found = {
        "task": task_of(contents, record),
        "display_name": display_name(contents, record),
        "publisher": PUBLISHER,
        "min_fl_version": LEAST_VERSION[record.profile],
        "capabilities": capabilities_of(markers),
        **modalities_of(contents),
        "execution_provider": device.provider,
        "device_type": device.kind,
        **markers,
    }
    licence = contents.manifest.plan.license
    return found | ({"license": licence} if licence else {})


def _ints(contents: Contents, record: PackageRecord, markers: dict[str, str]) -> dict[str, int]:
    return {
        "supports_tool_calling": int("tool_call_start" in markers),
        "supports_reasoning": int("reasoning_start" in markers),
        "max_output_tokens": most_output(contents.genai.model.context_length, record),
        "filesize_mb": model_megabytes(contents),
    }


def task_of(contents: Contents, record: PackageRecord) -> str:
    """Foundry's task: ``coding`` for what is made for code alone, a task of its own for what sees."""
    if contents.sees:
        return SEES
    return "coding" if record.tasks == ("coding",) else "chat-completion"


def modalities_of(contents: Contents) -> dict[str, str]:
    """What goes in and comes out, in Foundry's words; it takes no videos."""
    return {"input_modalities": "text,image" if contents.sees else "text", "output_modalities": "text"}


def capabilities_of(markers: dict[str, str]) -> str:
    """Foundry's list of what a model can do."""
    more = {"tool_call_start": "tool-calling", "reasoning_start": "reasoning"}
    return ",".join(["chat", *(word for name, word in more.items() if name in markers)])


def most_output(context: int, record: PackageRecord) -> int:
    """Tokens of an answer: a quarter of the context, half of it for models that think first."""
    thinks = record.kind in ("thinking", "hybrid")
    return max(1, min(context // 2, 32768) if thinks else min(context // 4, 8192))


def model_megabytes(contents: Contents) -> int:
    """Size of the ONNX files and their data in MB of 10^6 bytes, rounded up; files that are missing count nothing."""
    paths = [contents.path / name for name in contents.model_files]
    return math.ceil(sum(path.stat().st_size for path in paths if path.is_file()) / 1e6)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

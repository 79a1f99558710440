"""A row for a model that no recipe describes, made of its config.json, its tokenizer's files and its card.

It says what they say and nothing else; limits follow from the number of weights, as they do for a row of a recipe.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from qwen_onnx.bounded import read_object
from qwen_onnx.catalog.architectures import ARCHITECTURES, HEARING, HYBRIDS, QWEN1, SEEING, SENSING, text_config
from qwen_onnx.catalog.load import Catalog
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.catalog.reference import HubName, folder_name, id_of, parse, row_of
from qwen_onnx.catalog.schema import Family, Kind, Row
from qwen_onnx.catalog.sizes import LARGEST_CONFIG, shape_of
from qwen_onnx.catalog.sources import FolderSource, HubSource
from qwen_onnx.catalog.weights import count_weights
from qwen_onnx.errors import SourceError, UnsupportedModelError
from qwen_onnx.sources import facts as told
from qwen_onnx.sources.card import base_of, licence_of
from qwen_onnx.sources.checkpoint import adapter_fault, check_config, rope_type
from qwen_onnx.sources.facts import ADAPTER, CARD, CONFIG, TEMPLATE, TOKENIZER_CONFIG, Facts
from qwen_onnx.sources.fetch import has_recipes_weights
from qwen_onnx.sources.plain import PICKLES
from qwen_onnx.sources.quantized import HINT, quantization_of
from qwen_onnx.sources.split_tokenizer import TEMPLATE_JSON
from qwen_onnx.sources.transfer import Progress
from qwen_onnx.sources.vision_config import PREPROCESSOR

# what sentence-transformers adds to a model that gives vectors
POOLING = "modules.json"
OURS = "genai_config.json"


@dataclass(frozen=True)
class Chosen:
    """What a user asked for.

    Attributes:
        catalog: with a row of its own for a model that has no recipe.
        model: id of its row there.
        folder: where its weights are, when the user gave a folder.
    """

    catalog: Catalog
    model: str
    folder: Path | None = None


def choose(catalog: Catalog, text: str, cache: Path, progress: Progress) -> Chosen:
    """The row of a recipe's id, a repository or a folder; a repository of the catalogue has the catalogue's row.

    Raises:
        ConfigError: ``text`` names no model.
        SourceError: nothing can be known of the repository or folder, or it cannot be built.
    """
    asked = parse(text)
    if isinstance(asked, str):
        return Chosen(catalog, asked)
    if isinstance(asked, HubName) and (row := row_of(catalog, asked)):
        return Chosen(catalog, row.id)
    facts = told.of_hub(asked, cache, progress) if isinstance(asked, HubName) else told.of_folder(asked)
    model = id_of(catalog, asked)
    place = f"{CONFIG} of {facts.where}"
    found = catalog.with_own(place, own_family(catalog, facts, model))
    return Chosen(found, model, None if isinstance(asked, HubName) else asked)


def named_by_weights(plan: Plan, catalog: Catalog, cache: Path, local: Path) -> Plan:
    """The plan of a recipe for the weights in ``local``, a folder or a file; of other weights it has their name.

    What the recipe says of the model itself, such as its licence, is not said of other weights.

    Raises:
        ConfigError: nothing is left of the name.
        SourceError: the folder holds something other than plain files.
    """
    if not local.exists() or has_recipes_weights(plan, cache, local):
        return plan
    place = local.with_suffix("") if local.is_file() else local
    name, texts = folder_name(place), told.of_folder(local).texts if local.is_dir() else {}
    return plan.model_copy(
        update={
            "model": id_of(catalog, place),
            "title": f"{name} by the recipe {plan.model}",
            "license": licence_of(texts.get(CARD, "")),
            "sources": (FolderSource(kind="folder", name=name),),
            "catalogued": False,
        }
    )


def own_family(catalog: Catalog, facts: Facts, model: str) -> Family:
    """A family of one row, ``model``, with what the catalogue sets for its architecture on each target.

    Raises:
        UnsupportedModelError: not a checkpoint that can be built; says of what kind it is, and what to do.
        SourceError: its config.json cannot be read.
    """
    _require_weights(facts)
    if CONFIG not in facts.texts:
        raise SourceError(f"{CONFIG} is missing", where=facts.where, hint="give the folder that the model was saved to")
    text = facts.texts[CONFIG].encode()
    config = read_object(text, most_bytes=LARGEST_CONFIG, error=SourceError, what=CONFIG)
    architecture = _architecture(config, facts, catalog)
    base = base_of(facts.texts.get(CARD, ""))
    instead = f"{HINT}: qwen-onnx optimize {base}" if base else HINT
    quantization = quantization_of(config, facts.where, instead)
    check_config(config, architecture, facts.where)
    shape = shape_of(config)
    source = facts.source
    at = f"@{source.revision}" if isinstance(source, HubSource) else ""
    row = Row(
        id=model,
        title=source.name if isinstance(source, FolderSource) else f"{source.repo}{at}",
        kind=_kind(facts),
        parameters=count_weights(config, architecture, shape),
        license=licence_of(facts.texts.get(CARD, "")),
        context=_context(config, architecture, facts.where),
        shape=shape,
        sources=(source,),
        quantization=quantization,
        rope=_scaling(config, architecture, facts.where),
        # a Qwen3.5 is also published without its tower, which its config.json announces all the same
        modality=_modality(architecture) if PREPROCESSOR in facts.names or architecture in HEARING else "text",
        read_in={"default": CONFIG, "license": CARD, "kind": "the chat template"},
    )
    known = (family.targets for family in catalog.families.values() if family.architecture == architecture)
    return Family(family=model, architecture=architecture, targets=next(known, {}), sizes=(row,))


def _modality(architecture: str) -> str:
    if architecture in HEARING:
        return "text+audio"
    return "text+vision" if architecture in SEEING else "text"


def _require_weights(facts: Facts) -> None:
    names = facts.names
    if ADAPTER in facts.texts:
        raise adapter_fault(facts.where, facts.texts[ADAPTER])
    if OURS in names:
        raise UnsupportedModelError(
            "an ONNX artifact, not a checkpoint", where=facts.where, hint=f"qwen-onnx chat {facts.where}"
        )
    if POOLING in names:
        raise UnsupportedModelError(
            "an embedding model (sentence-transformers): only models that generate text can be built",
            where=facts.where,
            hint="qwen-onnx list",
        )
    if any(name.endswith(".safetensors") for name in names):
        return
    if any(name.lower().endswith(".gguf") for name in names):
        raise UnsupportedModelError(
            "it holds only GGUF files, whose weights are already quantised for llama.cpp",
            where=facts.where,
            hint="give the repository or folder that they were made of, with *.safetensors",
        )
    if any(name.endswith(PICKLES) for name in names):
        raise UnsupportedModelError(
            "it holds only pickled weights, which run code when they are loaded",
            where=facts.where,
            hint="if you trust it, save it again with transformers: model.save_pretrained(FOLDER) writes safetensors",
        )
    raise UnsupportedModelError(
        "it holds no weights", where=facts.where, hint="give a folder or repository with *.safetensors"
    )


def _architecture(config: dict[str, Any], facts: Facts, catalog: Catalog) -> str:
    named = config.get("architectures")
    found = str(named[0])[:100] if isinstance(named, list) and named else None
    if found in ARCHITECTURES:
        return found
    if found is None:
        known = {entry.model_type: name for name, entry in ARCHITECTURES.items()}
        kind = str(config.get("model_type"))[:100]
        what = f"{CONFIG} names no architecture (model_type {kind!r})"
        hint = f'add "architectures": ["{known[kind]}"] to it' if kind in known else "use the model's own config.json"
        raise UnsupportedModelError(what, where=facts.where, hint=hint)
    planned = (
        row.planned
        for family in catalog.families.values()
        if family.architecture == found
        for row in family.sizes
        if row.planned
    )
    if reason := next(planned, None):
        raise UnsupportedModelError(
            f"{found} cannot be built yet: {reason}", where=facts.where, hint="qwen-onnx list shows what can"
        )
    nearest = max(ARCHITECTURES, key=lambda name: _likeness(name, found))
    raise UnsupportedModelError(
        f"it is a {found}, which cannot be built; the nearest architecture that can is {nearest}",
        where=facts.where,
        hint=f"known: {', '.join(ARCHITECTURES)}",
    )


def _likeness(one: str, other: str) -> tuple[int, float]:
    """First by how far both begin alike: that is the generation."""
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return alike, difflib.SequenceMatcher(None, one, other).ratio()


def _context(config: dict[str, Any], architecture: str, where: str) -> int:
    """Tokens that the model was made for.

    Raises:
        UnsupportedModelError: the config does not say, or asks for attention that exports do not support.
    """
    text = text_config(config)
    key = "seq_length" if architecture == QWEN1 else "max_position_embeddings"
    most, faults = text.get(key), []
    if most is None:
        faults.append(f"{key} is missing")
    if text.get("use_sliding_window") or "sliding_attention" in (text.get("layer_types") or ()):
        faults.append("its attention uses a sliding window, which exports do not support")
    if faults or most is None:
        raise UnsupportedModelError("; ".join(faults), where=where, hint=f"change {CONFIG} of a local copy: ./FOLDER")
    # Qwen2.5-1M: beyond it attention goes by chunks, which exports do not
    chunked = text.get("dual_chunk_attention_config")
    original = chunked.get("original_max_position_embeddings") if isinstance(chunked, dict) else None
    return min(most, original) if type(original) is int and original > 0 else int(most)


def _scaling(config: dict[str, Any], architecture: str, where: str) -> Literal["yarn"] | None:
    """How positions are scaled.

    Raises:
        UnsupportedModelError: in a way that exports do not support, or that makes no sense.
    """
    text = text_config(config)
    kind = rope_type(text)
    # the first as transformers 5 writes it, the second as people add it by hand
    said = {key: rope_type({key: text[key]}) for key in ("rope_parameters", "rope_scaling") if text.get(key)}
    if len(set(said.values())) > 1:
        told = ", ".join(f"{key} {value}" for key, value in said.items())
        raise UnsupportedModelError(
            f"{CONFIG} scales its RoPE in two ways: {told}", where=where, hint="remove the one that is wrong"
        )
    if kind == "default":
        return None
    if kind != "yarn" or architecture == QWEN1 or architecture in HYBRIDS | SENSING:
        raise UnsupportedModelError(
            f"its RoPE is scaled ({kind}), which the export of a {architecture} does not support",
            where=where,
            hint=f"remove it from {CONFIG} of a local copy, for the native context: ./FOLDER",
        )
    rope: dict[str, Any] = text.get("rope_parameters") or text["rope_scaling"]
    numbers = {
        "factor": (1, 1024),
        "original_max_position_embeddings": (1, text["max_position_embeddings"]),
        "beta_fast": (0, 1024),
        "beta_slow": (0, 1024),
        "attention_factor": (0, 1024),
        "mscale": (0, 1024),
        "mscale_all_dim": (0, 1024),
    }
    faults = [
        f"{name} is {str(rope[name])[:40]}, not a number from {least} to {most:,}"
        for name, (least, most) in numbers.items()
        if rope.get(name) is not None and not (type(rope[name]) in (int, float) and least <= rope[name] <= most)
    ]
    faults += [f"{name} is missing" for name in list(numbers)[:2] if rope.get(name) is None]
    if faults:
        raise UnsupportedModelError(
            f"its RoPE cannot be right: {'; '.join(faults)}", where=where, hint="use the model's own config.json"
        )
    return "yarn"


def _kind(facts: Facts) -> Kind:
    """By what the chat template does; without one a model continues text."""
    if TEMPLATE_JSON in facts.names:
        return "chat"
    template = facts.texts.get(TEMPLATE) or facts.texts.get(TOKENIZER_CONFIG, "")
    if TEMPLATE not in facts.texts and '"chat_template"' not in template:
        return "base"
    if "enable_thinking" in template:
        return "hybrid"
    return "thinking" if "<think>" in template else "chat"

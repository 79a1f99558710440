"""Rules about what runs the model: configuration, chat template, tokenizer, markers."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_onnx.artifact.genai_config import ids_of
from qwen_onnx.errors import QwenOnnxError
from qwen_onnx.package.contents import CONTENT, INFERENCE, Contents
from qwen_onnx.package.devices import DEVICES
from qwen_onnx.package.foundry import MARKER_IDS, TOKENIZERS, capabilities_of, is_known_tokenizer
from qwen_onnx.package.registry import rule

# tokens that foundry-local-sdk 2.2 reserves for the answer when a request does not say how many
RESERVED = 2048


@rule("template", "Without a chat template answers fail; of two that differ Foundry Local takes another than we.")
def _template(contents: Contents) -> Iterator[str]:
    if len(contents.templates) != 1:
        yield f"{len(contents.templates) or 'no'} chat templates, one is needed"


@rule("prompt-template", "The older Foundry Local writes prompts by it, so that it must be the chat template's own.")
def _prompt_template(contents: Contents) -> Iterator[str]:
    if len(contents.templates) != 1:
        return
    try:
        wanted = {"assistant": CONTENT, "prompt": contents.user_prompt}
    except QwenOnnxError as error:
        yield f"the chat template cannot be used: {error.what}"
        return
    if contents.inference.get("PromptTemplate") != wanted:
        yield f"PromptTemplate of {INFERENCE} is not what the chat template gives"


@rule(
    "tokenizer-class", "Without a class that it knows onnxruntime-genai has no tokenizer, and Foundry Local no model."
)
def _tokenizer_class(contents: Contents) -> Iterator[str]:
    if not (named := contents.tokenizer_config.get("tokenizer_class")):
        yield "tokenizer_config.json has no tokenizer_class"
    elif not is_known_tokenizer(named):
        yield f"tokenizer_class is {named!r}, none of {', '.join(TOKENIZERS)}"


@rule("lengths", "Beyond the cache of rotary embeddings an answer ends in an error half-way.")
def _lengths(contents: Contents) -> Iterator[str]:
    context, longest = contents.genai.model.context_length, contents.search.max_length
    if not 0 < longest <= context:
        yield f"search.max_length is {longest}, context_length {context}"
    if (rows := contents.rope_rows) is not None and context > rows:
        yield f"context_length is {context}, the graph's rope cache has {rows} rows"


@rule("output-length", "An answer that may fill the context leaves no room for a question.")
def _output_length(contents: Contents) -> Iterator[str]:
    most, context = contents.ints.get("max_output_tokens", 0), contents.genai.model.context_length
    if not (isinstance(most, int) and 0 < most < context):
        yield f"max_output_tokens is {most}, context_length {context}"


@rule("reserve", f"Foundry Local reserves {RESERVED} tokens for an answer when a request does not say how many.")
def _reserve(contents: Contents) -> Iterator[str]:
    if (context := contents.genai.model.context_length) <= RESERVED:
        yield f"context_length is {context}: no such request fits"


@rule("provider", "The id, the metadata and genai_config.json must name the same device, or the load fails.")
def _provider(contents: Contents) -> Iterator[str]:
    if (device := DEVICES.get(contents.record.target)) is None:
        return
    if (named := contents.genai.provider) != device.genai:
        yield f"provider_options of genai_config.json name {named}, wanted {device.genai}"
    for key, wanted in (("execution_provider", device.provider), ("device_type", device.kind)):
        if (found := contents.strings.get(key)) != wanted:
            yield f"{key} is {found!r}, wanted {wanted!r}"


@rule("token-ids", "A wrong end token is an answer that does not stop.")
def _token_ids(contents: Contents) -> Iterator[str]:
    model = contents.genai.model
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for token in ids_of(getattr(model, key)):
            if not 0 <= token < model.vocab_size:
                yield f"{key} {token} is not in the vocabulary of {model.vocab_size}"
    end = contents.tokenizer_config.get("eos_token")
    text = end.get("content") if isinstance(end, dict) else end
    ends = ids_of(model.eos_token_id)
    known = contents.tokenizer.added_tokens
    if not ends or (isinstance(text, str) and text in known and known[text] not in ends):
        yield f"the tokenizer ends with {text!r}, which is not among eos_token_id {ends}"


def _markers(contents: Contents) -> dict[str, str]:
    """Markers that are announced; what is not text, the rule ``properties`` tells."""
    return {key: value for key in MARKER_IDS if isinstance(value := contents.strings.get(key), str)}


@rule("marker-pairs", "Foundry Local parses a call or a thought between two markers, and capabilities announce it.")
def _marker_pairs(contents: Contents) -> Iterator[str]:
    markers = _markers(contents)
    for name, flag in (("tool_call", "supports_tool_calling"), ("reasoning", "supports_reasoning")):
        ends = [f"{name}_{end}" in markers for end in ("start", "end")]
        if ends[0] != ends[1]:
            yield f"only one of {name}_start and {name}_end is there"
        elif contents.ints.get(flag) != int(ends[0]):
            yield f"{flag} is {contents.ints.get(flag)} {'with' if ends[0] else 'without'} markers"
    if "capabilities" in contents.strings and contents.strings["capabilities"] != capabilities_of(markers):
        yield f"capabilities are {contents.strings['capabilities']!r}, the markers give {capabilities_of(markers)!r}"


@rule("marker-tokens", "A marker that is several tokens is not recognised in the stream.")
def _marker_tokens(contents: Contents) -> Iterator[str]:
    for key, marker in _markers(contents).items():
        if marker not in contents.tokenizer.added_tokens:
            yield f"{key} {marker!r} is not one token of the tokenizer"


@rule("marker-use", "A model that was not taught a marker never writes it.")
def _marker_use(contents: Contents) -> Iterator[str]:
    source = "".join(contents.templates)
    for key, marker in _markers(contents).items():
        if marker not in source:
            yield f"the chat template never writes {key} {marker!r}"


@rule("marker-ids", "onnxruntime-genai finds tool calls and thoughts by these ids.")
def _marker_ids(contents: Contents) -> Iterator[str]:
    if contents.record.profile != "sdk2":
        return
    known, markers = contents.tokenizer.added_tokens, _markers(contents)
    for name, key in MARKER_IDS.items():
        marker, found = markers.get(name), getattr(contents.genai.model, key)
        wanted = known.get(marker) if marker else None
        if found != wanted and (marker is None or wanted is not None):
            yield f"{key} of genai_config.json is {found}, {name} {marker!r} is {wanted}"


@rule("cli1-keys", "onnxruntime-genai 0.14 refuses a genai_config.json with keys that it does not know.")
def _cli1_keys(contents: Contents) -> Iterator[str]:
    if contents.record.profile != "cli1":
        return
    for key in MARKER_IDS.values():
        if key in contents.genai.model.model_fields_set:
            yield f"genai_config.json holds {key}"

"""``genai_config.json``: what onnxruntime-genai is told of a model, as an allow-list.

onnxruntime-genai does what this file says: it loads libraries of operators, opens paths and hands options to execution
providers. So the record holds exactly what our targets write, and whatever reads the file reads it here: a key that is
not listed, a name that leaves the folder or a number out of range is refused before anything is loaded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator

from qwen_onnx.bounded import Fault, read_json, read_record
from qwen_onnx.errors import ArtifactError
from qwen_onnx.records import Record

GENAI_CONFIG = "genai_config.json"
MOST_BYTES = 1 << 20
HINT = "build it again: make optimize TARGET=cpu"

Flag = Literal["0", "1"]
Tokens = Annotated[int, Field(ge=1, le=1 << 24)]
Size = Annotated[int, Field(ge=1, le=1 << 20)]
Count = Annotated[int, Field(ge=1, le=1024)]
TokenId = Annotated[int, Field(ge=-1, lt=1 << 31)]
TokenIds = TokenId | Annotated[tuple[TokenId, ...], Field(max_length=64)]
Positive = Annotated[float, Field(ge=0, le=1e6)]
# a bare name: no separator, no drive, not hidden
OnnxFile = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,122}\.onnx$")]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Tensor = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_./-]{1,128}$")]
# printf(3) writes the layer's number into it: one %d and no other conversion
LayerTensor = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_./-]{0,64}%d[A-Za-z0-9_./-]{0,64}$")]
LENGTHS = re.compile(r"[1-9]\d{0,7}")


class Part(Record):
    """A part of the file: types as they stand, nothing converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


def _device_lengths(value: str) -> str:
    """OpenVINO's ``load_config`` may be a path, too: only the lengths that we write are taken."""
    try:
        found = read_json(value.encode(), most_bytes=1000, error=ArtifactError)
    except ArtifactError as error:
        raise ValueError(error.what) from error
    lengths = found.get("NPU") if isinstance(found, dict) and found.keys() == {"NPU"} else None
    known = isinstance(lengths, dict) and lengths.keys() <= {"MAX_PROMPT_LEN", "MIN_RESPONSE_LEN"}
    if not known or not all(isinstance(each, str) and LENGTHS.fullmatch(each) for each in (lengths or {}).values()):
        raise ValueError("not the lengths of an NPU")
    return value


class NoOptions(Part):
    """Of a provider that gets none."""


class GraphCapture(Part):
    """Of CUDA and of TensorRT for RTX."""

    enable_cuda_graph: Flag = "0"


class DmlOptions(Part):
    """Of DirectML."""

    enable_graph_capture: Flag = "0"


class WebGpuOptions(Part):
    """Of WebGPU."""

    enableGraphCapture: Flag = "0"
    validationMode: Literal["disabled", "wgpuOnly", "basic", "full"] = "basic"


class OpenVinoOptions(Part):
    """Of OpenVINO."""

    device_type: Literal["CPU", "GPU", "NPU"] = "CPU"
    enable_causallm: Literal["True", "False"] = "False"
    load_config: Annotated[str, AfterValidator(_device_lengths)] | None = None


class ProviderOptions(Part):
    """One execution provider, by genai's name; libraries of providers cannot be named."""

    cpu: NoOptions | None = None
    cuda: GraphCapture | None = None
    dml: DmlOptions | None = None
    webgpu: WebGpuOptions | None = None
    NvTensorRtRtx: GraphCapture | None = None
    OpenVINO: OpenVinoOptions | None = None
    qnn: NoOptions | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1 or getattr(self, self.name) is None:
            raise ValueError("an entry names one provider and its options")
        return self

    @property
    def name(self) -> str:
        """The provider."""
        return next(iter(self.model_fields_set))


class SessionOptions(Part):
    """What ONNX Runtime is told; ``custom_ops_library`` and the keys that write files are left out on purpose."""

    log_id: Word | None = None
    log_severity_level: Annotated[int, Field(ge=0, le=4)] | None = None
    intra_op_num_threads: Annotated[int, Field(ge=0, le=1024)] | None = None
    inter_op_num_threads: Annotated[int, Field(ge=0, le=1024)] | None = None
    graph_optimization_level: (
        Literal["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"] | None
    ) = None
    fused_matmul: Literal["0", "1"] | None = Field(default=None, alias="ep.cuda.fpa_intb_gemm")
    provider_options: Annotated[tuple[ProviderOptions, ...], Field(max_length=1)]


class SlidingWindow(Part):
    """Layers whose attention looks back a fixed number of tokens."""

    window_size: Tokens
    slide_key_value_cache: bool = False
    slide_inputs: bool = False
    layers: Annotated[tuple[Annotated[int, Field(ge=0, le=1024)], ...], Field(max_length=1024)] = ()
    cache_slack: Annotated[int, Field(ge=0, le=1 << 24)] = 0


class Inputs(Part):
    """Names of the graph's inputs."""

    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    past_key_names: LayerTensor | None = None
    past_value_names: LayerTensor | None = None
    past_conv_names: LayerTensor | None = None
    past_recurrent_names: LayerTensor | None = None


class Outputs(Part):
    """Names of the graph's outputs."""

    logits: Tensor | None = None
    present_key_names: LayerTensor | None = None
    present_value_names: LayerTensor | None = None
    present_conv_names: LayerTensor | None = None
    present_recurrent_names: LayerTensor | None = None


class Decoder(Part):
    """The graph and what runs it; artifacts that genai cannot run have its sizes elsewhere."""

    filename: OnnxFile
    session_options: SessionOptions
    inputs: Inputs = Inputs()
    outputs: Outputs = Outputs()
    head_size: Size | None = None
    hidden_size: Size | None = None
    num_attention_heads: Count | None = None
    num_hidden_layers: Count | None = None
    num_key_value_heads: Count | None = None
    sliding_window: SlidingWindow | None = None


class EmbeddingInputs(Part):
    """Names of the embedding's inputs."""

    input_ids: Tensor
    image_features: Tensor | None = None
    audio_features: Tensor | None = None


class EmbeddingOutputs(Part):
    """Names of its outputs."""

    inputs_embeds: Tensor


class Embedding(Part):
    """The graph that puts the features of pictures or sounds between the embeddings of tokens."""

    filename: OnnxFile
    inputs: EmbeddingInputs
    outputs: EmbeddingOutputs


class VisionInputs(Part):
    """Names of the encoder's inputs."""

    pixel_values: Tensor
    image_grid_thw: Tensor


class VisionOutputs(Part):
    """Names of its outputs."""

    image_features: Tensor


class Vision(Part):
    """The encoder of one picture, and the file that says how pictures are prepared."""

    filename: OnnxFile
    config_filename: Literal["processor_config.json"]
    spatial_merge_size: Annotated[int, Field(ge=1, le=16)]
    patch_size: Annotated[int, Field(ge=1, le=256)]
    tokens_per_second: Positive
    window_size: Annotated[int, Field(ge=0, le=1 << 16)]
    inputs: VisionInputs
    outputs: VisionOutputs


class SpeechInputs(Part):
    """Names of the encoder's inputs."""

    audio_embeds: Tensor
    audio_lengths: Tensor


class SpeechOutputs(Part):
    """Names of its outputs."""

    audio_features: Tensor


class Speech(Part):
    """The encoder of one sound, and the file that says how sounds are prepared, which genai has none for."""

    filename: OnnxFile
    config_filename: Literal["audio_config.json"]
    inputs: SpeechInputs
    outputs: SpeechOutputs


class Model(Part):
    """Sizes and special tokens; ``bot`` and the others are the markers of tool calls and of reasoning."""

    type: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}$")] = "qwen"
    context_length: Tokens
    vocab_size: Size
    bos_token_id: TokenIds | None = None
    eos_token_id: TokenIds
    pad_token_id: TokenIds | None = None
    bot_token_id: TokenId | None = None
    eot_token_id: TokenId | None = None
    bor_token_id: TokenId | None = None
    eor_token_id: TokenId | None = None
    image_token_id: TokenId | None = None
    video_token_id: TokenId | None = None
    vision_start_token_id: TokenId | None = None
    audio_token_id: TokenId | None = None
    decoder: Decoder
    embedding: Embedding | None = None
    vision: Vision | None = None
    speech: Speech | None = None

    @model_validator(mode="after")
    def _sees_or_hears_whole_or_not_at_all(self) -> Self:
        inputs = self.embedding.inputs if self.embedding else None
        sight = (self.vision, self.image_token_id, inputs and inputs.image_features)
        hearing = (self.speech, self.audio_token_id, inputs and inputs.audio_features)
        told = [parts for parts in (sight, hearing) if any(part is not None for part in parts)]
        if told and None in told[0]:
            raise ValueError(
                "embedding, vision and image_token_id go together, or embedding, speech and audio_token_id"
            )
        if len(told) > 1 or (inputs and not told):
            raise ValueError("an embedding has a place for pictures or one for sounds")
        return self

    @property
    def medium_token(self) -> int | None:
        """What stands for a part of a picture or a sound; None: the model reads text alone."""
        if self.vision is None and self.speech is None:
            return None
        return self.image_token_id if self.speech is None else self.audio_token_id

    @property
    def unspoken(self) -> tuple[int, ...]:
        """What stands for a part of a medium, and in no answer: none where the model reads text alone."""
        if self.medium_token is None:
            return ()
        return tuple(token for token in (self.medium_token, self.video_token_id) if token is not None)


class Search(Part):
    """Defaults of generation, all of which a request may replace."""

    max_length: Annotated[int, Field(ge=0, le=1 << 24)]
    min_length: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    do_sample: bool = False
    early_stopping: bool = True
    past_present_share_buffer: bool = True
    num_beams: Annotated[int, Field(ge=1, le=64)] = 1
    num_return_sequences: Annotated[int, Field(ge=1, le=64)] = 1
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1024)] = 0
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] = 50
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    temperature: Positive = 1.0
    repetition_penalty: Positive = 1.0
    length_penalty: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    diversity_penalty: Positive = 0.0


class GenaiConfig(Record):
    """The whole file, read and found harmless."""

    model: Model
    search: Search | None = None

    @classmethod
    def read(cls, folder: Path, error: Fault = ArtifactError, hint: str | None = HINT) -> GenaiConfig:
        """From ``genai_config.json`` in ``folder``.

        Raises:
            error: it is missing or damaged, or says something that is not allowed; names the first such place.
        """
        return read_record(folder / GENAI_CONFIG, cls, most_bytes=MOST_BYTES, error=error, hint=hint)

    @property
    def provider(self) -> str:
        """genai's name of the execution provider."""
        options = self.model.decoder.session_options.provider_options
        return options[0].name if options else "cpu"

    @property
    def graph_file(self) -> str:
        """Name of the decoder's ONNX file in the folder."""
        return self.model.decoder.filename

    @property
    def files(self) -> tuple[str, ...]:
        """Names of every file that it has loaded."""
        encoder, embedding = self.model.vision or self.model.speech, self.model.embedding
        if encoder is None or embedding is None:
            return (self.graph_file,)
        return (self.graph_file, embedding.filename, encoder.filename, encoder.config_filename)


def ids_of(value: TokenIds | None) -> list[int]:
    """Token ids, of which the file may have none, one or a list, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)

"""Our Olive pass ``AudioEncoder``: the parts of a model that hears, beside its decoder.

``audio.onnx`` makes features of one sound, ``embedding.onnx`` puts them between the embeddings of the tokens,
``audio_config.json`` says how a sound becomes a spectrogram. Their weights are the checkpoint's, in its own type.
onnxruntime-genai 0.18 has no model type with an audio encoder alone: the folder is laid out as its others are, and
our engine alone runs it.
"""

from __future__ import annotations

from pathlib import Path

from qwen_onnx.artifact.audio_config import AUDIO_CONFIG, HEARS, TRANSCRIBES
from qwen_onnx.errors import ExportError
from qwen_onnx.export.drawing import Drawing
from qwen_onnx.export.embedding import configure, copy_decoder, embedded_kind, write_embedding
from qwen_onnx.export.passes.audio_encoder import chunked
from qwen_onnx.export.passes.audio_encoder.options import AudioEncoderOptions
from qwen_onnx.export.passes.audio_encoder.tower import FEATURES, FRAMES, MEL, draw_tower, inputs, outputs
from qwen_onnx.export.passes.pack_weights.data_file import DataFile
from qwen_onnx.export.progress import progress
from qwen_onnx.export.tower_pass import TowerPass
from qwen_onnx.export.weights import CheckpointWeights
from qwen_onnx.sources.audio_tower import AUDIO_TOWER_CONFIG, AudioTower
from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.sources.chunked_tower import hearing_settings_of, hearing_tower_of

AUDIO_FILE = "audio.onnx"


def write_parts(checkpoint: Path, decoder: Path, output: Path, bits: int | None = None) -> None:
    """The files of ``decoder`` and the parts that hear, in ``output``.

    Args:
        checkpoint: as ``write_text_form`` writes it.
        bits: of the weights of the encoder's layers; None: the checkpoint's own type.

    Raises:
        ExportError: there is no tower, a weight is missing or has another shape, or the decoder takes token ids.
        UnsupportedModelError: see ``hearing_tower_of`` and ``hearing_settings_of``.
    """
    where = checkpoint / AUDIO_TOWER_CONFIG
    if not where.exists():
        raise ExportError("the checkpoint has no audio tower", where=str(checkpoint), hint="qwen-onnx list")
    tower = hearing_tower_of(read_json(where), str(where))
    settings = hearing_settings_of(checkpoint, tower)
    whisper = isinstance(tower, AudioTower)
    kind = embedded_kind(decoder)
    copy_decoder(decoder, output)
    progress(f"writing the audio encoder: {tower.depth} layers of {tower.width}")
    with DataFile(output / f"{AUDIO_FILE}.data") as data:
        draw = Drawing(CheckpointWeights(checkpoint), data, bits)
        if isinstance(tower, AudioTower):
            draw_tower(draw, tower, kind)
        else:
            chunked.draw_tower(draw, tower, kind)
        draw.save(output / AUDIO_FILE, inputs(tower), outputs(tower, kind))
    write_embedding(
        checkpoint,
        output,
        features=FEATURES,
        token=tower.token,
        hidden=tower.output,
        width=tower.output,
        kind=kind,
    )
    told_settings = settings.model_dump_json(indent=1, exclude_defaults=True)
    (output / AUDIO_CONFIG).write_text(told_settings, encoding="utf-8")
    speech = {
        "filename": AUDIO_FILE,
        "config_filename": AUDIO_CONFIG,
        "inputs": {MEL: MEL, FRAMES: FRAMES},
        "outputs": {FEATURES: FEATURES},
    }
    told = {"type": HEARS if whisper else TRANSCRIBES, "audio_token_id": tower.token, "speech": speech}
    configure(decoder, output, features=FEATURES, width=tower.output, told=told)


class AudioEncoder(TowerPass):
    """Write encoder, embedding and preparation of sounds beside a decoder."""

    kind = AudioEncoderOptions
    write = staticmethod(write_parts)

"""A tower of our own beside a Qwen2 that reads text: together a Qwen2.5-VL or a Qwen2-Audio.

The tower's file says in its header what it needs besides weights: its config, how pictures or sounds are prepared, and
which special tokens of the language model stand for them. It may carry a LoRA that the language model was taught to
read them with, under peft's names, which is merged. Without one the language model's weights are linked, not written
anew: for text it is what it was, to the last bit.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue, TypeAdapter, ValidationError

from qwen_onnx import bounded
from qwen_onnx.catalog.training import MOST_RANK
from qwen_onnx.errors import SourceError
from qwen_onnx.records import Record
from qwen_onnx.sources.adapter import Adapter, paired
from qwen_onnx.sources.audio_tower import QWEN2_AUDIO
from qwen_onnx.sources.checkpoint import (
    INDEX_FILE,
    LARGEST_TOKENIZER,
    MOST_TOKENIZER_VALUES,
    SINGLE_FILE,
    read_json,
)
from qwen_onnx.sources.merge import write_merged
from qwen_onnx.sources.streamed import tensors_of, write_part
from qwen_onnx.sources.text_form import linked
from qwen_onnx.sources.vision_config import PREPROCESSOR, QWEN2_5_VL

TOWERS = Path(__file__).parent / "towers"
# key of the header's metadata
TOLD = "qwen_onnx"
VISUAL = "visual."
# of a tower's weights; all else in its file is a LoRA
TOWER_WEIGHTS = (VISUAL, "audio_tower.", "multi_modal_projector.")
LARGEST_TOLD, LARGEST_TEMPLATE = 1 << 16, 1 << 18
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TEMPLATE = "chat_template.jinja"
# what a message's content is in the language model's own template, and what it may be where something is shown
CONTENT = "message['content']"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
SHOWN = (
    "{{%- macro shown(content) -%}}{{%- if content is string -%}}{{{{- content -}}}}"
    "{{%- else -%}}{{%- for part in content -%}}"
    "{{%- if part['type'] == '{kind}' -%}}{{{{- {text} -}}}}"
    "{{%- else -%}}{{{{- part['text'] -}}}}{{%- endif -%}}{{%- endfor -%}}{{%- endif -%}}{{%- endmacro -%}}"
)


class Told(Record):
    """What a tower's file says of itself."""

    rank: int | None = Field(default=None, ge=1, le=MOST_RANK, description="of the LoRA in the file; null: none")
    tokens: dict[str, int] = Field(description="ids of the language model's special tokens, by their new text")
    ids: dict[str, int] = Field(description="keys of config.json that are ids of tokens")
    preprocessor: dict[str, JsonValue]


class Sees(Told):
    """A tower in Qwen2.5-VL's form."""

    mrope_section: tuple[int, int, int]
    vision_config: dict[str, JsonValue]

    def config(self, text: dict[str, JsonValue]) -> dict[str, Any]:
        """What the whole model's ``config.json`` has of its own; ``text`` is the language model's."""
        rope = {**_rope(text), "mrope_section": list(self.mrope_section)}
        return {
            "architectures": [QWEN2_5_VL],
            "model_type": "qwen2_5_vl",
            "text_config": {**text, "model_type": "qwen2_5_vl_text", "rope_parameters": rope},
            "vision_config": self.vision_config,
        }

    def template(self) -> str:
        """The macro that shows the parts of a message."""
        return SHOWN.format(kind="image", text=json.dumps(PICTURE))


class Hears(Told):
    """A tower in Qwen2-Audio's form."""

    audio_config: dict[str, JsonValue]
    shown: str = Field(max_length=200, description="what the template puts in the place of a sound")

    def config(self, text: dict[str, JsonValue]) -> dict[str, Any]:
        """See ``Sees``."""
        return {
            "architectures": [QWEN2_AUDIO],
            "model_type": "qwen2_audio",
            "text_config": {**text, "model_type": "qwen2"},
            "audio_config": self.audio_config,
        }

    def template(self) -> str:
        """See ``Sees``."""
        return SHOWN.format(kind="audio", text=json.dumps(self.shown))


TOLD_OF = TypeAdapter[Sees | Hears](Sees | Hears)


def write_joined(text: Path, tower: Path, folder: Path) -> None:
    """Write the Qwen2 in ``text`` with ``tower`` into the empty ``folder``.

    Raises:
        SourceError: the tower's file is damaged, a token that it names is not a special one, or the language
            model's chat template has another form.
        UnsupportedModelError: its LoRA is incomplete, of another rank or for another language model.
    """
    told = _told(tower)
    stored = tensors_of([tower])
    taught = {name: entry for name, entry in stored.items() if not name.startswith(TOWER_WEIGHTS)}
    if not taught and told.rank is None:
        _write_beside(text, tower, folder, told)
        return
    parts = paired(taught, told.rank or 0, tower)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".merged-") as made:
        merged = Path(made)
        (language := merged / "language").mkdir()
        write_merged(text, Adapter(tower, tower.stem, told.rank or 0, 1.0, parts, None, ""), language)
        write_part(merged / tower.name, [name for name in stored if name not in taught], stored)
        _write_beside(language, merged / tower.name, folder, told)


def _write_beside(text: Path, tower: Path, folder: Path, told: Sees | Hears) -> None:
    for path in sorted(text.iterdir()):
        if path.is_file() and path.suffix in {".json", ".jinja"} and path.name not in {"config.json", "checksums.json"}:
            shutil.copyfile(path, folder / path.name)
    linked(text / SINGLE_FILE, folder / PARTS[0])
    shutil.copyfile(tower, folder / PARTS[1])
    names = {name: part for part in PARTS for name in _names(folder / part)}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
    config = _config(read_json(text / "config.json"), told)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / PREPROCESSOR).write_text(json.dumps(told.preprocessor, indent=2), encoding="utf-8")
    _rename_tokens(folder / "tokenizer.json", told)
    _show_parts(folder / TEMPLATE, told)


def _told(tower: Path) -> Sees | Hears:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(tower, framework="numpy") as file:
            text = (file.metadata() or {}).get(TOLD, "")
        value = bounded.read_json(
            text.encode(), most_bytes=LARGEST_TOLD, error=SourceError, what=f"the header of {tower.name}"
        )
        return TOLD_OF.validate_python(value)
    except (SafetensorError, ValidationError, OSError) as error:
        raise SourceError(f"the tower's file is damaged: {error}", where=str(tower), hint="install it again") from error


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return list(file.keys())


def _config(text: dict[str, Any], told: Sees | Hears) -> dict[str, Any]:
    kept = {name: value for name, value in text.items() if name not in {"architectures", "transformers_version"}}
    return {
        **told.config(kept),
        "dtype": text["dtype"],
        "tie_word_embeddings": text["tie_word_embeddings"],
        **told.ids,
    }


def _rope(text: dict[str, JsonValue]) -> dict[str, JsonValue]:
    found = text["rope_parameters"]
    return found if isinstance(found, dict) else {}


def _show_parts(path: Path, told: Sees | Hears) -> None:
    own = bounded.read_bytes(path, most_bytes=LARGEST_TEMPLATE, error=SourceError).decode("utf-8")
    if CONTENT not in own:
        raise SourceError(f"the chat template does not mention {CONTENT}", where=str(path))
    path.write_text(told.template() + own.replace(CONTENT, f"shown({CONTENT})"), encoding="utf-8")


def _rename_tokens(path: Path, told: Told) -> None:
    """Special tokens that the language model has and no text of ours uses get the names of Qwen's."""
    tokenizer = read_json(path, most_bytes=LARGEST_TOKENIZER, most_values=MOST_TOKENIZER_VALUES)
    special = {entry["id"]: entry for entry in tokenizer["added_tokens"] if entry["special"]}
    vocabulary = tokenizer["model"]["vocab"]
    for name, number in told.tokens.items():
        if number not in special:
            raise SourceError(f"{number} is not a special token of the language model", where=str(path))
        vocabulary.pop(special[number]["content"], None)
        vocabulary[name] = number
        special[number]["content"] = name
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")

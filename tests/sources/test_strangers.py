"""Checkpoints of strangers: no code of theirs runs, nothing outside their folder is read, nothing absurd is built."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from qwen_onnx.catalog.architectures import ARCHITECTURES
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import Plan, make_plan
from qwen_onnx.errors import SourceError, UnsupportedModelError
from qwen_onnx.sources.checkpoint import CONVERTED, INDEX_FILE
from qwen_onnx.sources.fetch import expected_revisions, fetch, weights_of
from tests.conftest import REPOSITORY, rewrite_json, run_cli

CODE = "import pathlib; pathlib.Path({!r}).write_text('it ran')\nfrom transformers import Qwen2Config as Own\n"


@pytest.fixture(scope="module")
def plan(repository: Path) -> Plan:
    return make_plan(load_catalog(repository), "starter", "cpu")


def refused(plan: Plan, folder: Path, words: str) -> None:
    """``fetch`` raises with these words, and raises nothing that is not deliberate."""
    with pytest.raises(SourceError, match=words):
        fetch(plan, folder.parent / "cache", local=folder, progress=lambda _: None)


def test_code_of_a_checkpoint_is_not_run_whatever_is_typed(broken_checkpoint: Path, tmp_path: Path) -> None:
    """As ``yes | qwen-onnx optimize``."""
    marker = tmp_path / "marker"
    (broken_checkpoint / "own.py").write_text(CODE.format(str(marker)))
    rewrite_json(broken_checkpoint / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    output = tmp_path / "out"
    done = run_cli("optimize", "starter", "--source", broken_checkpoint, "--output", output, input="y\n" * 1000)
    assert done.returncode == 4, done.stderr
    assert "model_type is 'own', not 'qwen2'" in done.stderr
    assert not marker.exists()
    assert not output.exists()


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "own.Own"}}, "auto_map"),
        ("config.json", {"sub": [{"auto_map": {"AutoConfig": "own.Own"}}]}, "auto_map"),
        ("config.json", {"attn_implementation": "somebody/kernels"}, "attn_implementation"),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["own.Own", None]}},
            "tokenizer_config.json.*auto_map",
        ),
        ("config.json", {"model_type": None}, "model_type is 'None'"),
        ("config.json", {"model_type": ["qwen2"]}, "model_type"),
    ],
)
def test_whatever_asks_for_code_is_refused(
    plan: Plan, broken_checkpoint: Path, file: str, changes: dict[str, Any], words: str
) -> None:
    rewrite_json(broken_checkpoint / file, **changes)
    refused(plan, broken_checkpoint, words)


def test_an_adapter_is_refused(plan: Plan, broken_checkpoint: Path) -> None:
    (broken_checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    refused(plan, broken_checkpoint, "an adapter is not a checkpoint")


def test_every_architecture_of_the_catalog_has_the_type_that_transformers_knows() -> None:
    assert len(ARCHITECTURES) >= 8
    for architecture, known in ARCHITECTURES.items():
        if architecture not in CONVERTED:
            assert getattr(transformers, architecture).config_class.model_type == known.model_type


def test_olive_has_nothing_to_read_from(tmp_path: Path) -> None:
    """Its process does not inherit what is typed."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nread line && echo "Error: read $line"\nexit 1\n')
    fake.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from qwen_onnx.export.olive import run_olive\n"
        "from qwen_onnx.processes.environments import Interpreter\n"
        "folder = Path(sys.argv[1])\n"
        "run_olive({}, folder, folder / 'work', folder / 'log', "
        "interpreter=Interpreter(folder / 'python', dict(PATH='/usr/bin:/bin')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], input="yes\n", capture_output=True, text=True, check=False
    )
    assert "Olive failed (exit 1): no message" in done.stderr


def _calls() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted((REPOSITORY / "qwen_onnx").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", node


def test_no_loader_trusts_code_and_no_child_inherits_the_terminal() -> None:
    loaders = children = 0
    for place, call in _calls():
        assert isinstance(call.func, ast.Attribute)
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if call.func.attr in ("from_pretrained", "from_config"):
            loaders += call.func.attr == "from_pretrained"
            trust = keywords.get("trust_remote_code")
            assert call.func.attr == "from_config" or (isinstance(trust, ast.Constant) and trust.value is False), place
        owner = call.func.value
        if isinstance(owner, ast.Name) and owner.id == "subprocess" and call.func.attr in ("run", "Popen"):
            children += 1
            assert "stdin" in keywords or "input" in keywords, place
    assert loaders >= 12
    assert children >= 1


@pytest.mark.parametrize(
    "name", ["../w.safetensors", ".w.safetensors", "/w.safetensors", "sub/w.safetensors", "w.bin", 3]
)
def test_an_index_names_visible_files_beside_it(plan: Plan, broken_checkpoint: Path, name: Any) -> None:
    weights = broken_checkpoint / "model.safetensors"
    if isinstance(name, str) and not name.startswith("/"):
        (broken_checkpoint / name).parent.mkdir(exist_ok=True)
        weights.rename(broken_checkpoint / name)
    (broken_checkpoint / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": name}}))
    refused(plan, broken_checkpoint, "which is not a safetensors file beside it")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "null"])
def test_an_index_that_is_none(plan: Plan, broken_checkpoint: Path, text: str) -> None:
    (broken_checkpoint / INDEX_FILE).write_text(text)
    refused(plan, broken_checkpoint, "safetensors.index.json")


def test_the_shards_of_an_index_are_all_among_the_weights(plan: Plan, broken_checkpoint: Path, tmp_path: Path) -> None:
    (broken_checkpoint / "model.safetensors").rename(broken_checkpoint / "w.safetensors")
    (broken_checkpoint / INDEX_FILE).write_text('{"weight_map": {"model.embed_tokens.weight": "w.safetensors"}}')
    found = fetch(plan, tmp_path / "cache", local=broken_checkpoint)
    assert set(weights_of(found.files)) == {"w.safetensors"}


def _link(target: str) -> Callable[[Path], None]:
    def plant(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return plant


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("name", ["LICENSE", "config.json", "tokenizer.json", "model.safetensors", "sub/more.txt"])
@pytest.mark.parametrize(
    "plant",
    [_link("/etc/hostname"), _link("../outside"), _link("/dev/zero"), _link("/nowhere"), _pipe],
    ids=["etc", "outside", "device", "nowhere", "pipe"],
)
def test_what_is_no_plain_file_is_refused_before_it_is_read(
    plan: Plan, broken_checkpoint: Path, tmp_path: Path, name: str, plant: Callable[[Path], None]
) -> None:
    (tmp_path / "outside").write_text("{}")
    (broken_checkpoint / "sub").mkdir()
    plant(broken_checkpoint / name)
    refused(plan, broken_checkpoint, "is not a plain file|leads out of the checkpoint")
    with pytest.raises(SourceError):
        expected_revisions(plan, tmp_path, broken_checkpoint)


def test_a_folder_elsewhere_is_refused(plan: Plan, broken_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (broken_checkpoint / "sub").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    refused(plan, broken_checkpoint, "leads out of the checkpoint")


def test_links_that_lead_to_each_other_are_refused(plan: Plan, broken_checkpoint: Path) -> None:
    (broken_checkpoint / "LICENSE").symlink_to("NOTICE")
    (broken_checkpoint / "NOTICE").symlink_to("LICENSE")
    refused(plan, broken_checkpoint, "leads out of the checkpoint")


def test_the_cache_of_hugging_face_is_a_source(plan: Plan, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Its files are links into the blobs of the same repository, and only there."""
    repository = tmp_path / "models--org--tiny"
    snapshot, blobs = repository / "snapshots/abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(tiny_checkpoint.iterdir())):
        shutil.copy(path, blobs / f"{number:040}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040}")
    found = fetch(plan, tmp_path / "cache", local=snapshot)
    assert found.files == fetch(plan, tmp_path / "cache", local=tiny_checkpoint).files
    (repository / "secret").write_text("x")
    (snapshot / "LICENSE").symlink_to("../../secret")
    refused(plan, snapshot, "leads out of the checkpoint")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not a number from 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_attention_heads": 2, "num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000, not a number from 1 to"),
        ({"vocab_size": 512}, "the embedding is .*, config.json says"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": 64.5}, "hidden_size is 64.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is 2, not a number"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"rope_parameters": [1]}, "rope_parameters is not an object"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is x"),
        ({"text_config": [1]}, "text_config is not an object"),
        ({"architectures": "Qwen2ForCausalLM"}, "the checkpoint is a none"),
        ({"architectures": []}, "the checkpoint is a none"),
    ],
)
def test_absurd_values_are_named(plan: Plan, broken_checkpoint: Path, changes: dict[str, Any], words: str) -> None:
    rewrite_json(broken_checkpoint / "config.json", **changes)
    with pytest.raises(UnsupportedModelError, match=words):
        fetch(plan, broken_checkpoint.parent / "cache", local=broken_checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": NaN}', '{"a": ' + "9" * 5000 + "}", "\x00"])
def test_json_beyond_the_limits_is_refused(plan: Plan, broken_checkpoint: Path, name: str, text: str) -> None:
    (broken_checkpoint / name).write_text(text)
    refused(plan, broken_checkpoint, f"{name} is damaged")

"""Fixtures that every test folder shares. Nothing here needs a network."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import make_plan
from qwen_onnx.sources.fetch import cache_root, fetch

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout under test."""
    return REPOSITORY


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of recipes and pipelines that a test may break."""
    for name in ("recipes", "pipelines"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    return tmp_path


def edit_yaml(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Load, change in place and write a YAML file."""
    data = yaml.safe_load(path.read_text())
    change(data)
    path.write_text(yaml.safe_dump(data, sort_keys=False))


def edit_int4(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Change the int4 build of a pipeline."""
    edit_yaml(path, lambda pipeline: change(pipeline["precisions"]["int4"]))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen2 with a byte-level tokenizer: builds in seconds."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


def byte_tokenizer():  # type: ignore[no-untyped-def]
    """A tokenizer of 256 bytes and the two tokens of ChatML, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=specials[0], eos_token=specials[1])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def make_tiny_checkpoint(folder: Path, seed: int = 0, kind: str = "qwen2") -> Path:
    """Write a random checkpoint of 64 dimensions and two layers; ``kind`` is qwen2 or qwen3."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config_class, model_class = (Qwen3Config, Qwen3ForCausalLM) if kind == "qwen3" else (Qwen2Config, Qwen2ForCausalLM)
    config = config_class(
        vocab_size=len(tokenizer) + (-len(tokenizer)) % 32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def broken_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))


def rewrite_json(path: Path, **changes: object) -> None:
    """Change top-level keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint built to int4 by the genai builder, in a process of its own as in a real build."""
    options = "precision='int4', block_size=32, is_symmetric=False, accuracy_level=4, algo_config='k_quant_mixed'"
    return build_apart(tiny_checkpoint, tmp_path_factory.mktemp("artifact") / "int4", options)


def build_apart(checkpoint: Path, folder: Path, options: str) -> Path:
    """``folder``, built by the genai builder in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from qwen_onnx.export.passes.genai_builder.build import build\n"
        "from qwen_onnx.export.passes.genai_builder.options import GenAIModelBuilderOptions as Config\n"
        f"build(Path(sys.argv[1]), Path(sys.argv[2]), Config({options}))"
    )
    subprocess.run([sys.executable, "-c", code, str(checkpoint), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def tiny_build(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint through the whole main job but for the verification, by the command line."""
    target = tmp_path_factory.mktemp("built") / "int4"
    done = run_cli("optimize", "starter", "--source", tiny_checkpoint, "--output", target, "--no-verify")
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def artifact_dir() -> Path:
    """The starter's artifact, as `make optimize TARGET=cpu` leaves it."""
    folder = REPOSITORY / "artifacts/starter/cpu-int4"
    if not folder.exists():
        pytest.fail("the starter's artifact is missing: make optimize TARGET=cpu")
    return folder


@pytest.fixture(scope="session")
def starter_checkpoint() -> Path:
    """The starter's checkpoint in the cache; fetched when it is not there."""
    catalog = load_catalog(REPOSITORY)
    return fetch(make_plan(catalog, "starter", "cpu"), cache_root(REPOSITORY)).path


def run_cli(*arguments: object, cwd: Path = REPOSITORY, **options: object) -> subprocess.CompletedProcess[str]:
    """``qwen-onnx`` as users run it; never raises for an exit code."""
    command = [sys.executable, "-m", "qwen_onnx.cli.app", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def as_in_a_terminal() -> None:
    """In a child: Ctrl-C works, also where the tests themselves run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

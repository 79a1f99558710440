"""Both engines serve weights in planes, and say what they say of the same weights in whole bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwen_onnx.runtime import Engine
from qwen_onnx.runtime.engines.batch import BatchEngine
from tests.fixtures.packed import small_and_packed
from tests.runtime.engines.batch.test_engine import Heard, endless

PROMPT, COUNT = list(range(40, 60)), 12


@pytest.fixture(scope="module")
def folders(tiny_unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same weights, as 8-bit codes and packed."""
    return small_and_packed(tiny_unpacked, tmp_path_factory.mktemp("packed"))


@pytest.mark.slow
def test_genai_gives_the_same_logits_to_the_bit(folders: tuple[Path, Path]) -> None:
    plain, packed = (Engine(folder, threads=1) for folder in folders)
    found = [engine.forced_logits(PROMPT, range(60, 90)) for engine in (plain, packed)]
    assert len(found[0]) >= 30
    assert np.array_equal(*found)


@pytest.mark.slow
def test_the_batch_engine_gives_the_same_log_probabilities(folders: tuple[Path, Path]) -> None:
    answers: dict[Path, list[object]] = {}
    for folder in folders:
        for length in (20, 7):
            # each alone: who shares a step is up to the clock, and steps of several rows round otherwise
            engine = BatchEngine(folder, streams=2, queue_size=4, capacity=512, threads=1)
            heard = Heard(engine, endless(tuple(PROMPT[:length]), COUNT, logprobs=3))
            tokens = heard.tokens()
            answers.setdefault(folder, []).append((tokens, [(event.logprob, event.top) for event in heard.all]))
            assert len(tokens) == COUNT
            engine.close()
    plain, packed = answers.values()
    assert plain == packed


LOADED = """
import sys
from pathlib import Path
from qwen_onnx.runtime import Engine
from qwen_onnx.runtime.engines.batch.model import BatchModel
folder = Path(sys.argv[1])
loaded = Engine(folder, threads=1) if sys.argv[2] == "genai" else BatchModel(folder, rows=1, capacity=64, threads=1)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells anonymous memory")
def test_what_was_folded_takes_no_memory_once_the_model_is_loaded(artifact_dir: Path) -> None:
    """On the starter, whose head is folded while it loads; twice its weights, as without planes."""
    weights = (artifact_dir / "model.onnx.data").stat().st_size
    for engine in ("genai", "batch"):
        command = [sys.executable, "-c", LOADED, str(artifact_dir), engine]
        anonymous = 1024 * int(subprocess.run(command, capture_output=True, check=True).stdout)
        assert weights < anonymous < 3 * weights, engine

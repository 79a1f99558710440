"""Child of ``latency.py``: ``python -m qwen_onnx.verify.latency_worker ENGINE FOLDER THREADS``.

Reads JSON lines (``prefill``, ``decode``, ``bandwidth``, ``memory``) and answers each with one JSON line.
Only the clock of this process counts, so that pipes and JSON are not part of the measurement.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from qwen_onnx.errors import QwenOnnxError
from qwen_onnx.processes.children import Answers
from qwen_onnx.processes.peak import peak_rss
from qwen_onnx.verify.roofline import bandwidth
from qwen_onnx.verify.timed import Timed


def load(engine: str, folder: Path, threads: int) -> Timed:
    """The engine by its name: ``artifact``, ``pytorch``, or ``layerwise`` for a PyTorch that does not fit."""
    if engine == "layerwise":
        from qwen_onnx.verify.layerwise import LayerTimer

        return LayerTimer(folder, threads)
    if engine == "pytorch":
        from qwen_onnx.verify.baseline import TorchBaseline

        return Timed(TorchBaseline(folder, threads).generate)
    from qwen_onnx.runtime.engines.genai import Engine

    served = Engine(folder, threads=threads)
    return Timed(lambda ids, count: iter(served.generate(ids, max_new_tokens=count, stop_on_eos=False)))


def serve(engine: Timed, answers: Answers, threads: int) -> None:
    """Obey until standard input ends."""
    for command in answers.questions():
        if command["do"] == "prefill":
            reply = {"seconds": engine.prefill(command["ids"], command["new_tokens"])}
        elif command["do"] == "decode":
            reply = {"seconds": engine.decode(int(command["count"]))}
        elif command["do"] == "bandwidth":
            reply = {"bytes_per_second": bandwidth(threads)}
        else:
            reply = {"peak_rss": engine.peak_memory(peak_rss())}
        answers.say(reply)


def main(arguments: list[str]) -> int:
    """Load, say how long it took, then obey; a fault becomes a JSON line and exit code 1."""
    engine, folder, threads = arguments
    answers = Answers()
    try:
        started = time.perf_counter()
        timed = load(engine, Path(folder), int(threads))
        answers.say({"load_s": time.perf_counter() - started, "computed": timed.computed})
        serve(timed, answers, int(threads))
    except (QwenOnnxError, OSError, ValueError, RuntimeError, ImportError) as error:
        answers.fail(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

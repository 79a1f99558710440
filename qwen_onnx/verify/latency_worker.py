"""Child of ``latency.py``: ``python -m qwen_onnx.verify.latency_worker ENGINE FOLDER THREADS``.

Reads JSON lines (``prefill``, ``decode``, ``memory``) and answers each with one JSON line.
Only the clock of this process counts, so that pipes and JSON are not part of the measurement.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from qwen_onnx.errors import QwenOnnxError
from qwen_onnx.processes.children import Answers

Generate = Callable[[list[int], int], Iterator[int]]


def load(engine: str, folder: Path, threads: int) -> Generate:
    """The engine's greedy generation: (prompt ids, count) to an iterator of ids."""
    if engine == "pytorch":
        from qwen_onnx.verify.baseline import TorchBaseline

        return TorchBaseline(folder, threads).generate
    from qwen_onnx.runtime.engines.genai import Engine

    served = Engine(folder, threads=threads)
    return lambda ids, count: iter(served.generate(ids, max_new_tokens=count, stop_on_eos=False))


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # not ru_maxrss: it survives exec, so a child would report its parent's peak
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(tokens: Iterator[int], count: int) -> dict[str, float]:
    """Draw ``count`` tokens.

    Raises:
        RuntimeError: the engine ended early; a speed from fewer tokens would be wrong.
    """
    started = time.perf_counter()
    drawn = len(list(islice(tokens, count)))
    seconds = time.perf_counter() - started
    if drawn != count:
        raise RuntimeError(f"{drawn} tokens instead of {count}")
    return {"seconds": seconds}


def serve(generate: Generate, answers: Answers) -> None:
    """Obey until standard input ends."""
    tokens: Iterator[int] = iter(())
    for command in answers.questions():
        if command["do"] == "prefill":
            # The old run must give back its memory and threads before the new one is timed.
            tokens = iter(())
            tokens = generate(command["ids"], command["new_tokens"])
            reply = timed(tokens, 1)
        elif command["do"] == "decode":
            reply = timed(tokens, int(command["count"]))
        else:
            reply = {"peak_rss": peak_rss()}
        answers.say(reply)


def main(arguments: list[str]) -> int:
    """Load, say how long it took, then obey; a fault becomes a JSON line and exit code 1."""
    engine, folder, threads = arguments
    answers = Answers()
    try:
        started = time.perf_counter()
        generate = load(engine, Path(folder), int(threads))
        answers.say({"load_s": time.perf_counter() - started})
        serve(generate, answers)
    except (QwenOnnxError, OSError, ValueError, RuntimeError, ImportError) as error:
        answers.fail(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

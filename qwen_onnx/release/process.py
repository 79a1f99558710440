"""Start a guarded command and wait for it; see ``guard``."""

from __future__ import annotations

import os
import subprocess
import sys

from qwen_onnx.errors import ReleaseError
from qwen_onnx.processes.children import kill_group
from qwen_onnx.release.guard import Ended, Order


def run_guarded(order: Order, environment: dict[str, str] | None = None) -> Ended:
    """Run a command within its bounds.

    When this process dies, however it does, the guard's standard input closes and the guard ends everything.

    Raises:
        ReleaseError: the guard itself was killed; what it had started is ended.
    """
    command = [sys.executable, "-m", "qwen_onnx.release.guard", order.model_dump_json()]
    guard = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, **(environment or {})},
    )
    assert guard.stdin is not None
    assert guard.stdout is not None
    assert guard.stderr is not None
    try:
        # not communicate(), which would close standard input: the guard takes that for the end of this process
        said = guard.stdout.read()
        complaint = guard.stderr.read().decode(errors="replace").strip()
        code = guard.wait()
    except BaseException:
        # the guard ends its tree by itself
        guard.stdin.close()
        guard.wait()
        raise
    finally:
        kill_group(guard)
        for stream in (guard.stdin, guard.stdout, guard.stderr):
            stream.close()
    if code != 0 or not said:
        raise ReleaseError(f"the guard of a job died (exit {code})", where=complaint or str(order.log))
    return Ended.model_validate_json(said)

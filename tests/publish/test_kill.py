"""kill -9 while publishing: readers see the old package or the new one, and the next run sends only the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.fixtures.fake_hubs import sha256
from tests.publish.conftest import LARGEST, files_of, leftovers, publish, pull

# stops the run, as a debugger would, at the first call of a function that is named; the function itself is the real one
STOP_AT = """
import importlib, os, signal, sys
module, name = sys.argv.pop(1).split(":")
owner = importlib.import_module(module)
real = getattr(owner, name)
calls = int(sys.argv.pop(1))
def stopped(*arguments, **options):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
setattr(owner, name, stopped)
from qwen_onnx.cli.app import main
main()
"""


def killed_at(place: str, call: int, *arguments: object) -> None:
    """Run the command line and kill it -9 at the given call of ``place``."""
    command = [sys.executable, "-c", STOP_AT, place, str(call), *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL, (done.returncode, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("qwen_onnx.sources.transfer:_append", 5),
        ("qwen_onnx.sources.transfer:_compare", 5),
        ("qwen_onnx.publish.receive:put_in_place", 1),
        ("qwen_onnx.publish.receive:verify_any", 1),
        ("shutil:rmtree", 1),
    ],
)
def test_a_folder(passing_package: Path, newer_package: Path, tmp_path: Path, place: str, call: int) -> None:
    out = tmp_path / "out"
    publish(passing_package, out)
    killed_at(place, call, "publish", newer_package, out)
    assert files_of(out) in (files_of(passing_package), files_of(newer_package))
    publish(newer_package, out)
    assert files_of(out) == files_of(newer_package)
    assert not leftovers(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("qwen_onnx.publish.layout:_add_file", 4),
        ("qwen_onnx.publish.layout:_replace", 2),
        ("qwen_onnx.publish.layout:_replace", 4),
        ("qwen_onnx.publish.layout:Receipt", 1),
    ],
)
def test_a_layout(passing_package: Path, newer_package: Path, tmp_path: Path, place: str, call: int) -> None:
    address = f"oci:{tmp_path}/layout:v1"
    old = publish(passing_package, address)
    killed_at(place, call, "publish", newer_package, address)
    seen = pull(address, "--output", tmp_path / "seen")
    assert (seen["digest"] == old["digest"]) == (place != "qwen_onnx.publish.layout:Receipt")
    new = publish(newer_package, address)
    assert new["sent"] < (tmp_path / "seen/model.onnx.data").stat().st_size
    assert pull(address, "--output", tmp_path / "got", "--expect", new["digest"])["digest"] == new["digest"]
    assert {path.name for path in (tmp_path / "layout").iterdir()} == {"blobs", "index.json", "oci-layout"}


def killed_while(busy: Any, *arguments: object) -> None:
    """Start the command line and kill it -9 once ``busy()`` is true."""
    command = [sys.executable, "-m", "qwen_onnx.cli.app", *map(str, arguments)]
    child = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)
    try:
        for _ in range(600):
            if busy():
                break
            assert child.poll() is None, child.communicate()
            time.sleep(0.05)
        assert busy(), "it never came to the point where it is to be killed"
    finally:
        child.kill()
        child.communicate()


@pytest.mark.slow
def test_a_registry(registry: Any, passing_package: Path, tmp_path: Path) -> None:
    """Killed while the largest file is under way: no tag; what was whole is not sent again."""
    address = f"oci://127.0.0.1:{registry.port}/models/tiny:v1"
    registry.stalls = threading.Event()
    waiting = registry.stalls.wait
    stalled: list[float] = []
    registry.stalls.wait = lambda timeout=None: stalled.append(time.time()) or waiting(timeout)
    killed_while(lambda: stalled, "publish", passing_package, address)
    assert not registry.manifests
    finished = list(registry.uploaded)
    assert finished
    registry.stalls.set()
    time.sleep(0.2)
    known = set(registry.blobs)
    registry.uploaded.clear()
    publish(passing_package, address)
    assert not set(registry.uploaded) & known
    pull(address, "--output", tmp_path / "got")
    assert files_of(tmp_path / "got") == files_of(passing_package)


@pytest.mark.slow
def test_a_hub(hub: Any, passing_package: Path, tmp_path: Path) -> None:
    """Killed while a large file is under way: no commit; the large file that arrived is not sent again."""
    hub.stalls = threading.Event()
    killed_while(lambda: len(hub.puts) >= 1, "publish", passing_package, hub.address)
    assert len(hub.repositories["org/tiny"]) == 1, "nothing was committed"
    hub.stalls.set()
    arrived = set()
    for _ in range(100):
        arrived = set(hub.stored)
        if arrived:
            break
        time.sleep(0.05)
    assert arrived
    hub.puts.clear()
    publish(passing_package, hub.address)
    assert not arrived & set(hub.puts)
    pull(hub.address, "--output", tmp_path / "got")
    assert files_of(tmp_path / "got") == files_of(passing_package)
    assert sha256((passing_package / LARGEST).read_bytes()) in hub.stored

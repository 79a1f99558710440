"""The soak test itself: what it finds, and one minute of it on the tiny artifact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import SOUND, Memory, Tally


def test_growth_is_found_and_warm_up_is_left_out() -> None:
    warm = [(float(i), 1000 * i) for i in range(200)]
    grows = [(float(i), 1_000_000 + 100 * (i - 200)) for i in range(200, 1000)]
    memory = Memory.of(warm + grows)
    assert memory.growth_percent == pytest.approx(7.2, abs=0.3)
    assert memory.slope_percent_per_hour == pytest.approx(36, abs=1)


def test_peaks_are_no_growth() -> None:
    memory = Memory.of([(float(i), 3_000_000 if i % 10 == 0 else 1_000_000) for i in range(1000)])
    assert memory.growth_percent == 0
    assert memory.slope_percent_per_hour == 0


@pytest.mark.parametrize(("status", "fault", "wrong"), [(200, None, 0), (503, "busy", 0), (500, "x", 1), (200, "x", 1)])
def test_what_a_request_does_not_deserve_is_a_fault(status: int, fault: str | None, wrong: int) -> None:
    tally = Tally()
    tally.note("whole", status, SOUND, fault)
    assert len(tally.faults) == wrong
    assert tally.statuses["whole"] == {status: 1}


@pytest.mark.release
def test_a_minute_of_mixed_load(tiny_build: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", str(tiny_build), "--minutes", "1"]
    command += ["--clients", "4", "--most-growth", "1000", "--serve-option=--threads=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["faults"] == told["hung"] == 0, done.stdout
    assert {"200"} == set(told["statuses"]["afterwards"])
    for kind in ("whole", "streamed", "hang-up", "burst", "stopped", "seeded"):
        assert told["statuses"][kind]["200"] > 0
    assert set(told["statuses"]["bad"]) <= {"400", "404", "413", "429"}

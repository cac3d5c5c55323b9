"""What a trial costs the driver when nothing is to be computed: time, memory, and room in the file of its study."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from tests.bench.replay import replay

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TRIALS = 200


def test_a_trial_takes_a_tenth_of_a_second_of_the_driver_and_a_few_kilobytes_of_file(tmp_path: Path) -> None:
    """CPU time of all threads, and five times the target: the machine may be busy."""
    found = replay(tmp_path, TRIALS)
    assert found.reason == f"all {TRIALS} trials are drawn and judged"
    assert found.cpu_ms_per_trial < 500
    assert found.journal_kB_per_trial < 10


def test_the_driver_keeps_little_of_each_trial_in_memory(tmp_path: Path) -> None:
    """What Python holds, to the byte: 20 kB are the target. What waits for the tracker is bounded, and left out here."""
    tracemalloc.start()
    try:
        found = replay(tmp_path, TRIALS, tracked=False)
    finally:
        tracemalloc.stop()
    assert 0 < found.driver_kB_per_trial < 25

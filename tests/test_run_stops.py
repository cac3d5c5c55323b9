"""`ktray run` on Ray as a user interrupts it, and how SIGTERM stays ours there."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.searches import Home
from tests.source import ROOT
from tests.toys import HOG, toy_spec

SECONDS_TO_STOP = 10
CLUSTERS = {"kind": "clusters", "iterations": 5}
NAMED = {"a": 4, "b": 5, "c": 6}
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from ktray.scheduler.ray_session import RuntimeSettings, start, stop
from ktray.runs.interruption import restore_signal_handlers
heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
session = start(Path(sys.argv[1]), None, RuntimeSettings(cpus=1))
restore_signal_handlers()
os.kill(os.getpid(), signal.SIGTERM)
stop(session)
restore_signal_handlers()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
print(heard)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_on_ray_that_is_interrupted_ends_in_order_within_ten_seconds(tmp_path: Path, number: int) -> None:
    schedule = {"epochs": 500, "lr": 0.01, "batch_size": 8}
    student = {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": schedule}
    pairs = {name: toy_spec(teacher=HOG, student=student, transfer={**CLUSTERS, "k": k}) for name, k in NAMED.items()}
    experiment = tmp_path / "three.py"
    experiment.write_text(
        f"from ktray.spec import PairSpec\n\n\ndef pairs():\n"
        f"    return {{name: PairSpec.model_validate(pair) for name, pair in {pairs!r}.items()}}\n"
    )
    home = Home(tmp_path / "home")
    with home.start("run", experiment, "--concurrent", 1) as running:
        running.until(lambda: home.keys("pseudo_labels"))
        ended = running.signal(number)
        assert ended.code == 130, ended.err
        assert ended.seconds < SECONDS_TO_STOP
        assert "SIGTERM received" not in ended.err
        assert "Traceback" not in ended.err
        assert not home.keys("student")


@pytest.mark.slow
def test_sigterm_is_heard_without_a_word_while_ray_runs_and_after_it(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    assert result.stdout.split("\n")[-2] == "[15, 15]"
    assert "SIGTERM received" not in result.stderr

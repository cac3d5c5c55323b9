"""A driver that stands still for a while, alone or with all that it started, as on a laptop that is closed: it goes on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.chaos import spaces, verdict
from tests.chaos.supervisor import Round
from tests.searches import Home, until
from tests.test_search_faults import assert_whole, trains

# It sends a heartbeat every 2 seconds, is looked for after 15 without one, and a scheduler without drivers ends after 30.
FREEZE_SECONDS = 50.0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("frozen", ["the driver", "everything"])
def test_a_search_that_stood_still_goes_on_as_if_nothing_had_happened(frozen: str, tmp_path: Path) -> None:
    listed = spaces.fixed(tmp_path, size=1)
    undisturbed, home = Home(tmp_path / "calm" / "home"), Home(tmp_path / "frozen" / "home")
    assert undisturbed.run("search", listed, timeout=600).code == 0
    with home.start("search", listed) as running:
        running.until(lambda: trains(home))
        pids = [running.process.pid, *(running.processes() if frozen == "everything" else ())]
        for number, seconds in ((signal.SIGSTOP, FREEZE_SECONDS), (signal.SIGCONT, 0.0)):
            for pid in pids:
                os.kill(pid, number)
            time.sleep(seconds)
        ended = running.wait(600)
        until(lambda: not running.processes(), 20)
    assert ended.code == 0, ended.err
    assert "no progress" not in ended.err
    assert_whole(home, len(undisturbed.states()))
    assert not verdict.different_from_undisturbed(Round(home), undisturbed)

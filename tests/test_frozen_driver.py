"""A driver that stands still for so long that its scheduler ends without it, as on a laptop that slept."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.chaos import spaces, verdict
from tests.chaos.supervisor import Round
from tests.searches import Home, until
from tests.test_search_faults import assert_whole, trains

# Its lease lapses after 15 seconds, and after 30 the scheduler ends; the chaos tests freeze a driver for 20 at most.
FREEZE_SECONDS = 60.0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_driver_that_is_frozen_until_its_scheduler_has_ended_says_so_and_the_same_command_goes_on(tmp_path: Path) -> None:
    listed = spaces.fixed(tmp_path, size=1)
    undisturbed, frozen = Home(tmp_path / "calm" / "home"), Home(tmp_path / "frozen" / "home")
    assert undisturbed.run("search", listed).code == 0
    with frozen.start("search", listed) as running:
        running.until(lambda: trains(frozen))
        running.process.send_signal(signal.SIGSTOP)
        frozen_at = time.monotonic()
        until(lambda: not running.actors("Broker") and not running.actors("Worker"), 60)
        time.sleep(max(0.0, frozen_at + FREEZE_SECONDS - time.monotonic()))
        running.process.send_signal(signal.SIGCONT)
        ended = running.wait()
        until(lambda: not running.processes(), 20)
    assert ended.code == 5, ended.err
    assert "Traceback" not in ended.err
    assert "the scheduler has ended; the same command goes on from here" in ended.err.splitlines()[-1]
    before = frozen.artifacts()
    again = frozen.run("search", listed)
    assert again.code == 0, again.err
    assert_whole(frozen, len(undisturbed.states()))
    assert {key: frozen.artifacts()[key] for key in before} == before
    assert not verdict.different_from_undisturbed(Round(frozen), undisturbed)

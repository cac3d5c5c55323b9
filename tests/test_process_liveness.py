"""Processes that only wait: one that stands still is told once, one that is heard of never."""

from __future__ import annotations

from ktray.scheduler.liveness import Process, ProcessLiveness

ONE, TWO = Process("node", 1, 10.0), Process("node", 2, 10.0)


def test_who_is_silent_for_too_long_is_told_once() -> None:
    liveness = ProcessLiveness(15.0)
    liveness.heartbeat(ONE, 0.0)
    liveness.heartbeat(TWO, 10.0)
    assert liveness.remove_silent(15.0) == []
    assert liveness.remove_silent(16.0) == [ONE]
    assert liveness.remove_silent(17.0) == []
    assert liveness.alive() == [TWO]


def test_silence_while_nobody_listened_proves_nothing() -> None:
    liveness = ProcessLiveness(15.0)
    liveness.heartbeat(ONE, 0.0)
    liveness.excuse_silence(100.0)
    assert liveness.remove_silent(114.0) == []
    assert liveness.remove_silent(116.0) == [ONE]


def test_after_a_restart_who_was_known_is_given_its_time_and_who_spoke_since_is_not_set_back() -> None:
    liveness = ProcessLiveness(15.0)
    liveness.heartbeat(TWO, 105.0)
    liveness.restore([ONE, TWO], 100.0)
    assert liveness.remove_silent(116.0) == [ONE]
    assert liveness.remove_silent(119.0) == []

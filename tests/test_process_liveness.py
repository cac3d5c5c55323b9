"""Processes of trials: one that is silent for too long is returned once, one that sends heartbeats never."""

from __future__ import annotations

from ktray.scheduler.fault_tolerance import ProcessId, ProcessLiveness

ONE, TWO = ProcessId("node", 1, 10.0), ProcessId("node", 2, 10.0)


def test_a_process_that_is_silent_for_too_long_is_returned_once() -> None:
    liveness = ProcessLiveness(15.0)
    liveness.record_heartbeat(ONE, 0.0)
    liveness.record_heartbeat(TWO, 10.0)
    assert liveness.remove_silent(15.0) == []
    assert liveness.remove_silent(16.0) == [ONE]
    assert liveness.remove_silent(17.0) == []
    assert liveness.alive() == [TWO]


def test_silence_while_nobody_listened_proves_nothing() -> None:
    liveness = ProcessLiveness(15.0)
    liveness.record_heartbeat(ONE, 0.0)
    liveness.compensate_pause(100.0)
    assert liveness.remove_silent(114.0) == []
    assert liveness.remove_silent(116.0) == [ONE]


def test_after_a_restart_known_processes_get_the_full_timeout_and_newer_heartbeats_stay() -> None:
    liveness = ProcessLiveness(15.0)
    liveness.record_heartbeat(TWO, 105.0)
    liveness.restore([ONE, TWO], 100.0)
    assert liveness.remove_silent(116.0) == [ONE]
    assert liveness.remove_silent(119.0) == []

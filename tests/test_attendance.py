"""Processes that only wait: one that stands still is told once, one that is heard of never."""

from __future__ import annotations

from ktray.scheduler.process_liveness import Process, ProcessLiveness

ONE, TWO = Process("node", 1, 10.0), Process("node", 2, 10.0)


def test_who_is_silent_for_too_long_is_told_once() -> None:
    attendance = ProcessLiveness(15.0)
    attendance.beat(ONE, 0.0)
    attendance.beat(TWO, 10.0)
    assert attendance.silent(15.0) == []
    assert attendance.silent(16.0) == [ONE]
    assert attendance.silent(17.0) == []
    assert attendance.present() == [TWO]


def test_silence_while_nobody_listened_proves_nothing() -> None:
    attendance = ProcessLiveness(15.0)
    attendance.beat(ONE, 0.0)
    attendance.forgive(100.0)
    assert attendance.silent(114.0) == []
    assert attendance.silent(116.0) == [ONE]


def test_after_a_restart_who_was_known_is_given_its_time_and_who_spoke_since_is_not_set_back() -> None:
    attendance = ProcessLiveness(15.0)
    attendance.beat(TWO, 105.0)
    attendance.recall([ONE, TWO], 100.0)
    assert attendance.silent(116.0) == [ONE]
    assert attendance.silent(119.0) == []

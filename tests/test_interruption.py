"""How work ends before its end: by signals, by a terminal that closes, and by a Ray that ends on its own."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ktray.errors import SearchStopped, StageFailed, UserError
from ktray.runs import interruption as module
from ktray.runs.interruption import Interruption, discard_output_to_closed, run_concurrently, run_until_ended, stop_on_signals
from tests.source import ROOT

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
GONE = "its GCS (process 4711) is gone"


@pytest.fixture
def forced() -> list[float]:
    return []


@pytest.fixture
def interruption(forced: list[float]) -> Interruption:
    """Of a program whose processes must be stopped in order."""
    made = Interruption(lambda: forced.append(time.monotonic()))
    made.needs_cleanup = True
    return made


class Scheduler:
    """Nobody waits on it."""

    def cancel_requests(self, waiter: str) -> None:
        """Nothing to cancel."""


def wait_forever() -> None:
    threading.Event().wait()


# ---- signals


@pytest.mark.parametrize("again", SIGNALS)
@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_requests_an_orderly_end_and_the_second_one_whichever_it_is_an_immediate_one(
    number: int, again: int, interruption: Interruption, forced: list[float]
) -> None:
    said: list[str] = []
    with stop_on_signals(interruption, said.append):
        signal.raise_signal(number)
        assert interruption.is_requested()
        assert interruption.must_end()
        assert forced == []
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(again)
        assert len(forced) == 1
    assert said == ["ktray: stopping; once more ends at once"]


@pytest.mark.parametrize("number", SIGNALS)
def test_before_anything_runs_a_signal_ends_the_work_at_once(number: int) -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signals(Interruption(), lambda text: None):
        signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_handlers_from_before_are_back_afterwards(number: int, interruption: Interruption) -> None:
    before = signal.getsignal(number)
    with stop_on_signals(interruption, lambda text: None):
        assert signal.getsignal(number) is not before
    assert signal.getsignal(number) is before


def test_a_hangup_that_is_ignored_as_below_nohup_stays_ignored(interruption: Interruption) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(interruption, lambda text: None):
            signal.raise_signal(signal.SIGHUP)
            assert not interruption.is_requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def ask(interruption: Interruption) -> None:
    interruption.request()


def lose(interruption: Interruption) -> None:
    interruption.lose(GONE)


@pytest.mark.parametrize("cause", [ask, lose])
def test_an_orderly_end_that_takes_too_long_is_forced(
    cause: Callable[[Interruption], None], interruption: Interruption, forced: list[float]
) -> None:
    interruption.force_after = 0.05
    with stop_on_signals(interruption, lambda text: None):
        cause(interruption)
        end = time.monotonic() + 5
        while not forced:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_an_orderly_end_in_time_is_not_forced(interruption: Interruption, forced: list[float]) -> None:
    interruption.force_after = 0.2
    with stop_on_signals(interruption, lambda text: None):
        interruption.request()
    time.sleep(0.4)
    assert forced == []


def test_a_python_session_goes_on_after_a_second_request() -> None:
    session = Interruption()
    session.needs_cleanup = True
    session.request()
    with pytest.raises(KeyboardInterrupt):
        session.request()
    assert not session.ends_process


# ---- a terminal that closes

CHILD = """
import sys, time
from ktray.runs.interruption import Interruption, stop_on_signals
made = Interruption()
made.needs_cleanup = True
with stop_on_signals(made, lambda text: print(text, file=sys.stderr, flush=True)):
    print("ready", flush=True)
    while not made.is_requested():
        time.sleep(0.05)
    print("the summary", flush=True)
    print("and why", file=sys.stderr, flush=True)
open(sys.argv[1], "w").write("ended in order")
sys.exit(7)
"""


def test_a_program_whose_terminal_closes_ends_in_order_with_its_own_exit_code(tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", CHILD, str(ended)])
    os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert ended.read_text() == "ended in order"


def test_output_goes_nowhere_once_its_terminal_is_closed_and_stays_where_it_is_before() -> None:
    terminal, screen = pty.openpty()
    discard_output_to_closed([screen])
    os.write(screen, b"seen")
    assert os.read(terminal, 100) == b"seen"
    os.close(terminal)
    with pytest.raises(OSError, match="Input/output error"):
        os.write(screen, b"lost")
    discard_output_to_closed([screen])
    os.write(screen, b"discarded")
    os.close(screen)


# ---- work that waits for Ray


def test_work_in_a_thread_gives_its_result_or_raises_its_error(interruption: Interruption) -> None:
    assert run_until_ended(lambda: 7, interruption) == 7
    with pytest.raises(StageFailed):
        run_until_ended(lambda: fail(StageFailed("images-1", "ValueError: no")), interruption)


def fail(error: BaseException) -> None:
    raise error


def test_work_that_waits_for_a_ray_that_is_gone_is_left_behind(
    interruption: Interruption, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOSS_SECONDS", 0.1)
    threading.Timer(0.1, interruption.lose, [GONE]).start()
    with pytest.raises(SearchStopped, match=r"Ray has ended: its GCS \(process 4711\) is gone; the same command goes on"):
        run_until_ended(wait_forever, interruption)


@pytest.mark.parametrize(
    "error", [RuntimeError("Ray is confused"), SearchStopped("the scheduler has ended"), SystemExit(0), KeyError("actor")]
)
def test_an_error_of_a_ray_that_is_gone_is_its_end_even_if_the_error_comes_first(
    error: BaseException, interruption: Interruption
) -> None:
    threading.Timer(0.3, interruption.lose, [GONE]).start()
    with pytest.raises(SearchStopped, match="Ray has ended"):
        run_until_ended(lambda: fail(error), interruption)


@pytest.mark.parametrize("error", [RuntimeError("Ray is confused"), SearchStopped("the scheduler has ended")])
def test_an_error_after_a_request_is_its_consequence(error: BaseException, interruption: Interruption) -> None:
    interruption.request()
    with pytest.raises(KeyboardInterrupt):
        run_until_ended(lambda: fail(error), interruption)


def test_an_error_of_the_user_is_raised_without_waiting_for_anything(interruption: Interruption) -> None:
    began = time.monotonic()
    with pytest.raises(UserError):
        run_until_ended(lambda: fail(UserError("no such cluster")), interruption)
    assert time.monotonic() - began < 1.5


def test_work_that_does_not_return_after_a_request_is_left_behind(
    interruption: Interruption, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLEANUP_SECONDS", 0.1)
    threading.Timer(0.1, interruption.request).start()
    with pytest.raises(KeyboardInterrupt):
        run_until_ended(wait_forever, interruption)


def test_a_request_counts_more_than_a_ray_that_ends_with_it(
    interruption: Interruption, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLEANUP_SECONDS", 0.1)
    interruption.lose(GONE)
    interruption.request()
    with pytest.raises(KeyboardInterrupt):
        run_until_ended(wait_forever, interruption)
    assert run_until_ended(lambda: "returned in time", interruption) == "returned in time"


def test_results_come_in_the_order_of_the_names_however_many_run_at_a_time() -> None:
    for concurrent in (1, 2, 7):
        found = run_concurrently(Scheduler(), "abcde", str.upper, str, concurrent, Interruption())
        assert found == ["A", "B", "C", "D", "E"]


def test_the_first_failure_in_the_order_of_the_names_is_raised() -> None:
    def work(name: str) -> None:
        time.sleep(0.2 if name == "a" else 0.0)
        raise StageFailed(name, "ValueError: no")

    with pytest.raises(StageFailed, match="a failed"):
        run_concurrently(Scheduler(), "ab", work, str, 2, Interruption())


def test_what_runs_concurrently_ends_with_ray_and_its_threads_hold_up_no_exit() -> None:
    program = f"""
import threading
from ktray.errors import SearchStopped
from ktray.runs import interruption
class Scheduler:
    def cancel_requests(self, waiter): pass
interruption.LOSS_SECONDS = interruption.CLEANUP_SECONDS = 0.1
made = interruption.Interruption()
threading.Timer(0.1, made.lose, [{GONE!r}]).start()
try:
    interruption.run_concurrently(Scheduler(), "abc", lambda name: threading.Event().wait(), str, 2, made)
except SearchStopped as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.stdout.startswith("Ray has ended"), ended.stderr
    assert ended.returncode == 0

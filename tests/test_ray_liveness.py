"""Whether Ray still runs: processes that end are noticed, processes that stand still are not taken for dead."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ktray.scheduler import ray_liveness
from ktray.scheduler.ray_liveness import (
    make_cluster_failure_check,
    make_own_ray_failure_check,
    make_process_failure_check,
    watch,
)
from tests.searches import until

SLEEP = "import time; time.sleep(600)"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", SLEEP])
    yield process
    process.kill()
    process.wait()


def test_a_process_that_runs_or_stands_still_is_alive_and_one_that_was_killed_is_not(child: subprocess.Popen[bytes]) -> None:
    failure = make_process_failure_check({"GCS": psutil.Process(child.pid)})
    assert failure() is None
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED, 10)
    assert failure() is None
    child.kill()
    assert until(failure, 10) == f"its GCS (process {child.pid}) is gone"  # a zombie, which nobody has waited for
    child.wait()
    assert failure() == f"its GCS (process {child.pid}) is gone"


def test_a_process_lives_on_when_the_clock_of_its_machine_is_set(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = psutil.Process(child.pid)
    failure = make_process_failure_check({"GCS": watched})
    assert failure() is None
    created = watched.create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created if process is watched else created + 1)
    monkeypatch.setattr(psutil.Process, "is_running", lambda process: False)  # which compares them exactly
    assert failure() is None
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created if process is watched else created + 60)
    assert failure() == f"its GCS (process {child.pid}) is gone", "another process has its id"


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Callable[[str, str], subprocess.Popen[bytes]]]:
    """Starts programs with the names of Ray's; `code` is for a shell."""
    started = []

    def start(name: str, code: str) -> subprocess.Popen[bytes]:
        path = tmp_path / name
        if not path.exists():
            path.write_bytes(Path("/bin/bash").read_bytes())
            path.chmod(0o755)
        started.append(subprocess.Popen([str(path), "-c", code]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


WAITS = "read < <(sleep 600)"  # in this process, not in one that it starts


@pytest.mark.parametrize(("program", "name"), [("gcs_server", "GCS"), ("raylet", "raylet")])
@pytest.mark.parametrize("has_started", [False, True])
def test_our_own_ray_is_watched_from_when_it_is_there_and_an_earlier_one_is_not(
    has_started: bool, program: str, name: str, programs: Callable[[str, str], subprocess.Popen[bytes]]
) -> None:
    earlier = programs(program, WAITS)
    failure = make_own_ray_failure_check(lambda: has_started)
    earlier.kill()
    assert failure() is None
    ours, other = programs(program, WAITS), programs("log_monitor", WAITS)
    until(lambda: psutil.Process(ours.pid).name() == program, 10)
    assert failure() is None
    other.kill()
    assert failure() is None
    ours.kill()
    assert until(failure, 10) == f"its {name} (process {ours.pid}) is gone"


@pytest.mark.parametrize("has_started", [False, True])
def test_a_ray_that_does_not_start_says_why_itself_and_one_that_was_killed_before_it_was_seen_counts(
    has_started: bool, programs: Callable[[str, str], subprocess.Popen[bytes]]
) -> None:
    failure = make_own_ray_failure_check(lambda: has_started)
    ended = programs("raylet", "exit 1")
    until(lambda: psutil.Process(ended.pid).status() == psutil.STATUS_ZOMBIE, 10)
    assert failure() == (f"its raylet (process {ended.pid}) is gone" if has_started else None)
    killed = programs("gcs_server", "kill -9 $$")
    until(lambda: psutil.Process(killed.pid).status() == psutil.STATUS_ZOMBIE, 10)
    assert f"its GCS (process {killed.pid}) is gone" in str(failure())


def test_a_cluster_whose_gcs_no_longer_answers_is_gone_after_a_while_and_not_if_it_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_liveness, "UNREACHABLE_SECONDS", 3 * ray_liveness.CHECK_SECONDS)
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    failure = make_cluster_failure_check(f"127.0.0.1:{port}", "f" * 56)
    assert failure() is None
    server.close()
    assert [failure() for _ in range(2)] == [None, None]
    server = socket.create_server(("127.0.0.1", port))
    assert failure() is None
    server.close()
    assert [failure() for _ in range(4)][-1] == f"its GCS at 127.0.0.1:{port} has not answered for 1.5 s"


def test_the_end_is_reported_once_and_not_after_the_watch_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_liveness, "CHECK_SECONDS", 0.02)
    reports: list[str] = []
    reported = threading.Event()
    watch(lambda: "it is gone", lambda cause: (reports.append(cause), reported.set()))
    assert reported.wait(10)
    time.sleep(0.1)
    assert reports == ["it is gone"]
    end = watch(lambda: None, reports.append)
    end()
    assert reports == ["it is gone"]

"""What a killed driver leaves of its Ray is ended by the process beside it, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ktray.scheduler.orphan_cleanup import end_ray_processes, ray_processes
from ktray.scheduler.ray_liveness import is_process_alive
from tests.searches import until
from tests.source import ROOT

SLEEP = "import time; time.sleep(600)"
IGNORES = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
DRIVER = """
import sys, time
from pathlib import Path
from ktray.scheduler.ray_session import _start_cleanup_process
print(_start_cleanup_process(Path(sys.argv[1])).pid, flush=True)
time.sleep(600)
"""
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "ktray-1a2b"
    (made / "session" / "logs").mkdir(parents=True)
    return made


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python processes, and kills them in the end."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*arguments: object, log: Path | None = None, code: str = SLEEP) -> subprocess.Popen[bytes]:
        with open(log or os.devnull, "wb") as out:
            started.append(subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=out, stderr=out))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_the_processes_of_a_session_are_those_with_its_folder_in_their_command_line_or_with_a_log_in_it(
    folder: Path, start: Start
) -> None:
    ours = [
        start(folder),
        start(f"--session-dir={folder}/session"),
        start(log=folder / "session" / "logs" / "worker-1.out"),  # Ray replaces the command line of a worker
        start(folder, code=IGNORES),
    ]
    others = [start(), start(f"{folder}c"), start(log=folder.parent / "ktray-1a2b.log"), start(folder.parent)]
    os.kill(ours[0].pid, signal.SIGSTOP)
    time.sleep(0.5)
    assert {process.pid for process in ray_processes(str(folder))} == {process.pid for process in ours}
    end_ray_processes(str(folder), grace=0.5)
    assert not [process.pid for process in ours if psutil.pid_exists(process.pid)]
    assert [process.poll() for process in others] == [None] * len(others)
    assert ray_processes(str(folder)) == []


def test_a_process_that_ends_by_itself_in_time_is_not_killed(folder: Path, start: Start) -> None:
    ended = folder.parent / "ended"
    start(folder, ended, code="import sys, time; time.sleep(1.0); open(sys.argv[2], 'w').close()")
    end_ray_processes(str(folder), grace=60.0)
    assert ended.exists()


@pytest.mark.parametrize("frozen", [False, True])
def test_after_kill_9_of_the_driver_nothing_of_its_session_is_left_and_its_folder_is_gone(
    frozen: bool, folder: Path, start: Start
) -> None:
    left = [start(folder), start(log=folder / "session" / "logs" / "worker-1.out", code=IGNORES)]
    if frozen:
        os.kill(left[0].pid, signal.SIGSTOP)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(folder)], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert driver.stdout is not None
    cleanup = psutil.Process(int(driver.stdout.readline()))
    assert os.getpgid(cleanup.pid) != os.getpgid(driver.pid)
    until(lambda: all(blocks_or_ignores(cleanup, number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)), 20)
    assert [process.poll() for process in left] == [None, None], "nothing happens while the driver lives"
    driver.kill()
    driver.wait()
    began = time.monotonic()
    for process in left:
        process.wait(15)
    until(lambda: not cleanup.is_running() or cleanup.status() == psutil.STATUS_ZOMBIE, 15)
    assert not folder.exists()
    assert time.monotonic() - began < 15


def blocks_or_ignores(process: psutil.Process, number: int) -> bool:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    ignored = next(int(line.split()[1], 16) for line in lines if line.startswith("SigIgn"))
    return bool(ignored >> (number - 1) & 1)


def test_a_process_exists_while_it_runs_or_stands_still_and_not_as_a_zombie_or_under_the_id_of_an_earlier_one(
    start: Start,
) -> None:
    process = start()
    created = psutil.Process(process.pid).create_time()
    assert is_process_alive(process.pid, created)
    assert not is_process_alive(process.pid, created - 100)
    os.kill(process.pid, signal.SIGSTOP)
    assert is_process_alive(process.pid, created)
    process.kill()
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, 10)
    assert not is_process_alive(process.pid, created)
    process.wait()
    assert not is_process_alive(process.pid, created)

"""The process beside a driver that ends what is left of its Ray if the driver is killed. Run as a file; imports no ktray.

Most of Ray's processes end with their driver by themselves, but its two agents wait a minute for a GCS that is gone.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from contextlib import suppress

import psutil

GRACE_SECONDS = 2.0  # in which processes may end by themselves
KILL_SECONDS = 10.0  # in which those that are left are killed, again and again: a process may just have started another


def ray_processes(temporary: str) -> list[psutil.Process]:
    """The processes of the Ray with this temporary folder: it is in their command line, or they write a log below it.

    Only their open files tell of a worker whose raylet is gone, for Ray replaces the command line of its workers.
    """
    mine, found = psutil.Process(), []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != mine.pid and process.uids().real == mine.uids().real and _uses_folder(process, temporary):
                found.append(process)
    return found


def end_ray_processes(temporary: str, grace: float = GRACE_SECONDS) -> None:
    """Wait `grace` seconds for the processes of a Ray to end, then kill those that are left."""
    began = time.monotonic()
    while (left := ray_processes(temporary)) and (waited := time.monotonic() - began) < grace + KILL_SECONDS:
        for process in left if waited > grace else ():
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=0.5)


def _uses_folder(process: psutil.Process, temporary: str) -> bool:
    if process.status() == psutil.STATUS_ZOMBIE:
        return False
    below = f"{temporary}/"
    if any(argument == temporary or below in argument for argument in process.cmdline()):
        return True
    return any(file.path.startswith(below) for file in process.open_files())


def main() -> None:
    """Read the temporary folder from stdin, then wait for its end: it is a pipe that closes when the driver ends."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    temporary = sys.stdin.readline().rstrip("\n")
    sys.stdin.read()
    if temporary:
        end_ray_processes(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main()

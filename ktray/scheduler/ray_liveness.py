"""Whether the Ray that a driver is connected to still runs. A thread asks twice a second, and reports the end once.

Ray itself says nothing for a minute when its GCS is gone, and nothing at all when the raylet of the driver's node is.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

import psutil

CHECK_SECONDS = 0.5
CONNECT_SECONDS = 5.0
SAME_PROCESS_SECONDS = 5.0  # two readings of when a process was created may differ, because clocks are adjusted
UNREACHABLE_SECONDS = 20.0  # of a cluster's GCS, until it counts as gone: it may be restarted
ESSENTIAL = {"GCS": "gcs_server", "raylet": "raylet/raylet"}  # name in a sentence -> end of the program's path

FailureCheck = Callable[[], str | None]
"""What has ended, such as ``its GCS (process 4711) is gone``; None while nothing has."""


def watch(failure: FailureCheck, report: Callable[[str], None]) -> Callable[[], None]:
    """Call `report` once with the first answer of `failure`, in a thread; returns the function that ends it."""
    over = threading.Event()

    def check() -> None:
        while not over.wait(CHECK_SECONDS):
            found = failure()
            if found is not None and not over.is_set():
                report(found)
                return

    thread = threading.Thread(target=check, daemon=True, name="ray-liveness")
    thread.start()

    def end() -> None:
        over.set()
        if threading.current_thread() is not thread:
            thread.join(timeout=2 * CONNECT_SECONDS)

    return end


def has_process_ended(process: psutil.Process) -> bool:
    """Whether a process is gone, or a zombie that nobody has waited for."""
    try:
        return not is_process_alive(process.pid, process.create_time())
    except psutil.NoSuchProcess:  # it ended before anybody asked when it was created
        return True


def is_process_alive(pid: int, created: float) -> bool:
    """Whether this process runs or stands still, and is no later one with its id.

    `psutil.Process.is_running` compares creation times exactly, and so takes a living process for gone after a clock was set.
    """
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - created) < SAME_PROCESS_SECONDS
    except psutil.NoSuchProcess:
        return False


def make_process_failure_check(processes: Mapping[str, psutil.Process]) -> FailureCheck:
    """Watches processes of this machine, by their names in a sentence."""

    def failure() -> str | None:
        ended = [
            f"its {name} (process {process.pid}) is gone" for name, process in processes.items() if has_process_ended(process)
        ]
        return " and ".join(ended) or None

    return failure


def make_own_ray_failure_check(has_started: Callable[[], bool]) -> FailureCheck:
    """Watches the GCS and the raylet that this process starts from now on.

    Args:
        has_started: whether all of Ray runs. Before that only a process that was killed counts: of one that ends by itself Ray
            says why.
    """
    earlier = {process.pid for process in psutil.Process().children()}  # a Ray that this process had before
    found: dict[str, psutil.Process] = {}

    def failure() -> str | None:
        if len(found) < len(ESSENTIAL):
            found.update(_essential_processes(process for process in psutil.Process().children() if process.pid not in earlier))
        counted = {name: process for name, process in found.items() if has_started() or _was_killed(process)}
        return make_process_failure_check(counted)()

    return failure


def _essential_processes(children: Iterable[psutil.Process]) -> dict[str, psutil.Process]:
    """The essential ones among these processes; a zombie has a name, and no command line."""
    found: dict[str, psutil.Process] = {}
    for process in children:
        with suppress(psutil.Error):
            found |= {name: process for name, part in ESSENTIAL.items() if process.name() == part.rpartition("/")[2]}
    return found


def _was_killed(child: psutil.Process) -> bool:
    """Whether a child of this process was ended by a signal; it stays a zombie for whoever waits for it."""
    try:
        ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return False
    return ended is not None and ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED)


def make_cluster_failure_check(address: str, node: str) -> FailureCheck:
    """Watches a cluster's GCS, by connecting to it, and the raylet of this driver's node.

    Args:
        address: HOST:PORT of the GCS.
        node: id of the node to which this process is connected.
    """
    raylet_failure, host, port = make_process_failure_check(_raylet_of(node)), *address.rpartition(":")[::2]
    silent = 0.0

    def failure() -> str | None:
        nonlocal silent
        began = time.monotonic()
        answers = _accepts_connections(host.strip("[]"), int(port))
        asked = min(time.monotonic() - began, CONNECT_SECONDS)  # no longer, even if this process was paused meanwhile
        silent = 0.0 if answers else silent + CHECK_SECONDS + asked
        if silent > UNREACHABLE_SECONDS:
            return f"its GCS at {address} has not answered for {UNREACHABLE_SECONDS:g} s"
        return raylet_failure()

    return failure


def _accepts_connections(host: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _raylet_of(node: str) -> dict[str, psutil.Process]:
    """The raylet of this node, which has its id in its command line, if it is a process that we may look at."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            arguments = process.cmdline()
            if arguments and arguments[0].endswith(ESSENTIAL["raylet"]) and any(node in argument for argument in arguments):
                return {"raylet": process}
    return {}

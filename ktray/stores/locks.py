"""File locks for starting Ray on a home, computing on a store and driving a study; released when the process ends."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import psutil

from ktray.errors import UserError

FRESH_SECONDS = 10.0  # a status written longer ago says nothing about now


class FileLock:
    """A locked file; it stays locked until `release`, the end of a `with` block or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        self._has_owner = False

    def note_owner(self, owner: str) -> None:
        """Write the owner to the file; `release` clears it."""
        assert self._descriptor is not None, "a released lock has no owner"
        self._has_owner = True
        os.ftruncate(self._descriptor, os.pwrite(self._descriptor, f"{owner}\n".encode(), 0))

    def release(self) -> None:
        """Release the lock; further calls do nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        if self._has_owner:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
        with suppress(OSError):
            os.close(descriptor)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def try_lock(path: Path, owner: str) -> FileLock | None:
    """The exclusive lock on this file, or None at once if another process holds it.

    Args:
        path: the lock file; created with its folder if needed, never removed.
        owner: written to the file, for the message to processes that find it locked; see `lock_owner`.
    """
    lock = _flock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if lock is not None:
        try:
            lock.note_owner(owner)
        except OSError:
            lock.release()
            raise
    return lock


def wait_for_lock(path: Path) -> FileLock:
    """The exclusive lock on this file, which is created if need be; waits until no other process or thread holds it."""
    lock = _flock(path, fcntl.LOCK_EX)
    assert lock is not None, "a blocking flock returns only when it has the lock"
    return lock


def lock_owner(path: Path) -> str:
    """The owner recorded in a lock file; empty if there is none."""
    return path.read_text().strip()


def name_of_this_process() -> str:
    """This process as the owner of a lock that other machines see, too; `lock_holder` reads it."""
    return f"process {os.getpid()} on {socket.gethostname()}"


class LockHolder(NamedTuple):
    """The process that holds a lock: its name is such as ``process 4711 on host``, `since` in seconds since 1970."""

    pid: int
    name: str
    since: float


def lock_holder(path: Path, written: Path) -> LockHolder | None:
    """The process that holds a lock, by what the file says; trying the lock itself would be in its way.

    Args:
        path: a lock file with a `name_of_this_process` as its owner.
        written: a file that the holder writes every few seconds: all that is known of a process on another machine.
    """
    try:
        owner, since = lock_owner(path), path.stat().st_mtime
    except OSError:
        return None
    match = re.fullmatch(r"process (\d+) on (.+)", owner)
    if match is None:
        return None
    holder = LockHolder(int(match[1]), owner, since)
    if match[2] != socket.gethostname():
        return holder if _age(written) < FRESH_SECONDS else None
    with suppress(psutil.Error):
        process = psutil.Process(holder.pid)
        if process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= since + 1:
            return holder
    return None


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return float("inf")


def lock_home(home: Path) -> FileLock:
    """The lock that a session needs to start Ray on this home; only one can hold it.

    Raises:
        UserError: another process holds it; the message names its process id.
    """
    path = home / "lock"
    lock = try_lock(path, str(os.getpid()))
    if lock is None:
        raise UserError(
            f"the home {home} is in use by process {lock_owner(path) or 'unknown'}",
            instead="Wait for it, stop it, or choose another home with --home. To run several searches that share one Ray "
            "cluster and their stages, use `ray start --head`, and --address auto for each search.",
        )
    return lock


def lock_store_shared(url: str) -> FileLock | None:
    """The shared lock for computing on a store; None if the store is not a directory."""
    path = _store_lock(url)
    return _flock(path, fcntl.LOCK_SH) if path else None


def try_lock_store(url: str) -> FileLock | None:
    """The exclusive lock for sweeping a store; None if a process is computing on it."""
    path = _store_lock(url)
    return _flock(path, fcntl.LOCK_EX | fcntl.LOCK_NB) if path else None


def _flock(path: Path, operation: int) -> FileLock | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not inheritable, or a Ray process that outlives its driver would keep the lock.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return FileLock(descriptor)


def _store_lock(url: str) -> Path | None:
    scheme, separator, rest = url.partition("://")
    if separator and scheme != "file":
        return None
    return Path(rest if separator else url) / ".lock"

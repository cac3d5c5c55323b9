"""File locks for starting Ray on a home, computing on a store and driving a study; released when the process ends."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ktray.errors import UserError


class FileLock:
    """A locked file; it stays locked until `release`, the end of a `with` block or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Release the lock; further calls do nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
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
            path.write_text(f"{owner}\n")
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

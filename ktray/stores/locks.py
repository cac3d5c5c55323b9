"""File locks: who may start Ray on a home, who computes on a store, who drives a study. They end with their process."""

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
        """Unlock; a second time does nothing."""
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
        path: the lock file; it and its folder are created, and the file is never removed.
        owner: written into the file for whoever is refused; see `lock_owner`.
    """
    lock = _flock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if lock is not None:
        try:
            path.write_text(f"{owner}\n")
        except OSError:
            lock.release()
            raise
    return lock


def lock_owner(path: Path) -> str:
    """What the process that holds this lock wrote into it; empty if it wrote nothing."""
    return path.read_text().strip()


def lock_home(home: Path) -> FileLock:
    """The lock of the one session that may start Ray on this home.

    Raises:
        UserError: another process holds it; the message names its process id.
    """
    path = home / "lock"
    lock = try_lock(path, str(os.getpid()))
    if lock is None:
        raise UserError(
            f"the home {home} is in use by the process {lock_owner(path) or 'unknown'}",
            instead="Wait for it, stop it, or give another home with --home. Several searches at once share one Ray and "
            "compute nothing twice: `ray start --head`, and --address auto for each of them.",
        )
    return lock


def lock_store_shared(url: str) -> FileLock | None:
    """The shared lock of a process that computes on this store; None if the store is not a directory."""
    path = _store_lock(url)
    return _flock(path, fcntl.LOCK_SH) if path else None


def try_lock_store(url: str) -> FileLock | None:
    """The exclusive lock on a store on which nobody computes, to be held while sweeping it; None if somebody does."""
    path = _store_lock(url)
    return _flock(path, fcntl.LOCK_EX | fcntl.LOCK_NB) if path else None


def _flock(path: Path, operation: int) -> FileLock | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not inheritable: a Ray process that outlives its driver must not keep the lock.
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

"""Locks on a home and on a store: files that the operating system unlocks when their process dies."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from ktray.errors import UserError


class Lock:
    """A locked file; it stays locked until `release` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Unlock; a second time does nothing."""
        with suppress(OSError):
            os.close(self._descriptor)


def _locked(path: Path, how: int) -> Lock | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not inheritable: a Ray process that outlives its driver must not keep the lock.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return Lock(descriptor)


def hold_home(home: Path) -> Lock:
    """The one session that may start Ray on this home.

    Raises:
        UserError: another process holds it; the message names its pid.
    """
    path = home / "lock"
    lock = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if lock is None:
        pid = path.read_text().strip() or "unknown"
        raise UserError(
            f"the home {home} is in use by the process {pid}",
            instead="Wait for it, stop it, or give another home with --home. Several searches at once share one Ray and "
            "compute nothing twice: `ray start --head`, and --address auto for each of them.",
        )
    path.write_text(f"{os.getpid()}\n")
    return lock


def hold_store(url: str) -> Lock | None:
    """A shared lock of who computes on a store; None if the store is not a directory."""
    path = _store_lock(url)
    return _locked(path, fcntl.LOCK_SH) if path else None


def alone_on_store(url: str) -> Lock | None:
    """An exclusive lock while nobody computes on this store, else None: hold it while sweeping."""
    path = _store_lock(url)
    return _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) if path else None


def _store_lock(url: str) -> Path | None:
    scheme, separator, rest = url.partition("://")
    if separator and scheme != "file":
        return None
    return Path(rest if separator else url) / ".lock"

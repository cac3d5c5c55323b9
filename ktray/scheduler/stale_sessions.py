"""Folders of sessions that were killed: HOME/ray lists where Ray of this home kept its sockets and logs."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

from ktray.errors import UserError
from ktray.stores.locks import lock_home

TRIES = 30  # to remove a folder that a process of Ray, in its last moments, writes into; a tenth of a second between two


def tidy(home: Path) -> None:
    """Remove what was left unless a session uses this home: for who needs no Ray, as others remove it when they start."""
    if not (home / "ray").exists():
        return
    try:
        lock = lock_home(home)
    except UserError:
        return
    try:
        remove_all(home)
    finally:
        lock.release()


def remove_all(home: Path) -> None:
    """`remove` again and again for some seconds; what is there even then is the next session's to remove."""
    for _ in range(TRIES):
        if not remove(home):
            return
        time.sleep(0.1)


def remove(home: Path) -> list[Path]:
    """Remove the folders of earlier sessions that were killed; under the lock, so nobody uses them.

    Returns:
        Those that are still there: Ray's processes outlive a killed driver by seconds, and write into them.
    """
    try:
        listed = [Path(line) for line in (home / "ray").read_text().splitlines()]
    except FileNotFoundError:
        return []
    ours = [folder for folder in listed if folder.exists() and _is_ours(folder)]
    for folder in ours:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder for folder in ours if folder.exists()]


def _is_ours(folder: Path) -> bool:
    """Whether we may have made this folder: who may write HOME/ray must not choose what we remove."""
    places = {Path("/tmp"), Path(tempfile.gettempdir())}
    if not folder.name.startswith("ktray-") or folder.parent not in places:
        return False
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()

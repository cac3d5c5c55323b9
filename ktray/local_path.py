"""Paths as users write them: `~` becomes a home folder, and a URL where only a path can be is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ktray.errors import UserError
from ktray.redaction import without_secrets

_URL = re.compile(r"(?i)[a-z][a-z0-9+.-]+:/")  # a `Path` has made one slash of two


def expanded(path: str | Path, where: str = "") -> Path:
    """`path` with `~` and `~user` at its beginning replaced by that home folder.

    The result never begins with ``~`` itself, so expanding it once more changes nothing.

    Args:
        where: what the path belongs to, for the error, such as ``teacher.checkpoint``.

    Raises:
        UserError: there is no such user, or it is not known where the home folder is.
    """
    text = os.fspath(path)
    found = os.path.expanduser(text)
    if found.startswith("~"):
        begin = found.partition("/")[0]
        why = "and this user has no home folder" if begin == "~" else "and there is no user of this name"
        instead = f"Write ./{begin} for a folder of that name, or give the full path."
        raise UserError(f"{without_secrets(text)} begins with {begin}, {why}", where, instead)
    changed = Path(found)
    return changed.absolute() if str(changed).startswith("~") else changed


def local_path(path: str | Path, where: str) -> Path:
    """The same for a path that may not be a URL, as none but that of a store may.

    Raises:
        UserError: it is a URL; its passwords are not shown. Or as `expanded`.
    """
    text = os.fspath(path)
    if _URL.match(text):
        url = without_secrets(re.sub(r":/+", "://", text, count=1))
        raise UserError(f"{url} is a URL, and ktray reads and writes only files of this machine", where, "Give a path.")
    return expanded(path, where)

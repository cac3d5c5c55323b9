"""Stores of artifacts: the contract `Store`, and its implementation on a file system, `FileStore`.

May import only the modules of the root. Start with `Store` below, then `file.py`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ktray.artifact import Artifact
from ktray.errors import UserError


class Store(Protocol):
    """Publish-once storage of artifacts by key.

    A stage is computed in a scratch directory of its own (one per attempt) and published by one rename, record last. Whoever
    publishes second is discarded. Nothing damaged is ever returned.
    """

    @property
    def url(self) -> str:
        """What `open_store` takes to open the same store elsewhere."""

    @property
    def root(self) -> Path:
        """The directory that holds it, for who measures its disk or asks whether all nodes see it."""

    def find(self, key: str) -> Artifact | None:
        """The artifact, or None if absent; a damaged one is moved aside with a warning and counts as absent."""

    def scratch(self, key: str, attempt: str) -> Path:
        """A fresh empty directory for one attempt at `key`. FileNotFoundError if the attempt is fenced."""

    def publish(self, scratch: Path, key: str, record: Mapping[str, Any]) -> tuple[Artifact, bool]:
        """Write `record` last and publish; (artifact, whether this call published it). Other attempts at `key` end with it.

        FileNotFoundError if this one was fenced, and nobody else has published `key`.
        """

    def fence(self, key: str, attempt: str) -> bool:
        """Take the scratch directory away from an attempt, so that it can neither write nor publish; False if it was gone."""

    def attempts(self, beginning: str) -> list[tuple[str, str]]:
        """(key, attempt) of all that have a scratch directory and whose name begins like this."""

    def checkpoints(self, key: str) -> list[Path]:
        """Complete checkpoints that unfinished attempts at `key` left, newest first."""

    def record_failure(self, key: str, failure: Mapping[str, Any]) -> None:
        """Remember why the last attempt at `key` failed; a failure is not an artifact."""

    def failure(self, key: str) -> Mapping[str, Any] | None:
        """Why the last attempt at `key` failed, or None."""

    def keys(self) -> Iterator[str]:
        """Keys of all published artifacts."""

    def remove(self, key: str) -> None:
        """Delete an artifact."""

    def verify(self, key: str) -> str:
        """The first difference between an artifact's files and the sha256 in its record; empty if there is none."""

    def set_aside(self, key: str, problem: str) -> None:
        """Move a damaged artifact aside with a warning, as `find` does with what it sees; nothing if it is gone already."""

    def discard_damaged(self) -> None:
        """Delete what was moved aside."""

    def sweep(self) -> int:
        """Remove what dead attempts left behind; how many directories. Only while nothing runs on this store."""


def open_store(url: str) -> Store:
    """The store at `url`: ``file:///path`` or a plain path.

    Raises:
        UserError: another scheme, or a place where no directory can be.
        OSError: the disk is full, or the directory may not be created.
    """
    from ktray.stores.file import FileStore

    scheme, separator, rest = url.partition("://")
    if separator and scheme != "file":
        raise UserError(f"the store {url!r} is not supported", instead="Use file:///path, local or on a shared file system.")
    try:
        return FileStore(Path(rest if separator else url))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise  # no mistake in the URL: the same command goes on once there is room, or once its rights were changed
        why = "a file is in its place" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise UserError(f"the store {url} cannot be created: {why}", instead="Choose another with --store.") from error

"""Stores of artifacts: the contract `Store`, and its implementation on a file system, `FileStore`.

May import only the modules of the root. Start with `Store` below, then `file.py`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from ktray.artifact import Artifact
from ktray.checksums import intact
from ktray.errors import DamagedArtifact, MissingInput, UserError


class Store(Protocol):
    """Publish-once storage of artifacts by key.

    Each attempt at a stage writes to its own scratch directory, the record last, and is published by a single rename. If two
    attempts finish, the second is discarded. A damaged artifact is never returned.
    """

    on_damage: Callable[[str], None]
    """Called with a sentence whenever an artifact was moved aside; logs it unless something else is set."""

    @property
    def url(self) -> str:
        """The URL with which `open_store` opens this store elsewhere."""

    @property
    def root(self) -> Path:
        """The directory of the store, for measuring disk use and checking that all nodes see it."""

    def find(self, key: str) -> Artifact | None:
        """The artifact, or None if absent; a damaged artifact is moved aside with a warning and counts as absent."""

    def scratch(self, key: str, attempt: str) -> Path:
        """A fresh empty directory for one attempt at `key`. FileNotFoundError if the attempt was fenced."""

    def publish(self, scratch: Path, key: str, record: Mapping[str, Any]) -> tuple[Artifact, bool]:
        """Write `record` and publish; returns (artifact, whether this call published it). Removes other attempts at `key`.

        FileNotFoundError if this attempt was fenced and `key` is not published.
        """

    def fence(self, key: str, attempt: str) -> bool:
        """Move the scratch directory of an attempt away, so that it can neither write nor publish; False if there was none."""

    def attempts(self, prefix: str) -> list[tuple[str, str]]:
        """(key, attempt) of every attempt with a scratch directory and a name that starts with `prefix`."""

    def checkpoints(self, key: str) -> list[Path]:
        """Complete checkpoints of unfinished attempts at `key`, newest first."""

    def record_failure(self, key: str, failure: Mapping[str, Any]) -> None:
        """Store the cause of the last failed attempt at `key`; a failure is not an artifact."""

    def failure(self, key: str) -> Mapping[str, Any] | None:
        """The cause of the last failed attempt at `key`, or None."""

    def keys(self) -> Iterator[str]:
        """Keys of all published artifacts."""

    def remove(self, key: str) -> None:
        """Delete an artifact."""

    def verify(self, key: str) -> str:
        """The first difference between an artifact's files and its record, all bytes compared; empty if there is none."""

    def set_aside(self, damage: DamagedArtifact) -> bool:
        """Move a damaged artifact aside and say so, as `find` does; False if it is gone, or was replaced since."""

    def discard_damaged(self) -> None:
        """Delete all artifacts that were moved aside."""

    def sweep(self) -> int:
        """Remove directories of dead attempts and return their number. Only allowed while nothing runs on this store."""


def intact_file(artifact: Artifact, name: str) -> Path:
    """The path of a file of an artifact, after comparing it with the record; for commands, which compute nothing.

    Raises:
        MissingInput: the artifact is damaged and was moved aside, or is gone.
    """
    try:
        return intact(artifact.directory / name)
    except DamagedArtifact as damage:
        open_store(str(damage.directory.resolve().parent)).set_aside(damage)
        raise MissingInput(artifact.key, damage.problem) from damage
    except FileNotFoundError as error:
        raise MissingInput(artifact.key) from error


def intact_file_or_none(artifact: Artifact, name: str) -> Path | None:
    """The same, for what a command can do without; None if the artifact has no such file, is damaged or is gone."""
    with suppress(MissingInput):
        return intact_file(artifact, name)
    return None


def require_file_url(url: str) -> None:
    """Raise unless this is the URL of a store in a file system.

    Raises:
        UserError: it has another scheme, no path, or a host.
    """
    scheme, separator, path = url.partition("://")
    if separator and scheme != "file":
        raise UserError(f"the store {url!r} is not supported", instead="Use file:///path, local or on a shared file system.")
    if separator and not path.startswith(("/", "~", ".")):
        what = f"the host {path.partition('/')[0]!r}" if path else "no path"
        raise UserError(f"the store {url!r} names {what}", "--store", "Use file:///path, with three slashes.")


def open_store(url: str) -> Store:
    """The store at `url`: ``file:///path`` or a plain path.

    Raises:
        UserError: another scheme, or a path where no directory can be created.
        OSError: the disk is full, or permission is denied.
    """
    from ktray.stores.file import FileStore

    require_file_url(url)
    try:
        return FileStore(Path(url.removeprefix("file://")))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise  # the URL is valid: the command works again with free space or permissions
        why = "a file is in its place" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise UserError(f"the store {url} cannot be created: {why}", instead="Choose another with --store.") from error

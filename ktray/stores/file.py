"""A store of artifacts as directories on a POSIX file system, local or shared; readers memory-map the files in place."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ktray.artifact import Artifact
from ktray.fingerprint import file_sha256

RECORD = "record.json"
CHECKPOINT = "checkpoint-"
log = logging.getLogger("ktray")


class FileStore:
    """One directory per artifact under `root`; everything unpublished is in hidden directories.

    Attempts write to `.scratch/KEY.ATTEMPT`; fencing an attempt moves this directory to `.fenced`. Artifacts with files that
    do not match the sizes in their record are moved to `.damaged`. `.failures` contains the cause of each key's last failure.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.root.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"file://{self.root}"

    def find(self, key: str) -> Artifact | None:
        if not _is_key(key):  # keys may come from the command line: "." must not count as a damaged artifact
            return None
        directory = self.root / key
        try:
            record = json.loads((directory / RECORD).read_text())
            problem = _damage(directory, record)
        except FileNotFoundError:
            if not directory.exists():
                return None
            record, problem = {}, "its record is missing"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            record, problem = {}, f"its record is unreadable ({error})"
        if problem:
            self.set_aside(key, problem)
            return None
        return Artifact(key, directory, record["metrics"], record)

    def set_aside(self, key: str, problem: str) -> None:
        log.warning("%s is damaged (%s): moved to .damaged; it will be recomputed", key, problem)
        target = self._hidden(".damaged") / f"{key}.{uuid.uuid4().hex[:8]}"
        with contextlib.suppress(FileNotFoundError):  # another process moved it first
            (self.root / key).rename(target)

    def discard_damaged(self) -> None:
        shutil.rmtree(self.root / ".damaged", ignore_errors=True)

    def scratch(self, key: str, attempt: str) -> Path:
        directory = self._hidden(".scratch") / f"{key}.{attempt}"
        directory.mkdir()
        # The attempt may have been fenced before: `fence` marks first and moves second, so either it or this check succeeds.
        if (self.root / ".fenced" / directory.name).exists():
            directory.rmdir()
            raise FileNotFoundError(errno.ENOENT, "this attempt was fenced", str(directory))
        return directory

    def publish(self, scratch: Path, key: str, record: Mapping[str, Any]) -> tuple[Artifact, bool]:
        try:
            published = self._publish(scratch, key, record)
        except FileNotFoundError:
            if self.find(key) is None:
                raise  # fenced
            published = False  # the attempt that published first removed this directory
        self._remove_attempts(key)
        artifact = self.find(key)
        if artifact is None:
            raise FileNotFoundError(f"{key} disappeared right after it was published")
        return artifact, published

    def _publish(self, scratch: Path, key: str, record: Mapping[str, Any]) -> bool:
        for leftover in scratch.glob(f"{CHECKPOINT}*"):
            shutil.rmtree(leftover)
        full = {**record, "files": _inventory(scratch)}
        _write_durably(scratch / RECORD, json.dumps(full, indent=1, sort_keys=True))
        for file in full["files"]:  # safetensors makes files readable only by their owner, but a store may be shared
            (scratch / file).chmod((scratch / RECORD).stat().st_mode & 0o777)
        try:
            # rename(2) fails if the target is a non-empty directory: publish-once without a lock.
            scratch.rename(self.root / key)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(scratch, ignore_errors=True)
            return False
        return True

    def _remove_attempts(self, key: str) -> None:
        (self._hidden(".failures") / f"{key}.json").unlink(missing_ok=True)
        for place in (".scratch", ".fenced"):
            for directory in self._hidden(place).glob(f"{key}.*"):
                shutil.rmtree(directory, ignore_errors=True)

    def fence(self, key: str, attempt: str) -> bool:
        name = f"{key}.{attempt}"
        mark = self._hidden(".fenced") / name
        with contextlib.suppress(OSError):  # it exists, or the disk is full; an attempt with a directory is fenced anyway
            mark.mkdir()
        moved = self._move_to_fenced(name, mark)
        if (self.root / key / RECORD).exists():  # the publisher ran before this attempt existed, or died before cleaning up
            self._remove_attempts(key)
        return moved

    def _move_to_fenced(self, name: str, mark: Path) -> bool:
        try:
            (self._hidden(".scratch") / name).rename(mark)  # atomically, onto the empty mark
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        return True

    def attempts(self, prefix: str) -> list[tuple[str, str]]:
        found = (path.name.rpartition(".") for path in self._hidden(".scratch").iterdir())
        return [(key, attempt) for key, _, attempt in found if attempt.startswith(prefix)]

    def checkpoints(self, key: str) -> list[Path]:
        found: list[tuple[int, Path]] = []
        for place in (".scratch", ".fenced"):
            for path in self._hidden(place).glob(f"{key}.*/{CHECKPOINT}*"):
                epoch = path.name.removeprefix(CHECKPOINT)
                if epoch.isdigit():  # an incomplete one has another name
                    found.append((int(epoch), path))
        return [path for _, path in sorted(found, reverse=True)]

    def record_failure(self, key: str, failure: Mapping[str, Any]) -> None:
        _write_durably(self._hidden(".failures") / f"{key}.json", json.dumps(failure, indent=1, sort_keys=True))

    def failure(self, key: str) -> Mapping[str, Any] | None:
        if not _is_key(key):
            return None
        try:
            found: Mapping[str, Any] = json.loads((self._hidden(".failures") / f"{key}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return found

    def keys(self) -> Iterator[str]:
        for directory in sorted(self.root.iterdir()):
            if not directory.name.startswith(".") and (directory / RECORD).exists():
                yield directory.name

    def remove(self, key: str) -> None:
        # Moved first, so readers see the complete artifact or none.
        target = self._hidden(".fenced") / f"{key}.{uuid.uuid4().hex[:8]}"
        (self.root / key).rename(target)
        shutil.rmtree(target)

    def sweep(self) -> int:
        count = 0
        for place in (".scratch", ".fenced"):
            for directory in self._hidden(place).iterdir():
                if any(directory.glob(f"{CHECKPOINT}[0-9]*")) and not (self.root / directory.name.rsplit(".", 1)[0]).exists():
                    continue  # a later attempt can resume from this checkpoint
                shutil.rmtree(directory, ignore_errors=True)
                count += 1
        return count

    def verify(self, key: str) -> str:
        """The first difference between an artifact's files and the sha256 in its record; empty if all match."""
        artifact = self.find(key)
        if artifact is None:
            return "absent"
        for name, entry in artifact.record["files"].items():
            if file_sha256(artifact.directory / name) != entry["sha256"]:
                return f"{name} does not match the sha256 in its record"
        return ""

    def _hidden(self, name: str) -> Path:
        directory = self.root / name
        directory.mkdir(parents=True, exist_ok=True)
        return directory


def _is_key(name: str) -> bool:
    return bool(name) and "/" not in name and not name.startswith(".")


def _damage(directory: Path, record: Mapping[str, Any]) -> str:
    for name, entry in record["files"].items():
        try:
            size = (directory / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if size != entry["size"]:
            return f"{name} has {size} bytes, not {entry['size']}"
    return ""


def _inventory(directory: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != RECORD)
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return {str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in files}


def _write_durably(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)

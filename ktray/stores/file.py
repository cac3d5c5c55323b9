"""A store of artifacts as directories on a POSIX file system, local or shared; readers memory-map the files in place."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ktray.artifact import Artifact
from ktray.checksums import RECORD, problem_of, read_json, seal, write_json, wrong_size
from ktray.errors import DamagedArtifact

CHECKPOINT = "checkpoint-"
MAX_DAMAGED = 8  # artifacts that were moved aside and are kept for inspection; older ones are deleted
log = logging.getLogger("ktray")


class FileStore:
    """One directory per artifact under `root`; everything unpublished is in hidden directories.

    Attempts write to `.scratch/KEY.ATTEMPT`; fencing an attempt moves this directory to `.fenced`. What does not match its
    record is moved to `.damaged`, where the last few are kept. `.failures` contains the cause of each key's last failure.

    Attributes:
        on_damage: called with a sentence whenever an artifact was moved aside.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.root.mkdir(parents=True, exist_ok=True)
        self.on_damage: Callable[[str], None] = lambda sentence: log.warning("%s", sentence)

    @property
    def url(self) -> str:
        return f"file://{self.root}"

    def find(self, key: str) -> Artifact | None:
        if not _is_key(key):  # keys may come from the command line: "." must not count as a damaged artifact
            return None
        directory = self.root / key
        try:
            inode = directory.stat().st_ino
        except FileNotFoundError:
            return None
        try:
            record = read_json(directory / RECORD)
            problem = _damage(directory, record)
        except FileNotFoundError:
            if not directory.exists():
                return None
            record, problem = {}, "its record is missing"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            record, problem = {}, f"its record is unreadable: {error}"
        if problem:
            self.set_aside(DamagedArtifact(directory, inode, problem))
            return None
        return Artifact(key, directory, record["metrics"], record)

    def set_aside(self, damage: DamagedArtifact) -> bool:
        directory, root = damage.directory.resolve(), self.root.resolve()
        if not directory.is_relative_to(root):  # a dry run reads artifacts of the real store through links
            root = directory.parent
        place = root / ".damaged"
        place.mkdir(exist_ok=True)
        parts = [part for part in directory.relative_to(root).parts if not part.startswith(".")]  # a checkpoint lies deeper
        name = ".".join(parts)
        target = place / f"{name}.{uuid.uuid4().hex[:8]}"
        try:
            directory.rename(target)
        except FileNotFoundError:  # another process moved it first
            return False
        if target.stat().st_ino != damage.inode:  # it has been replaced since; what lies there now was not found damaged
            try:
                target.rename(directory)
            except OSError:  # published once more in this moment
                shutil.rmtree(target, ignore_errors=True)
            return False
        with contextlib.suppress(OSError):  # a full disk
            (target / "damage.txt").write_text(f"{damage.problem}\n")
        self.on_damage(f"{name} is damaged ({damage.problem}): it was moved to {place} and is computed again when needed")
        _keep_newest(place)
        return True

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
        files = seal(scratch, record)
        mode = (scratch / RECORD).stat().st_mode & 0o777
        for path in files:
            path.chmod(mode)  # safetensors makes files readable only by their owner, but a store may be shared
            with open(path, "rb") as file:
                os.fsync(file.fileno())
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
        write_json(self._hidden(".failures") / f"{key}.json", failure)

    def failure(self, key: str) -> Mapping[str, Any] | None:
        if not _is_key(key):
            return None
        try:
            return read_json(self._hidden(".failures") / f"{key}.json")
        except (FileNotFoundError, ValueError):
            return None

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
        directory = self.root / key
        try:
            problems = (problem_of(directory, name) for name in read_json(directory / RECORD)["files"])
            return next(filter(None, problems), "")
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"its record is unreadable: {error}"

    def _hidden(self, name: str) -> Path:
        directory = self.root / name
        directory.mkdir(parents=True, exist_ok=True)
        return directory


def _is_key(name: str) -> bool:
    return bool(name) and "/" not in name and not name.startswith(".")


def _damage(directory: Path, record: Mapping[str, Any]) -> str:
    """What is wrong with an artifact as far as its record and the sizes of its files tell; empty if nothing is."""
    if not isinstance(record["metrics"], dict):
        return "its record holds no metrics"
    for name, entry in record["files"].items():
        try:
            problem = wrong_size(name, (directory / name).stat().st_size, entry)
        except FileNotFoundError:
            return f"{name} is missing"
        if problem:
            return problem
    return ""


def _keep_newest(place: Path) -> None:
    """Delete the oldest of the artifacts that were moved aside."""
    moved: list[tuple[int, Path]] = []
    for path in place.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process deletes as well
            moved.append((path.stat().st_ctime_ns, path))  # a rename sets it
    for _, path in sorted(moved)[:-MAX_DAMAGED]:
        shutil.rmtree(path, ignore_errors=True)

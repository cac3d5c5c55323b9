"""Checkpoints of a stage in progress: sealed directories in its scratch folder, from which a later attempt goes on."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktray.checksums import RECORD, intact, read_json, seal

Write = Callable[[Path], None]
"""Fills an existing empty directory."""

STEP, SECONDS = "step", "seconds"
"""Fields of a checkpoint's record: how far the work was, and the seconds that it had taken, all attempts together."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at long work, which goes on where a killed one ended.

    Attributes:
        start: directory of the newest intact checkpoint, whose files were written by `save`; None to begin. Its files are
            already compared with their checksums.
        done: the step of `start`; 0 to begin.
        save: (step, write) makes a checkpoint with the number `step`, which ascends from 1, if more than
            `StageContext.checkpoint_seconds` of work would be lost without it; otherwise it does nothing. Only the newest is
            kept.
        report: tells whoever watches how far the work is, ``{"epoch": 3, "of": 8}``. Call it whenever there is progress: a
            stage without any counts as stuck.
    """

    start: Path | None
    done: int
    save: Callable[[int, Write], None]
    report: Callable[[Mapping[str, float]], None]


def saving(out: Path, interval: float, started_from: Path | None) -> Callable[[int, Write], None]:
    """The function `Attempt.save` for a stage that writes to `out` and may lose `interval` seconds of work."""
    began = time.monotonic()
    earlier = seconds_of(started_from) if started_from else 0.0
    keep_newest = keeping_newest(out, interval)
    return lambda step, write: keep_newest(step, write, {STEP: step, SECONDS: earlier + time.monotonic() - began})


def keeping_newest(out: Path, interval: float) -> Callable[[int, Write, Mapping[str, Any]], None]:
    """A function (step, write, record) that makes a checkpoint every `interval` seconds and removes the one before."""
    saved: dict[str, Any] = {"at": time.monotonic(), "path": None}

    def keep_newest(step: int, write: Write, record: Mapping[str, Any]) -> None:
        if time.monotonic() - saved["at"] < interval:
            return
        path = write_checkpoint(out, step, write, record)
        if saved["path"]:
            shutil.rmtree(saved["path"])
        saved.update(at=time.monotonic(), path=path)

    return keep_newest


def write_checkpoint(out: Path, step: int, write: Write, record: Mapping[str, Any]) -> Path:
    """Write `checkpoint-000012` below `out`, whole or not at all, and wait for the disk; its path."""
    partial = out / "checkpoint-partial"
    partial.mkdir()
    write(partial)
    seal(partial, record)
    _fsync(partial)  # otherwise a crash of the machine may leave empty files under the new name
    path = out / f"checkpoint-{step:06d}"
    partial.rename(path)
    return path


def step_of(directory: Path) -> int:
    """The step of a checkpoint that `saving` made, after comparing all of its files.

    Raises:
        DamagedArtifact: a file is not as it was written.
        ValueError: the record is missing, or is not of such a checkpoint.
    """
    record = _record(directory)
    for name in record["files"]:
        intact(directory / name)
    return int(record[STEP])


def seconds_of(directory: Path) -> float:
    """The seconds of work up to a checkpoint that `saving` made.

    Raises:
        ValueError: as `step_of`.
    """
    return float(_record(directory)[SECONDS])


def _record(directory: Path) -> dict[str, Any]:
    try:
        record = read_json(directory / RECORD)
    except (OSError, ValueError) as error:
        raise ValueError(f"the checkpoint {directory} cannot be read: {error}") from error
    if not {STEP, SECONDS, "files"} <= record.keys():
        raise ValueError(f"the checkpoint {directory} has no record of its step")
    return record


def _fsync(directory: Path) -> None:
    for path in (*directory.iterdir(), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

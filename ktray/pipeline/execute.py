"""Find or compute one artifact. The same function runs in the local process and on every worker of the crew."""

from __future__ import annotations

import contextlib
import platform
import resource
import subprocess
import time
import warnings
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ktray import snapshot
from ktray.artifact import Artifact, Stage
from ktray.errors import MissingInput
from ktray.pool import Means
from ktray.stages import WORK
from ktray.stores import Store

_PACKAGE = Path(__file__).parent.parent


def execute(stage: Stage, store: Store, attempt: str, means: Means) -> tuple[Artifact, bool]:
    """The artifact of `stage`, and whether this call published it.

    Args:
        attempt: name of this attempt, unique per key.

    Raises:
        MissingInput: an artifact that the stage reads is absent.
        FileNotFoundError: this attempt was fenced.
        Exception: whatever the stage raises.
    """
    found = store.find(stage.key)
    if found:
        return found, False
    inputs = {role: _input(store, key) for role, key in stage.inputs.items()}
    torch.set_num_threads(1)  # more threads change sums in the last bit, and one actor owns one core
    scratch = store.scratch(stage.key, attempt)
    start = _latest_snapshot(stage, store)
    _reset_peak()
    began = time.perf_counter()
    metrics = WORK[stage.name](stage, inputs, scratch, means, start)
    seconds = time.perf_counter() - began
    record = _record(stage, metrics, seconds, inputs, means)
    record |= {"attempt": attempt, "started_from": start.name if start else None}
    if "lineage" in stage.local:
        record["lineage"] = stage.local["lineage"]
    record["seconds_alone"] = round(_seconds_alone(stage, store, seconds, start), 3)
    return store.publish(scratch, stage.key, record)


def _input(store: Store, key: str) -> Artifact:
    found = store.find(key)
    if found is None:
        raise MissingInput(key)
    return found


def _latest_snapshot(stage: Stage, store: Store) -> Path | None:
    """The furthest snapshot to start from: a checkpoint of a dead attempt at this key, or an earlier epoch's artifact."""
    artifacts = (artifact.directory for artifact in map(store.find, stage.starts) if artifact)
    found = [_first_readable(store.checkpoints(stage.key)), _first_readable(artifacts)]
    return max(filter(None, found), default=(0, None))[1]


def _first_readable(newest_first: Iterable[Path]) -> tuple[int, Path] | None:
    """The first snapshot that is whole, and its epoch: a torn one costs epochs, and must not fail its stage for ever."""
    for directory in newest_first:
        try:
            return snapshot.epoch_of(directory), directory
        except ValueError as error:
            warnings.warn(f"{error}; going on without it", stacklevel=2)
    return None


def _seconds_alone(stage: Stage, store: Store, seconds: float, start: Path | None) -> float:
    """What this stage would have cost without the snapshot that it continued."""
    if start is None:
        return seconds
    earlier = store.find(start.name)
    if earlier:
        return seconds + float(earlier.record["seconds_alone"])
    until, begun = stage.spec["epoch"], snapshot.epoch_of(start)  # a dead attempt's checkpoint: its epochs cost what ours did
    return seconds * until / max(1, until - begun)


def _record(
    stage: Stage, metrics: Mapping[str, float], seconds: float, inputs: Mapping[str, Artifact], means: Means
) -> dict[str, Any]:
    return {
        "key": stage.key,
        "sha256": stage.sha256,
        "stage": stage.name,
        "spec": dict(stage.spec),
        "revisions": dict(stage.revisions),
        "inputs": {role: artifact.key for role, artifact in inputs.items()},
        "metrics": {name: float(value) for name, value in metrics.items()},
        "seconds": round(seconds, 3),
        "peak_bytes": _peak() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": _device(means.device),
        "workers": means.pool.workers,
        "published": datetime.now(UTC).isoformat(timespec="seconds"),
        **_environment(),
    }


def _device(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"cpu {platform.machine()}"


@lru_cache
def _environment() -> Mapping[str, Any]:
    versions = {"python": platform.python_version()}
    for package in ("ktray", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "faiss-cpu", "pillow", "timm"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"versions": versions, "commit": _commit()}


def _commit() -> str | None:
    """The commit of ktray's working tree, "-dirty" if the package differs from it; None if ktray was installed.

    An installed ktray may lie inside the user's repository, as `.venv` often does, whose commit says nothing about ktray.
    """
    try:
        if not _PACKAGE.parent.samefile(_git("rev-parse", "--show-toplevel")):
            return None
        modified = _git("status", "--porcelain", "--", _PACKAGE.name)
        return _git("rev-parse", "HEAD") + ("-dirty" if modified else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_PACKAGE.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()


def _reset_peak() -> None:
    """Let the kernel count peak memory from here: a warm worker ran other stages before."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return 0

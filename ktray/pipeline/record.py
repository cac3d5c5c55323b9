"""The record of an artifact: what was computed, from which inputs, where, by which code, and what it cost.

Its peaks of host and device memory are reset before each run, because a worker has run other stages before. torch is imported
for a GPU only: a stage that decodes images does without.
"""

from __future__ import annotations

import contextlib
import platform
import resource
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ktray.artifact import KEY_FORMAT, Artifact, Stage
from ktray.pool import StageContext

_PACKAGE = Path(__file__).parent.parent


def record_of(
    stage: Stage, metrics: Mapping[str, float], seconds: float, inputs: Mapping[str, Artifact], context: StageContext
) -> dict[str, Any]:
    """The record of a run, except for the attempt, the snapshot that it resumed from, and its cost alone.

    Args:
        seconds: of the run, or this stage's share of them if the run made several stages.
    """
    return {
        "key": stage.key,
        "key_format": KEY_FORMAT,
        "sha256": stage.sha256,
        "stage": stage.name,
        "spec": dict(stage.spec),
        "revisions": dict(stage.revisions),
        "inputs": {role: artifact.key for role, artifact in inputs.items()},
        "metrics": {name: float(value) for name, value in metrics.items()},
        "seconds": round(seconds, 3),
        "together": [],
        "peak_bytes": host_peak(),
        "device_peak_bytes": device_peak(context.device),
        "device_bytes": device_bytes(context.device),
        "after_out_of_memory": context.max_batch_size is not None,
        "device": _device(context.device),
        "workers": context.pool.worked,
        "published": datetime.now(UTC).isoformat(timespec="seconds"),
        **software(),
    }


def _device(device: str) -> str:
    if not device.startswith("cuda"):
        return f"cpu {platform.machine()}"
    import torch

    return torch.cuda.get_device_name(device)


@lru_cache
def software() -> Mapping[str, Any]:
    """Versions of the packages that a result depends on, and the commit of ktray; the first call runs git."""
    versions = {"python": platform.python_version()}
    for package in ("ktray", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow", "timm"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"versions": versions, "commit": _commit()}


def _commit() -> str | None:
    """The commit of ktray's working tree, with "-dirty" if the package has changes; None if ktray was installed.

    An installed ktray may lie inside the user's repository, such as in `.venv`; the commit of that says nothing about ktray.
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


def reset_peaks(device: str) -> None:
    """Start counting peaks from now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.startswith("cuda"):
        import torch

        torch.cuda.init()  # otherwise the next line raises "Invalid device argument" in a process that has not used CUDA
        torch.cuda.reset_peak_memory_stats(device)


def host_peak() -> int:
    """Peak bytes of host memory of this process since `reset_peaks`, or since its start where the kernel does not say."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_peak(device: str) -> int:
    """Peak bytes of GPU memory in tensors of this process since `reset_peaks`; 0 on a CPU."""
    if not device.startswith("cuda"):
        return 0
    import torch

    return int(torch.cuda.max_memory_allocated(device))


def device_bytes(device: str) -> int:
    """Total memory of the GPU in bytes; 0 on a CPU."""
    if not device.startswith("cuda"):
        return 0
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)

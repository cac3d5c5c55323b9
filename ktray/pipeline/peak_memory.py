"""Peaks of host and device memory of one stage. They are reset first, because a worker has run other stages before."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import torch


def reset_peaks(device: str) -> None:
    """Start counting peaks from now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.startswith("cuda"):
        torch.cuda.init()  # otherwise the next line raises "Invalid device argument" in a process that has not used CUDA
        torch.cuda.reset_peak_memory_stats(device)


def peak() -> int:
    """Peak bytes of host memory of this process since `reset_peaks`, or since its start where the kernel does not say."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_peak(device: str) -> int:
    """Peak bytes of GPU memory in tensors of this process since `reset_peaks`; 0 on a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.startswith("cuda") else 0


def device_bytes(device: str) -> int:
    """Total memory of the GPU in bytes; 0 on a CPU."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.startswith("cuda") else 0


def release_cached_memory(device: str) -> None:
    """Release the GPU memory that torch caches, so that other processes can use it."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()

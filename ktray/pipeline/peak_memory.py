"""Peaks of host and device memory while one stage runs: a warm worker ran other stages before."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import torch


def reset_peaks(device: str) -> None:
    """Count peaks from here."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.startswith("cuda"):
        torch.cuda.init()  # in a process that has not touched CUDA yet, the next line says "Invalid device argument"
        torch.cuda.reset_peak_memory_stats(device)


def peak() -> int:
    """Most bytes of host memory that this process held since `reset_peaks`; where the kernel does not say, since its start."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_peak(device: str) -> int:
    """Most bytes of GPU memory that tensors of this process held since `reset_peaks`; 0 on a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.startswith("cuda") else 0


def device_bytes(device: str) -> int:
    """All memory of the GPU, in bytes; 0 on a CPU."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.startswith("cuda") else 0


def release_cached_memory(device: str) -> None:
    """Let others on the same GPU have what torch keeps for later."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()

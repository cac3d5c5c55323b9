"""What this machine has: cores that this process may use, free memory, GPUs, free disk."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What a search on this machine can use.

    Attributes:
        cores: that this process may use.
        memory_bytes: that are free now.
        gpus: names of its CUDA devices.
        gpu_bytes: memory of the smallest of them; 0 without one.
    """

    cores: int
    memory_bytes: int
    gpus: tuple[str, ...] = ()
    gpu_bytes: int = 0

    def __str__(self) -> str:
        cores = f"{self.cores} core{'s' * (self.cores != 1)}"
        gpus = f"{len(self.gpus)} x {self.gpus[0]} ({self.gpu_bytes / 2**30:.0f} GB)" if self.gpus else "no GPU"
        return f"{cores}, {gpus}, {self.memory_bytes / 2**30:.0f} GB of memory free"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def this_machine() -> Machine:
    """The machine that this process runs on. It imports torch, which alone knows the GPUs that a search will use."""
    import psutil
    import torch

    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return Machine(
        cores(),
        int(psutil.virtual_memory().available),
        tuple(str(each.name) for each in found),
        min((int(each.total_memory) for each in found), default=0),
    )

"""An exponential moving average of the network in training, used as the target that it learns from (BYOL, DINO).

The average ("target") is part of the head: saved with every snapshot, never trained, and discarded with the head. The head
must have a `projector`, which is averaged together with the backbone.

Source: Tarvainen, Valpola, "Mean teachers are better role models", NeurIPS 2017, arXiv:1703.01780.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

IDENTITY, REVISION = "moving_average", 1


def prepare(model: nn.ModuleDict) -> None:
    """Add `target` to the head: a frozen copy of the freshly initialised backbone and projector."""
    head: Any = model["head"]
    copied = nn.ModuleDict({"backbone": model["backbone"], "projector": head.projector})
    head.target = copy.deepcopy(copied).requires_grad_(False)


@torch.no_grad()
def target_projection(model: nn.ModuleDict, inputs: Tensor) -> Tensor:
    """The target's projections of inputs (M, 3, h, w)."""
    head: Any = model["head"]
    projections: Tensor = head.target["projector"](head.target["backbone"](inputs))
    return projections


@torch.no_grad()
def update(model: nn.ModuleDict, decay: float) -> None:
    """Move the target's parameters towards the network's by a share 1 - `decay`; it keeps its own batch norm statistics."""
    head: Any = model["head"]
    for name, module in (("backbone", model["backbone"]), ("projector", head.projector)):
        for moving, trained in zip(head.target[name].parameters(), module.parameters(), strict=True):
            moving.lerp_(trained, 1 - decay)

"""A slowly moving average of a network in training, as the target that it learns from (BYOL, DINO).

The average ("target") is a part of the head: saved with every snapshot, never trained, and left behind with the head. The head
has a `projector`, which is averaged together with the backbone.

Source: Tarvainen, Valpola, "Mean teachers are better role models", NeurIPS 2017, arXiv:1703.01780.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

IDENTITY, REVISION = "moving_average", 1


def prepare(model: nn.ModuleDict) -> None:
    """Give the head its `target`: a frozen copy of backbone and projector as drawn."""
    head: Any = model["head"]
    twin = nn.ModuleDict({"backbone": model["backbone"], "projector": head.projector})
    head.target = copy.deepcopy(twin).requires_grad_(False)


@torch.no_grad()
def target_projection(model: nn.ModuleDict, inputs: Tensor) -> Tensor:
    """What the target says of inputs (M, 3, h, w)."""
    head: Any = model["head"]
    said: Tensor = head.target["projector"](head.target["backbone"](inputs))
    return said


@torch.no_grad()
def update(model: nn.ModuleDict, decay: float) -> None:
    """Move the target's parameters by a share 1 - `decay` towards the network's; its batch statistics are its own."""
    head: Any = model["head"]
    for name, module in (("backbone", model["backbone"]), ("projector", head.projector)):
        for moving, trained in zip(head.target[name].parameters(), module.parameters(), strict=True):
            moving.lerp_(trained, 1 - decay)

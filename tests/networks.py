"""A small network, and the same with the head of a pretext task on it."""

from __future__ import annotations

import torch
from torch import nn

from ktray import plugins
from ktray.training import loop
from ktray.training.task import Task

BACKBONE = plugins.parse("backbone", {"kind": "alexnet", "width": 0.125})


def model_of(task: Task) -> nn.ModuleDict:
    """What `loop.fit` trains of a task, ready for its first step."""
    torch.manual_seed(0)
    backbone = loop.untrained_backbone(BACKBONE, 0)
    model = nn.ModuleDict({"backbone": backbone, "head": task.head(backbone.feature_dim)})
    task.prepare(model)
    return model

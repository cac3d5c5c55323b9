"""A training that is counted in optimiser steps: how its steps are taken, and what on. `loop.fit_steps` takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """How a network is trained by SGD.

    Attributes:
        steps: optimiser steps.
        lr: learning rate, before `milestones` and `warmup`.
        milestones: steps after which the learning rate is multiplied by `factor`.
        factor: see `milestones`.
        warmup: steps over which the learning rate rises linearly.
        cosine: whether it falls to 0 along a cosine instead.
        head_factor: the learning rate of the modules beside the backbone, relative to the backbone's.
        clip: the largest norm of the gradient; None for any.
        precision: of products and convolutions, as in `Schedule`.
    """

    steps: int
    lr: float
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    warmup: int = 0
    cosine: bool = False
    momentum: float = 0.9
    weight_decay: float = 1e-4
    head_factor: float = 1.0
    clip: float | None = None
    precision: str = "float32"

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        lr = self.lr * self.factor ** sum(step >= milestone for milestone in self.milestones)
        if step < self.warmup:
            lr *= (step + 1) / self.warmup
        elif self.cosine:
            lr *= 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))
        return lr


@dataclass(frozen=True)
class StepTask:
    """What a network is trained on.

    Attributes:
        batch: (step, counted from 0; a CPU generator seeded from (seed, step)) -> what `loss` takes. It runs in a thread while
            the step before is taken, and makes all draws with the generator.
        loss: (the model, a batch) -> terms by name; their sum is minimised. Draws of the network itself (dropout, the sampling
            of boxes) use the global generators, which are seeded from (seed, step).
        frozen: modules of the model that are neither trained nor put into training mode.
    """

    batch: Callable[[int, torch.Generator], Any]
    loss: Callable[[nn.ModuleDict, Any], dict[str, Tensor]]
    frozen: Sequence[nn.Module] = ()

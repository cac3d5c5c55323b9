"""A training problem as a record of functions: plugins define it, `loop.fit` solves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """A training problem for a backbone.

    The model is ``head(backbone(inputs))``. One image may become several inputs (the nine tiles of a puzzle, two views);
    `inputs` then has a multiple of B rows, and the head combines them again.

    Attributes:
        head: feature width D of the backbone -> the module on top of it, which maps (M, D) to the input of `loss`.
        batch: (images (B, H, W, 3) uint8 on the training device, their indices (B,) int64 on the CPU, a CPU generator seeded
            from (seed, epoch, step)) -> (inputs (M, 3, h, w) float32 as from `augmentation.to_float`, targets with B rows). All
            random draws come from the generator, so the batch is the same on every device.
        loss: (outputs of the head, targets) -> (scalar loss, metrics as scalars, such as {"top1": ...} in [0, 1]).
        keep: indices (n,) int64 of the images to train on, ascending; None for all.
        order: a CPU generator seeded from (seed, epoch) -> the images (n,) of one epoch, all in `keep`; images may
            repeat or be missing. None shows each image of `keep` once, shuffled.
        after_step: called with the model (`nn.ModuleDict` of "backbone" and "head") after every optimiser step.
        prepare: called once with the freshly initialised model, before a snapshot is loaded; it may add modules that are saved
            with the model but not trained, such as a moving average of the backbone.
        forward: (model, inputs) -> the input of `loss`; None for ``head(backbone(inputs))``.
        mean_over_images: whether `loss` is a mean of one term per image, computed from the inputs and targets of that image
            alone, and the rows of `inputs` are grouped by image. A batch that does not fit in memory may then go through the
            network in parts, see `loop.fit`. False for a loss that compares images with each other, and for a `forward` that
            stores something about the batch for `after_step`: parts would change the training. False is the safe choice: a
            batch that does not fit then fails with an error.
    """

    head: Callable[[int], nn.Module]
    batch: Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
    keep: Tensor | None = None
    order: Callable[[torch.Generator], Tensor] | None = None
    after_step: Callable[[nn.ModuleDict], None] | None = None
    prepare: Callable[[nn.ModuleDict], None] | None = None
    forward: Callable[[nn.ModuleDict, Tensor], Tensor] | None = None
    mean_over_images: bool = False

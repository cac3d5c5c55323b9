"""A training problem, as a record of functions; `loop.fit` solves it, plugins state it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """What a backbone is trained for.

    The model is ``head(backbone(inputs))``. One image may become several inputs (the nine tiles of a puzzle, two views): then
    `inputs` has a multiple of B rows and the head brings them together again.

    Attributes:
        head: feature width D of the backbone -> the module on top of it, (M, D) -> whatever `loss` takes.
        batch: (images (B, H, W, 3) uint8 on the training device, their indices (B,) int64 on the CPU, a CPU generator seeded
            from (seed, epoch, step)) -> (inputs (M, 3, h, w) float32 as from `augmentation.to_float`, targets with B rows). All
            random draws come from the generator, so that the batch is the same on every device.
        loss: (outputs of the head, targets) -> (scalar loss, metrics as scalars, such as {"top1": ...} in [0, 1]).
        keep: indices (n,) int64 of the images to train on, ascending; None for all.
        order: a CPU generator seeded from (seed, epoch) -> the images (n,) of one epoch, each of `keep`, some perhaps several
            times and others not; None shows each of `keep` once, shuffled.
        after_step: called with the model (`nn.ModuleDict` of "backbone" and "head") after every optimiser step.
        prepare: called once with the model as drawn, before a snapshot is loaded; it may add what is saved with the model and
            never trained, such as a moving average of the backbone.
        forward: (model, inputs) -> what `loss` takes; None for ``head(backbone(inputs))``.
        mean_over_images: whether `loss` is a mean of one term per image, from that image's inputs and targets alone, and the
            rows of `inputs` stand image by image. Then a batch that is too large for the memory may go through the network in
            parts, see `loop.fit`. False for a loss that compares images with each other, and for a `forward` that keeps what
            it saw of the batch for `after_step`: parts would train something else. False is safe, as a batch that does not fit
            then fails and says so.
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

"""Rotation: predict by which of four angles (0, 90, 180, 270 degrees) an image was rotated.

Source: Gidaris, Singh, Komodakis, ICLR 2018, arXiv:1803.07728; crop, flip and all four rotations of an image in one batch
as in the authors' CIFAR-10 code (gidariss/FeatureLearningRotNet, dataloader.py).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ktray.ops import augmentation
from ktray.ops.random_draws import Draws
from ktray.spec import Augment, UnmixedAugment
from ktray.strict import StrictSpec
from ktray.training import classification
from ktray.training.classification import cross_entropy
from ktray.training.task import Task

REVISION = 1
TOOLS = (augmentation, classification)


class Spec(StrictSpec):
    """`rotations`: "all" four of each image (a batch of B images trains on 4B), or "one" at random.

    `augment` is applied before the rotation.
    """

    kind: Literal["rotation"] = "rotation"
    rotations: Literal["all", "one"] = "all"
    augment: UnmixedAugment = Augment(crop=4, flip=True)


def task(spec: Spec, size: int) -> Task:
    """Classification of the four rotations by a linear head. Metric "top1": accuracy over the rotated images.

    Args:
        size: side of the images in pixels; any.
    """

    def draw(indices: Tensor, generator: torch.Generator) -> Draws:
        draws: dict[str, Any] = {"views": augmentation.draw_views(len(indices), spec.augment, generator)}
        if spec.rotations == "one":
            draws["turns"] = torch.randint(4, (len(indices), 1), generator=generator)
        return draws

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        seen = augmentation.random_views(images, spec.augment, draws["views"])
        turned = torch.stack([torch.rot90(seen, turns, dims=(1, 2)) for turns in range(4)], dim=1)
        targets = torch.arange(4, device=images.device).expand(len(images), 4)
        if spec.rotations == "one":
            targets = draws["turns"]
            turned = turned.take_along_dim(targets[:, :, None, None, None], dim=1)
        return augmentation.to_float(turned.flatten(0, 1)), targets

    return Task(
        head=lambda width: nn.Linear(width, 4),
        draw=draw,
        batch=batch,
        loss=cross_entropy,
        mean_over_images=True,
        capturable=True,
    )

"""Classification of images by given targets, whoever gave them: clusters, people, or a pretext task."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ktray import augment as views_of
from ktray.spec import Augment
from ktray.task import Task

REVISION = 1
TOOLS = (views_of,)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean cross entropy, and {"top1"} in [0, 1].

    Args:
        logits: (M, K) float.
        targets: int64 in [0, K), M in total, of any shape that flattens to the order of `logits`.
    """
    targets = targets.reshape(-1)
    loss = nn.functional.cross_entropy(logits, targets)
    hits = logits.detach().max(1).indices == targets  # max: argmax of the CPU is several times slower
    return loss, {"top1": hits.float().mean()}


def task(targets: NDArray[np.int64], classes: int, augment: Augment) -> Task:
    """A linear head that predicts each image's target from a random view of it.

    Args:
        targets: (N,) int64 in [-1, classes); images with -1 are left out.
        classes: K >= 1, width of the head.

    Raises:
        ValueError: a target is outside of [-1, classes).
    """
    if targets.size and (targets.min() < -1 or targets.max() >= classes):
        raise ValueError(f"targets lie in [{targets.min()}, {targets.max()}], which are not {classes} classes (or -1)")
    of_image = torch.from_numpy(np.ascontiguousarray(targets, dtype=np.int64))

    def batch(images: Tensor, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        seen = views_of.to_float(views_of.views(images, augment, generator))
        return seen, of_image[indices].to(images.device)

    return Task(
        head=lambda width: nn.Linear(width, classes),
        batch=batch,
        loss=cross_entropy,
        keep=torch.nonzero(of_image >= 0).flatten(),
    )

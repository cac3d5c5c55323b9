"""Classification of images by given targets: cluster numbers, human labels, or the classes of a pretext task."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ktray.ops import augmentation
from ktray.ops.random_draws import Draws, copies
from ktray.spec import Augment
from ktray.training.task import Labels, Task

IDENTITY, REVISION = "classification", 1
TOOLS = (augmentation,)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross entropy, and {"top1"} in [0, 1].

    Args:
        logits: (M, K) float.
        targets: int64 in [0, K), M in total, of any shape that flattens to the order of `logits`.
    """
    targets = targets.reshape(-1)
    loss = nn.functional.cross_entropy(logits, targets)
    hits = logits.detach().max(1).indices == targets  # not argmax, which is several times slower on the CPU
    return loss, {"top1": hits.float().mean()}


def joint_cross_entropy(logits: Tensor, targets: Tensor, widths: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over heads of each head's mean cross entropy, and {"top1"}, the mean over heads of their accuracy.

    Args:
        logits: (B, sum of widths) float, head by head.
        targets: (B, heads) int64, each in [-1, width of its head); -1 is ignored in that head's loss and accuracy.
        widths: number of classes of each head.
    """
    losses, tops = [], []
    for part, expected in zip(logits.split(list(widths), dim=1), targets.unbind(1), strict=True):
        known = (expected >= 0).sum().clamp(min=1)
        losses.append(nn.functional.cross_entropy(part, expected, ignore_index=-1, reduction="sum") / known)
        tops.append((part.detach().max(1).indices == expected).sum() / known)
    return torch.stack(losses).mean(), {"top1": torch.stack(tops).mean()}


def task(targets: NDArray[np.int64], classes: int, augment: Augment) -> Task:
    """A linear head that predicts each image's target from a random view of it.

    Args:
        targets: (N,) int64 in [-1, classes); images with -1 are left out.
        classes: K >= 1, width of the head.

    Raises:
        ValueError: a target is outside [-1, classes).
    """
    return joint_task([Labels(targets, classes)], augment)


def joint_task(heads: Sequence[Labels], augment: Augment) -> Task:
    """One linear head per entry on a shared backbone; all heads predict their targets from the same random view of an image.

    The heads are blocks of one linear layer. An image without a target in some entries trains the other heads; an image
    without any target is left out.

    Raises:
        ValueError: a target is outside [-1, classes) of its entry.
    """
    of_image = torch.from_numpy(np.stack([_checked_targets(entry) for entry in heads], axis=1))
    targets_on = copies(of_image.squeeze(1))
    widths = [entry.classes for entry in heads]
    known = of_image >= 0
    kept = known.any(dim=1)

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        seen = augmentation.to_float(augmentation.random_views(images, augment, draws))
        return seen, targets_on(images.device)[indices]

    return Task(
        head=lambda width: nn.Linear(width, sum(widths)),
        draw=lambda indices, generator: augmentation.draw_views(len(indices), augment, generator),
        batch=batch,
        loss=cross_entropy if len(heads) == 1 else functools.partial(joint_cross_entropy, widths=widths),
        keep=torch.nonzero(kept).flatten(),
        mean_over_images=bool(known[kept].all()),  # otherwise a head's mean covers only part of the batch
        capturable=True,
    )


def _checked_targets(entry: Labels) -> NDArray[np.int64]:
    targets = np.asarray(entry.of_image, dtype=np.int64)
    if targets.size and (targets.min() < -1 or targets.max() >= entry.classes):
        raise ValueError(f"targets lie in [{targets.min()}, {targets.max()}], but must lie in [-1, {entry.classes})")
    return targets

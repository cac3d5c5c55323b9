"""Classification of images by given targets: cluster numbers, human labels, or the classes of a pretext task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ktray.ops import augmentation, mixing
from ktray.ops.random_draws import Draws, copies
from ktray.spec import Augment
from ktray.training.task import Labels, Task

IDENTITY, REVISION = "classification", 1
TOOLS = (augmentation,)
TOOLS_OF_SOME = (mixing,)  # through `augmentation.tools_of`


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross entropy, and {"top1"} in [0, 1].

    Args:
        logits: (M, K) float.
        targets: int64 in [0, K), M in total, of any shape that flattens to the order of `logits`.
        smoothing: share of each target that is spread over all classes.
    """
    targets = targets.reshape(-1)
    loss = nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    hits = logits.detach().max(1).indices == targets  # not argmax, which is several times slower on the CPU
    return loss, {"top1": hits.float().mean()}


def joint_cross_entropy(
    logits: Tensor, targets: Tensor, widths: Sequence[int], smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over heads of each head's mean cross entropy, and {"top1"}, the mean over heads of their accuracy.

    Args:
        logits: (B, sum of widths) float, head by head.
        targets: (B, heads) int64, each in [-1, width of its head); -1 is ignored in that head's loss and accuracy. With
            `counted`, further columns say how many images of the batch have a target, so that its parts weigh as in the whole.
        widths: number of classes of each head.
        smoothing: share of each target that is spread over all classes.
    """
    losses, tops = [], []
    expected_of, shares = targets[:, : len(widths)].unbind(1), _shares_known(targets, len(widths))
    for part, expected, known in zip(logits.split(list(widths), dim=1), expected_of, shares, strict=True):
        total = nn.functional.cross_entropy(part, expected, ignore_index=-1, reduction="sum", label_smoothing=smoothing)
        losses.append(total / known.to(total.dtype))
        tops.append((part.detach().max(1).indices == expected).sum() / known.float())
    return torch.stack(losses).mean(), {"top1": torch.stack(tops).mean()}


def counted(targets: Tensor) -> Tensor:
    """Targets (B, heads) int64 with the columns that `joint_cross_entropy` needs for parts of this batch: (B, 2 * heads + 1).

    They say how many images have a target for each head, and how many images there are.
    """
    known = (targets >= 0).sum(dim=0).clamp(min=1)
    count = torch.full_like(known[:1], len(targets))
    return torch.cat([targets, torch.cat([known, count]).expand(len(targets), -1)], dim=1)


def _shares_known(targets: Tensor, heads: int) -> list[Tensor]:
    """What the sum of each head's losses is divided by: the images with a target, as if they were spread evenly over the parts.

    Scalars of float64, because those of a whole batch are whole numbers.
    """
    if targets.shape[1] == heads:
        return [(expected >= 0).sum().clamp(min=1).double() for expected in targets.unbind(1)]
    known, count = targets[0, heads : 2 * heads].double(), targets[0, 2 * heads]
    return list((known * len(targets) / count).unbind(0))


def mixed_cross_entropy(
    logits: Tensor, targets: Tensor, widths: Sequence[int], smoothing: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `joint_cross_entropy` for mixed images; {"top1"} counts the target of the larger share.

    Args:
        logits: (B, sum of widths) float.
        targets: of `mixed_targets`.
        widths, smoothing: as for `joint_cross_entropy`.
    """
    weighted = targets.view(len(targets), len(widths), 2, 2)
    losses, tops = [], []
    for head, part in enumerate(logits.split(list(widths), dim=1)):
        expected, weights = weighted[:, head, :, 0].long(), weighted[:, head, :, 1].to(part.dtype)
        both = [
            nn.functional.cross_entropy(part, expected[:, which], reduction="none", label_smoothing=smoothing)
            for which in range(2)
        ]
        losses.append((torch.stack(both, dim=1) * weights).sum(dim=1).mean())
        larger = expected.gather(1, weights.max(1, keepdim=True).indices).squeeze(1)
        tops.append(((part.detach().max(1).indices == larger) * weights.sum(dim=1)).mean())
    return torch.stack(losses).mean(), {"top1": torch.stack(tops).mean()}


def mixed_targets(targets: Tensor, partner: Tensor, kept: Tensor) -> Tensor:
    """The targets of mixed images, (B, heads * 4) float64: for each head its own target, its weight, the partner's, its weight.

    The weights of a head sum to the number of images; targets that are missing weigh nothing.

    Args:
        targets: (B, heads) int64, -1 where an image has none.
        partner: (B,) int64, with which image each is mixed.
        kept: (B,) float32, its own share in the mixture.
    """
    both = torch.stack([targets, targets[partner]], dim=2)  # (B, heads, 2)
    weights = torch.stack([kept, 1 - kept], dim=1).double()[:, None] * (both >= 0)
    weights = weights * (len(targets) / weights.sum(dim=(0, 2)).clamp_min(1e-12))[None, :, None]
    return torch.stack([both.clamp_min(0).double(), weights], dim=3).flatten(1)


def task(targets: NDArray[np.int64], classes: int, augment: Augment, smoothing: float = 0.0) -> Task:
    """A linear head that predicts each image's target from a random view of it.

    Args:
        targets: (N,) int64 in [-1, classes); images with -1 are left out.
        classes: K >= 1, width of the head.
        smoothing: share of each target that is spread over all classes.

    Raises:
        ValueError: a target is outside [-1, classes).
    """
    return joint_task([Labels(targets, classes)], augment, smoothing)


def joint_task(heads: Sequence[Labels], augment: Augment, smoothing: float = 0.0) -> Task:
    """One linear head per entry on a shared backbone; all heads predict their targets from the same random view of an image.

    The heads are blocks of one linear layer. An image without a target in some entries trains the other heads; an image
    without any target is left out. Where `augment` mixes images, their targets are mixed in the same shares.

    Raises:
        ValueError: a target is outside [-1, classes) of its entry.
    """
    of_image = torch.from_numpy(np.stack([_checked_targets(entry) for entry in heads], axis=1))
    widths = [entry.classes for entry in heads]
    known = of_image >= 0
    kept = known.any(dim=1)
    some_missing = not bool(known[kept].all())
    targets_on = copies(of_image if augment.mixes else of_image.squeeze(1))

    def draw(indices: Tensor, generator: torch.Generator) -> Draws:
        views = augmentation.draw_views(len(indices), augment, generator)
        mixture = mixing.draw_mixing(len(indices), augment, generator)
        return {**views, "mixture": mixture} if mixture else views

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        seen = augmentation.to_float(augmentation.random_views(images, augment, draws))
        targets = targets_on(images.device)[indices]
        if augment.mixes:
            seen, own = mixing.mix(seen, draws["mixture"])
            return seen, mixed_targets(targets, draws["mixture"]["partner"], own)
        return seen, counted(targets) if some_missing else targets

    function: Callable[..., tuple[Tensor, dict[str, Tensor]]] = cross_entropy if len(heads) == 1 else joint_cross_entropy
    details: dict[str, Any] = {} if len(heads) == 1 and not augment.mixes else {"widths": widths}
    if augment.mixes:
        function = mixed_cross_entropy
    if smoothing:
        details["smoothing"] = smoothing
    return Task(
        head=lambda width: nn.Linear(width, sum(widths)),
        draw=draw,
        batch=batch,
        loss=functools.partial(function, **details) if details else function,
        keep=torch.nonzero(kept).flatten(),
        mean_over_images=True,
        capturable=True,
    )


def _checked_targets(entry: Labels) -> NDArray[np.int64]:
    targets = np.asarray(entry.of_image, dtype=np.int64)
    if targets.size and (targets.min() < -1 or targets.max() >= entry.classes):
        raise ValueError(f"targets lie in [{targets.min()}, {targets.max()}], but must lie in [-1, {entry.classes})")
    return targets

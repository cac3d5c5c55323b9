"""A queue of the teacher's features as a pseudo classifier: its similarities to an image are a soft label.

A queue of recently seen images, in shuffled order, is a random sample of all images. So each step draws its queue at random
instead of keeping one: a training has no extra state, and a batch can be cut into parts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ktray.errors import UserError
from ktray.text import counted
from ktray.training import distillation
from ktray.training.task import Features

IDENTITY, REVISION = "teacher_queue", 1
TOOLS = (distillation,)

_MOST = 2**24  # images whose numbers float32 holds exactly


def draw_queue(count: int, length: int, generator: torch.Generator) -> Tensor:
    """The images of a step's queue, (length,) int64 in [0, count), drawn with replacement."""
    return torch.randint(count, (length,), generator=generator)


def require_resident(features: Features) -> None:
    """Raise unless all features can be held on a device, as a queue that changes with every step needs.

    Raises:
        UserError: there are too many.
    """
    if not features.fit_on_a_device or len(features) > _MOST:
        raise UserError(
            f"the queue is drawn from the features of all {counted(len(features), 'image')}, which do not fit on a device",
            "queue",
            "Use 'similarity', whose anchors are a fixed sample, or a teacher with fewer features.",
        )


def with_queue(targets: Tensor, queue: Tensor) -> Tensor:
    """Targets (B, T) float32 with the images of the queue in further columns: (B, T + length)."""
    return torch.cat([targets, queue.to(targets.dtype).expand(len(targets), -1)], dim=1)


def queue_divergence(
    outputs: Tensor,
    unit: Tensor,
    queue: Tensor,
    features_of: Callable[[Tensor], Tensor],
    temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Divergence of the student's soft label from the teacher's, and {"nearest"}; see `distillation.divergence`.

    Args:
        outputs: (B, D) float, the student's predictions of the teacher's features.
        unit: (B, D) float, the teacher's features of length 1.
        queue: (B, length) float, the numbers of the images of the queue in each row.
        features_of: indices (length,) int64 -> the teacher's features (length, D) float32 on their device.
    """
    bank = nn.functional.normalize(features_of(queue[0].long()), dim=1)
    student = nn.functional.normalize(outputs, dim=1) @ bank.T / temperature
    return distillation.divergence(student, unit @ bank.T / teacher_temperature)

"""Similarity to a queue: soft pseudo-labels are the teacher's similarities to a queue of its features, anew in each step.

The queue is a pseudo classifier: teacher and student are both compared with it, and the student's distribution is trained to
match the teacher's. `similarity` does the same with a fixed set of anchors.

Differences from the source: the queue is drawn anew in each step instead of being kept (see `ktray.training.teacher_queue`);
the teacher sees each image once, without the student's augmentation, where the source applies the same to both.

Source: what LightlyTrain's documentation describes as `distillationv1` (docs.lightly.ai/train, "What's under the hood"; read
there, not in its code), after Beyer, Zhai, Royer, Markeeva, Anil, Kolesnikov, "Knowledge distillation: A good teacher is
patient and consistent", CVPR 2022, arXiv:2106.05237; queues of teacher features: Fang et al., "SEED", ICLR 2021,
arXiv:2101.04731.
Defaults: `temperature` is the 0.04 of CompRess's program (github.com/UMBCvision/CompRess), of student and teacher. `queue` is
our own, for data sets smaller than ImageNet: that program has 128,000, SEED's (github.com/jacobswan1/SEED) 65,536, with
temperatures of 0.2 for the student and 1e-4 for the teacher. `hidden` is our own.
"""

from __future__ import annotations

import functools
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ktray.ops.random_draws import Draws
from ktray.spec import Augment
from ktray.strict import StrictSpec
from ktray.training import distillation, teacher_queue
from ktray.training.task import Targets, Task

REVISION = 1
TOOLS = (distillation, teacher_queue)

NEEDS: dict[str, tuple[str, ...]] = {"features": ()}


class Spec(StrictSpec):
    """The softmax over cosine similarities to the queue; the student's is trained to match the teacher's."""

    kind: Literal["queue_similarity"] = "queue_similarity"
    queue: int = Field(default=4096, ge=2, le=131072, description="images in the queue of a step")
    temperature: float = Field(default=0.04, gt=0, le=10, description="softmax temperature of the student")
    teacher_temperature: float | None = Field(
        default=None, gt=0, le=10, description="softmax temperature of the teacher; null: the same as the student's"
    )
    hidden: tuple[Annotated[int, Field(ge=8, le=16384)], ...] = Field(
        default=(512,), max_length=8, description="widths of the head's hidden layers; []: a linear head"
    )


def task(spec: Spec, targets: Targets, augment: Augment) -> Task:
    """Distillation by a head as wide as the teacher's features. Metric "nearest": how often both agree on the nearest image.

    Raises:
        ValueError: there are no teacher features.
        UserError: they do not fit on a device.
    """
    features = targets.require_features()
    teacher_queue.require_resident(features)
    width = features.width
    draw_rows, rows = distillation.feature_batch(features, augment, functools.partial(nn.functional.normalize, dim=1))

    def draw(indices: Tensor, generator: torch.Generator) -> Draws:
        return {**draw_rows(indices, generator), "queue": teacher_queue.draw_queue(len(features), spec.queue, generator)}

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        seen, unit = rows(images, indices, draws)
        return seen, teacher_queue.with_queue(unit, draws["queue"])

    def loss(outputs: Tensor, given: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        unit, queue = given[:, :width], given[:, width:]
        colder = spec.teacher_temperature or spec.temperature
        features_of = functools.partial(features.rows_on, outputs.device)
        return teacher_queue.queue_divergence(outputs, unit, queue, features_of, spec.temperature, colder)

    return Task(
        head=lambda own: distillation.mlp_head(own, spec.hidden, width),
        draw=draw,
        batch=batch,
        loss=loss,
        mean_over_images=True,
        capturable=True,
    )

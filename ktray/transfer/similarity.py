"""Similarity distillation: the student learns the teacher's similarities between an image and a fixed set of anchor images.

Teacher and student are both compared with the teacher's features of the anchors ("1q" of CompRess, and SEED); a head maps the
student's features into the teacher's space. In the sources the anchors are a queue of recently seen images. Here they are drawn
once from the seed, so that a training has no extra state to save and restore between its segments.

Source: Abbasi Koohpayegani, Tejankar, Pirsiavash, "CompRess: Self-Supervised Learning by Compressing Representations",
NeurIPS 2020, arXiv:2010.14713, section 3; Fang, Wang, Wang, Zhang, Yang, Liu, "SEED: Self-supervised Distillation for Visual
Representation", ICLR 2021, arXiv:2101.04731, section 3.2.
Defaults: `temperature` is the 0.04 of CompRess's program (github.com/UMBCvision/CompRess), of student and teacher. `anchors` is
our own, for data sets smaller than ImageNet: that program has 128,000, SEED's (github.com/jacobswan1/SEED) 65,536, with
temperatures of 0.2 for the student and 1e-4 for the teacher.
"""

from __future__ import annotations

import functools
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from ktray.errors import UserError
from ktray.fingerprint import seed_of
from ktray.ops.random_draws import copies
from ktray.spec import Augment, Seed
from ktray.strict import StrictSpec
from ktray.text import counted
from ktray.training import distillation
from ktray.training.task import Targets, Task

REVISION = 1
TOOLS = (distillation,)

NEEDS: dict[str, tuple[str, ...]] = {"features": ()}


class Spec(StrictSpec):
    """The softmax over cosine similarities to the anchors; the student's is trained to match the teacher's."""

    kind: Literal["similarity"] = "similarity"
    anchors: int = Field(
        default=4096, ge=2, le=131072, description="number of anchor images; at most the number of transfer images"
    )
    temperature: float = Field(default=0.04, gt=0, le=10, description="softmax temperature of the student")
    teacher_temperature: float | None = Field(
        default=None, gt=0, le=10, description="softmax temperature of the teacher; null: the same as the student's"
    )
    hidden: tuple[Annotated[int, Field(ge=8, le=16384)], ...] = Field(
        default=(512,), max_length=8, description="widths of the head's hidden layers; []: a linear head"
    )
    seed: Seed = 0


def check(spec: Spec, count: int, clustered: int) -> None:
    """Refuse more anchors than images.

    Args:
        count: number of images that the student is trained on.
        clustered: number of images whose features are clustered; not used.

    Raises:
        UserError: there are too few images.
    """
    if spec.anchors > count:
        raise UserError(
            f"{counted(spec.anchors, 'anchor')} cannot be chosen from {counted(count, 'image')}",
            "anchors",
            f"Use at most {count}.",
        )


def task(spec: Spec, targets: Targets, augment: Augment) -> Task:
    """Distillation by a head as wide as the teacher's features. Metric "nearest": how often both agree on the nearest anchor.

    Raises:
        ValueError: there are no teacher features, or fewer images than anchors.
    """
    features = targets.require_features()
    rows = torch.from_numpy(features.read(anchor_indices(len(features), spec.anchors, spec.seed)))
    anchors = nn.functional.normalize(rows, dim=1)
    anchors_on = copies(anchors)

    def loss(outputs: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        bank = anchors_on(outputs.device)
        teacher = target @ bank.T / (spec.teacher_temperature or spec.temperature)
        return distillation.divergence(nn.functional.normalize(outputs, dim=1) @ bank.T / spec.temperature, teacher)

    draw, batch = distillation.feature_batch(features, augment, functools.partial(nn.functional.normalize, dim=1))
    return Task(
        head=lambda width: distillation.mlp_head(width, spec.hidden, features.width),
        draw=draw,
        batch=batch,
        loss=loss,
        mean_over_images=True,
        capturable=True,
    )


def anchor_indices(count: int, anchors: int, seed: int) -> NDArray[np.int64]:
    """Indices of the anchor images, (anchors,) int64, ascending, determined by the arguments alone.

    Raises:
        ValueError: there are fewer images than anchors.
    """
    if anchors > count:
        raise ValueError(f"anchors={anchors} cannot be chosen from {counted(count, 'image')}")
    drawn = np.random.default_rng(seed_of(seed, "anchors", count)).choice(count, anchors, replace=False)
    return np.sort(drawn)

"""Regression: the student predicts the teacher's normalised features of each image.

The rival of clusters: the features themselves pass from teacher to student, not only who is like whom. A small network between
the student's features and the teacher's is thrown away with the head.

Source: the row "[37]+vgg-Jigsaw++" of table 3 of Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385; the
head of several layers, Navaneet, Koohpayegani, Tejankar, Pirsiavash, "SimReg", BMVC 2021, arXiv:2201.05131. `standardise` is in
the spirit of "Reg-BN" in Abbasi Koohpayegani, Tejankar, Pirsiavash, "CompRess", NeurIPS 2020, arXiv:2010.14713, with moments
over all images in place of those of a batch.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ktray.spec import Augment
from ktray.strict import StrictSpec
from ktray.training import distillation
from ktray.training.targets import Targets
from ktray.training.task import Task

REVISION = 1
TOOLS = (distillation,)

NEEDS: dict[str, tuple[str, ...]] = {"features": ()}


class Spec(StrictSpec):
    """The teacher's features to length 1, predicted by an MLP on the student."""

    kind: Literal["regression"] = "regression"
    loss: Literal["cosine", "l2"] = Field(
        default="cosine", description="squared distance to the prediction at length 1 (2 - 2 cosine), or to it as it is"
    )
    hidden: tuple[Annotated[int, Field(ge=8, le=16384)], ...] = Field(
        default=(512,), max_length=8, description="widths of the head's hidden layers; []: a linear head"
    )
    standardise: bool = Field(default=False, description="each feature to mean 0 and variance 1 before the length is made 1")


def task(spec: Spec, targets: Targets, augment: Augment) -> Task:
    """A head as wide as the teacher's features; "cosine" is that of prediction and target, in [-1, 1].

    Raises:
        ValueError: there are no features.
    """
    features = targets.require_features()
    mean, deviation = torch.zeros(features.width), torch.ones(features.width)
    if spec.standardise:
        mean, deviation = map(torch.from_numpy, distillation.moments(features))

    def prepare(rows: Tensor) -> Tensor:
        return nn.functional.normalize((rows - mean.to(rows.device)) / deviation.to(rows.device), dim=1)

    return Task(
        head=lambda width: distillation.head(width, spec.hidden, features.width),
        batch=distillation.batch(features, augment, prepare),
        loss=cosine if spec.loss == "cosine" else l2,
        mean_over_images=True,
    )


def cosine(predictions: Tensor, wanted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of 2 - 2 cosine, and {"cosine"}.

    Args:
        predictions: (B, D) float.
        wanted: (B, D) float, rows of length 1.
    """
    likeness = nn.functional.cosine_similarity(predictions, wanted, dim=1).mean()
    return 2 - 2 * likeness, {"cosine": likeness}


def l2(predictions: Tensor, wanted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean squared distance of the predictions as they are, and {"cosine"}.

    Args:
        predictions: (B, D) float.
        wanted: (B, D) float, rows of length 1.
    """
    likeness = nn.functional.cosine_similarity(predictions.detach(), wanted, dim=1).mean()
    return (predictions - wanted).square().sum(dim=1).mean(), {"cosine": likeness}

"""Regression: the student predicts the teacher's normalised features of each image.

The alternative to `clusters`: the features themselves are transferred, not only their grouping. The MLP that maps the student's
features to the teacher's is the head, and is discarded after training.

Source: the row "[37]+vgg-Jigsaw++" of table 3 of Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385; the
MLP head: Navaneet, Koohpayegani, Tejankar, Pirsiavash, "SimReg", BMVC 2021, arXiv:2201.05131. `standardise`
follows "Reg-BN" in Abbasi Koohpayegani, Tejankar, Pirsiavash, "CompRess", NeurIPS 2020, arXiv:2010.14713, with moments over
all images instead of a batch.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ktray.ops.random_draws import copies
from ktray.spec import Augment
from ktray.strict import StrictSpec
from ktray.training import distillation
from ktray.training.task import Targets, Task

REVISION = 1
TOOLS = (distillation,)

NEEDS: dict[str, tuple[str, ...]] = {"features": ()}


class Spec(StrictSpec):
    """An MLP on the student predicts the teacher's features, scaled to length 1."""

    kind: Literal["regression"] = "regression"
    loss: Literal["cosine", "l2"] = Field(
        default="cosine",
        description="cosine: 2 - 2 cosine similarity; l2: squared distance, without scaling the prediction to length 1",
    )
    hidden: tuple[Annotated[int, Field(ge=8, le=16384)], ...] = Field(
        default=(512,), max_length=8, description="widths of the head's hidden layers; []: a linear head"
    )
    standardise: bool = Field(default=False, description="first scale each teacher feature to mean 0 and variance 1")


def task(spec: Spec, targets: Targets, augment: Augment) -> Task:
    """Regression by a head as wide as the teacher's features. Metric "cosine": similarity to the target, in [-1, 1].

    Raises:
        ValueError: there are no teacher features.
    """
    features = targets.require_features()
    mean, deviation = torch.zeros(features.width), torch.ones(features.width)
    if spec.standardise:
        mean, deviation = map(torch.from_numpy, distillation.feature_moments(features))
    mean_on, deviation_on = copies(mean), copies(deviation)

    def prepare(rows: Tensor) -> Tensor:
        return nn.functional.normalize((rows - mean_on(rows.device)) / deviation_on(rows.device), dim=1)

    draw, batch = distillation.feature_batch(features, augment, prepare)
    return Task(
        head=lambda width: distillation.mlp_head(width, spec.hidden, features.width),
        draw=draw,
        batch=batch,
        loss=cosine if spec.loss == "cosine" else l2,
        mean_over_images=True,
        capturable=True,
    )


def cosine(predictions: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of 2 - 2 cosine similarity, and {"cosine"}.

    Args:
        predictions: (B, D) float.
        targets: (B, D) float, rows of length 1.
    """
    similarity = nn.functional.cosine_similarity(predictions, targets, dim=1).mean()
    return 2 - 2 * similarity, {"cosine": similarity}


def l2(predictions: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean squared distance between predictions (not scaled) and targets, and {"cosine"}.

    Args:
        predictions: (B, D) float.
        targets: (B, D) float, rows of length 1.
    """
    similarity = nn.functional.cosine_similarity(predictions.detach(), targets, dim=1).mean()
    return (predictions - targets).square().sum(dim=1).mean(), {"cosine": similarity}

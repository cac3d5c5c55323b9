"""BYOL: predict what a slowly moving average of the network says of another view of the image; nothing is told apart.

Different from the source: its decay is constant, not 1 at the end, so that a longer training continues a shorter one; default
widths and distortions are those for small images.

Source: Grill et al., NeurIPS 2020, arXiv:2006.07733, section 3 and appendices B and J.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from ktray.ops import distortions
from ktray.ops.distortions import Distortions, view
from ktray.strict import StrictSpec
from ktray.training import moving_average
from ktray.training.task import Task

REVISION = 1
TOOLS = (distortions, moving_average)


class Spec(StrictSpec):
    """Two views per image by distortions of their own, and a target that follows the network."""

    kind: Literal["byol"] = "byol"
    decay: float = Field(
        default=0.99, ge=0, lt=1, description="share of the target that a step leaves; 0.99 for 300 epochs or less"
    )
    hidden: int = Field(default=512, ge=8, le=16384, description="width of the hidden layers of projector and predictor")
    width: int = Field(default=128, ge=2, le=4096, description="width of what is predicted")
    first: Distortions = Distortions()
    second: Distortions = Distortions(solarise=0.2)


class Head(nn.Module):
    """Projector and predictor; `moving_average.prepare` adds the `target`, the average of backbone and projector."""

    target: nn.ModuleDict

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.projector = _perceptron(width, hidden, out)
        self.predictor = _perceptron(out, hidden, out)

    def forward(self, features: Tensor) -> Tensor:
        """(M, D) -> (M, 2 * out): the prediction, and the projection that it was made from."""
        projection = self.projector(features)
        return torch.cat([self.predictor(projection), projection], dim=1)


def task(spec: Spec, size: int) -> Task:
    """Metric "spread": deviation of the target's unit vectors over the batch; 1 if they fill the sphere, 0 after a collapse.

    Args:
        size: side of the images in pixels; any.
    """

    def batch(images: Tensor, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        views = [view(images, distortions, generator) for distortions in (spec.first, spec.second)]
        return torch.stack(views, dim=1).flatten(0, 1), torch.arange(len(images), device=images.device)

    return Task(
        head=lambda width: Head(width, spec.hidden, spec.width),
        batch=batch,
        loss=lambda outputs, targets: regression(*outputs.chunk(2, dim=1)),
        after_step=lambda model: moving_average.follow(model, spec.decay),
        prepare=moving_average.prepare,
        forward=forward,
        mean_over_images=True,
    )


def forward(model: nn.ModuleDict, inputs: Tensor) -> Tensor:
    """(M, 3, h, w) -> (M, 2 * out): the network's predictions, and the target's projections of the same inputs."""
    head = cast(Head, model["head"])
    prediction, _ = head(model["backbone"](inputs)).chunk(2, dim=1)
    return torch.cat([prediction, moving_average.projected(model, inputs)], dim=1)


def regression(predictions: Tensor, projections: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared distance of unit vectors from each view's prediction to the other's projection, both directions summed.

    Args:
        predictions, projections: (2B, out) float; rows 2i and 2i + 1 are of one image. No gradient flows into the projections.

    Source: Grill et al., equation 2.
    """
    wanted = nn.functional.normalize(projections.detach().float(), dim=1)
    other = wanted.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    distance = (nn.functional.normalize(predictions.float(), dim=1) - other).square().sum(dim=1)
    spread = wanted.std(dim=0, correction=0).mean() * wanted.shape[1] ** 0.5
    return 2 * distance.mean(), {"spread": spread}


def _perceptron(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out))

"""BYOL: predict a moving-average network's projection of another view of the same image. No negative pairs.

Differences from the source: the decay of the moving average is constant instead of rising to 1, so that a longer training can
continue a shorter one; the default widths and distortions suit small images.

Source: Grill et al., NeurIPS 2020, arXiv:2006.07733, section 3 and appendices B and J.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from ktray.ops import distortions
from ktray.ops.distortions import Distortions, draw_view, random_view
from ktray.ops.random_draws import Draws
from ktray.strict import StrictSpec
from ktray.training import moving_average
from ktray.training.task import Task

REVISION = 1
TOOLS = (distortions, moving_average)


class Spec(StrictSpec):
    """Two views per image, each with its own distortions, and a target network that is a moving average of the trained one."""

    kind: Literal["byol"] = "byol"
    decay: float = Field(
        default=0.99, ge=0, lt=1, description="share of the target kept at each step; the source uses 0.99 for up to 300 epochs"
    )
    hidden: int = Field(default=512, ge=8, le=16384, description="hidden width of the projector and the predictor")
    width: int = Field(default=128, ge=2, le=4096, description="width of the projection")
    first: Distortions = Distortions()
    second: Distortions = Distortions(solarise=0.2)


class _Head(nn.Module):
    """Projector and predictor; `moving_average.prepare` adds `target`, the moving average of backbone and projector."""

    target: nn.ModuleDict

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.projector = _perceptron(width, hidden, out)
        self.predictor = _perceptron(out, hidden, out)

    def forward(self, features: Tensor) -> Tensor:
        """(M, D) -> (M, 2 * out): the prediction, then the projection it was computed from."""
        projection = self.projector(features)
        return torch.cat([self.predictor(projection), projection], dim=1)


def task(spec: Spec, size: int) -> Task:
    """BYOL's training problem. Metric "spread" detects a collapse: 1 if the projections cover the sphere, 0 if they all agree.

    "spread" is the standard deviation of the target's unit vectors over the batch, times the square root of their width.

    Args:
        size: side of the images in pixels; any.
    """
    distorted = {"first": spec.first, "second": spec.second}

    def draw(indices: Tensor, generator: torch.Generator) -> Draws:
        return {name: draw_view(len(indices), each, generator) for name, each in distorted.items()}

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        views = [random_view(images, each, draws[name]) for name, each in distorted.items()]
        return torch.stack(views, dim=1).flatten(0, 1), torch.arange(len(images), device=images.device)

    return Task(
        head=lambda width: _Head(width, spec.hidden, spec.width),
        draw=draw,
        batch=batch,
        loss=lambda outputs, targets: regression(*outputs.chunk(2, dim=1)),
        after_step=lambda model: moving_average.update(model, spec.decay),
        prepare=moving_average.prepare,
        forward=forward,
        mean_over_images=True,
        capturable=True,
    )


def forward(model: nn.ModuleDict, inputs: Tensor) -> Tensor:
    """(M, 3, h, w) -> (M, 2 * out): the network's predictions, then the target's projections of the same inputs."""
    head = cast(_Head, model["head"])
    prediction, _ = head(model["backbone"](inputs)).chunk(2, dim=1)
    return torch.cat([prediction, moving_average.target_projection(model, inputs)], dim=1)


def regression(predictions: Tensor, projections: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared distance between each view's prediction and the other view's projection, both of length 1; and {"spread"}.

    The two directions are summed, and no gradient flows into the projections.

    Args:
        predictions, projections: (2B, out) float; rows 2i and 2i + 1 belong to one image.

    Source: Grill et al., equation 2.
    """
    targets = nn.functional.normalize(projections.detach().float(), dim=1)
    swapped = targets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    distance = (nn.functional.normalize(predictions.float(), dim=1) - swapped).square().sum(dim=1)
    spread = targets.std(dim=0, correction=0).mean() * targets.shape[1] ** 0.5
    return 2 * distance.mean(), {"spread": spread}


def _perceptron(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out))

"""SimCLR: contrastive learning. Identify, among all views in the batch, the other view of the same image.

The batch size matters: with B images, a view has 2B - 2 negatives, so smaller batches make the task easier.

Source: Chen, Kornblith, Norouzi, Hinton, ICML 2020, arXiv:2002.05709, algorithm 1; temperature 0.5 for CIFAR-10 (appendix
B.9). The head with batch norm is that of google-research/simclr.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ktray.ops import distortions
from ktray.ops.distortions import Distortions, draw_view, random_view
from ktray.ops.random_draws import Draws
from ktray.strict import StrictSpec
from ktray.training.task import Task

REVISION = 1
TOOLS = (distortions,)


class Spec(StrictSpec):
    """Two distorted views per image, compared after a projection head that is discarded after training."""

    kind: Literal["simclr"] = "simclr"
    temperature: float = Field(default=0.5, gt=0, le=10, description="divides the cosine similarities")
    hidden: int = Field(default=512, ge=8, le=16384, description="width of the head's hidden layer")
    width: int = Field(default=128, ge=2, le=4096, description="width of the projection")
    distortions: Distortions = Distortions()


def task(spec: Spec, size: int) -> Task:
    """The NT-Xent loss on a two-layer head. Metric "top1": how often the most similar view is of the same image.

    Args:
        size: side of the images in pixels; any.
    """

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        pairs = images.repeat_interleave(2, dim=0)  # the two views of an image are neighbours
        return random_view(pairs, spec.distortions, draws), torch.arange(len(images), device=images.device)

    def head(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(width, spec.hidden, bias=False),
            nn.BatchNorm1d(spec.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(spec.hidden, spec.width),
        )

    return Task(
        head=head,
        draw=lambda indices, generator: draw_view(2 * len(indices), spec.distortions, generator),
        batch=batch,
        loss=lambda outputs, targets: nt_xent(outputs, spec.temperature),
        capturable=True,
    )


def nt_xent(outputs: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The NT-Xent loss: cross entropy of picking the same image's other view among all others; and {"top1"} in [0, 1].

    Logits are cosine similarities divided by the temperature.

    Args:
        outputs: (2B, d) float; rows 2i and 2i + 1 belong to one image.

    Source: Sohn, NeurIPS 2016; Chen et al., equation 1.
    """
    unit = nn.functional.normalize(outputs.float(), dim=1)
    similarity = unit @ unit.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(unit), dtype=torch.bool, device=unit.device), -torch.inf)
    partner = torch.arange(len(unit), device=unit.device) ^ 1
    top1 = (similarity.detach().max(1).indices == partner).float().mean()
    return nn.functional.cross_entropy(similarity, partner), {"top1": top1}

"""DINO: self-distillation. Every view of an image must match a moving-average network's output for its global views.

The moving-average network (the target) sees only the global views. Its outputs are centred, so that no single output dimension
dominates, and sharpened, so that they do not become uniform. The centre is saved with the head.

Differences from the source: local views are enlarged to the size of the global ones, so that all views form one batch; the
decay and the target's temperature are constant, so that a longer training can continue a shorter one; the last layer is never
frozen; the output dimension is 1,024 instead of 65,536.

Source: Caron, Touvron, Misra, Jégou, Mairal, Bojanowski, Joulin, ICCV 2021, arXiv:2104.14294, section 3.1 and algorithm 1;
multi-crop from Caron et al., NeurIPS 2020, arXiv:2006.09882.
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

_GLOBAL = 2


class Spec(StrictSpec):
    """Two global and `local` local views per image. Trains best with adamw.

    Losses are not comparable between trainings, and the loss rises when the target starts to use more output dimensions; watch
    the metric "entropy" instead.
    """

    kind: Literal["dino"] = "dino"
    local: int = Field(default=4, ge=0, le=16, description="local views per image")
    answers: int = Field(default=1024, ge=2, le=65536, description="output dimension (the source: number of prototypes)")
    hidden: int = Field(default=512, ge=8, le=16384, description="width of the head's hidden layers")
    bottleneck: int = Field(default=128, ge=2, le=4096, description="width before the last layer, normalised to length 1")
    batch_norm: bool = Field(
        default=True, description="in the head; helps convolutional networks, whose first features are alike for all images"
    )
    temperature: float = Field(default=0.1, gt=0, le=10, description="softmax temperature of the network")
    target_temperature: float = Field(
        default=0.04, gt=0, le=10, description="softmax temperature of the target; lower is sharper"
    )
    decay: float = Field(default=0.99, ge=0, lt=1, description="share of the target kept at each step")
    centre_decay: float = Field(default=0.9, ge=0, lt=1, description="share of the centre kept at each step")
    whole: Distortions = Distortions(area=0.4, blur=0.5)
    part: Distortions = Distortions(area=0.1, most=0.4, blur=0.5)


class _Projector(nn.Module):
    """A three-layer MLP to a vector of length 1, then its cosine similarity to the weights of each output dimension."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before in (width, spec.hidden):
            norms = [nn.BatchNorm1d(spec.hidden)] if spec.batch_norm else []
            layers += [nn.Linear(before, spec.hidden), *norms, nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(spec.hidden, spec.bottleneck))
        self.answers = nn.Parameter(torch.empty(spec.answers, spec.bottleneck).normal_())

    def forward(self, features: Tensor) -> Tensor:
        """(M, D) -> (M, answers) in [-1, 1]."""
        unit = nn.functional.normalize(self.layers(features), dim=1)
        return unit @ nn.functional.normalize(self.answers, dim=1).T


class _Head(nn.Module):
    """The projector and the centre; `moving_average.prepare` adds `target`, the moving average of backbone and projector."""

    target: nn.ModuleDict
    centre: Tensor
    target_mean: Tensor

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        self.spec, self.views = spec, _GLOBAL + spec.local
        self.projector = _Projector(width, spec)
        self.register_buffer("centre", torch.zeros(spec.answers))
        self.register_buffer("target_mean", torch.zeros(spec.answers), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B * views, D) -> as `compared`, with the network's own outputs in place of the target's."""
        logits = self.projector(features)
        return self.compared(logits, logits.detach().unflatten(0, (-1, self.views))[:, :_GLOBAL].flatten(0, 1))

    def compared(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B * views, answers) and (B * 2, answers) -> (B, views + 2, answers): logits of the network, then of the target."""
        own = (logits / self.spec.temperature).unflatten(0, (-1, self.views))
        targets = ((target - self.centre) / self.spec.target_temperature).unflatten(0, (-1, _GLOBAL))
        return torch.cat([own, targets], dim=1)


def task(spec: Spec, size: int) -> Task:
    """DINO's training problem. Metric "entropy" detects a collapse: 1 if all output dimensions are used equally, 0 if only one.

    "entropy" is that of the target's mean output over the batch, divided by its maximum.

    Args:
        size: side of the images in pixels; any.
    """

    def draw(indices: Tensor, generator: torch.Generator) -> Draws:
        count = len(indices)
        wholes = draw_view(_GLOBAL * count, spec.whole, generator)
        return {"wholes": wholes, **{f"part {number}": draw_view(count, spec.part, generator) for number in range(spec.local)}}

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        wholes = random_view(images.repeat_interleave(_GLOBAL, dim=0), spec.whole, draws["wholes"]).unflatten(0, (-1, _GLOBAL))
        parts = [random_view(images, spec.part, draws[f"part {number}"])[:, None] for number in range(spec.local)]
        return torch.cat([wholes, *parts], dim=1).flatten(0, 1), torch.arange(len(images), device=images.device)

    return Task(
        head=lambda width: _Head(width, spec),
        draw=draw,
        batch=batch,
        loss=lambda outputs, targets: agreement(*outputs.split([_GLOBAL + spec.local, _GLOBAL], dim=1)),
        after_step=after_step,
        prepare=moving_average.prepare,
        forward=forward,
        capturable=True,
    )


def forward(model: nn.ModuleDict, inputs: Tensor) -> Tensor:
    """(B * views, 3, h, w) -> logits (B, views + 2, answers) as from `_Head.compared`."""
    head = cast(_Head, model["head"])
    target = moving_average.target_projection(model, inputs.unflatten(0, (-1, head.views))[:, :_GLOBAL].flatten(0, 1))
    head.target_mean.copy_(target.mean(dim=0))
    return head.compared(head.projector(model["backbone"](inputs)), target)


@torch.no_grad()
def after_step(model: nn.ModuleDict) -> None:
    """Move the target towards the network, and the centre towards the target's mean output over the last batch."""
    head = cast(_Head, model["head"])
    moving_average.update(model, head.spec.decay)
    head.centre.lerp_(head.target_mean, 1 - head.spec.centre_decay)


def agreement(own: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross entropy between the target's output for a global view and the network's for every other view; {"entropy"}.

    Args:
        own: (B, views, answers) logits of the network, the global views first.
        targets: (B, 2, answers) logits of the target for the global views; no gradient flows into them.

    Source: Caron et al., equation 3.
    """
    answers = targets.detach().float().softmax(dim=2)
    each = -torch.einsum("btk,bvk->btv", answers, own.float().log_softmax(dim=2)).mean(dim=0)  # (2, views)
    others = ~torch.eye(len(each), each.shape[1], dtype=torch.bool, device=each.device)
    mean = answers.mean(dim=(0, 1))
    entropy = -(mean * mean.clamp_min(1e-12).log()).sum() / torch.tensor(len(mean)).log()
    return (each * others).sum() / others.sum(), {"entropy": entropy}

"""DINO: tell of a part of an image what a slowly moving average of the network says of most of it.

The average sees the global views only, and what it says is centred (against one answer for all) and sharpened (against the same
share of every answer). The centre is a part of the head like the average, and saved with it.

Different from the source: local views are enlarged to the size of the global ones, so that all are one batch; decay and the
target's temperature are constant, so that a longer training continues a shorter one; the last layer is never held back; there
are 1,024 answers, not 65,536.

Source: Caron, Touvron, Misra, Jégou, Mairal, Bojanowski, Joulin, ICCV 2021, arXiv:2104.14294, section 3.1 and algorithm 1;
multi-crop from Caron et al., NeurIPS 2020, arXiv:2006.09882.
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

_GLOBAL = 2


class Spec(StrictSpec):
    """Two global and `local` local views per image. Trains best with adamw.

    The loss of different targets cannot be compared, and it rises where the target begins to use more answers: see "entropy".
    """

    kind: Literal["dino"] = "dino"
    local: int = Field(default=4, ge=0, le=16, description="local views")
    answers: int = Field(default=1024, ge=2, le=65536, description="what network and target distribute over")
    hidden: int = Field(default=512, ge=8, le=16384, description="width of the head's hidden layers")
    bottleneck: int = Field(default=128, ge=2, le=4096, description="width before the answers, where vectors have length 1")
    batch_norm: bool = Field(default=True, description="in the head; for convolutional networks, whose images begin alike")
    temperature: float = Field(default=0.1, gt=0, le=10, description="of the network")
    target_temperature: float = Field(default=0.04, gt=0, le=10, description="of the target; lower is sharper")
    decay: float = Field(default=0.99, ge=0, lt=1, description="share of the target that a step leaves")
    centre_decay: float = Field(default=0.9, ge=0, lt=1, description="share of the centre that a step leaves")
    whole: Distortions = Distortions(area=0.4, blur=0.5)
    part: Distortions = Distortions(area=0.1, most=0.4, blur=0.5)


class Projector(nn.Module):
    """Three layers to a vector of length 1, and its cosine to every answer."""

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


class Head(nn.Module):
    """The projector, the centre, and, once `moving_average.prepare` has seen the model, the target."""

    target: nn.ModuleDict
    centre: Tensor
    said: Tensor

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        self.spec, self.views = spec, _GLOBAL + spec.local
        self.projector = Projector(width, spec)
        self.register_buffer("centre", torch.zeros(spec.answers))
        self.register_buffer("said", torch.zeros(spec.answers), persistent=False)  # the target's mean over the last batch

    def forward(self, features: Tensor) -> Tensor:
        """(B * views, D) -> as `compared`, with what the network says itself in the target's place."""
        logits = self.projector(features)
        return self.compared(logits, logits.detach().unflatten(0, (-1, self.views))[:, :_GLOBAL].flatten(0, 1))

    def compared(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B * views, answers) and (B * 2, answers) -> (B, views + 2, answers), ready for softmax."""
        own = (logits / self.spec.temperature).unflatten(0, (-1, self.views))
        wanted = ((target - self.centre) / self.spec.target_temperature).unflatten(0, (-1, _GLOBAL))
        return torch.cat([own, wanted], dim=1)


def task(spec: Spec, size: int) -> Task:
    """Metric "entropy": of the target's mean answer, 1 if all answers are as frequent, 0 after a collapse to one.

    Args:
        size: side of the images in pixels; any.
    """

    def batch(images: Tensor, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        wholes = view(images.repeat_interleave(_GLOBAL, dim=0), spec.whole, generator).unflatten(0, (-1, _GLOBAL))
        parts = [view(images, spec.part, generator)[:, None] for _ in range(spec.local)]
        return torch.cat([wholes, *parts], dim=1).flatten(0, 1), torch.arange(len(images), device=images.device)

    return Task(
        head=lambda width: Head(width, spec),
        batch=batch,
        loss=lambda outputs, targets: agreement(*outputs.split([_GLOBAL + spec.local, _GLOBAL], dim=1)),
        after_step=after_step,
        prepare=moving_average.prepare,
        forward=forward,
    )


def forward(model: nn.ModuleDict, inputs: Tensor) -> Tensor:
    """(B * views, 3, h, w) -> as `Head.compared`."""
    head = cast(Head, model["head"])
    target = moving_average.projected(model, inputs.unflatten(0, (-1, head.views))[:, :_GLOBAL].flatten(0, 1))
    head.said.copy_(target.mean(dim=0))
    return head.compared(head.projector(model["backbone"](inputs)), target)


@torch.no_grad()
def after_step(model: nn.ModuleDict) -> None:
    """Move the target towards the network, and the centre towards what the target said of the last batch."""
    head = cast(Head, model["head"])
    moving_average.follow(model, head.spec.decay)
    head.centre.lerp_(head.said, 1 - head.spec.centre_decay)


def agreement(own: Tensor, wanted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The cross entropy from each target's answer to the network's on every other view, and {"entropy"}.

    Args:
        own: (B, views, answers) logits of the network, the global views first.
        wanted: (B, 2, answers) logits of the target for the global views; no gradient flows into them.

    Source: Caron et al., equation 3.
    """
    answers = wanted.detach().float().softmax(dim=2)
    each = -torch.einsum("btk,bvk->btv", answers, own.float().log_softmax(dim=2)).mean(dim=0)  # (2, views)
    others = ~torch.eye(len(each), each.shape[1], dtype=torch.bool, device=each.device)
    mean = answers.mean(dim=(0, 1))
    entropy = -(mean * mean.clamp_min(1e-12).log()).sum() / torch.tensor(len(mean)).log()
    return (each * others).sum() / others.sum(), {"entropy": entropy}

"""An exponential moving average of the weights in training: what is judged, exported and read by later stages.

Step t keeps min(decay, (1 + t) / (10 + t)) of the average, so that a short training does not end with the random weights that
it began with. Buffers, such as the statistics of batch norm, are averaged as well; whole numbers are copied.

Source: Polyak, Juditsky, SIAM Journal on Control and Optimization 30, 1992; the rule for the first steps is that of
TensorFlow's ExponentialMovingAverage with `num_updates`, the average of buffers that of timm's ModelEmaV2.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

IDENTITY, REVISION = "averaged_weights", 1


@dataclass(frozen=True)
class WeightAverage:
    """The average of the weights of `model`, which `update` moves after each step.

    Attributes:
        model: the network in training with its head.
        average: a copy of it with the averaged weights, never trained.
        decay: largest share of the average that a step keeps.
        steps: scalar float32 on the device, steps so far.
    """

    model: nn.ModuleDict
    average: nn.ModuleDict
    decay: float
    steps: Tensor

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights after a step; tensors of the device alone."""
        self.steps.add_(1)
        kept = ((1 + self.steps) / (10 + self.steps)).clamp_max(self.decay)
        moving, trained = ([*model.state_dict().values()] for model in (self.average, self.model))
        floats = [index for index, tensor in enumerate(moving) if tensor.is_floating_point()]
        averaged = [moving[index] for index in floats]
        difference = torch._foreach_sub([trained[index] for index in floats], averaged)
        torch._foreach_mul_(difference, 1 - kept)
        torch._foreach_add_(averaged, difference)
        for index in set(range(len(moving))) - set(floats):
            moving[index].copy_(trained[index])


def averaging(model: nn.ModuleDict, decay: float | None, device: torch.device) -> WeightAverage | None:
    """The average of a model's weights, which begins with them; None without a decay."""
    if decay is None:
        return None
    average = copy.deepcopy(model).requires_grad_(False)
    return WeightAverage(model, average, decay, torch.zeros((), device=device))

"""airbench: a shallow convolutional network that learns CIFAR-10 in very few epochs.

A first layer of 2x2 filters without padding, then three blocks of two 3x3 convolutions, the first of each followed by
max-pooling; batch norm with fast statistics, GELU, and global max-pooling. Convolutions are initialised to the identity as far
as their channels allow.

Differences from the source: a backbone sees no images when it is built, so the first layer is not whitened on the training
images. It starts with filters close to the whitening of photographs, the 2x2 cosine basis of each opponent colour and its
negative, and batch norm equalises their variances. Biases and scales are trained like all other parameters.

Source: Jordan, 94% on CIFAR-10 in 3.29 seconds on a single GPU, arXiv:2404.00498, section 3; opponent colours after
Ohta, Kanade, Sakai, Computer Graphics and Image Processing 13, 1980.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ktray.strict import StrictSpec

REVISION = 1

_CHANNELS = (64, 256, 256)
_MOMENTUM = 0.4  # PyTorch's convention; with so few steps, slow statistics would lag behind the weights


class Spec(StrictSpec):
    """Seven convolutions, 2.0M parameters at width 1; meant for 28 to 64 px and high learning rates."""

    kind: Literal["airbench"] = "airbench"
    width: float = Field(
        default=1.0, gt=0, le=8, description="factor on the number of channels, each rounded to a multiple of 8"
    )


class _Airbench(nn.Module):
    """A first layer and three blocks in sequence."""

    layers = ("first", "block1", "block2", "block3")

    def __init__(self, width: float) -> None:
        super().__init__()
        filters = _opponent_cosines()
        convolution = nn.Conv2d(3, len(filters), 2, bias=False)
        with torch.no_grad():
            convolution.weight.copy_(filters)
        self.first = nn.Sequential(convolution, nn.BatchNorm2d(len(filters), momentum=_MOMENTUM), nn.GELU())
        before = len(filters)
        for number, channels in enumerate(_CHANNELS, start=1):
            after = max(8, 8 * round(channels * width / 8))
            self.add_module(f"block{number}", _block(before, after))
            before = after
        self.feature_dim = before

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 -> (B, feature_dim) float32: the largest value of each map of block3."""
        maps = images
        for name in self.layers:
            maps = self.get_submodule(name)(maps)
        return maps.amax(dim=(2, 3))


def _block(before: int, after: int) -> nn.Sequential:
    def half(channels: int, *pooling: nn.Module) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, after, 3, padding=1, bias=False)
        nn.init.dirac_(convolution.weight[:channels])  # the other filters keep their random initialisation
        return [convolution, *pooling, nn.BatchNorm2d(after, momentum=_MOMENTUM), nn.GELU()]

    return nn.Sequential(*half(before, nn.MaxPool2d(2)), *half(after))


def _opponent_cosines() -> Tensor:
    """(24, 3, 2, 2) float32: 12 orthonormal filters of 2x2 pixels and three colours, and their negatives."""
    cosine = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]])
    colours = colours / colours.norm(dim=1, keepdim=True)
    filters = torch.einsum("kc,iy,jx->kijcyx", colours, cosine, cosine).reshape(12, 3, 2, 2)
    return torch.cat([filters, -filters])


def build(spec: Spec) -> nn.Module:
    """The network with random initial weights from the global generator; images of at least 9 px."""
    return _Airbench(spec.width)

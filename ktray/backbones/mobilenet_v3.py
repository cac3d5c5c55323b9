"""MobileNetV3-Small or -Large: torchvision's ("full"), or with two strides fewer for 28 to 64 px ("small").

Parameters are named as in torchvision, without `classifier`: its state_dicts load at width 1. A layer is a stage of equal
resolution; the last one includes the final 1x1 convolution. "small" has stride 1 in the stem and in the first strided block:
images of 32 px give maps of 4 x 4.

Source: Howard, Sandler, et al., ICCV 2019, arXiv:1905.02244, Tables 1 and 2.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ktray.strict import StrictSpec

REVISION = 1
HEAD = "classifier"


class Spec(StrictSpec):
    """Inverted residuals with squeeze-and-excitation; "small" has 0.9M parameters, "large" 3.0M, both without a classifier."""

    kind: Literal["mobilenet_v3"] = "mobilenet_v3"
    size: Literal["small", "large"] = "small"
    form: Literal["small", "full"] = "small"
    width: float = Field(
        default=1.0, gt=0, le=8, description="factor on the number of channels, each rounded to a multiple of 8"
    )


class _MobileNetV3(nn.Module):
    """torchvision's blocks in sequence; an identity module at the end of each stage names the layer.

    Args:
        features: the blocks.
        starts: index of the first block of each stage.
    """

    layers = ("stage1", "stage2", "stage3", "stage4", "stage5")

    def __init__(self, features: nn.Sequential, starts: list[int]) -> None:
        super().__init__()
        self.features = features
        self._starts = starts
        for name in self.layers:
            self.add_module(name, nn.Identity())
        self.feature_dim = [module for module in features.modules() if isinstance(module, nn.Conv2d)][-1].out_channels

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 -> (B, feature_dim) float32: stage5 averaged over positions."""
        maps = images
        for name, start, stop in zip(self.layers, self._starts, [*self._starts[1:], len(self.features)], strict=True):
            maps = self.get_submodule(name)(self.features[start:stop](maps))
        return maps.mean(dim=(2, 3))


def build(spec: Spec) -> nn.Module:
    """The network with random initial weights from the global generator; images of any size."""
    from torchvision import models

    make = models.mobilenet_v3_small if spec.size == "small" else models.mobilenet_v3_large
    features = make(weights=None, width_mult=spec.width).features
    strided = [(i, m) for i, block in enumerate(features) for m in block.modules() if getattr(m, "stride", 1) == (2, 2)]
    if spec.form == "small":
        for _, convolution in strided[:2]:
            convolution.stride = (1, 1)
    return _MobileNetV3(features, [index for index, _ in strided])


def in_torchvision(spec: Spec) -> str | None:
    """The torchvision model with the same weights and outputs before `classifier`; None for forms and widths of our own."""
    return f"mobilenet_v3_{spec.size}()" if (spec.form, spec.width) == ("full", 1.0) else None

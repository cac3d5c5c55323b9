"""AlexNet's five convolutions with batch norm, for 28 to 64 px ("small") or 224 px ("full").

Different from the paper's AlexNet: batch norm after each convolution and no local response normalisation, no groups in conv2,
conv4 and conv5, and global average pooling in the place of fc6 and fc7, so that the features are those of conv5. "small" also
has 3x3 convolutions of stride 1 everywhere and no pooling after conv5: 28 px come to 7 x 7, 32 px to 8 x 8.

Source: Krizhevsky, Sutskever, Hinton, NeurIPS 2012; channels of "small" after Krizhevsky, arXiv:1404.5997.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ktray.spec import Spec as SpecBase

REVISION = 1

# per convolution: channels at width 1, kernel, stride, padding, (kernel, stride) of the max-pooling after it
_FORMS: dict[str, list[tuple[int, int, int, int, tuple[int, int] | None]]] = {
    "small": [
        (64, 3, 1, 1, (2, 2)),
        (192, 3, 1, 1, (2, 2)),
        (384, 3, 1, 1, None),
        (256, 3, 1, 1, None),
        (256, 3, 1, 1, None),
    ],
    "full": [
        (96, 11, 4, 2, (3, 2)),
        (256, 5, 1, 2, (3, 2)),
        (384, 3, 1, 1, None),
        (384, 3, 1, 1, None),
        (256, 3, 1, 1, (3, 2)),
    ],
}


class Spec(SpecBase):
    """Five convolutions; "small" has 2.3M parameters at width 1, "full" 3.7M."""

    kind: Literal["alexnet"] = "alexnet"
    form: Literal["small", "full"] = "small"
    width: float = Field(default=1.0, gt=0, le=8, description="factor of the channels, each rounded to a multiple of 8")


class AlexNet(nn.Module):
    """Convolutions as named blocks (convolution, batch norm, ReLU), so that a layer's output is what the next one sees."""

    layers = ("conv1", "conv2", "conv3", "conv4", "conv5")

    def __init__(self, form: str, width: float) -> None:
        super().__init__()
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        before = 3
        for number, (channels, kernel, stride, padding, pooling) in enumerate(_FORMS[form], start=1):
            after = max(8, 8 * round(channels * width / 8))
            convolution = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            blocks[f"conv{number}"] = nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True))
            if pooling:
                blocks[f"pool{number}"] = nn.MaxPool2d(*pooling)
            before = after
        self.feature_dim = before
        for name, block in blocks.items():
            self.add_module(name, block)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 -> (B, feature_dim) float32: conv5 (pooled in "full"), averaged over the places."""
        maps = images
        for block in self.children():
            maps = block(maps)
        return maps.mean(dim=(2, 3))


def build(spec: Spec) -> nn.Module:
    """The network with weights drawn from the global generator.

    "small" takes images from 8 px, "full" from 63 px.
    """
    return AlexNet(spec.form, spec.width)

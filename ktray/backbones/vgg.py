"""VGG-11, -13, -16 or -19: torchvision's ("full"), or with two poolings fewer for 28 to 64 px ("small").

Parameters are named as in torchvision, without `classifier`: its state_dicts load at width 1. A layer is a block of
convolutions before its pooling. "small" omits the pooling after block3 and after block5: in block4, images of 32 px give maps
of 8 x 8 and 28 px 7 x 7, enough for the 4 x 4 x 512 features of Noroozi et al. (2018). Global average pooling replaces the
fully connected layers.

Source: Simonyan, Zisserman, ICLR 2015, Table 1 (A, B, D, E); batch norm after Ioffe, Szegedy, ICML 2015.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ktray.strict import StrictSpec

REVISION = 1
HEAD = "classifier"

_COUNTS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_CHANNELS = (64, 128, 256, 512, 512)
_UNPOOLED = {"small": (3, 5), "full": ()}


class Spec(StrictSpec):
    """3x3 convolutions in five blocks; 14.7M parameters at depth 16."""

    kind: Literal["vgg"] = "vgg"
    depth: Literal[11, 13, 16, 19] = 16
    form: Literal["small", "full"] = "small"
    batch_norm: bool = Field(
        default=True, description="after each convolution; without it, deep networks need a low learning rate"
    )
    width: float = Field(
        default=1.0, gt=0, le=8, description="factor on the number of channels, each rounded to a multiple of 8"
    )


class _Vgg(nn.Module):
    """The convolutions, numbered as in torchvision; an identity module at the end of each block names the layer."""

    layers = ("block1", "block2", "block3", "block4", "block5")

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        self._ends: list[int] = []
        before = 3
        for block, count in enumerate(_COUNTS[spec.depth], start=1):
            after = max(8, 8 * round(_CHANNELS[block - 1] * spec.width / 8))
            for _ in range(count):
                convolution = nn.Conv2d(before, after, 3, padding=1)
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
                modules += [convolution, *([nn.BatchNorm2d(after)] if spec.batch_norm else []), nn.ReLU(inplace=True)]
                before = after
            self._ends.append(len(modules))
            modules.append(nn.Identity() if block in _UNPOOLED[spec.form] else nn.MaxPool2d(2, 2))
            self.add_module(f"block{block}", nn.Identity())
        self.features = nn.Sequential(*modules)
        self.feature_dim = before

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 -> (B, feature_dim) float32: block5 (pooled in "full"), averaged over positions."""
        maps = images
        for index, module in enumerate(self.features):
            if index in self._ends:
                maps = self.get_submodule(self.layers[self._ends.index(index)])(maps)
            maps = module(maps)
        return maps.mean(dim=(2, 3))


def build(spec: Spec) -> nn.Module:
    """The network with random initial weights from the global generator.

    Images have at least 8 px in "small" and 32 px in "full".
    """
    return _Vgg(spec)


def in_torchvision(spec: Spec) -> str | None:
    """The torchvision model with the same weights and outputs before `classifier`; None for forms and widths of our own."""
    if (spec.form, spec.width) != ("full", 1.0):
        return None
    return f"vgg{spec.depth}{'_bn' if spec.batch_norm else ''}() with avgpool = torch.nn.AdaptiveAvgPool2d(1)"

"""ResNet-18 to -152: torchvision's ("full"), or with a 3x3 stem for 28 to 96 px ("small").

Parameters are named as in torchvision, without `fc`: its state_dicts load into "full" at width 1, and vice versa.

Source: He, Zhang, Ren, Sun, CVPR 2016; "small" after its section 4.2 (CIFAR) with the stages of section 3.3.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from ktray.strict import StrictSpec

REVISION = 1
HEAD = "fc"

_BLOCKS = {
    18: ("BasicBlock", (2, 2, 2, 2)),
    34: ("BasicBlock", (3, 4, 6, 3)),
    50: ("Bottleneck", (3, 4, 6, 3)),
    101: ("Bottleneck", (3, 4, 23, 3)),
    152: ("Bottleneck", (3, 8, 36, 3)),
}


class Spec(StrictSpec):
    """A residual network; "full" has torchvision's 7x7 stem with max-pooling and is meant for 224 px."""

    kind: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50, 101, 152] = 18
    form: Literal["small", "full"] = "small"
    width: float = Field(
        default=1.0, gt=0, le=8, description="factor on the number of channels, each rounded to a multiple of 8"
    )


class _ResNet(nn.Module):
    """torchvision's residual blocks between a stem of either form and global average pooling.

    Args:
        block: torchvision's BasicBlock or Bottleneck.
        counts: number of blocks per stage.
    """

    layers = ("layer1", "layer2", "layer3", "layer4")

    def __init__(self, block: Any, counts: tuple[int, ...], form: str, width: float) -> None:
        super().__init__()
        channels = [max(8, 8 * round(64 * 2**stage * width / 8)) for stage in range(4)]
        kernel, stride = (3, 1) if form == "small" else (7, 2)
        self.conv1 = nn.Conv2d(3, channels[0], kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if form == "small" else nn.MaxPool2d(3, 2, 1)
        before = channels[0]
        for stage, count in enumerate(counts):
            after, stride = channels[stage] * block.expansion, min(stage, 1) + 1
            shortcut = None
            if stride != 1 or before != after:
                shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
            blocks = [block(before, channels[stage], stride, shortcut)]
            blocks += [block(after, channels[stage]) for _ in range(1, count)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            before = after
        self.feature_dim = before
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 -> (B, feature_dim) float32: layer4 averaged over positions."""
        maps = images
        for module in self.children():  # in the order of assignment, which is the order of depth
            maps = module(maps)
        return maps.mean(dim=(2, 3))


def build(spec: Spec) -> nn.Module:
    """The network with random initial weights from the global generator."""
    from torchvision.models import resnet

    name, counts = _BLOCKS[spec.depth]
    return _ResNet(getattr(resnet, name), counts, spec.form, spec.width)


def in_torchvision(spec: Spec) -> str | None:
    """The torchvision model with the same weights and outputs before `fc`; None for forms and widths of our own."""
    return f"resnet{spec.depth}()" if (spec.form, spec.width) == ("full", 1.0) else None

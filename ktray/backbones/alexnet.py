"""AlexNet's five convolutions: with batch norm, for 28 to 64 px or for 224 px, or grouped as in the paper.

All forms replace fc6 and fc7 by global average pooling, so the features are those of conv5.

- "small" and "full" have batch norm after each convolution, no groups and no local response normalisation. "small" also has
  3x3 convolutions of stride 1 everywhere and no pooling after conv5: images of 28 px give maps of 7 x 7, 32 px 8 x 8.
- "grouped" is the network of the paper and of its released code (CaffeNet): two groups in conv2, conv4 and conv5, biases, and
  local response normalisation after the first two poolings. "grouped_stride2" has stride 2 in conv1, which the authors
  use for puzzle tiles of 64 px. The weights of either load into the other.

Source: Krizhevsky, Sutskever, Hinton, NeurIPS 2012; channels of "small" after Krizhevsky, arXiv:1404.5997; the grouped forms
after the code of Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385 (train_val_cfn_jps++.prototxt), except
that they are initialised like the other forms instead of with a fixed deviation of 0.01, and that conv1 takes 224 px with
padding instead of 227 px without.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ktray.strict import StrictSpec

REVISION = 1

# per convolution: channels at width 1, kernel, stride, padding, (kernel, stride) of the max-pooling after it
_Rows = list[tuple[int, int, int, int, tuple[int, int] | None]]
_SMALL: _Rows = [
    (64, 3, 1, 1, (2, 2)),
    (192, 3, 1, 1, (2, 2)),
    (384, 3, 1, 1, None),
    (256, 3, 1, 1, None),
    (256, 3, 1, 1, None),
]
_FULL: _Rows = [
    (96, 11, 4, 2, (3, 2)),
    (256, 5, 1, 2, (3, 2)),
    (384, 3, 1, 1, None),
    (384, 3, 1, 1, None),
    (256, 3, 1, 1, (3, 2)),
]
_FORMS = {"small": _SMALL, "full": _FULL, "grouped": _FULL, "grouped_stride2": [(96, 11, 2, 2, (3, 2)), *_FULL[1:]]}
_GROUPS = (1, 2, 1, 2, 2)


class Spec(StrictSpec):
    """Five convolutions; "small" has 2.3M parameters at width 1, "full" 3.7M, the grouped forms 2.3M."""

    kind: Literal["alexnet"] = "alexnet"
    form: Literal["small", "full", "grouped", "grouped_stride2"] = "small"
    width: float = Field(
        default=1.0, gt=0, le=8, description="factor on the number of channels, each rounded to a multiple of 8"
    )


class _AlexNet(nn.Module):
    """Convolutions as named blocks that end in ReLU, so that a layer's output is taken before pooling."""

    layers = ("conv1", "conv2", "conv3", "conv4", "conv5")

    def __init__(self, form: str, width: float) -> None:
        super().__init__()
        grouped = form.startswith("grouped")
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        before = 3
        for number, (channels, kernel, stride, padding, pooling) in enumerate(_FORMS[form], start=1):
            after = max(8, 8 * round(channels * width / 8))
            groups = _GROUPS[number - 1] if grouped else 1
            convolution = nn.Conv2d(before, after, kernel, stride, padding, groups=groups, bias=grouped)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            norms: list[nn.Module] = [] if grouped else [nn.BatchNorm2d(after)]
            blocks[f"conv{number}"] = nn.Sequential(convolution, *norms, nn.ReLU(inplace=True))
            if pooling:
                blocks[f"pool{number}"] = nn.MaxPool2d(*pooling)
            if grouped and number <= 2:
                blocks[f"norm{number}"] = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
            before = after
        self.feature_dim = before
        for name, block in blocks.items():
            self.add_module(name, block)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 -> (B, feature_dim) float32: conv5 (pooled, except in "small"), averaged over positions."""
        maps = images
        for block in self.children():
            maps = block(maps)
        return maps.mean(dim=(2, 3))


def build(spec: Spec) -> nn.Module:
    """The network with random initial weights from the global generator.

    "small" takes images of at least 8 px, "full" and "grouped" 63 px, "grouped_stride2" 35 px.
    """
    return _AlexNet(spec.form, spec.width)

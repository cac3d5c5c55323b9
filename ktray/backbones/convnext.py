"""ConvNeXt-T: torchvision's ("full"), or with a stem of 2x2 patches for 28 to 64 px ("small").

Parameters are named as in torchvision, without the linear classifier; the norm before it (`classifier.0`) belongs to the
backbone. torchvision's state_dicts load into "full" at width 1. A layer is a stage: in "small", images of 32 px give maps of
16, 8, 4 and 2 px.

Source: Liu, Mao, et al., CVPR 2022, arXiv:2201.03545, section 2 and Table 5.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from ktray.strict import StrictSpec

REVISION = 1
HEAD = "classifier.2"

_SIZES = {"tiny": ((96, 192, 384, 768), (3, 3, 9, 3))}


class Spec(StrictSpec):
    """Depthwise 7x7 convolutions with layer norm; 27.8M parameters. Trains best with adamw."""

    kind: Literal["convnext"] = "convnext"
    size: Literal["tiny"] = "tiny"
    form: Literal["small", "full"] = "small"
    width: float = Field(
        default=1.0, gt=0, le=8, description="factor on the number of channels, each rounded to a multiple of 8"
    )
    drop_path: float = Field(
        default=0.0, ge=0, lt=1, description="stochastic depth: probability of skipping the last block, lower for earlier ones"
    )


class _ConvNeXt(nn.Module):
    """torchvision's stem, stages and downsamplings in sequence; an identity module at the end of each stage names the layer."""

    layers = ("stage1", "stage2", "stage3", "stage4")

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.features: nn.Sequential = model.features
        self.classifier = nn.Sequential(model.classifier[0])
        for name in self.layers:
            self.add_module(name, nn.Identity())
        self.feature_dim = int(model.classifier[2].in_features)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 -> (B, feature_dim) float32: stage4 averaged over positions, then normalised."""
        maps = images
        for number, name in enumerate(self.layers):
            maps = self.get_submodule(name)(self.features[2 * number : 2 * number + 2](maps))
        normed: Tensor = self.classifier(maps.mean(dim=(2, 3), keepdim=True))
        return normed.flatten(1)


def build(spec: Spec) -> nn.Module:
    """The network with random initial weights from the global generator.

    Images have at least 16 px in "small" and 32 px in "full".
    """
    from torchvision.models import convnext

    widths, counts = _SIZES[spec.size]
    channels = [max(8, 8 * round(width * spec.width / 8)) for width in widths]
    stages = [
        convnext.CNBlockConfig(before, after, count)
        for before, after, count in zip(channels, [*channels[1:], None], counts, strict=True)
    ]
    model = convnext.ConvNeXt(stages, stochastic_depth_prob=spec.drop_path)
    if spec.form == "small":
        stem = nn.Conv2d(3, channels[0], 2, 2)
        nn.init.trunc_normal_(stem.weight, std=0.02)
        nn.init.zeros_(stem.bias)  # type: ignore[arg-type]
        model.features[0][0] = stem
    return _ConvNeXt(model)


def in_torchvision(spec: Spec) -> str | None:
    """The torchvision model with the same weights and outputs before its head; None for forms and widths of our own."""
    return f"convnext_{spec.size}()" if (spec.form, spec.width) == ("full", 1.0) else None

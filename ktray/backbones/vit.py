"""Vision transformers ViT-Ti, ViT-S and ViT-B, with patches of any size; layers are maps of patches.

Parameters are named as in torchvision, without `heads`: a state_dict of its VisionTransformer of the same patch and image size
loads strictly (ViT-B/16: size base, patch 16, image 224, readout token). The position embedding is made for one image
size and interpolated for others. A layer is the output of a block without its class token, as a map (B, D, h, w).

Source: Dosovitskiy et al., ICLR 2021, arXiv:2010.11929; sizes tiny and small after Touvron et al., ICML 2021,
arXiv:2012.12877, Table 1; the readout "mean" after Zhai et al., CVPR 2022, arXiv:2106.04560.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ktray.strict import StrictSpec

REVISION = 1
HEAD = "heads.head"

BLOCKS = 12
_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # width D, heads


class Spec(StrictSpec):
    """12 blocks; 5.4M (tiny), 21.4M (small) or 85.3M (base) parameters. Trains best with adamw and a warm-up."""

    kind: Literal["vit"] = "vit"
    size: Literal["tiny", "small", "base"] = "tiny"
    patch: int = Field(
        default=4, ge=1, le=64, description="side of a patch in pixels; 4 for images of 28 to 64 px, 16 for 224 px"
    )
    image: int = Field(default=32, ge=1, le=1024, description="image side in pixels for which the position embedding is made")
    readout: Literal["mean", "token"] = Field(
        default="mean", description="features: the mean over the patches, or the class token"
    )

    @model_validator(mode="after")
    def _whole_patches(self) -> Spec:
        if self.image % self.patch:
            raise ValueError(f"an image of {self.image} px cannot be divided into patches of {self.patch} px")
        return self


class _VisionTransformer(nn.Module):
    """torchvision's encoder blocks; an identity module after each names its map of patches."""

    layers = tuple(f"block{number}" for number in range(1, BLOCKS + 1))

    def __init__(self, spec: Spec) -> None:
        from torchvision.models.vision_transformer import EncoderBlock

        super().__init__()
        width, heads = _SIZES[spec.size]
        self._readout, self._grid = spec.readout, spec.image // spec.patch
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.conv_proj = nn.Conv2d(3, width, spec.patch, spec.patch)
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / (3 * spec.patch**2)))
        nn.init.zeros_(self.conv_proj.bias)  # type: ignore[arg-type]
        blocks = OrderedDict(
            (f"encoder_layer_{number}", EncoderBlock(heads, width, 4 * width, dropout=0.0, attention_dropout=0.0))
            for number in range(BLOCKS)
        )
        self.encoder: Any = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.empty(1, self._grid**2 + 1, width).normal_(std=0.02))
        self.encoder.layers = nn.Sequential(blocks)
        self.encoder.ln = nn.LayerNorm(width, eps=1e-6)
        for name in self.layers:
            self.add_module(name, nn.Identity())
        self.feature_dim = width

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 -> (B, D) float32: the normalised class token, or the mean over the normalised patches."""
        maps = self.conv_proj(images)
        height, width = maps.shape[2:]
        tokens = torch.cat([self.class_token.expand(maps.shape[0], -1, -1), maps.flatten(2).transpose(1, 2)], dim=1)
        tokens = tokens + self._positions(height, width)
        for name, block in zip(self.layers, self.encoder.layers, strict=True):
            tokens = block(tokens)
            self.get_submodule(name)(tokens[:, 1:].transpose(1, 2).unflatten(2, (height, width)))
        normed: Tensor = self.encoder.ln(tokens)
        return normed[:, 0] if self._readout == "token" else normed[:, 1:].mean(dim=1)

    def _positions(self, height: int, width: int) -> Tensor:
        table: Tensor = self.encoder.pos_embedding
        if (height, width) == (self._grid, self._grid):
            return table
        maps = table[:, 1:].transpose(1, 2).unflatten(2, (self._grid, self._grid))
        maps = nn.functional.interpolate(maps, (height, width), mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], maps.flatten(2).transpose(1, 2)], dim=1)


def build(spec: Spec) -> nn.Module:
    """The network with random initial weights from the global generator.

    Images have at least one patch; what exceeds whole patches at the edge is ignored.
    """
    return _VisionTransformer(spec)


def in_torchvision(spec: Spec) -> str | None:
    """The torchvision model with the same weights and outputs before its head; None for the readout "mean"."""
    if spec.readout != "token":
        return None
    width, heads = _SIZES[spec.size]
    return f"VisionTransformer({spec.image}, {spec.patch}, {BLOCKS}, {heads}, {width}, {4 * width})"

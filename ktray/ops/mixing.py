"""Mixup and CutMix: each image of a batch mixed with another one of it, as batched tensor operations on any device.

Source: Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv:1710.09412; Yun, Han,
Oh, Chun, Choe, Yoo, "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019,
arXiv:1905.04899. Where both are enabled, each image gets one of them with equal chances, as by timm for whole batches.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ktray.ops.random_draws import Draws
from ktray.spec import Augment

IDENTITY, REVISION = "mixing", 1


def draw_mixing(count: int, augment: Augment, generator: torch.Generator) -> dict[str, Tensor]:
    """What `mix` needs for `count` images; empty if `augment` mixes none.

    `partner` (count,) int64 is a random permutation; `share` (count,) float32 in [0, 1] what is to be kept of each image; `cut`
    (count,) bool which are cut instead of averaged; `centre` (2, count) float32 in [0, 1) where, as shares of height and width.
    """
    if not augment.mixes:
        return {}
    partner = torch.randperm(count, generator=generator)
    cut = torch.rand(count, generator=generator) < (0.5 if augment.mixup and augment.cutmix else float(augment.mixup == 0))
    centre = torch.rand(2, count, generator=generator)
    beta = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))  # torch draws it from its global generator
    alphas = np.where(cut.numpy(), augment.cutmix, augment.mixup)
    return {"partner": partner, "share": torch.from_numpy(beta.beta(alphas, alphas)).float(), "cut": cut, "centre": centre}


def mix(inputs: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """The mixed images, and the share of each in its mixture (B,) float32; the rest is its partner's.

    Args:
        inputs: (B, 3, H, W) float32.
        draws: of `draw_mixing`, not empty, on the device of `inputs`.
    """
    others, share = inputs[draws["partner"]], draws["share"]
    height, width = inputs.shape[2:]
    rows, columns = (
        _inside(side, middle, share) for side, middle in zip((height, width), draws["centre"].unbind(0), strict=True)
    )
    box = rows[:, :, None] & columns[:, None, :]  # (B, H, W)
    kept = torch.where(draws["cut"], 1 - box.sum(dim=(1, 2)) / (height * width), share)
    averaged = share[:, None, None, None] * inputs + (1 - share)[:, None, None, None] * others
    pasted = torch.where(box[:, None], others, inputs)
    mixed = torch.where(draws["cut"][:, None, None, None], pasted, averaged)
    return mixed.contiguous(memory_format=torch.channels_last), kept


def _inside(side: int, middle: Tensor, share: Tensor) -> Tensor:
    """Which of `side` rows or columns lie in the cut box of each image: (B, side) bool. Its area is 1 - `share` if it fits."""
    half = ((1 - share).sqrt() * (side / 2)).floor()
    centre = (middle * side).floor()
    place = torch.arange(side, device=share.device)
    return (place >= (centre - half)[:, None]) & (place < (centre + half)[:, None])

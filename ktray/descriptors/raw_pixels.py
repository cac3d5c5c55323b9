"""Raw pixels in [0, 1], optionally resized: a baseline that any teacher should beat.

Source: the baseline of k-means on pixels in Ji, Henriques, Vedaldi, ICCV 2019, arXiv:1807.06653.
"""

from __future__ import annotations

from typing import Any, Literal

from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from ktray.strict import StrictSpec

REVISION = 1


class Spec(StrictSpec):
    """All pixels, or the image resized to `side`."""

    kind: Literal["raw_pixels"] = "raw_pixels"
    side: int | None = Field(default=None, ge=1, description="side in pixels to resize to; null: no resizing")


def describe(spec: Spec, state: dict[str, NDArray[Any]] | None, images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3 * side * side) float32 in [0, 1]; shrunk by averaging, enlarged by interpolation."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    if spec.side is not None and spec.side != pixels.shape[-1]:
        size = (spec.side, spec.side)
        if spec.side < pixels.shape[-1]:
            pixels = nn.functional.adaptive_avg_pool2d(pixels, size)
        else:
            pixels = nn.functional.interpolate(pixels, size, mode="bilinear", align_corners=False)
    return pixels.flatten(1)

"""The network that an evaluation judges: for evaluations that train it, or that read more of it than one vector per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ktray.features.extraction import View
from ktray.images import Images
from ktray.ops import augmentation, precision
from ktray.spec import BackboneSpec, ChannelStatistics, Normalization, Pooling, Precision


@dataclass(frozen=True)
class JudgedNetwork:
    """The judged network, with all that its features depend on.

    Attributes:
        backbone: spec of the network.
        layer: the layer that the evaluation asks for; None for the output of the network's forward pass.
        pool: how the maps of that layer become one vector.
        normalize: the pixel normalisation that the weights expect; see `inputs`.
        precision: of products and convolutions; see `computing`.
        device: torch device, such as ``cuda:0``.
        max_batch_size: most images that may go through the network at once; None for any number. See `StageContext`.
        build: () -> the network with its weights, on the device and in eval mode. Each call makes a new one, which the
            evaluation may change and train. It has `layers`, the names of its layers in order, and `feature_dim`.
        features: (images, views) -> features (N, D) float32 of each view (a layer and its pooling), not to be changed. One
            forward pass makes all views, and the rows are shared with other evaluations of this network.
    """

    backbone: BackboneSpec
    layer: str | None
    pool: Pooling
    normalize: Normalization | ChannelStatistics
    precision: Precision
    device: str
    max_batch_size: int | None
    build: Callable[[], nn.Module]
    features: Callable[[Images, Sequence[View]], list[NDArray[np.float32]]]

    def inputs(self, pixels: Tensor) -> Tensor:
        """What the network takes for pixels (B, H, W, 3) uint8: (B, 3, H, W) float32."""
        return augmentation.normalize(pixels, self.normalize)

    def computing(self) -> AbstractContextManager[None]:
        """A `with` in which the network runs in its precision."""
        return precision.computing_in(self.precision, self.device)

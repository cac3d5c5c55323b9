"""Features of an untrained network: what the architecture alone contributes.

Source: a baseline of Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385; Saxe et al., On random weights and
unsupervised feature learning, ICML 2011.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from ktray.features import extraction
from ktray.spec import BackboneSpec, Pooling, Seed
from ktray.strict import StrictSpec
from ktray.training import loop

REVISION = 1
TOOLS = (extraction, loop)


class Spec(StrictSpec):
    """A backbone with its random initial weights, and the layer whose features are read."""

    kind: Literal["random_network"] = "random_network"
    backbone: BackboneSpec
    layer: str | None = None
    pool: Pooling = Pooling()
    seed: Seed = 0


def describe(spec: Spec, state: dict[str, NDArray[Any]] | None, images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, C * grid * grid) float32; batch norm keeps its initial statistics.

    Raises:
        UserError: the backbone has no such layer, or its feature maps are smaller than the pooling grid.
    """
    return _network(spec, str(images.device))(images)


@lru_cache(maxsize=2)  # `describe` is called for every batch
def _network(spec: Spec, device: str) -> Callable[[Tensor], Tensor]:
    return extraction.layer_extractor(
        loop.untrained_backbone(spec.backbone, spec.seed).to(torch.device(device)), spec.layer, spec.pool
    )

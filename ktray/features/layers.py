"""Layers of a ready network, pooled to one vector per image: one of them, or several in one forward pass.

What it computes is part of `features`, whose revision counts for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ktray.errors import UserError
from ktray.ops import augmentation
from ktray.spec import Normalization, Pooling

View = tuple[str | None, Pooling]
"""A layer of a network, None for what its forward returns, and how its maps become one vector."""


def layer_extractor(
    network: nn.Module, layer: str | None, pool: Pooling, normalize: Normalization = "ktray"
) -> Callable[[Tensor], Tensor]:
    """Features of a ready backbone: (B, H, W, 3) uint8 -> (B, D) float32, both on the network's device.

    The network is put into eval mode. Its layers after `layer` are not run.

    Raises:
        UserError: the backbone has no such layer; at the first batch, the grid is finer than the maps.
    """
    extract = layers_extractor(network, [(layer, pool)], normalize)
    return lambda images: extract(images)[0][0]


def layers_extractor(
    network: nn.Module, views: Sequence[View], normalize: Normalization = "ktray"
) -> Callable[[Tensor], list[tuple[Tensor, float]]]:
    """Features of several layers in one forward pass, each in the bits of `layer_extractor`.

    Args:
        normalize: what the network's weights expect of pixels.

    Returns:
        A function from (B, H, W, 3) uint8 to, for each view in order, (B, D) float32 on the network's device and the seconds
        from the pass's beginning until they were there, which is what this view would have taken alone.

    Raises:
        UserError: as `layer_extractor`.
    """
    network.eval()
    network.to(memory_format=torch.channels_last)
    layers: tuple[str, ...] = network.layers  # type: ignore[assignment]
    wanted = {layer for layer, _ in views}
    for layer in wanted - {None, *layers}:
        raise UserError(f"the backbone has no layer {layer!r}", "layer", f"One of: {', '.join(layers)}.")
    hooked = {layer: network.get_submodule(layer) for layer in wanted if layer is not None}

    @torch.inference_mode()
    def extract(images: Tensor) -> list[tuple[Tensor, float]]:
        collector = _LayerOutputs(views)
        handles = [module.register_forward_hook(collector.hook_of(layer)) for layer, module in hooked.items()]
        try:
            collector.hook_of(None)(network, (), network(augmentation.normalize(images, normalize)))
        except _LastLayerReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(collector.found) < len(views):
            never = next(layer for index, (layer, _) in enumerate(views) if index not in collector.found)
            raise ValueError(f"the forward pass never runs the layer {never!r}")
        return [collector.found[index] for index in range(len(views))]

    return extract


class _LayerOutputs:
    """What one forward pass leaves: index of a view -> its rows, and when they were there."""

    def __init__(self, views: Sequence[View]) -> None:
        self.views, self.began = views, time.perf_counter()
        self.found: dict[int, tuple[Tensor, float]] = {}

    def hook_of(self, layer: str | None) -> Callable[[Any, Any, Tensor], None]:
        """The hook of a layer; of one that runs several times the first output counts, with which a pass for it alone ends."""

        def hook(_: Any, __: Any, output: Tensor) -> None:
            for index, (name, pool) in enumerate(self.views):
                if name == layer and index not in self.found:
                    rows = _pooled(output, pool)
                    if len(self.views) > 1:
                        rows = rows.clone()  # what follows may change the output in place
                        if rows.is_cuda:
                            torch.cuda.synchronize(rows.device)
                    self.found[index] = rows, time.perf_counter() - self.began
            if len(self.found) == len(self.views):
                raise _LastLayerReached

        return hook


class _LastLayerReached(Exception):
    """The forward pass has reached the last layer asked for; nothing after it is needed."""


def _pooled(output: Tensor, pool: Pooling) -> Tensor:
    places = min(output.shape[2:]) if output.ndim == 4 else 1
    if pool.grid > places:
        raise UserError(
            f"a grid of {pool.grid} is finer than the features, {tuple(output.shape[1:])}",
            "pool.grid",
            f"At most {places} here.",
        )
    if output.ndim == 4:
        function = nn.functional.adaptive_avg_pool2d if pool.kind == "avg" else nn.functional.adaptive_max_pool2d
        output = function(output, pool.grid)
    return output.flatten(1).float()

"""Outputs of a network's layers, pooled to one vector per image: of one layer, or of several in one forward pass.

The revision of `extraction` covers this module too: raise it when results change.
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
"""A layer of a network (None for the output of its forward pass), and how its maps become one vector."""


def layer_extractor(
    network: nn.Module, layer: str | None, pool: Pooling, normalize: Normalization = "ktray"
) -> Callable[[Tensor], Tensor]:
    """A function that extracts features: (B, H, W, 3) uint8 -> (B, D) float32, both on the network's device.

    The network is put into eval mode. Layers after `layer` are not run.

    Raises:
        UserError: the backbone has no such layer, or (at the first batch) the pooling grid is finer than the maps.
    """
    extract = layers_extractor(network, [(layer, pool)], normalize)
    return lambda images: extract(images)[0][0]


def layers_extractor(
    network: nn.Module, views: Sequence[View], normalize: Normalization = "ktray"
) -> Callable[[Tensor], list[tuple[Tensor, float]]]:
    """As `layer_extractor`, for several layers in one forward pass; bitwise equal to extracting each layer on its own.

    Args:
        normalize: the pixel normalisation that the network's weights expect.

    Returns:
        A function that maps (B, H, W, 3) uint8 to a pair per view, in order: features (B, D) float32 on the network's device,
        and the seconds from the start of the pass until they were ready, i.e. what this view would have taken on its own.

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
        handles = [module.register_forward_hook(collector.hook_for(layer)) for layer, module in hooked.items()]
        try:
            collector.hook_for(None)(network, (), network(augmentation.normalize(images, normalize)))
        except _LastLayerReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(collector.found) < len(views):
            missing = next(layer for index, (layer, _) in enumerate(views) if index not in collector.found)
            raise ValueError(f"the forward pass never runs the layer {missing!r}")
        return [collector.found[index] for index in range(len(views))]

    return extract


class _LayerOutputs:
    """Outputs collected in one forward pass: index of a view -> its rows, and the seconds until they were ready."""

    def __init__(self, views: Sequence[View]) -> None:
        self.views, self.began = views, time.perf_counter()
        self.found: dict[int, tuple[Tensor, float]] = {}

    def hook_for(self, layer: str | None) -> Callable[[Any, Any, Tensor], None]:
        """The forward hook of a layer; if it runs several times, the first output counts, as in a pass for it alone."""

        def hook(_: Any, __: Any, output: Tensor) -> None:
            for index, (name, pool) in enumerate(self.views):
                if name == layer and index not in self.found:
                    rows = _pooled(output, pool)
                    if len(self.views) > 1:
                        rows = rows.clone()  # later layers may change the output in place
                        if rows.is_cuda:
                            torch.cuda.synchronize(rows.device)
                    self.found[index] = rows, time.perf_counter() - self.began
            if len(self.found) == len(self.views):
                raise _LastLayerReached

        return hook


class _LastLayerReached(Exception):
    """Raised by a hook to end the forward pass once all requested outputs are collected."""


def _pooled(output: Tensor, pool: Pooling) -> Tensor:
    side = min(output.shape[2:]) if output.ndim == 4 else 1
    if pool.grid > side:
        raise UserError(
            f"a grid of {pool.grid} is finer than the features, {tuple(output.shape[1:])}",
            "pool.grid",
            f"At most {side} here.",
        )
    if output.ndim == 4:
        function = nn.functional.adaptive_avg_pool2d if pool.kind == "avg" else nn.functional.adaptive_max_pool2d
        output = function(output, pool.grid)
    return output.flatten(1).float()

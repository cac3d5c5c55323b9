"""Random draws as tensors: made on the CPU by a seeded generator, uploaded, and applied on any device without a copy or a draw.

So a batch is the same on every device, and applying the draws is a pure function of tensors, which a CUDA graph can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Draws = Mapping[str, Any]  # name -> tensor, or further draws under names of their own


def map_draws(function: Callable[[Tensor], Any], draws: Draws) -> dict[str, Any]:
    """The same names with ``function(tensor)`` in place of each tensor."""
    return {name: function(value) if isinstance(value, Tensor) else map_draws(function, value) for name, value in draws.items()}


def copies(tensor: Tensor) -> Callable[[torch.device], Tensor]:
    """A function: device -> `tensor` there, copied once. What a step reads must lie on its device before a graph holds it."""
    held: dict[torch.device, Tensor] = {}

    def on(device: torch.device) -> Tensor:
        if device not in held:  # not functools.cache, whose function torch.compile would run again
            held[device] = tensor.to(device)
        return held[device]

    return on


def constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """Numbers, such as the rows of a matrix, as a float32 tensor on `device`; copied there once. Not to be changed."""
    if (values, device) not in _constants:
        with torch.inference_mode(False):  # a tensor made in inference mode would stay one, and could not be trained through
            _constants[values, device] = torch.tensor(values, device=device)
    return _constants[values, device]


_constants: dict[tuple[Any, torch.device], Tensor] = {}

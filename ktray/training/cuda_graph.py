"""CUDA graphs: a function of tensors whose kernels are recorded once and then launched together.

A training step of a small network has hundreds of kernels of a few microseconds each, and launching them one by one from
Python takes longer than running them. The replay of a graph launches all of them at once, with the same results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Calls before a function is captured. Libraries choose kernels and allocate memory in the first, optimisers their state; the
# second is the first as all others will be.
EAGER_CALLS = 3


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Within a `with`, work on `device` goes to a stream of its own, which can be captured; on a CPU nothing changes."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream, outer = _stream_of(device), torch.cuda.current_stream()
        stream.wait_stream(outer)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            outer.wait_stream(stream)


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The same stream in all trainings of a process: cuBLAS keeps a workspace of tens of megabytes for every stream."""
    return torch.cuda.Stream(device)


@dataclass
class _Recording:
    calls: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    inputs: list[Tensor] = field(default_factory=list)


class Graphs:
    """The CUDA graphs of a function, one for each variant of its arguments. To be used on the stream of `own_stream`.

    Args:
        enabled: whether to capture at all; otherwise every call is a plain one.
        eager_calls: plain calls of each variant before its capture; None for `EAGER_CALLS`.
    """

    def __init__(self, enabled: bool, eager_calls: int | None = None) -> None:
        self._enabled, self._eager_calls = enabled, EAGER_CALLS if eager_calls is None else eager_calls
        self._recordings: dict[Hashable, _Recording] = {}
        self._pool: Any = None

    def call(self, function: Callable[..., None], variant: Hashable, *tensors: Tensor) -> bool:
        """Call ``function(variant, *tensors)``, after a few calls by the replay of a graph; whether it was one.

        Args:
            function: the same in all calls. It returns nothing and has its effect on tensors that stay where they are, such as
                weights. For what it must not do, see `Task.capturable`.
            tensors: of the same shapes and types in all calls with this variant.
        """
        recording = self._recordings.setdefault(variant, _Recording())
        if recording.graph is None:
            if not self._enabled or recording.calls < self._eager_calls:
                recording.calls += 1
                function(variant, *tensors)
                return False
            self._capture(function, variant, recording, tensors)
        assert recording.graph is not None
        for held, given in zip(recording.inputs, tensors, strict=True):
            held.copy_(given)
        recording.graph.replay()
        return True

    def _capture(
        self, function: Callable[..., None], variant: Hashable, recording: _Recording, tensors: tuple[Tensor, ...]
    ) -> None:
        recording.inputs = [tensor.clone() for tensor in tensors]
        graph = torch.cuda.CUDAGraph()
        # Graphs may share memory, because none reads what another has computed in it. Other threads may go on using the device.
        with torch.cuda.graph(graph, self._pool, torch.cuda.current_stream(), capture_error_mode="thread_local"):
            function(variant, *recording.inputs)
        self._pool, recording.graph = graph.pool(), graph

"""Whether a training is long enough for torch.compile, which fuses the kernels of a network and its loss.

A CUDA graph costs a tenth of a second and pays at once. Compiling costs many seconds, then makes a step a fifth to a third
shorter, and rounds differently. So it is done only where the rest of the training is expected to win twice what it costs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

# Measured on one H200: 7 s (small AlexNet) to 23 s (ResNet-18), and 1.3 to 1.4 times the images per second.
SECONDS = 20.0
SHARE_SAVED = 0.22
SKIPPED_STEPS, TIMED_STEPS = 8, 32  # replays before the timing begins, and those that are timed

log = logging.getLogger("ktray")


def pays(seconds_left: float) -> bool:
    """Whether compiling now is expected to save twice its cost in a training that would go on for `seconds_left` without."""
    return seconds_left * SHARE_SAVED > 2 * SECONDS


class StepTimer:
    """The seconds of a step on a GPU, from the time between two of its kernels, and so with the waits for the host."""

    def __init__(self) -> None:
        self._replays = 0
        self._events: tuple[torch.cuda.Event, ...] = ()

    def replayed(self) -> float | None:
        """Count a replay. The seconds of a step once enough have been timed, and then None again."""
        self._replays += 1
        if self._replays == SKIPPED_STEPS:
            self._events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._events[0].record()
        if self._replays != SKIPPED_STEPS + TIMED_STEPS:
            return None
        first, last = self._events
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000 / TIMED_STEPS


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first call; if that fails, the function itself from then on, with a line in the log."""
    current = torch.compile(function, dynamic=False)

    def call(*arguments: Any) -> Any:
        nonlocal current
        try:
            return current(*arguments)
        except Exception as error:  # whatever a compiler may raise; the training goes on as it did before
            if current is function:
                raise
            log.warning("torch.compile failed (%s), so the training goes on without it", type(error).__name__)
            current = function
            return function(*arguments)

    return call

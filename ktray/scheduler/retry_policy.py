"""How often a stage may lose its worker or its inputs before it is given up. Pure, a part of the core."""

from __future__ import annotations

from collections import Counter

from ktray.scheduler.messages import RunningStage

DEATHS = 3


class RetryPolicy:
    """What went wrong with each stage since it was last published or given up."""

    def __init__(self) -> None:
        self._deaths, self._missed = Counter[str](), Counter[str]()
        self._furthest: dict[str, float] = {}

    def bear(self, run: RunningStage, blamed: bool) -> bool:
        """Its worker is no more; False if that was once too often.

        Args:
            blamed: whether the stage may have been the cause.
        """
        if run.progress.get("epoch", 0) > self._furthest.get(run.key, 0):
            self._furthest[run.key] = run.progress["epoch"]
            self._deaths[run.key] = 0  # a stage that gets further each time does not kill its workers
        self._deaths[run.key] += blamed
        return self._deaths[run.key] < DEATHS

    def miss(self, key: str) -> bool:
        """One of its inputs was not in the store; False if that was once too often."""
        self._missed[key] += 1
        return self._missed[key] < DEATHS

    def forget(self, key: str) -> None:
        """What went wrong with a stage before counts no more."""
        for counts in (self._deaths, self._missed, self._furthest):
            counts.pop(key, None)

"""Which stages run with nothing beside them, since memory ran out before. Pure, a part of the core."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from ktray.scheduler.eviction import quiet
from ktray.scheduler.failure_kinds import OUT_OF_MEMORY
from ktray.scheduler.messages import RunningStage
from ktray.scheduler.placement import Placement
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.worker_registry import Worker, WorkerRegistry, shape_of


class ExclusiveStages:
    """A stage that raised out-of-memory gets the whole GPU, or machine, and takes few images at once.

    One whose worker was ended for the memory of its node may not be to blame, and few images change what batch norm sees: it
    gets the node for itself, and whole batches.
    """

    def __init__(self, registry: WorkerRegistry) -> None:
        self.registry = registry
        self._raised: set[str] = set()
        self._ended: set[str] = set()

    def after_error(self, key: str, kind: str) -> bool:
        """A stage raised; whether it is to run once more, alone."""
        if kind != OUT_OF_MEMORY or key in self._raised:
            return False
        self._raised.add(key)
        return True

    def after_death(self, key: str, event: str) -> None:
        """The worker of a stage is no more."""
        if event == OUT_OF_MEMORY:
            self._ended.add(key)

    def forget(self, key: str) -> None:
        """It is published, or given up."""
        self._raised.discard(key)
        self._ended.discard(key)

    def __contains__(self, key: str) -> bool:
        return key in self._raised or key in self._ended

    def keys(self) -> set[str]:
        """Of the stages that must be alone."""
        return self._raised | self._ended

    def takes_few(self, key: str) -> bool:
        """Whether few images at a time go through its network."""
        return key in self._raised

    def needs(self, key: str, usual: ResourceRequest) -> ResourceRequest:
        """What a stage needs that usually needs `usual`."""
        if key not in self:
            return usual
        gpus = usual.gpus or 0.0
        return replace(usual, gpus=float(math.ceil(gpus)) if key in self._raised else gpus, helpers=0)

    def keep(self, runs: Iterable[tuple[RunningStage, ResourceRequest]]) -> None:
        """Let nothing begin on the nodes that these runs have for themselves."""
        self.registry.kept.clear()
        for run, needs in runs:
            if self._has_node(run.key, needs) and run.worker in self.registry.workers:
                self.registry.keep(self.registry.workers[run.worker].node)

    def worker(self, key: str, needs: ResourceRequest, openings: Placement) -> Worker | None:
        """Who can run the stage now, alone if it must be."""
        # Without a worker of its shape there is no node to be kept yet: first one is hired.
        if self._has_node(key, needs) and any(each.shape == shape_of(needs) for each in self.registry.workers.values()):
            return quiet(openings, needs)
        return openings.take(needs)

    def _has_node(self, key: str, needs: ResourceRequest) -> bool:
        """Whether it has its node for itself; who has a whole GPU and ran out of that one's memory needs no more."""
        return key in self._ended or (key in self._raised and not needs.gpus)

"""The scheduler of one: stages run here and now, in this process."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from ktray.artifact import Artifact, Stage
from ktray.errors import StageFailed, StoppedEarly, UserError
from ktray.pool import FEW_IMAGES, StageContext
from ktray.scheduler.failure_kinds import DISK_FULL, OUT_OF_MEMORY, also_alone, kind_of
from ktray.stores import Store
from ktray.stores.locks import lock_store_shared, try_lock_store

Work = Callable[[Stage, Store, str, StageContext], tuple[Artifact, bool]]


@contextmanager
def _computing(store: Store) -> Iterator[None]:
    """Hold the store, so that nobody sweeps away what is being written; what dead attempts left goes before."""
    alone = try_lock_store(store.url)
    if alone is not None:
        store.sweep()
        alone.release()
    held = lock_store_shared(store.url)
    try:
        yield
    finally:
        if held is not None:
            held.release()


class LocalScheduler:
    """Obtains stages one after the other, without Ray; the same calls as the Ray scheduler's `client.Scheduler`."""

    def __init__(self, store: Store, work: Work, context: StageContext, tell: Callable[[Mapping[str, Any]], None]) -> None:
        self.store, self.work, self.context, self.tell = store, work, context, tell

    def obtain(self, stages: list[Stage], waiter: str, priority: int = 0) -> list[dict[str, Any]]:
        """Every stage published, in order; one outcome ``{"key", "state", "seconds", "metrics"}`` each.

        Raises:
            StageFailed: a stage raised; its cause is kept in the store's failures.
            StoppedEarly: the disk is full.
        """
        if all(self.store.find(stage.key) for stage in stages):  # also where nothing can be written
            return [self._obtain(stage) for stage in stages]
        with _computing(self.store):
            return [self._obtain(stage) for stage in stages]

    def _obtain(self, stage: Stage) -> dict[str, Any]:
        self.tell({"event": "started", "key": stage.key, "stage": stage.name})
        began = time.perf_counter()
        attempt = f"{os.getpid()}-{time.time_ns():x}"
        try:
            artifact, published = self._work(stage, attempt)
        except Exception as error:
            # A process boundary: whatever a stage raises becomes the named failure of that stage; so does an absent input,
            # as a loaded teacher names an artifact that no stage of its pair makes.
            found = self.store.find(stage.key)
            if found is None:
                raise self._failure(stage, error) from error
            artifact, published = (
                found,
                False,
            )  # a scheduler on this store was faster: that takes away what others write at the key
        state = "computed" if published else "reused"
        seconds = time.perf_counter() - began
        self.tell({"event": "published" if published else "found", "key": stage.key, "stage": stage.name, "seconds": seconds})
        return {"key": stage.key, "state": state, "seconds": seconds, "metrics": dict(artifact.metrics)}

    def _failure(self, stage: Stage, error: Exception) -> StoppedEarly | StageFailed:
        kind = kind_of(error, self.store.root)
        if kind == DISK_FULL:
            return StoppedEarly(f"the disk is full: {error}")
        cause = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        cause = also_alone(cause) if kind == OUT_OF_MEMORY else cause
        with suppress(OSError):  # a store that cannot be written is one of the causes
            self.store.fail(stage.key, {"cause": cause, "traceback": traceback.format_exc(), "stage": stage.name})
        return StageFailed(stage.key, cause)

    def _work(self, stage: Stage, attempt: str) -> tuple[Artifact, bool]:
        try:
            return self.work(stage, self.store, attempt, self.context)
        except Exception as error:
            if kind_of(error, self.store.root) != OUT_OF_MEMORY:
                raise
            self.tell({"event": OUT_OF_MEMORY, "key": stage.key, "stage": stage.name})
        # Beyond the handler, whose error holds the tensors of all its frames.
        return self.work(stage, self.store, f"{attempt}-again", replace(self.context, most_images=FEW_IMAGES))

"""A scheduler without Ray: stages run here and now, one after the other, in the calling process."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from ktray.artifact import Artifact, Stage
from ktray.errors import MissingInput, SearchStopped, StageFailed
from ktray.pool import SMALL_BATCH_SIZE, StageContext, release_gpu_memory
from ktray.scheduler.messages import (
    DISK_FULL,
    OUT_OF_MEMORY,
    StageFunction,
    describe_error,
    failure_kind,
    repeated_out_of_memory_text,
)
from ktray.stores import Store
from ktray.stores.locks import lock_store_shared, try_lock_store


@contextmanager
def _locked_store(store: Store) -> Iterator[None]:
    """Lock the store, so that nobody removes what is being written; first remove what dead attempts left."""
    exclusive = try_lock_store(store.url)
    if exclusive is not None:
        store.sweep()
        exclusive.release()
    shared = lock_store_shared(store.url)
    try:
        yield
    finally:
        if shared is not None:
            shared.release()


class LocalScheduler:
    """Obtains stages one after the other; `obtain` is called as that of `client.SchedulerClient`.

    Args:
        stage_function: computes and publishes one stage.
        context: passed to each stage.
        on_event: called with a mapping when a stage starts, is published or found, or runs again.
    """

    def __init__(
        self, store: Store, stage_function: StageFunction, context: StageContext, on_event: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self.store, self.stage_function, self.context, self.on_event = store, stage_function, context, on_event
        self._published: set[str] = set()  # keys that the running `obtain` has published

    def obtain(self, stages: list[Stage], waiter: str, priority: int = 0) -> list[dict[str, Any]]:
        """Every stage published, in order; one outcome ``{"key", "state", "seconds", "metrics"}`` each.

        Raises:
            StageFailed: a stage raised; the store keeps the cause.
            SearchStopped: the disk is full.
        """
        by_key, self._published = {stage.key: stage for stage in stages}, set()
        if all(self.store.find(stage.key) for stage in stages):  # works on a read-only store, too
            return self._as_counted([self._obtain_stage(stage, by_key) for stage in stages])
        with _locked_store(self.store):
            outcomes = {stage.key: self._obtain_stage(stage, by_key) for stage in stages}
            # A stage may find an earlier snapshot damaged and do without it; others may need it.
            while lost := [stage for stage in stages if self.store.find(stage.key) is None]:
                outcomes |= {stage.key: self._obtain_stage(stage, by_key) for stage in lost}
            return self._as_counted(list(outcomes.values()))

    def _as_counted(self, outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The outcomes, computed for each stage that this `obtain` published: also one found first and damaged later."""
        return [each | ({"state": "computed"} if each["key"] in self._published else {}) for each in outcomes]

    def _obtain_stage(self, stage: Stage, stages: Mapping[str, Stage]) -> dict[str, Any]:
        self.on_event({"event": "started", "key": stage.key, "stage": stage.name})
        began = time.perf_counter()
        attempt = f"{os.getpid()}-{time.time_ns():x}"
        try:
            artifact, published = self._run_recomputing_inputs(stage, stages, attempt)
        except Exception as error:
            # A process boundary: whatever a stage raises becomes the failure of that stage. So does an absent input, for a
            # loaded teacher may name an artifact that no stage of its pair makes.
            found = self.store.find(stage.key)
            if found is None:
                raise self._record_failure(stage, error) from error
            # Another scheduler on this store has published the key, which removes the directories of all other attempts.
            artifact, published = found, False
        if published:
            self._published.add(stage.key)
        state = "computed" if published else "reused"
        seconds = time.perf_counter() - began
        event = "published" if published else "found"
        self.on_event({"event": event, "key": stage.key, "stage": stage.name, "seconds": seconds})
        return {"key": stage.key, "state": state, "seconds": seconds, "metrics": dict(artifact.metrics)}

    def _record_failure(self, stage: Stage, error: Exception) -> SearchStopped | StageFailed:
        kind = failure_kind(error, self.store.root)
        if kind == DISK_FULL:
            return SearchStopped(f"the disk is full: {error}")
        cause = describe_error(error)
        cause = repeated_out_of_memory_text(cause) if kind == OUT_OF_MEMORY else cause
        with suppress(OSError):  # a store that cannot be written is one of the causes
            self.store.record_failure(stage.key, {"cause": cause, "traceback": traceback.format_exc(), "stage": stage.name})
        return StageFailed(stage.key, cause)

    def _run_recomputing_inputs(self, stage: Stage, stages: Mapping[str, Stage], attempt: str) -> tuple[Artifact, bool]:
        """Run a stage; an input that turns out to be damaged is computed again first, as often as there are inputs."""
        for number in range(2 * len(stages)):
            try:
                return self._run_retrying_out_of_memory(stage, f"{attempt}-{number}" if number else attempt)
            except MissingInput as error:
                if error.key not in stages:
                    raise
                missing = error.key
            if missing != stage.key:  # otherwise one of its own checkpoints was damaged
                self._obtain_stage(stages[missing], stages)
        return self._run_retrying_out_of_memory(stage, f"{attempt}-last")

    def _run_retrying_out_of_memory(self, stage: Stage, attempt: str) -> tuple[Artifact, bool]:
        try:
            return self.stage_function(stage, self.store, attempt, self.context)
        except Exception as error:
            if failure_kind(error, self.store.root) != OUT_OF_MEMORY:
                raise
            self.on_event({"event": OUT_OF_MEMORY, "key": stage.key, "stage": stage.name})
        release_gpu_memory(after_failure=True)  # outside the handler, whose error holds the tensors of all its frames
        return self.stage_function(
            stage, self.store, f"{attempt}-again", replace(self.context, max_batch_size=SMALL_BATCH_SIZE)
        )

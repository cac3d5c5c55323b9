"""A warm worker: it asks the broker for one stage after the other, sends heartbeats, and helps other workers in between."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ktray.artifact import Stage
from ktray.errors import MissingInput
from ktray.pool import SMALL_BATCH_SIZE, StageContext
from ktray.scheduler.messages import (
    BROKER_NAME,
    FAILED,
    AssignStage,
    AttemptReport,
    SchedulerConfig,
    StageFunction,
    WorkerIdentity,
    WorkerOrder,
    describe_error,
    failure_kind,
)
from ktray.scheduler.ray_pool import RayPool, to_bytes
from ktray.scheduler.worker_registry import WorkerShape
from ktray.stores import open_store
from ktray.stores.locks import lock_store_shared


class WorkerActor:
    """One process. Its own two threads do the work; the broker only calls `wait_until_exit`, another worker only `run_item`."""

    def __init__(self, config: SchedulerConfig, name: str, shape: WorkerShape) -> None:
        self._config = config
        self._stage_function: StageFunction = cloudpickle.loads(config.stage_function)
        self._store = open_store(config.store_url)
        self._store_lock = lock_store_shared(config.store_url)
        self._broker = ray.get_actor(BROKER_NAME, namespace=config.namespace)
        gpu_ids = tuple(map(str, ray.get_gpu_ids())) if shape.gpus else ()
        node = ray.get_runtime_context().get_node_id()
        self._identity = WorkerIdentity(name, node, os.getpid(), shape, gpu_ids)
        self._stage: Stage | None = None
        self._attempt = ""
        self._progress: Mapping[str, float] = {}
        self._lent: tuple[str, ...] = ()
        self._helper_handles: dict[str, Any] = {}
        self._busy = threading.Lock()
        self._helped_call: tuple[str, Any] = ("", None)
        self._watcher = threading.Event()
        for target in (self._send_heartbeats, self._run_stages):
            threading.Thread(target=_run_or_exit, args=(target,), daemon=True).start()

    def wait_until_exit(self) -> None:
        """Block while this process lives; its end is the caller's RayError. A newer caller replaces an older one."""
        self._watcher.set()
        self._watcher = watcher = threading.Event()
        watcher.wait()

    def run_item(self, call: str, function_ref: list[Any], item: bytes) -> bytes | None:
        """One item of another worker's `map`; None if this worker has a stage of its own by now.

        Args:
            call: id of the call of `map`.
            function_ref: holds one reference to the pickled function and what its items share; in a list, so that Ray passes
                the reference on instead of fetching the value for each item.
            item: pickled.

        Returns:
            Pickled (True, result) or (False, error).
        """
        with self._busy:
            if self._attempt:
                return None
            if self._helped_call[0] != call:
                self._helped_call = (call, cloudpickle.loads(ray.get(function_ref[0])))
            function, shared = self._helped_call[1]
            try:
                return to_bytes((True, function(cloudpickle.loads(item), shared)))
            except Exception as error:  # noqa: BLE001 - a process boundary: it is raised at the leader as it was
                return pickle_error(error)

    def _run_stages(self) -> None:
        report: AttemptReport | None = None
        while True:
            call: Any = self._broker.next_order.remote(self._identity, report)
            order: WorkerOrder = ray.get(call)
            if order.action == "exit":
                return
            report = self._run(order.assignment, order.helpers) if order.assignment is not None else None

    def _run(self, assignment: AssignStage, helpers: tuple[str, ...]) -> AttemptReport:
        stage, attempt = assignment.stage, assignment.attempt
        self._progress, self._lent, self._stage, self._attempt = {}, helpers, stage, attempt
        runtime = self._config.runtime
        context = StageContext(
            pool=RayPool(self._helpers),
            device="cuda:0" if self._identity.shape.gpus else "cpu",
            progress=self._note_progress,
            checkpoint_seconds=runtime.checkpoint_seconds,
            memmap_bytes=runtime.memmap_bytes,
            max_batch_size=SMALL_BATCH_SIZE if assignment.small_batches else None,
        )
        began = time.monotonic()
        with self._busy:  # wait for an item of another worker that is being computed
            self._helped_call = ("", None)
            try:
                computed = self._stage_function(stage, self._store, attempt, context)[1]
                others = [(other.key, self._was_published_by(other.key, attempt)) for other in stage.computed_with]
                seconds = time.monotonic() - began
                report = AttemptReport(stage.key, attempt, seconds, ((stage.key, computed), *others))
            except MissingInput as error:
                cause = f"MissingInput: {error}"
                report = AttemptReport(stage.key, attempt, failure=FAILED, cause=cause, missing=error.key)
            except BaseException as error:  # noqa: BLE001 - a process boundary: any error of a stage is that stage's failure
                kind, cause = failure_kind(error, self._store.root), describe_error(error)
                report = AttemptReport(stage.key, attempt, failure=kind, cause=cause, traceback=traceback.format_exc())
            finally:
                self._stage, self._attempt, self._lent = None, "", ()
        self._release_gpu_memory()
        return report

    def _release_gpu_memory(self) -> None:
        """Return cached memory to other workers on this GPU; called once an error that held tensors is gone."""
        torch = sys.modules.get("torch")
        if torch is not None and self._identity.shape.gpus:
            torch.cuda.empty_cache()

    def _was_published_by(self, key: str, attempt: str) -> bool:
        artifact = self._store.find(key)
        return artifact is not None and artifact.record.get("attempt") == attempt

    def _note_progress(self, values: Mapping[str, float]) -> None:
        self._progress = dict(values)

    def _helpers(self) -> Mapping[str, Any]:
        """Name -> actor handle of the workers that are lent to this one now."""
        handles = {}
        for name in self._lent:
            try:
                handles[name] = self._helper_handles.get(name) or ray.get_actor(name, namespace=self._config.namespace)
            except ValueError:
                continue  # it has died since
        self._helper_handles = handles
        return handles

    def _send_heartbeats(self) -> None:
        while True:
            attempt, stage = self._attempt, self._stage
            call: Any = self._broker.heartbeat.remote(self._identity, stage, attempt if stage else "", self._progress)
            helpers: list[str] | None = ray.get(call)
            if helpers is None:
                return
            if attempt and attempt == self._attempt:
                self._lent = tuple(helpers)
            time.sleep(self._config.runtime.heartbeat_seconds)


def start_worker(config: SchedulerConfig, name: str, shape: WorkerShape, node: str) -> Any:
    """The handle of a worker that is about to start on `node`, or elsewhere if that node is gone."""
    actor = ray.remote(WorkerActor).options(
        name=name,
        namespace=config.namespace,
        lifetime="detached",
        num_cpus=shape.cpus,
        num_gpus=shape.gpus,
        max_restarts=0,
        max_concurrency=8,
        runtime_env={"env_vars": dict(config.environment)},
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
    )
    return actor.remote(config, name, shape)


def _run_or_exit(target: Callable[[], None]) -> None:
    """Run one of the two threads; when either ends for whatever reason, the process is useless and exits."""
    try:
        target()
    except ray.exceptions.RayError:
        pass  # the scheduler has ended
    except BaseException:  # noqa: BLE001 - the last frame of a thread; the log keeps it
        traceback.print_exc()
    os._exit(0)


def pickle_error(error: Exception) -> bytes:
    """Pickled (False, error); an error that cannot be unpickled goes as a RuntimeError with its text."""
    try:
        pickled = to_bytes((False, error))
        cloudpickle.loads(pickled)
    except Exception:  # noqa: BLE001 - an error may be of any class
        return to_bytes((False, RuntimeError(describe_error(error))))
    return pickled

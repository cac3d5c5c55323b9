"""A warm worker: it asks the broker for one stage after the other, sends heartbeats, and helps other workers in between.

The pool of a worker are the workers that are lent to it: it works too, and whatever a helper does not return is redone by
another worker.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ktray.artifact import Stage
from ktray.errors import MissingInput
from ktray.pool import SMALL_BATCH_SIZE, Item, Result, StageContext, release_gpu_memory
from ktray.scheduler.messages import (
    BROKER_NAME,
    FAILED,
    AssignStage,
    AttemptResult,
    SchedulerConfig,
    StageFunction,
    WorkerIdentity,
    WorkerOrder,
    describe_error,
    failure_kind,
)
from ktray.scheduler.worker_registry import WorkerShape
from ktray.stores import open_store
from ktray.stores.locks import lock_store_shared

LEADER = ""  # the name of the worker that runs the stage, in a call of `map`
RESERVED_SECONDS = 0.2  # for which an item is reserved for the worker that computed it in the call before
Helpers = Callable[[], Mapping[str, Any]]
to_bytes: Callable[[Any], bytes] = cloudpickle.dumps


class _RayPool:
    """Calls on this worker and on those that are lent to it at the moment.

    Args:
        helpers: name -> actor handle of the workers lent now; called between items, so helpers may come and go.
    """

    def __init__(self, helpers: Helpers) -> None:
        self._helpers = helpers
        self._worked = set[str]()  # helpers that have returned a result
        self._takers: dict[
            bytes, dict[int, str]
        ] = {}  # first and number of the items of a call -> index -> who computed it last

    @property
    def worker_count(self) -> int:
        return 1 + len(self._helpers())

    @property
    def worked(self) -> int:
        return 1 + len(self._worked)

    def map(self, function: Callable[[Item, Any], Result], items: Sequence[Item], shared: Any = None) -> list[Result]:
        takers = self._takers.setdefault(to_bytes((len(items), items[0])), {}) if items else {}
        return _MapCall(function, items, shared, self._worked, takers).run(self._helpers)


class _MapCall:
    """One call of `map`. The leader and a thread per helper each take the next index until none is left.

    A worker first takes items that it computed in the call before, of which it may know something, then those of nobody, then,
    after a while, those of others. Values travel as bytes, so that all workers get copies that they may write to.

    Args:
        worked: names of helpers that have returned a result are added to it.
        takers: who computed which index in the call before, such as `LEADER`; it is brought up to date.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Any],
        items: Sequence[Any],
        shared: Any,
        worked: set[str],
        takers: dict[int, str],
    ) -> None:
        self.function, self.items, self.shared, self.worked = function, items, shared, worked
        self.name = uuid.uuid4().hex
        self.changed = threading.Condition()
        self.results: dict[int, Any] = {}
        self.errors: dict[int, BaseException] = {}
        self.takers, self.began = takers, time.monotonic()
        self.waiting: dict[str | None, list[int]] = {}  # who computed them before -> indices, the next one last
        for index in reversed(range(len(items))):
            self.waiting.setdefault(takers.get(index), []).append(index)
        self.sent: dict[int, float] = {}  # index -> when a helper took it
        self.longest_seconds = 0.0
        self.ended = False
        self.function_ref: list[Any] = []
        self.lent: set[str] = set()  # names of the helpers at the last look
        self.engaged: set[str] = set()  # of those to which a thread sends items

    def run(self, helpers: Helpers) -> list[Any]:
        try:
            while not self._is_done():
                lent = helpers()
                self.lent = set(lent)
                index = self._take_for_leader(time.monotonic())  # first: of unequal items, the first ones are the larger
                for name, handle in lent.items() if any(self.waiting.values()) else ():
                    if name not in self.engaged:
                        self.engaged.add(name)
                        self._engage_helper(name, handle)
                if index is None:
                    with self.changed:
                        if not self._is_done():
                            self.changed.wait(0.05)
                    continue
                began = time.monotonic()
                try:
                    self._note_result(index, self.function(self.items[index], self.shared), began, LEADER)
                except Exception as error:  # noqa: BLE001 - raised below, if it is the first in the order of the items
                    self._note_error(index, error)
        finally:
            self.ended = True
        if self.errors:
            raise self.errors[min(self.errors)]
        return [self.results[index] for index in range(len(self.items))]

    def _engage_helper(self, name: str, handle: Any) -> None:
        """Have a helper compute items from now on, which a thread of its own sends to it."""
        if not self.function_ref:
            self.function_ref.append(ray.put(to_bytes((self.function, self.shared))))
        threading.Thread(target=self._send_items, args=(name, handle), daemon=True).start()

    def _send_items(self, name: str, handle: Any) -> None:
        """Send one item after the other to a helper, until none is left, the helper takes no more, or it is lent elsewhere."""
        while name in self.lent and (index := self._take_for_helper(name, began := time.monotonic())) is not None:
            item = to_bytes(self.items[index])
            try:
                reply = ray.get(handle.run_map_item.remote(self.name, self.function_ref, item))
            except ray.exceptions.RayError:
                reply = None
            if reply is None:  # the helper has died, or runs a stage of its own
                with self.changed:
                    if index in self.sent:
                        del self.sent[index]
                        self.waiting.setdefault(None, []).append(index)
                        self.changed.notify_all()
                return
            self.worked.add(name)
            succeeded, value = cloudpickle.loads(reply)
            if succeeded:
                self._note_result(index, value, began, name)
            else:
                self._note_error(index, value)
        self.engaged.discard(name)  # it may be lent to this call again

    def _take_for_helper(self, name: str, now: float) -> int | None:
        with self.changed:
            index = self._pop_waiting_index(name)
            if index is not None:
                self.sent[index] = now
            return index

    def _take_for_leader(self, now: float) -> int | None:
        with self.changed:
            index = self._pop_waiting_index(LEADER)
            if index is not None or not self.sent:
                return index
            oldest = min(self.sent, key=lambda each: self.sent[each])
            if now - self.sent[oldest] < 1.0 + 3 * self.longest_seconds:
                return None
            del self.sent[oldest]  # its helper is slow: the leader computes it, too, and the first result counts
            return oldest

    def _pop_waiting_index(self, name: str) -> int | None:
        if self.ended or self.errors:
            # As in a plain loop, nothing starts after the first error.
            for taker, indices in self.waiting.items():
                self.waiting[taker] = [index for index in indices if not self.ended and index < min(self.errors)]
        here = {LEADER, *self.lent} if time.monotonic() - self.began < RESERVED_SECONDS else set()
        for taker in (name, None, *(other for other in self.waiting if other not in here)):
            if self.waiting.get(taker):
                return self.waiting[taker].pop()
        return None

    def _note_result(self, index: int, value: Any, began: float, name: str) -> None:
        with self.changed:
            if index not in self.results:
                self.results[index], self.takers[index] = value, name
            self.sent.pop(index, None)
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
            self.changed.notify_all()

    def _note_error(self, index: int, error: BaseException) -> None:
        with self.changed:
            self.sent.pop(index, None)
            if index not in self.results:
                self.errors.setdefault(index, error)
            self.changed.notify_all()

    def _is_done(self) -> bool:
        count = min(self.errors) if self.errors else len(self.items)
        return all(index in self.results for index in range(count))


class WorkerActor:
    """One process. Its two threads do the work; the broker only calls `wait_until_exit`, another worker only `run_map_item`."""

    def __init__(self, config: SchedulerConfig, name: str, shape: WorkerShape) -> None:
        self._config = config
        self._stage_function: StageFunction = cloudpickle.loads(config.stage_function)
        self._store = open_store(config.store_url)
        self._damage: list[str] = []
        self._store.on_damage = self._damage.append
        self._store_lock = lock_store_shared(config.store_url)
        self._broker = ray.get_actor(BROKER_NAME, namespace=config.namespace)
        gpu_ids = tuple(map(str, ray.get_gpu_ids())) if shape.gpus else ()
        node = ray.get_runtime_context().get_node_id()
        self._identity = WorkerIdentity(name, node, os.getpid(), shape, gpu_ids)
        self._device = "cuda:0" if shape.gpus else "cpu"
        self._stage: Stage | None = None
        self._attempt = ""
        self._progress: Mapping[str, float] = {}
        self._lent: tuple[str, ...] = ()
        self._helper_handles: dict[str, Any] = {}
        self._busy = threading.Lock()
        self._helped_call: tuple[str, Any] = ("", None)
        self._watcher = threading.Event()
        self._prepare()  # before the first heartbeat: importing a large library may hold up all threads for seconds
        for target in (self._send_heartbeats, self._run_stages):
            threading.Thread(target=_run_then_exit, args=(target,), daemon=True).start()

    def wait_until_exit(self) -> None:
        """Block while this process lives; its end is the caller's RayError. A newer caller replaces an older one."""
        self._watcher.set()
        self._watcher = watcher = threading.Event()
        watcher.wait()

    def run_map_item(self, call: str, function_ref: list[Any], item: bytes) -> bytes | None:
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

    def _prepare(self) -> None:
        """Load what the first stage would wait for. If that fails, the first stage fails with the reason, and is reported."""
        if self._config.prepare:
            try:
                cloudpickle.loads(self._config.prepare)(self._device)
            except Exception:  # noqa: BLE001 - see above; the worker's log keeps it
                traceback.print_exc()

    def _run_stages(self) -> None:
        result: AttemptResult | None = None
        while True:
            call: Any = self._broker.next_order.remote(self._identity, result)
            order: WorkerOrder = ray.get(call)
            if order.action == "exit":
                return
            result = self._run_assignment(order.assignment, order.helpers) if order.assignment is not None else None
            if result is not None and self._damage:
                result = replace(result, damage=tuple(self._damage))
                self._damage.clear()

    def _run_assignment(self, assignment: AssignStage, helpers: tuple[str, ...]) -> AttemptResult:
        stage, attempt = assignment.stage, assignment.attempt
        self._progress, self._lent, self._stage, self._attempt = {}, helpers, stage, attempt
        runtime = self._config.runtime
        context = StageContext(
            pool=_RayPool(self._lent_worker_handles),
            device=self._device,
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
                result = AttemptResult(stage.key, attempt, seconds, ((stage.key, computed), *others))
            except MissingInput as error:
                result = AttemptResult(stage.key, attempt, failure=FAILED, cause=describe_error(error), missing=error.key)
            except BaseException as error:  # noqa: BLE001 - a process boundary: any error of a stage is that stage's failure
                kind, cause = failure_kind(error, self._store.root), describe_error(error)
                result = AttemptResult(stage.key, attempt, failure=kind, cause=cause, traceback=traceback.format_exc())
            finally:
                self._stage, self._attempt, self._lent = None, "", ()
        release_gpu_memory(after_failure=result.failure is not None)
        return result

    def _was_published_by(self, key: str, attempt: str) -> bool:
        artifact = self._store.find(key)
        return artifact is not None and artifact.record.get("attempt") == attempt

    def _note_progress(self, values: Mapping[str, float]) -> None:
        self._progress = dict(values)

    def _lent_worker_handles(self) -> Mapping[str, Any]:
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
            call: Any = self._broker.worker_heartbeat.remote(self._identity, stage, attempt if stage else "", self._progress)
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
        runtime_env=config.runtime_env,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
    )
    return actor.remote(config, name, shape)


def _run_then_exit(target: Callable[[], None]) -> None:
    """Run `target`, one of the two threads, then end the process: it is useless without either, whatever the reason."""
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

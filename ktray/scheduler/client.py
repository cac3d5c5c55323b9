"""The scheduler as a driver or a trial sees it: a picklable client, and how a driver connects to a scheduler or starts one."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ktray.artifact import Stage
from ktray.errors import SearchStopped, StageFailed
from ktray.fingerprint import fingerprint
from ktray.scheduler.broker import Broker
from ktray.scheduler.fault_tolerance import ProcessId
from ktray.scheduler.messages import (
    BROKER_NAME,
    CANCELLED,
    DISK_FULL,
    Prepare,
    RequestResult,
    SchedulerConfig,
    StageFunction,
)
from ktray.scheduler.ray_cluster import kill_process, this_process
from ktray.scheduler.ray_session import RaySession, actor_runtime_env, code_and_environment_hash
from ktray.scheduler.worker import to_bytes
from ktray.stores import open_store
from ktray.stores.locks import try_lock_store

DRIVER_HEARTBEAT_SECONDS = 2.0
BROKER_FROZEN_SECONDS = 20  # without an answer, until a broker on this node that has answered before counts as frozen
BROKER_START_SECONDS = 120  # the same for one that may just be starting, or is on another node


class WaitCancelled(Exception):
    """The wait was cancelled; nothing failed, and the stages that run for it keep running."""


class SchedulerClient:
    """A handle on the broker, for drivers and trials alike; it can be pickled."""

    def __init__(self, namespace: str, session: str) -> None:
        self.namespace, self.session = namespace, session
        self._broker_handle: Any = None
        self._broker_process: ProcessId | None = None
        self._trial_processes: list[ProcessId] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(SchedulerClient(self.namespace, self.session))}

    def obtain(self, stages: Sequence[Stage], waiter: str, priority: int = 0) -> list[dict[str, Any]]:
        """Wait until all stages are published.

        Args:
            stages: in dependency order, inputs before those that read them.
            waiter: who waits, for `status` and `cancel_requests`; not empty.
            priority: higher goes first.

        Returns:
            One outcome ``{"key", "state", "seconds", "metrics"}`` per stage. `state` is ``computed`` for the one request that
            caused the computation, ``joined`` for one that arrived while it was running, ``reused`` if the store had it;
            `seconds` are those of its record.

        Raises:
            StageFailed: a stage raised, or its workers died three times.
            SearchStopped: the disk is full, or the scheduler has ended.
            WaitCancelled: `cancel_requests` was called for this waiter.
        """
        result: RequestResult = self._call("obtain", uuid.uuid4().hex, waiter, self.session, list(stages), priority)
        if result.kind == CANCELLED:
            raise WaitCancelled(result.cause)
        if result.kind == DISK_FULL:
            raise SearchStopped(f"the disk is full: {result.failed}: {result.cause}")
        if result.failed:
            raise StageFailed(result.failed, result.cause)
        return [dict(outcome) for outcome in result.outcomes]

    def prefetch(self, stages: Sequence[Stage]) -> None:
        """Compute these after all that trials wait for; the first request to obtain one counts as having computed it."""
        self._call("prefetch", self.session, list(stages))

    def status(self) -> dict[str, Any]:
        """Name and workers, what runs where and since when, what this driver's waiters wait for, what is queued, counts."""
        status: dict[str, Any] = self._call("status")
        return {**status, "waiting": [wait for wait in status["waiting"] if wait["session"] == self.session]}

    def cancel_requests(self, waiter: str) -> None:
        """End the waits of this waiter: its `obtain` calls raise `WaitCancelled`. Running stages go on and are published."""
        self._call("cancel_requests", waiter, self.session)

    def events(self, since: int = 0) -> list[dict[str, Any]]:
        """Numbered events after `since`, oldest first.

        Each is ``started``, ``published``, ``failed``, ``out of memory`` (the stage runs again, exclusively), ``split`` (stages
        that failed together run again one by one), ``fenced`` (a worker was silent), ``late`` (one did not start in time) or
        ``worker died``.
        """
        events: list[dict[str, Any]] = self._call("events", since)
        return events

    def shut_down_for_all_drivers(self) -> None:
        """End the broker and all workers, for every driver; waiters get `SearchStopped`. For one driver see `disconnect`."""
        with suppress(SearchStopped):
            self._call("shut_down")

    def trial_heartbeat(self) -> None:
        """Report that this process, which runs a trial, is alive. The scheduler kills one that stops reporting."""
        self._call("trial_heartbeat", this_process())

    def driver_heartbeat(self, cancelled: threading.Event | None = None) -> None:
        """Report that this process, which drives a search or run, is alive; a thread that `connect` starts does so every 2 s.

        Args:
            cancelled: once this is set, the call no longer waits for the answer.
        """
        with _broker_loss_as_search_stopped():
            answer = self._broker().driver_heartbeat.remote(self.session, self._trial_processes, this_process())
            if self._await_broker_answer(answer, cancelled):
                self._broker_process, self._trial_processes = ray.get(answer)

    def _await_broker_answer(self, answer: Any, cancelled: threading.Event | None = None) -> bool:
        """Wait until the broker has answered; False if `cancelled` is set before.

        A frozen broker is killed, because Ray restarts only a dead one.
        """
        seconds = 0
        while not ray.wait([answer], timeout=1.0)[0]:  # in steps, so that a pause of this process counts as one second
            seconds += 1
            if cancelled is not None and cancelled.is_set():
                return False
            if seconds == (BROKER_FROZEN_SECONDS if self._can_kill_broker_process() else BROKER_START_SECONDS):
                self._restart_broker()
        return True

    def _can_kill_broker_process(self) -> bool:
        """Whether the broker has answered before, from this machine, so that its process is known and can be killed."""
        return self._broker_process is not None and self._broker_process.node == ray.get_runtime_context().get_node_id()

    def _restart_broker(self) -> None:
        if self._broker_process is not None and self._can_kill_broker_process():
            kill_process(self._broker_process.pid, self._broker_process.created)
        else:
            ray.kill(self._broker(), no_restart=False)
        self._broker_process = None

    def disconnect(self) -> None:
        """End this driver's use of the scheduler, which is shut down unless another driver still uses it."""
        with suppress(SearchStopped):
            with _broker_loss_as_search_stopped():
                answer = self._broker().disconnect.remote(self.session)
                self._await_broker_answer(answer)
                is_last = ray.get(answer)
            if is_last:
                self.shut_down_for_all_drivers()

    def _call(self, name: str, *arguments: Any) -> Any:
        with _broker_loss_as_search_stopped():
            method = getattr(self._broker(), name)
            return ray.get((method.options(max_task_retries=0) if name == "shut_down" else method).remote(*arguments))

    def _broker(self) -> Any:
        if self._broker_handle is None:
            self._broker_handle = ray.get_actor(BROKER_NAME, namespace=self.namespace)
        return self._broker_handle


@contextmanager
def _broker_loss_as_search_stopped() -> Iterator[None]:
    """Within it, Ray's errors about a broker that is gone for good become a `SearchStopped` of one sentence."""
    try:
        yield
    except (ValueError, ray.exceptions.RayActorError) as error:
        if isinstance(error, ray.exceptions.RayTaskError):
            raise
        raise SearchStopped("the scheduler has ended; the same command goes on from here") from error


def _keep_sending_driver_heartbeats(scheduler: SchedulerClient, cancelled: threading.Event) -> None:
    """Report that the driver is alive until this is cancelled or the scheduler has ended."""
    while not cancelled.wait(DRIVER_HEARTBEAT_SECONDS):
        try:
            scheduler.driver_heartbeat(cancelled)
        except SearchStopped:
            return
        except Exception:  # noqa: BLE001 - one unanswered call, which Ray reports in several ways, even as a bare Exception;
            continue  # the broker looks for the driver only after several


def _start_driver_heartbeats(scheduler: SchedulerClient) -> Callable[[], None]:
    """Begin this driver's session and send heartbeats in a thread; returns the function that stops sending them."""
    scheduler.driver_heartbeat()
    cancelled = threading.Event()
    thread = threading.Thread(target=_keep_sending_driver_heartbeats, args=(scheduler, cancelled), daemon=True)
    thread.start()

    def cancel() -> None:
        cancelled.set()
        thread.join(timeout=DRIVER_HEARTBEAT_SECONDS)

    return cancel


def connect(
    session: RaySession, store_url: str, stage_function: StageFunction, prepare: Prepare | None = None
) -> SchedulerClient:
    """The scheduler for this code, environment, runtime and store: the one that runs on this cluster, or a new one.

    What dead attempts left in the store is removed first, unless a worker of any scheduler uses the store.

    Args:
        stage_function: module-level function that computes and publishes one stage. Workers get it pickled and import its
            module; the broker does not.
        prepare: module-level function that each new worker calls with its device before its first stage.
    """
    packed = to_bytes(stage_function)
    runtime = session.runtime.model_dump(mode="json")
    namespace = f"ktray-{fingerprint([code_and_environment_hash(), runtime, store_url, packed.hex()])[:12]}"
    scheduler = SchedulerClient(namespace, session.name)
    if not _keep_broker_if_responsive(namespace):
        _sweep_store_if_unused(store_url)
    name, prepared = uuid.uuid4().hex[:8], to_bytes(prepare) if prepare is not None else b""
    config = SchedulerConfig(namespace, store_url, packed, session.runtime, actor_runtime_env(session), name, prepared)
    ray.remote(Broker).options(
        name=BROKER_NAME,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=2000,
        runtime_env=config.runtime_env,
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
    ).remote(config)
    session.on_stop += [_start_driver_heartbeats(scheduler), scheduler.disconnect]
    return scheduler


def _keep_broker_if_responsive(namespace: str) -> bool:
    """Whether a broker runs in this namespace; one that does not answer within ten seconds is removed."""
    try:
        broker = ray.get_actor(BROKER_NAME, namespace=namespace)
    except ValueError:
        return False
    try:
        ray.get(broker.status.remote(), timeout=10)
    except ray.exceptions.RayError:
        with suppress(ValueError):
            ray.kill(broker)
        _wait_until_broker_is_removed(namespace)
        return False
    return True


def _wait_until_broker_is_removed(namespace: str) -> None:
    for _ in range(50):
        try:
            ray.get_actor(BROKER_NAME, namespace=namespace)
        except ValueError:
            return
        time.sleep(0.1)


def _sweep_store_if_unused(store_url: str) -> None:
    """Remove what dead attempts left in the store, unless a worker of any scheduler uses it."""
    lock = try_lock_store(store_url)
    if lock is not None:
        with lock:
            open_store(store_url).sweep()

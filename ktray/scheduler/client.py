"""What a driver or a trial holds of the scheduler: a picklable handle, and how a driver founds a scheduler."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ktray.artifact import Artifact, Stage
from ktray.errors import StageFailed, StoppedEarly
from ktray.fingerprint import fingerprint
from ktray.pool import StageContext
from ktray.scheduler.broker import Broker
from ktray.scheduler.config import BROKER, SchedulerConfig
from ktray.scheduler.process_liveness import Process
from ktray.scheduler.ray_cluster import end_process, this_process
from ktray.scheduler.ray_session import RaySession
from ktray.scheduler.worker_environment import environment, identity
from ktray.stores import Store, open_store
from ktray.stores.locks import try_lock_store

Work = Callable[[Stage, Store, str, StageContext], tuple[Artifact, bool]]
LEASE_EVERY = 2.0
FROZEN = 20  # seconds without an answer after which a broker stands still; it answers within milliseconds
LONG_FROZEN = 120  # the same for one that may just be starting


class WaitCancelled(Exception):
    """The wait was cancelled; nothing failed, and whatever ran for it runs on."""


class SchedulerClient:
    """A handle on the broker, for drivers and trials alike; it may be pickled."""

    def __init__(self, namespace: str, session: str) -> None:
        self.namespace, self.session = namespace, session
        self._handle: Any = None
        self._its_process: Process | None = None
        self._processes: list[Process] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(SchedulerClient(self.namespace, self.session))}

    def obtain(self, stages: Sequence[Stage], waiter: str, priority: int = 0) -> list[dict[str, Any]]:
        """Waits until all stages are published.

        Args:
            stages: in dependency order, inputs before those that read them.
            waiter: who waits, for `status` and `release`; not empty.
            priority: higher goes first.

        Returns:
            One outcome ``{"key", "state", "seconds", "metrics"}`` per stage. `state` is ``computed`` for the one request that
            caused the computation, ``joined`` for who came while it was on its way, ``reused`` if it was there; `seconds` are
            those of its record.

        Raises:
            StageFailed: a stage raised, or its workers died three times.
            StoppedEarly: the disk is full, or the scheduler has ended.
            Released: `release` was called for this waiter.
        """
        answer = self._ask("obtain", uuid.uuid4().hex, waiter, self.session, list(stages), priority)
        if answer.kind == "released":
            raise WaitCancelled(answer.cause)
        if answer.kind == "disk full":
            raise StoppedEarly(f"the disk is full: {answer.failed}: {answer.cause}")
        if answer.failed:
            raise StageFailed(answer.failed, answer.cause)
        return [dict(outcome) for outcome in answer.outcomes]

    def prefetch(self, stages: Sequence[Stage]) -> None:
        """Have these computed while workers have nothing else to do; the first who obtains them then counts as their cause."""
        self._ask("prefetch", self.session, list(stages))

    def status(self) -> dict[str, Any]:
        """Its name and workers, what runs where and since when, who of this driver waits for what, what is queued, counts."""
        status: dict[str, Any] = self._ask("status")
        return {**status, "waiting": [wait for wait in status["waiting"] if wait["session"] == self.session]}

    def release(self, waiter: str) -> None:
        """Ends every `obtain` of this waiter at once, with `Released`."""
        self._ask("release", waiter, self.session)

    def events(self, since: int = 0) -> list[dict[str, Any]]:
        """Numbered events after `since`, oldest first.

        Each is ``started``, ``published``, ``failed``, ``out of memory`` (the stage runs again, alone), ``apart`` (a family's
        stages do, one by one), ``fenced`` (a worker was silent), ``late`` (one has not come) or ``worker died``.
        """
        events: list[dict[str, Any]] = self._ask("events", since)
        return events

    def end(self) -> None:
        """Ends the broker and its workers; waiters get StoppedEarly."""
        with suppress(StoppedEarly):
            self._ask("end")

    def attend(self) -> None:
        """Tells that this process of a trial lives. The scheduler ends one that it no longer hears of."""
        self._ask("attend", this_process())

    def lease(self, over: threading.Event | None = None) -> None:
        """Tells that the driver lives; the thread of `connect` does so every few seconds.

        Args:
            over: nobody waits for the answer once this is set.
        """
        with _said_if_over():
            answer = self._broker().lease.remote(self.session, self._processes)
            if self._await(answer, over):
                self._its_process, self._processes = ray.get(answer)

    def _await(self, answer: Any, over: threading.Event | None = None) -> bool:
        """Wait for a broker that may stand still: Ray restarts only a dead one, so it is ended. False once `over` is set."""
        seconds = 0
        while not ray.wait([answer], timeout=1.0)[0]:  # in steps: if this process itself stood still, that counts as one
            seconds += 1
            if over is not None and over.is_set():
                return False
            if seconds == (FROZEN if self._is_near() else LONG_FROZEN):
                self._replace_broker()
        return True

    def _is_near(self) -> bool:
        """Whether the broker has answered before, and from this machine: then only that process can be meant."""
        return self._its_process is not None and self._its_process.node == ray.get_runtime_context().get_node_id()

    def _replace_broker(self) -> None:
        if self._is_near():
            assert self._its_process is not None
            end_process(self._its_process.pid, self._its_process.born)
        else:
            ray.kill(self._broker(), no_restart=False)
        self._its_process = None

    def leave(self) -> None:
        """The driver goes: ends the scheduler, unless another driver still uses it."""
        with suppress(StoppedEarly):
            with _said_if_over():
                answer = self._broker().leave.remote(self.session)
                self._await(answer)
                last = ray.get(answer)
            if last:
                self.end()

    def _ask(self, method: str, *arguments: Any) -> Any:
        with _said_if_over():
            call = getattr(self._broker(), method)
            return ray.get((call.options(max_task_retries=0) if method == "end" else call).remote(*arguments))

    def _broker(self) -> Any:
        if self._handle is None:
            self._handle = ray.get_actor(BROKER, namespace=self.namespace)
        return self._handle


@contextmanager
def _said_if_over() -> Iterator[None]:
    """Ray's errors about an actor that is no more, as one sentence."""
    try:
        yield
    except (ValueError, ray.exceptions.RayActorError) as error:
        if isinstance(error, ray.exceptions.RayTaskError):
            raise
        raise StoppedEarly("the scheduler has ended; the same command goes on from here") from error


class Lease:
    """A thread that renews a driver's lease until it is cancelled."""

    def __init__(self, scheduler: SchedulerClient) -> None:
        self._scheduler, self._over = scheduler, threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._over.wait(LEASE_EVERY):
            try:
                self._scheduler.lease(self._over)
            except StoppedEarly:
                return
            except Exception:  # noqa: BLE001 - one call without an answer, which Ray says in several ways, a bare
                continue  # Exception among them: a lease lasts several calls

    def cancel(self) -> None:
        """Stops renewing."""
        self._over.set()
        self._thread.join(timeout=LEASE_EVERY)


def connect(session: RaySession, store_url: str, work: Work) -> SchedulerClient:
    """The scheduler for this code, environment, runtime and store: the one that lives on this cluster, or a new one.

    What dead attempts left in the store is swept away first, unless a worker of any scheduler holds the store.

    Args:
        work: module-level function that computes and publishes one stage; workers import its module, the broker does not.
    """
    packed = cloudpickle.dumps(work)
    namespace = f"ktray-{fingerprint([identity(), asdict(session.runtime), store_url, packed.hex()])[:12]}"
    scheduler = SchedulerClient(namespace, session.name)
    if not _lives(namespace):
        _sweep(store_url)
    config = SchedulerConfig(namespace, store_url, packed, session.runtime, environment(), uuid.uuid4().hex[:8])
    ray.remote(Broker).options(
        name=BROKER,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=2000,
        runtime_env={"env_vars": dict(config.environment)},
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
    ).remote(config)
    scheduler.lease()
    lease = Lease(scheduler)
    session.schedulers += [lease.cancel, scheduler.leave]
    return scheduler


def _lives(namespace: str) -> bool:
    """Whether a broker answers under this name; one that does not within ten seconds is removed."""
    try:
        broker = ray.get_actor(BROKER, namespace=namespace)
    except ValueError:
        return False
    try:
        ray.get(broker.status.remote(), timeout=10)
    except ray.exceptions.RayError:
        with suppress(ValueError):
            ray.kill(broker)
        _until_absent(namespace)
        return False
    return True


def _until_absent(namespace: str) -> None:
    for _ in range(50):
        try:
            ray.get_actor(BROKER, namespace=namespace)
        except ValueError:
            return
        time.sleep(0.1)


def _sweep(store_url: str) -> None:
    lock = try_lock_store(store_url)
    if lock is not None:
        try:
            open_store(store_url).sweep()
        finally:
            lock.release()

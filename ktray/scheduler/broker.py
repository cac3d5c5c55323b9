"""The broker: one light actor that runs the core on Ray. It computes nothing, holds no data, and may be killed at any time."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray

from ktray.artifact import Artifact, Stage
from ktray.cost_model.stage_costs import CostModel
from ktray.scheduler.core import SchedulerCore
from ktray.scheduler.fault_tolerance import ProcessId, ProcessLiveness
from ktray.scheduler.messages import (
    AHEAD,
    BROKER_NAME,
    DAMAGED,
    OUT_OF_MEMORY,
    WORKER_DIED,
    AssignStage,
    AttemptResult,
    FenceAttempt,
    FenceOrphanedAttempts,
    KillWorker,
    LossKind,
    RequestResult,
    RetireWorker,
    SchedulerConfig,
    SchedulerEvent,
    StartWorker,
    WorkerIdentity,
    WorkerOrder,
)
from ktray.scheduler.ray_cluster import (
    classify_worker_loss,
    is_process_alive_on_its_node,
    kill_process_on_node,
    kill_workers_of_scheduler,
    resources_of_alive_nodes,
    this_process,
    worker_names,
)
from ktray.scheduler.recent_set import RecentSet
from ktray.scheduler.resources import GpuShares
from ktray.scheduler.worker import start_worker
from ktray.scheduler.worker_registry import Worker, WorkerRegistry
from ktray.stores import open_store

POLL_SECONDS = 5.0
DRIVER_SILENT_SECONDS = 15.0  # without a heartbeat, until the process of a driver is looked for
REFRESH_NODES_SECONDS = 5.0
MAX_EVENTS = 20_000
MAX_PRESTARTED = {False: 4, True: 2}  # are there GPUs? -> workers without one: few where most stages run on GPUs
MAX_PRESTARTED_ON_GPUS = 8


class Broker:
    """Carries out the core's actions, and answers drivers, trials and workers.

    After a crash its state is rebuilt: Ray repeats the calls of waiters and workers, heartbeats tell which attempts are
    running, and the store tells what is done.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config, self._store = config, open_store(config.store_url)
        self._store.on_damage = self._record_damage_event
        runtime, now = config.runtime, time.time()
        stale_after = max(2.0, 4 * runtime.heartbeat_seconds)
        self._registry = WorkerRegistry(resources_of_alive_nodes(), runtime.cpus or float("inf"), stale_after)
        self._costs = CostModel()
        self._shares = GpuShares(
            runtime.resources_for, lambda: any(node.gpus for node in self._registry.alive_and_departed_nodes())
        )
        self._core = SchedulerCore(
            self._find_artifact,
            self._shares,
            self._registry,
            lambda: f"{config.name}-{uuid.uuid4().hex[:8]}",
            runtime.dead_after,
            self._expected_seconds,
            self._shares.on_cpus,
            lambda gpu, stage: self._costs.seconds_on(gpu, stage, self._core.requests.stages),
        )
        self._polls: dict[str, asyncio.Future[WorkerOrder]] = {}
        self._results: dict[str, asyncio.Future[RequestResult]] = {}
        self._trials = ProcessLiveness(runtime.dead_after)
        self._handles: dict[str, Any] = {}
        self._ended_workers = RecentSet[str]()  # if they call again, they are told to exit
        self._driver_heartbeats: dict[str, float] = {}  # session -> when its driver was last known to exist
        self._drivers: dict[str, ProcessId] = {}  # session -> its process
        self._last_driver_heartbeat = now
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._last_event = int(now * 1000)  # so that numbers keep rising across restarts
        self._periodic_task: asyncio.Task[None] | None = None
        self._driver_check: asyncio.Task[None] | None = None
        self._watchers: set[asyncio.Task[None]] = set()
        # Workers of an earlier scheduler are killed before any new one exists; Ray frees their names only some time later.
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self._registry.exclude_names([] if restarted else kill_workers_of_scheduler(config.namespace))
        self._survivors = worker_names(config.namespace) if restarted else []
        self._core.first_heartbeats.note_broker_restart(self._survivors, now)
        threading.Timer(runtime.idle_exit_seconds, self._exit_if_never_called).start()

    def _find_artifact(self, key: str) -> Artifact | None:
        artifact = self._store.find(key)
        if artifact is not None:
            self._costs.add(key, artifact.record)
            self._shares.learn_peak_memory(artifact)
        return artifact

    def _expected_seconds(self, stage: Stage) -> float:
        return self._costs.seconds(stage, self._core.requests.stages)

    # ---- calls of drivers and trials

    async def driver_heartbeat(
        self, session: str, trials: Sequence[ProcessId], driver: ProcessId
    ) -> tuple[ProcessId, list[ProcessId]]:
        """Note that a driver is alive. Once its process has ended, its requests are cancelled; without any the broker ends.

        A driver that stops calling this while its process exists stands still, as while a laptop is closed, and goes on later.

        Args:
            trials: the processes of trials that an earlier call returned, so that a restarted broker learns of them.

        Returns:
            The broker's own process, and those of all trials.
        """
        self._ensure_periodic_task()
        self._driver_heartbeats[session] = self._last_driver_heartbeat = time.time()
        self._drivers[session] = driver
        self._trials.restore(trials, self._last_driver_heartbeat)
        return this_process(), self._trials.alive()

    async def trial_heartbeat(self, process: ProcessId) -> None:
        """Note that the process of a trial is alive. Once it stops calling this, it is killed, and its trial starts again."""
        self._ensure_periodic_task()
        self._trials.record_heartbeat(process, time.time())

    async def disconnect(self, session: str) -> bool:
        """End the session of a driver; True if it was the last one."""
        self._end_session(session)
        self._carry_out_actions()
        return not self._driver_heartbeats

    async def obtain(self, request_id: str, waiter: str, session: str, stages: Sequence[Stage], priority: int) -> RequestResult:
        """Wait until all stages are published, or one has failed."""
        self._ensure_periodic_task()
        result = self._results.get(request_id)
        if result is None:
            result = self._results[request_id] = asyncio.get_running_loop().create_future()
            self._core.requests.add_request(request_id, waiter, session, stages, priority, time.time())
            self._dispatch()
        return await asyncio.shield(result)

    async def prefetch(self, session: str, stages: Sequence[Stage]) -> None:
        """Compute these stages before any trial asks for them: after all that trials wait for, before background work."""
        self._ensure_periodic_task()
        self._core.requests.add_request(uuid.uuid4().hex, "", session, stages, AHEAD, time.time())
        self._dispatch()

    async def cancel_requests(self, waiter: str, session: str) -> None:
        """Cancel all requests of this waiter."""
        self._core.requests.cancel_requests(session, waiter)
        self._dispatch()

    async def events(self, since: int) -> list[dict[str, Any]]:
        """Events with a higher number than `since`, oldest first."""
        return [event for event in self._events if event["n"] > since]

    async def status(self) -> dict[str, Any]:
        """The scheduler's name, what its workers do, what waits and is queued, and what was computed and reused so far."""
        return {"name": self._config.name, "pid": os.getpid(), **core_status(self._core, time.time())}

    async def shut_down(self) -> None:
        """Kill all workers, then this process."""
        for handle in self._handles.values():
            ray.kill(handle)
        kill_workers_of_scheduler(self._config.namespace)
        self._exit()

    # ---- calls of workers

    async def next_order(self, identity: WorkerIdentity, result: AttemptResult | None) -> WorkerOrder:
        """Take the result of a worker's last attempt, and answer within `POLL_SECONDS` what it is to do next."""
        worker = self._find_or_register_worker(identity)
        if worker is None:
            return WorkerOrder("exit")
        now = time.time()
        self._core.handle_heartbeat(worker, "", None, "", {}, now)
        must_exit = result is not None and self._core.must_exit(worker, result.key, result.attempt)
        if result is not None:
            self._handle_attempt_result(result, now)
        if worker.attempt is not None:
            self._core.handle_lost_assignment(worker)
        if worker.retiring or must_exit:
            return WorkerOrder("exit")
        poll: asyncio.Future[WorkerOrder] = asyncio.get_running_loop().create_future()
        self._polls[worker.name], worker.polling = poll, True
        self._dispatch()
        await asyncio.wait({poll}, timeout=POLL_SECONDS)
        if self._polls.get(worker.name) is poll:
            del self._polls[worker.name]
            worker.polling = False
        return poll.result() if poll.done() else WorkerOrder("poll")

    async def worker_heartbeat(
        self, identity: WorkerIdentity, stage: Stage | None, attempt: str, progress: Mapping[str, float]
    ) -> list[str] | None:
        """Note that a worker is alive. Returns the names of the workers lent to its attempt, or None if it must exit."""
        worker = self._find_or_register_worker(identity)
        if worker is None:
            return None
        key = stage.key if stage else ""
        if not self._core.handle_heartbeat(worker, key, stage, attempt, progress, time.time()):
            return None
        return self._core.lent_workers(attempt) if attempt else []

    def _find_or_register_worker(self, identity: WorkerIdentity) -> Worker | None:
        """The calling worker, registered if it is new to this broker; None if it counts as dead."""
        self._ensure_periodic_task()
        if identity.name in self._ended_workers:
            return None
        worker = self._registry.workers.get(identity.name)
        worker = worker or self._registry.register(identity.name, identity.shape, identity.node)
        worker.pid, worker.node, worker.gpu_ids = identity.pid, identity.node, identity.gpu_ids
        return worker

    def _record_damage_event(self, sentence: str) -> None:
        self._record_event(SchedulerEvent(DAMAGED, cause=sentence))

    def _handle_attempt_result(self, result: AttemptResult, now: float) -> None:
        for sentence in result.damage:
            self._record_damage_event(sentence)
        key, attempt, kind, cause = result.key, result.attempt, result.failure, result.cause
        if kind is None:
            for published_key, computed in result.published:
                self._core.handle_succeeded_attempt(published_key, attempt, computed, result.seconds, now)
        elif self._core.handle_failed_attempt(key, attempt, kind, cause, result.missing, now):
            failure = {"cause": cause, "traceback": result.traceback, "kind": kind, "time": now}
            with suppress(OSError):  # a full disk is one of the failures
                self._store.record_failure(key, failure)
        self._carry_out_actions()

    # ---- the periodic task

    def _ensure_periodic_task(self) -> None:
        """At the first call: start the periodic task, and watch the workers from before a restart. Later calls do nothing."""
        if self._periodic_task is None:
            self._periodic_task = asyncio.get_running_loop().create_task(self._check_periodically())
            for name in self._survivors:
                try:
                    self._watch_worker(name, ray.get_actor(name, namespace=self._config.namespace))
                except ValueError:
                    self._handle_lost_worker(name, WORKER_DIED, "it died while the broker was down")

    async def _check_periodically(self) -> None:
        """The periodic task: look for lost nodes, workers, trials and drivers, shut down if unused, start what can start."""
        pause = min(0.5, self._config.runtime.heartbeat_seconds)
        last, refresh_at = time.time(), 0.0
        while True:
            await asyncio.sleep(pause)
            now = time.time()
            if not 0 <= now - last < pause + 1.0:
                self._compensate_pause(now - last - pause)
            last = now
            if now > refresh_at:
                refresh_at = now + REFRESH_NODES_SECONDS
                with suppress(ray.exceptions.RayError):
                    self._registry.set_alive_nodes(await asyncio.to_thread(resources_of_alive_nodes), now)
            self._core.check_heartbeats(now)
            for process in self._trials.remove_silent(now):
                kill_process_on_node(process.node, process.pid, process.created)
            if self._driver_check is None or self._driver_check.done():
                self._driver_check = asyncio.get_running_loop().create_task(self._end_sessions_without_driver(now))
            if not self._driver_heartbeats and now - self._last_driver_heartbeat > self._config.runtime.idle_exit_seconds:
                await self.shut_down()
            self._prestart()
            self._dispatch()

    def _prestart(self) -> None:
        nodes_now = self._registry.nodes.values()
        cpus = min(self._registry.cpu_limit, sum(node.cpus for node in nodes_now))
        share = self._shares("student").gpus or 0.0
        slots = sum(int(node.gpus / share) for node in nodes_now) if share else 0
        self._core.scaling.prestart(int(min(cpus, MAX_PRESTARTED[slots > 0])), share, min(slots, MAX_PRESTARTED_ON_GPUS))

    async def _end_sessions_without_driver(self, now: float) -> None:
        """End the sessions of drivers that have ended. One that only stands still keeps its session, and so the broker."""
        silent_after = min(DRIVER_SILENT_SECONDS, self._config.runtime.idle_exit_seconds)
        for session in [name for name, last in self._driver_heartbeats.items() if now - last > silent_after]:
            exists = await asyncio.to_thread(is_process_alive_on_its_node, self._drivers[session])
            if now - self._driver_heartbeats.get(session, now) <= silent_after:
                continue  # it has called or ended meanwhile
            if exists:
                self._driver_heartbeats[session] = self._last_driver_heartbeat = time.time()
            else:
                self._end_session(session)

    def _end_session(self, session: str) -> None:
        self._driver_heartbeats.pop(session, None)
        self._drivers.pop(session, None)
        self._core.requests.cancel_requests(session)

    def _compensate_pause(self, seconds: float) -> None:
        """This process was paused, or its clock was set forward, for this long: nobody was silent in that time."""
        self._core.compensate_pause(seconds)
        self._trials.compensate_pause(seconds)
        self._last_driver_heartbeat += seconds
        self._driver_heartbeats = {session: last + seconds for session, last in self._driver_heartbeats.items()}

    def _dispatch(self) -> None:
        self._core.dispatch(time.time())
        self._carry_out_actions()

    def _carry_out_actions(self) -> None:
        """Carry out the actions in the core's outbox."""
        actions = self._core.outbox[:]
        self._core.outbox.clear()
        for action in actions:
            match action:
                case AssignStage(worker, _, attempt):
                    self._answer_poll(worker, WorkerOrder("run", action, tuple(self._core.lent_workers(attempt))))
                case StartWorker(worker):
                    self._watch_worker(worker.name, start_worker(self._config, worker.name, worker.shape, worker.node))
                case RetireWorker(worker):
                    self._answer_poll(worker, WorkerOrder("exit"))
                case FenceAttempt(key, attempt):
                    with suppress(OSError):  # a store that is briefly unreachable must not end this task
                        self._store.fence(key, attempt)
                case FenceOrphanedAttempts():
                    with suppress(OSError):
                        self._fence_orphaned_attempts()
                case KillWorker(worker):
                    self._kill_worker(worker)
                case RequestResult(request_id):
                    result = self._results.pop(request_id, None)
                    if result is not None and not result.done():
                        result.set_result(action)
                case SchedulerEvent():
                    self._record_event(action)

    def _fence_orphaned_attempts(self) -> None:
        owned = {run.attempt for run in self._core.running.values()}
        for key, attempt in self._store.attempts(f"{self._config.name}-"):
            if attempt not in owned:
                self._store.fence(key, attempt)

    def _record_event(self, event: SchedulerEvent) -> None:
        """Keep an event for drivers, and learn from one about GPU memory."""
        if event.event == OUT_OF_MEMORY and event.worker in self._registry.workers:
            share = self._registry.workers[event.worker].shape.gpus
            self._shares.increase_after_out_of_memory(event.stage, share)
        self._last_event += 1
        self._events.append({"n": self._last_event, "time": time.time(), **vars(event)})

    def _answer_poll(self, worker: str, order: WorkerOrder) -> None:
        """Give a worker that waits in `next_order` its order; of one that does not wait nothing happens."""
        poll = self._polls.pop(worker, None)
        if poll is not None:
            self._registry.workers[worker].polling = False
            poll.set_result(order)

    def _watch_worker(self, name: str, handle: Any) -> None:
        self._handles[name] = handle
        watcher = asyncio.get_running_loop().create_task(self._await_worker_exit(name, handle))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    async def _await_worker_exit(self, name: str, handle: Any) -> None:
        try:
            await handle.wait_until_exit.remote()
        except ray.exceptions.RayError as error:
            self._handle_lost_worker(name, *classify_worker_loss(error))

    def _handle_lost_worker(self, name: str, event: LossKind, cause: str) -> None:
        self._ended_workers.add(name)
        self._handles.pop(name, None)
        poll = self._polls.pop(name, None)
        if poll is not None:
            poll.cancel()
        self._core.handle_lost_worker(name, event, cause, time.time())
        self._dispatch()

    def _kill_worker(self, worker: Worker) -> None:
        self._ended_workers.add(worker.name)
        if worker.pid:
            kill_process_on_node(worker.node, worker.pid, None)
        handle = self._handles.pop(worker.name, None)
        if handle is not None:
            ray.kill(handle)

    def _exit_if_never_called(self) -> None:
        if self._periodic_task is None:
            self._exit()

    def _exit(self) -> None:
        # ray.kill, because Ray would restart an actor that leaves its process in any other way.
        ray.kill(ray.get_actor(BROKER_NAME, namespace=self._config.namespace))


def core_status(core: SchedulerCore, now: float) -> dict[str, Any]:
    """What workers do, what waits and is queued, and what was computed and reused so far, as JSON values."""
    workers, pending = core.registry.workers.values(), core.requests.pending
    return {
        "workers": [
            {
                "name": worker.name,
                "node": worker.node,
                "pid": worker.pid,
                "cpus": worker.shape.cpus,
                "gpus": worker.shape.gpus,
                "gpu_ids": list(worker.gpu_ids),
                "state": _worker_state(worker),
                "silent_seconds": round(now - worker.last_heartbeat, 3) if worker.last_heartbeat else None,
            }
            for worker in workers
        ],
        "running": [
            {
                "key": run.key,
                "stage": run.stage.name,
                "worker": run.worker,
                "node": core.registry.node_of(run.worker),
                "since": run.since,
                "progress": dict(run.progress),
                "silent_seconds": round(now - run.last_progress, 3),
                "attempt": run.attempt,
                "pace_seconds": (run.last_progress - run.since) / run.progress_changes if run.progress_changes else None,
                "helpers": core.lent_workers(run.attempt),
            }
            for run in core.running.values()
        ],
        "waiting": [
            {"waiter": request.waiter, "session": request.session, "key": key, "since": request.since}
            for request in core.requests.open.values()
            if request.waiter
            for key in sorted(request.pending, key=lambda key: pending[key].order)[:1]
        ],
        "queued": [key for key in pending if key not in core.running],
        "computed": dict(core.computed),
        "reused": dict(core.requests.reused),
    }


def _worker_state(worker: Worker) -> str:
    if worker.attempt:
        return "stage"
    if worker.lent_to:
        return "helping"
    return "idle" if worker.polling else "starting"

"""The broker: one light actor that keeps the core, never computes and never holds data. It may be killed at any time."""

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
from ktray.scheduler.config import BROKER, SchedulerConfig
from ktray.scheduler.core import SchedulerCore
from ktray.scheduler.failure_kinds import DIED, OUT_OF_MEMORY
from ktray.scheduler.gpu_shares import GpuShares
from ktray.scheduler.lengths import StageLengths
from ktray.scheduler.messages import (
    AssignStage,
    FenceAttempt,
    FenceOrphans,
    KillWorker,
    RequestResult,
    RetireWorker,
    SchedulerEvent,
    StartWorker,
)
from ktray.scheduler.overview import overview
from ktray.scheduler.process_liveness import Process, ProcessLiveness
from ktray.scheduler.ray_cluster import death_of, end_process_on, end_workers, nodes, this_process, workers_of
from ktray.scheduler.worker import start
from ktray.scheduler.worker_registry import Worker, WorkerRegistry
from ktray.stores import open_store

POLL_SECONDS = 5.0
LEASE_SECONDS = 15.0
EVENTS = 20_000
WARM = 4


class Broker:
    """Carries the core's actions out and its answers to who waits.

    What it knows is rebuilt after a crash: Ray repeats the calls of waiters and workers, beats tell which attempts run, and
    the store tells what is done.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._charter, self._store = config, open_store(config.store_url)
        runtime, now = config.runtime, time.time()
        self._roster = WorkerRegistry(nodes(), runtime.cpus or float("inf"), stale=max(2.0, 4 * runtime.heartbeat_seconds))
        attempts = lambda: f"{config.name}-{uuid.uuid4().hex[:8]}"  # noqa: E731
        self._lengths = StageLengths()
        self._shares = GpuShares(runtime.of, lambda: any(node.gpus for node in self._roster.known()))
        self._ledger = SchedulerCore(self._find, self._shares, self._roster, attempts, runtime.dead_after, self._lengths)
        self._polls: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._answers: dict[str, asyncio.Future[RequestResult]] = {}
        self._attendance = ProcessLiveness(runtime.dead_after)
        self._handles: dict[str, Any] = {}
        self._gone: set[str] = set()
        self._leases: dict[str, float] = {}
        self._leased = now
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self._number = int(now * 1000)  # numbers go on rising over restarts
        self._ticking: asyncio.Task[None] | None = None
        self._watches: set[asyncio.Task[None]] = set()
        # Workers of an earlier scheduler end here, before any new one exists; Ray frees their names only some time later.
        reborn = ray.get_runtime_context().was_current_actor_reconstructed
        self._roster.skip([] if reborn else end_workers(config.namespace))
        self._survivors = workers_of(config.namespace) if reborn else []
        self._ledger.expected.restart(self._survivors, now)
        threading.Timer(runtime.idle_exit_seconds, self._end_if_never_called).start()

    def _find(self, key: str) -> Artifact | None:
        artifact = self._store.find(key)
        if artifact is not None:
            self._lengths.note(artifact)
            self._shares.note(artifact)
        return artifact

    # ---- drivers and trials

    async def lease(self, session: str, known: Sequence[Process]) -> tuple[Process, list[Process]]:
        """A driver lives; its requests are released, and in the end the scheduler, when it stops calling this.

        Args:
            known: the processes of trials that an earlier answer named: a broker that was killed hears of them again.

        Returns:
            The broker's own process, and those of trials.
        """
        self._wake()
        self._leases[session] = self._leased = time.time()
        self._attendance.recall(known, self._leased)
        return this_process(), self._attendance.present()

    async def attend(self, process: Process) -> None:
        """The process of a trial lives; it is ended, and its trial waits anew, when it stops calling this."""
        self._wake()
        self._attendance.beat(process, time.time())

    async def leave(self, session: str) -> bool:
        """A driver goes; True if no other driver is here."""
        self._leases.pop(session, None)
        self._ledger.demand.release(session)
        self._act()
        return not self._leases

    async def obtain(self, request: str, waiter: str, session: str, stages: Sequence[Stage], priority: int) -> RequestResult:
        """Wait until all are published, or one failed."""
        self._wake()
        if request not in self._answers:
            self._answers[request] = asyncio.get_running_loop().create_future()
            self._ledger.demand.request(request, waiter, session, stages, priority, time.time())
            self._turn()
        answer = await asyncio.shield(self._answers[request])
        self._answers.pop(request, None)
        return answer

    async def prefetch(self, session: str, stages: Sequence[Stage]) -> None:
        """Compute these when nothing that somebody waits for comes first."""
        self._wake()
        self._ledger.demand.request(uuid.uuid4().hex, "", session, stages, -1, time.time())
        self._turn()

    async def release(self, waiter: str, session: str) -> None:
        """End all requests of this waiter at once."""
        self._ledger.demand.release(session, waiter)
        self._turn()

    async def events(self, since: int) -> list[dict[str, Any]]:
        """Events with a higher number than `since`, oldest first."""
        return [event for event in self._events if event["n"] > since]

    async def status(self) -> dict[str, Any]:
        """The scheduler's name, what works, waits and is queued, and what was computed and reused so far."""
        return {"name": self._charter.name, "pid": os.getpid(), **overview(self._ledger, time.time())}

    async def end(self) -> None:
        """End all workers, then this process."""
        for handle in self._handles.values():
            ray.kill(handle)
        end_workers(self._charter.namespace)
        self._end_self()

    # ---- workers

    async def next(self, who: Mapping[str, Any], report: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the worker shall do next, after how its last stage ended; an answer comes after a few seconds at most."""
        worker = self._meet(who)
        if worker is None:
            return {"do": "go"}
        now = time.time()
        self._ledger.beat(worker, "", None, "", {}, now)
        if report is not None:
            self._note(report, now)
        if worker.leads is not None:
            self._ledger.lost(worker)
        if worker.leaving:
            return {"do": "go"}
        poll: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._polls[worker.name], worker.polling = poll, True
        self._turn()
        await asyncio.wait({poll}, timeout=POLL_SECONDS)
        if self._polls.get(worker.name) is poll:
            del self._polls[worker.name]
            worker.polling = False
        return poll.result() if poll.done() else {"do": "wait"}

    async def beat(
        self, who: Mapping[str, Any], stage: Stage | None, attempt: str, progress: Mapping[str, float]
    ) -> dict[str, Any]:
        """A sign of life; the answer says whether to die, and who is lent to the attempt."""
        worker = self._meet(who)
        if worker is None:
            return {"die": True, "helpers": []}
        alive = self._ledger.beat(worker, stage.key if stage else "", stage, attempt, progress, time.time())
        return {"die": not alive, "helpers": self._ledger.helpers(attempt) if attempt else []}

    def _meet(self, who: Mapping[str, Any]) -> Worker | None:
        self._wake()
        name = who["name"]
        if name in self._gone:
            return None
        worker = self._roster.workers.get(name) or self._roster.add(name, who["shape"], who["node"])
        worker.pid, worker.node, worker.cards = who["pid"], who["node"], who["cards"]
        return worker

    def _note(self, report: Mapping[str, Any], now: float) -> None:
        key, attempt, kind = report["key"], report["attempt"], report["kind"]
        if not kind:
            for published, computed in [(key, report["computed"]), *report["beside"]]:
                self._ledger.published(published, attempt, computed, report["seconds"], now)
        elif self._ledger.failed(key, attempt, kind, report["cause"], report.get("missing", ""), now):
            failure = {"cause": report["cause"], "traceback": report["traceback"], "kind": kind, "time": now}
            with suppress(OSError):  # a full disk is one of the failures
                self._store.fail(key, failure)
        self._act()

    # ---- the broker itself

    def _wake(self) -> None:
        if self._ticking is None:
            self._ticking = asyncio.get_running_loop().create_task(self._tick())
            for name in self._survivors:
                try:
                    self._watch(name, ray.get_actor(name, namespace=self._charter.namespace))
                except ValueError:
                    self._lose(name, DIED, "it died while the broker was down")

    async def _tick(self) -> None:
        pause = min(0.5, self._charter.runtime.heartbeat_seconds)
        last, refresh = time.time(), 0.0
        while True:
            await asyncio.sleep(pause)
            now = time.time()
            if not 0 <= now - last < pause + 1.0:
                self._excuse(now - last - pause)
            last = now
            if now > refresh:
                refresh = now + 5.0
                with suppress(ray.exceptions.RayError):
                    self._roster.see(await asyncio.to_thread(nodes), now)
            self._ledger.silent(now)
            for process in self._attendance.silent(now):
                end_process_on(process.node, process.pid, process.born)
            for session in [each for each, leased in self._leases.items() if now - leased > LEASE_SECONDS]:
                del self._leases[session]
                self._ledger.demand.release(session)
            if now - self._leased > self._charter.runtime.idle_exit_seconds:
                await self.end()
            cpus = min(self._roster.cpus, sum(node.cpus for node in self._roster.nodes.values()))
            self._ledger.hiring.warm(int(min(cpus, WARM)))
            self._turn()

    def _excuse(self, seconds: float) -> None:
        """This process or its clock stood still: whatever seems silent since then is not."""
        self._ledger.forgive(seconds)
        self._attendance.forgive(seconds)
        self._leased += seconds
        self._leases = {session: leased + seconds for session, leased in self._leases.items()}

    def _turn(self) -> None:
        self._ledger.dispatch(time.time())
        self._act()

    def _act(self) -> None:
        outbox = self._ledger.outbox[:]
        self._ledger.outbox.clear()
        for action in outbox:
            match action:
                case AssignStage(worker, stage, attempt, few):
                    given = {"do": "stage", "stage": stage, "attempt": attempt, "few": few}
                    self._reply(worker, given | {"helpers": self._ledger.helpers(attempt)})
                case StartWorker(worker):
                    self._hire(worker)
                case RetireWorker(worker):
                    self._reply(worker, {"do": "go"})
                case FenceAttempt(key, attempt):
                    with suppress(OSError):  # a store that is away for a moment must not end the broker's own task
                        self._store.fence(key, attempt)
                case FenceOrphans():
                    with suppress(OSError):
                        self._fence_lost()
                case KillWorker(worker):
                    self._kill(worker)
                case RequestResult(request):
                    future = self._answers.get(request)
                    if future is not None and not future.done():
                        future.set_result(action)
                case SchedulerEvent():
                    self._publish(action)

    def _fence_lost(self) -> None:
        owned = {run.attempt for run in self._ledger.runs.values()}
        for key, attempt in self._store.attempts(f"{self._charter.name}-"):
            if attempt not in owned:
                self._store.fence(key, attempt)

    def _publish(self, event: SchedulerEvent) -> None:
        if event.event == OUT_OF_MEMORY and event.worker in self._roster.workers:
            self._shares.ran_out(event.stage, self._roster.workers[event.worker].shape.gpus)
        self._number += 1
        self._events.append({"n": self._number, "time": time.time(), **vars(event)})

    def _reply(self, worker: str, order: dict[str, Any]) -> None:
        poll = self._polls.pop(worker, None)
        if poll is not None:
            self._roster.workers[worker].polling = False
            poll.set_result(order)

    def _hire(self, worker: Worker) -> None:
        self._watch(worker.name, start(self._charter, worker.name, worker.shape, worker.node))

    def _watch(self, name: str, handle: Any) -> None:
        self._handles[name] = handle
        task = asyncio.get_running_loop().create_task(self._mourn(name, handle))
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    async def _mourn(self, name: str, handle: Any) -> None:
        try:
            await handle.forever.remote()
        except ray.exceptions.RayError as error:
            self._lose(name, *death_of(error))

    def _lose(self, name: str, event: str, why: str) -> None:
        self._gone.add(name)
        self._handles.pop(name, None)
        poll = self._polls.pop(name, None)
        if poll is not None:
            poll.cancel()
        self._ledger.gone(name, event, why, time.time())
        self._turn()

    def _kill(self, worker: Worker) -> None:
        self._gone.add(worker.name)
        if worker.pid:
            end_process_on(worker.node, worker.pid, None)
        handle = self._handles.pop(worker.name, None)
        if handle is not None:
            ray.kill(handle)

    def _end_if_never_called(self) -> None:
        if self._ticking is None:
            self._end_self()

    def _end_self(self) -> None:
        # Without a restart, which leaving the process in any other way would bring.
        ray.kill(ray.get_actor(BROKER, namespace=self._charter.namespace))

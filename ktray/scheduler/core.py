"""The scheduler's functional core: which stage runs where, and who waits for it. Events come in, actions go out; no I/O."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ktray.artifact import Artifact, Stage, kind_of
from ktray.scheduler.fault_tolerance import MAX_LOSSES, START_TIMEOUT, ExclusivityPolicy, FailureCounts, FirstHeartbeatMonitor
from ktray.scheduler.messages import (
    BACKGROUND,
    FAILED,
    FENCED,
    LATE,
    OUT_OF_MEMORY,
    PUBLISHED,
    SPLIT,
    STARTED,
    Action,
    AssignStage,
    FailureKind,
    FenceAttempt,
    KillWorker,
    LossKind,
    SchedulerEvent,
    repeated_out_of_memory_text,
)
from ktray.scheduler.placement import DispatchCapacity, WorkerAutoscaler
from ktray.scheduler.recent_set import REMEMBERED, RecentSet
from ktray.scheduler.requests import PendingStage, RequestTable, RunningStage
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.worker_registry import Worker, WorkerRegistry, WorkerShape, describe_resources, worker_shape_for

BACKGROUND_IDLE_SECONDS = 1.0  # without a stage, until a worker takes one of the background: a trial may just be about to ask
START_HELPERS_SECONDS = 5.0  # of a stage, until workers start to help it; idle ones help at once
MAX_FAMILY = 8  # stages that one attempt computes together: all of its outputs are in memory at once


class SchedulerCore:
    """The state of a scheduler and the rules by which it changes.

    Methods that take an event append the actions that follow from it to `outbox`; `dispatch` decides what starts.

    Args:
        find: key -> artifact if it is in the store.
        usual_resources_for: stage name -> the resources that it requests.
        registry: the workers.
        new_attempt: returns the name of a new attempt.
        dead_after: seconds without a heartbeat after which a worker counts as dead.
        expected_seconds: how long a stage is expected to run.
        resources_on_cpus: stage name -> what it requests where it runs on CPUs instead of a GPU; None if it must not.
        seconds_on: (on a GPU or not, stage) -> how long it is expected to run there.
        remembered: how many ended attempts and troubled keys are kept.

    Attributes:
        running: key -> its current attempt.
        computed: stage name -> how many this scheduler has computed.
    """

    def __init__(
        self,
        find: Callable[[str], Artifact | None],
        usual_resources_for: Callable[[str], ResourceRequest],
        registry: WorkerRegistry,
        new_attempt: Callable[[], str],
        dead_after: float = 15.0,
        expected_seconds: Callable[[Stage], float] = lambda stage: 0.0,
        resources_on_cpus: Callable[[str], ResourceRequest | None] = lambda name: None,
        seconds_on: Callable[[bool, Stage], float] = lambda gpu, stage: 0.0,
        remembered: int = REMEMBERED,
    ) -> None:
        self.find, self.usual_resources_for, self.registry = find, usual_resources_for, registry
        self.new_attempt, self.dead_after = new_attempt, dead_after
        self.resources_on_cpus, self.seconds_on = resources_on_cpus, seconds_on
        self.outbox: list[Action] = []
        self.running: dict[str, RunningStage] = {}
        self.computed: Counter[str] = Counter()
        self.requests = RequestTable(find, self.running.keys(), self.outbox, expected_seconds, remembered)
        self.scaling = WorkerAutoscaler(registry, self.outbox)
        self.first_heartbeats = FirstHeartbeatMonitor(registry, self.outbox, dead_after)
        self._failures = FailureCounts(remembered)
        self._exclusivity = ExclusivityPolicy(registry, remembered)
        self._keys_of_attempt: dict[str, list[str]] = {}
        # Forgetting an entry does little harm: a fenced attempt has no directory to publish from, a stage that failed in a
        # family fails there again and is split again, and no report arrives that late.
        self._fenced = RecentSet[str](remembered)
        self._ended = RecentSet[tuple[str, str]](remembered)
        self._split = RecentSet[str](remembered)

    # ---- events: what workers report

    def handle_heartbeat(
        self, worker: Worker, key: str, stage: Stage | None, attempt: str, progress: Mapping[str, float], now: float
    ) -> bool:
        """Note that a worker is alive and runs this attempt, or none. False if it must exit: this was fenced or replaced."""
        worker.last_heartbeat, self.scaling.failed_starts = now, 0
        self.registry.silent_nodes.discard(worker.node)
        self.first_heartbeats.note_heartbeat(worker.name)
        if not attempt:
            return True
        worker.last_busy = now
        run = self.running.get(key)
        if attempt in self._fenced or (run is not None and run.attempt != attempt):
            return False
        if run is None:
            if stage is None or worker.attempt is not None or (key, attempt) in self._ended:
                return True  # a late heartbeat: the report of the same attempt was faster
            if self.first_heartbeats.was_fenced(worker.name):
                return False
            self._adopt_attempt(worker, stage, attempt, now)
        for member in self._running_stages_of(attempt):
            member.confirmed = True
            if progress != member.progress:
                member.progress, member.last_progress = progress, now
                member.progress_changes += 1
        return True

    def _running_stages_of(self, attempt: str) -> list[RunningStage]:
        """The running stages of one attempt: more than one where a worker computes a family together."""
        return [self.running[key] for key in self._keys_of_attempt.get(attempt, ())]

    def _adopt_attempt(self, worker: Worker, stage: Stage, attempt: str, now: float) -> None:
        """Take over an attempt that a broker before this one has started."""
        family = [
            member for member in (replace(stage, computed_with=()), *stage.computed_with) if member.key not in self.running
        ]
        for member in family:
            self.requests.find_or_add_pending(member, now)
        self._open_attempt(worker, family, attempt, now)

    def _open_attempt(self, worker: Worker, stages: Sequence[Stage], attempt: str, now: float) -> None:
        leader, worker.attempt, worker.lent_to, worker.polling = stages[0], attempt, None, False
        worker.reserved_memory = self._resources_for(leader).memory_bytes
        self._keys_of_attempt[attempt] = [stage.key for stage in stages]
        for stage in stages:
            worker.note_stage([*stage.resume_from, *stage.inputs.values(), stage.key], now)
            self.running[stage.key] = RunningStage(stage.key, stage, attempt, worker.name, now, now, leader=leader.key)
            self.requests.pending_graph.mark_running(stage.key)

    def _close_attempt(self, key: str, attempt: str) -> RunningStage | None:
        """End an attempt at one key; None if it is not the current one."""
        run = self.running.get(key)
        if run is None or run.attempt != attempt:
            return None
        del self.running[key]
        self.requests.pending_graph.mark_stopped(key)
        self._ended.add((key, attempt))
        self._keys_of_attempt[attempt].remove(key)
        if self._keys_of_attempt[attempt]:
            return run
        del self._keys_of_attempt[attempt]
        for worker in self.registry.workers.values():
            if worker.attempt == attempt:
                worker.attempt, worker.reserved_memory = None, 0
            if worker.lent_to == attempt:
                worker.lent_to = None
        return run

    def handle_succeeded_attempt(self, key: str, attempt: str, computed: bool, seconds: float, now: float) -> None:
        """End an attempt that reports success; whether its artifact exists is for the store to say.

        Args:
            computed: whether it was this attempt that published the artifact.
        """
        already_counted = (key, attempt) in self._ended
        run = self._close_attempt(key, attempt)
        artifact = self.find(key)
        if artifact is None:
            if run is not None:
                self._fail_stage(key, FAILED, "FileNotFoundError: the stage ended, but its artifact is not in the store")
            return
        self._reset_history(key)
        self._split.discard(key)
        if computed and not already_counted:  # also an attempt that ended while the broker was down
            name = kind_of(key)
            self.computed[name] += 1
            self._ended.add((key, attempt))
            spent = float(artifact.record["seconds"]) if artifact.record.get("together") else seconds
            self.outbox.append(SchedulerEvent(PUBLISHED, key, name, run.worker if run else "", spent))
        self.requests.mark_published(artifact, computed)

    def handle_failed_attempt(self, key: str, attempt: str, kind: FailureKind, cause: str, missing: str, now: float) -> bool:
        """End an attempt that reports a failure. False if it is not the current attempt, or if its stages simply run again.

        A missing input is recomputed first. If a family failed, any of its stages may be to blame, so they run again one by
        one. A stage that ran out of memory runs once more, exclusively.
        """
        others = [member for member in self._running_stages_of(attempt) if member.key != key]
        run = self._close_attempt(key, attempt)
        if run is None:
            return False
        for other in others:
            self._close_attempt(other.key, attempt)
        if kind == FAILED and not others and self.find(key) is not None:
            # Another scheduler on this store has published the key, which removes the directories of all other attempts.
            self.handle_succeeded_attempt(key, attempt, False, 0.0, now)
            return False
        if not missing and kind in (FAILED, OUT_OF_MEMORY) and (others or self._exclusivity.note_failure(key, kind)):
            event = SchedulerEvent(SPLIT if others else OUT_OF_MEMORY, key, run.stage.name, run.worker, now - run.since, cause)
            self.outbox.append(event)
            self._requeue_stages([run, *others])
            return False
        if kind == OUT_OF_MEMORY:
            kind, cause = FAILED, repeated_out_of_memory_text(cause)
        if kind != FAILED:
            for other in others:
                self._fail_stage(other.key, kind, cause)
        if missing and self._failures.count_missing_input(key, missing) and self.requests.recompute_input(key, missing, now):
            return True
        self.outbox.append(SchedulerEvent(FAILED, key, run.stage.name, run.worker, now - run.since, cause))
        self._fail_stage(key, kind, cause)
        return True

    def _requeue_stages(self, family: Sequence[RunningStage]) -> None:
        """Let stages start again, one by one if they ran together; drop those that nobody requests any more."""
        for run in family:
            if len(family) > 1:
                self._split.add(run.key)
            self.requests.drop_if_unrequested(run.key)

    def _fail_stage(self, key: str, kind: FailureKind, cause: str) -> None:
        self._reset_history(key)
        self.requests.fail_stage(key, kind, cause)

    def _reset_history(self, key: str) -> None:
        self._failures.forget(key)
        self._exclusivity.forget(key)

    def handle_lost_assignment(self, worker: Worker) -> None:
        """End the attempt of a worker that asks for work all the same: the order never reached it."""
        for run in self._running_stages_of(worker.attempt or ""):
            self._close_attempt(run.key, run.attempt)
        worker.attempt = None

    def must_exit(self, worker: Worker, key: str, attempt: str) -> bool:
        """Whether a worker that reports the end of an attempt must exit: a restart fenced the attempt while it was silent."""
        run = self.running.get(key)
        return self.first_heartbeats.was_fenced(worker.name) and (run is None or run.attempt != attempt)

    # ---- events: workers come to an end

    def handle_lost_worker(self, name: str, event: LossKind, cause: str, now: float) -> None:
        """Remove a worker that is gone and fence its attempt; its stages start again, or fail after `MAX_LOSSES` losses."""
        worker = self.registry.workers.pop(name, None)
        self.first_heartbeats.forget(name)
        if worker is None:
            return
        # A late worker may only be waiting for room on a full cluster: no reason to give up.
        if worker.last_heartbeat is None and event != LATE and self.scaling.count_failed_start(worker):
            self._fail_waiting_stages(f"WorkerDied: workers die before their first heartbeat: {cause}")
        family = self._running_stages_of(worker.attempt or "")
        if not family:
            if not worker.retiring:
                self.outbox.append(SchedulerEvent(event, worker=name, cause=cause))
            return
        lead = next((run for run in family if run.key == run.leader), family[0])
        self._fenced.add(lead.attempt)
        self.outbox.append(SchedulerEvent(event, lead.key, lead.stage.name, name, now - lead.since, cause))
        for run in family:
            self.outbox.append(FenceAttempt(run.key, run.attempt))
            self._close_attempt(run.key, run.attempt)
        self._requeue_stages(family)
        if len(family) == 1:
            self._exclusivity.note_worker_loss(lead.key, event)
        for run in family:
            # If a worker froze before it even received the stage, the stage is not to blame.
            if not self._failures.count_worker_loss(run, blamed=run.confirmed or event != FENCED):
                self._fail_stage(run.key, FAILED, f"WorkerDied: its worker died {MAX_LOSSES} times, the last time: {cause}")

    def _fail_waiting_stages(self, cause: str) -> None:
        for key in [key for key in self.requests.pending if key not in self.running]:
            if key in self.requests.pending:
                self._fail_stage(key, FAILED, cause)

    def check_heartbeats(self, now: float) -> None:
        """Kill workers that were silent for `dead_after` seconds, and new ones that did not start within `START_TIMEOUT`."""
        for worker in list(self.registry.workers.values()):
            if worker.last_heartbeat is not None and now - worker.last_heartbeat > self.dead_after:
                self.outbox.append(KillWorker(worker))
                self.registry.silent_nodes.add(worker.node)
                self.handle_lost_worker(worker.name, FENCED, f"no heartbeat for {self.dead_after:g} s", now)
            elif worker.last_heartbeat is None and self.first_heartbeats.is_late(worker, now):
                self.outbox.append(KillWorker(worker))
                self.handle_lost_worker(worker.name, LATE, f"it has not started within {START_TIMEOUT:g} s", now)
        self.first_heartbeats.kill_silent_survivors(now)

    def compensate_pause(self, seconds: float) -> None:
        """The broker itself was paused for this long, so silence during that time proves nothing."""
        for worker in self.registry.workers.values():
            if worker.last_heartbeat is not None:
                worker.last_heartbeat += seconds
        for run in self.running.values():
            run.since += seconds
            run.last_progress += seconds
        self.first_heartbeats.compensate_pause(seconds)

    # ---- decisions: what starts now

    def dispatch(self, now: float) -> None:
        """Start what can start, start and retire workers for what waits, lend idle workers to what can be split."""
        if self.first_heartbeats.must_delay_dispatch(now):
            return
        exclusive = self._exclusivity.keys()
        runs = [self.running[key] for key in exclusive & self.running.keys()]
        self._exclusivity.reserve_nodes((run, self._resources_for(run.stage)) for run in runs)
        capacity = DispatchCapacity(self.registry, now)
        for pending in self.requests.startable_among(exclusive):
            if pending.stage.key in self.requests.pending:
                self._place_stage(pending, capacity)
        full: set[str] = set()
        for pending in self.requests.ready_stages():
            name = pending.stage.name
            if name in full or pending.stage.key in self.running or pending.stage.key in self._exclusivity:
                continue  # no room for its kind, started in a family just now, or placed above
            if not self._place_stage(pending, capacity):
                full.add(name)  # other stages of this name would find no room either
                if full >= self.requests.pending_graph.ready_counts.keys():
                    break
        self.scaling.forget_served_shapes(capacity)
        self._lend_idle_workers(capacity)

    def _place_stage(self, pending: PendingStage, capacity: DispatchCapacity) -> bool:
        """Start a stage, or arrange a worker for it; False if it must wait for room."""
        stage, request = pending.stage, self._resources_for(pending.stage)
        in_background = max(pending.priorities, default=0) <= BACKGROUND
        idle_since = capacity.now - BACKGROUND_IDLE_SECONDS if in_background else float("inf")
        worker = self._exclusivity.take_worker(stage, request, capacity, idle_since)
        if worker is not None:
            self._assign(worker, stage, capacity.now)
        elif not self.registry.could_ever_fit(request):
            self._fail_stage(
                stage.key, FAILED, f"it needs {describe_resources(request)}, more than any node of the cluster has"
            )
        elif in_background:
            return False  # no worker starts for it, and none is evicted
        else:
            exclusive = stage.key in self._exclusivity
            on_cpus = self.resources_on_cpus(stage.name) if request.gpus and not exclusive else None
            if on_cpus and self._is_sooner_on_cpus(pending, request, capacity.now):
                return self._place_on_cpus(stage, on_cpus, capacity)
            return self.scaling.start_worker_or_make_room(worker_shape_for(request), exclusive, capacity)
        return True

    def _place_on_cpus(self, stage: Stage, request: ResourceRequest, capacity: DispatchCapacity) -> bool:
        """As `_place_stage`, for a stage that would wait for a GPU."""
        worker = self._exclusivity.take_worker(stage, request, capacity)
        if worker is None:
            return self.scaling.start_worker_or_make_room(worker_shape_for(request), False, capacity)
        self._assign(worker, stage, capacity.now)
        return True

    def _is_sooner_on_cpus(self, pending: PendingStage, request: ResourceRequest, now: float) -> bool:
        """Whether a stage that no idle worker with a GPU can take would end sooner on CPUs.

        So it is if no node with a GPU is there, whether or not one may come back. Otherwise the wait is that of a queue: the
        workers with GPUs end their stages when expected, and take the ready stages before this one.
        """
        if not any(node.gpus for node in self.registry.nodes.values()):
            return True
        workers = [worker for worker in self.registry.workers.values() if worker.shape.gpus and not worker.retiring]
        runs = {run.attempt: run for run in self.running.values()}
        if not workers or any(worker.attempt not in runs for worker in workers):
            return False  # one starts, is about to, or is idle and makes room
        free_after = [
            max(0.0, self.requests.expected_seconds(runs[worker.attempt].stage) - (now - runs[worker.attempt].since))
            for worker in workers
            if worker.attempt
        ]
        heapq.heapify(free_after)
        for other in self.requests.ready_stages():
            if other is pending:
                break
            if other.stage.key not in self.running and self._resources_for(other.stage).gpus:
                heapq.heapreplace(free_after, free_after[0] + other.seconds)
        return self.seconds_on(False, pending.stage) < free_after[0] + self.seconds_on(True, pending.stage)

    def _resources_for(self, stage: Stage) -> ResourceRequest:
        return self._exclusivity.resources_for(stage.key, self.usual_resources_for(stage.name))

    def _assign(self, worker: Worker, stage: Stage, now: float) -> None:
        family, attempt = self._startable_family(stage), self.new_attempt()
        self._open_attempt(worker, family, attempt, now)
        whole = replace(stage, computed_with=tuple(family[1:])) if len(family) > 1 else stage
        self.outbox.append(AssignStage(worker.name, whole, attempt, self._exclusivity.must_use_small_batches(stage.key)))
        self.outbox += [SchedulerEvent(STARTED, member.key, member.name, worker.name) for member in family]

    def _startable_family(self, stage: Stage) -> list[Stage]:
        """The stage and, after it, those of its family that can start now and run together with it."""
        if not stage.family or self._runs_without_family(stage.key):
            return [stage]
        others = [
            other for other in self.requests.other_ready_family_members(stage) if not self._runs_without_family(other.key)
        ]
        return [stage, *others[: MAX_FAMILY - 1]]

    def _runs_without_family(self, key: str) -> bool:
        return key in self._split or key in self._exclusivity

    def _lend_idle_workers(self, capacity: DispatchCapacity) -> None:
        names = {name for name in {run.stage.name for run in self.running.values()} if self.usual_resources_for(name).helpers}
        leaders = [run for run in self.running.values() if run.stage.name in names and run.key == run.leader]
        wanted: dict[WorkerShape, dict[str, int]] = {}
        for run in sorted(leaders, key=lambda run: run.since):
            if run.worker in self.registry.workers:
                shape = self.registry.workers[run.worker].shape
                wanted.setdefault(shape, {})[run.attempt] = self._resources_for(run.stage).helpers
        # A new worker needs seconds to load its libraries, in which others load theirs more slowly: not for a short stage.
        may_start = {run.attempt for run in leaders if capacity.now - run.since >= START_HELPERS_SECONDS}
        for shape, attempts in wanted.items():
            self.scaling.lend_workers(shape, attempts, may_start, capacity)

    def lent_workers(self, attempt: str) -> list[str]:
        """Names of the workers that are lent to an attempt."""
        return self.scaling.lent_workers(attempt)

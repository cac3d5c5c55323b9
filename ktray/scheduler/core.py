"""Which stage runs where and who waits for it: pure scheduling, told of events with their time, answering with actions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ktray.artifact import Artifact, Stage
from ktray.scheduler.exclusive_stages import ExclusiveStages
from ktray.scheduler.failure_kinds import FAILED, OUT_OF_MEMORY, also_alone
from ktray.scheduler.messages import AssignStage, FenceAttempt, KillWorker, PendingStage, RunningStage, SchedulerEvent
from ktray.scheduler.placement import Placement
from ktray.scheduler.requests import RequestTable
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.retry_policy import DEATHS, RetryPolicy
from ktray.scheduler.worker_registry import Worker, WorkerRegistry, said, shape_of
from ktray.scheduler.worker_scaling import WorkerScaling
from ktray.scheduler.worker_startup import LATE, StartupMonitor

FAMILY = 8  # most stages of one run: all of its outputs are in memory at once


class SchedulerCore:
    """The books of the broker.

    Args:
        find: key -> artifact if it is in the store.
        needs: stage name -> what it needs.
        registry: the workers.
        attempts: names a new attempt.
        dead_after: seconds without a heartbeat after which a worker is taken for dead.
        seconds: how long a stage is thought to run.

    Every method that is told of an event leaves what follows from it in `outbox`.
    """

    def __init__(
        self,
        find: Callable[[str], Artifact | None],
        needs: Callable[[str], ResourceRequest],
        registry: WorkerRegistry,
        attempts: Callable[[], str],
        dead_after: float = 15.0,
        seconds: Callable[[Stage], float] = lambda stage: 0.0,
    ) -> None:
        self.find, self.needs, self.registry, self.attempts, self.dead_after = find, needs, registry, attempts, dead_after
        self.outbox: list[Any] = []
        self.runs: dict[str, RunningStage] = {}
        self.demand = RequestTable(find, self.runs.keys(), self.outbox, seconds)
        self.computed: Counter[str] = Counter()
        self._fenced: set[str] = set()
        self._closed: set[tuple[str, str]] = set()
        self._apart: set[str] = set()
        self._alone = ExclusiveStages(registry)
        self.hiring = WorkerScaling(registry, self.outbox)
        self.expected = StartupMonitor(registry, self.outbox, dead_after)
        self._attempts: dict[str, list[str]] = {}
        self._patience = RetryPolicy()

    # ---- what workers tell

    def beat(
        self, worker: Worker, key: str, stage: Stage | None, attempt: str, progress: Mapping[str, float], now: float
    ) -> bool:
        """A heartbeat; False if this worker must die because its attempt was fenced or another one runs."""
        worker.beat, self.hiring.stillborn = now, 0
        self.registry.silent.discard(worker.node)
        self.expected.came(worker.name)
        if not attempt:
            return True
        run = self.runs.get(key)
        if attempt in self._fenced or (run is not None and run.attempt != attempt):
            return False
        if run is None:
            if stage is None or worker.leads is not None or (key, attempt) in self._closed:
                return True  # a late beat: its report was faster
            if self.expected.is_cut_off(worker.name):
                return False
            run = self._adopt(worker, stage, attempt, now)
        for each in self._family(attempt):
            each.seen = True
            if progress != each.progress:
                each.progress, each.moved, each.moves = progress, now, each.moves + 1
        return True

    def _family(self, attempt: str) -> list[RunningStage]:
        """The runs of one attempt; more than one where a worker makes several stages at once."""
        return [self.runs[key] for key in self._attempts.get(attempt, ())]

    def _adopt(self, worker: Worker, stage: Stage, attempt: str, now: float) -> RunningStage:
        family = [each for each in (replace(stage, beside=()), *stage.beside) if each.key not in self.runs]
        for each in family:
            self.demand.add(each, now)
        return self._start(worker, family, attempt, now)

    def _start(self, worker: Worker, stages: Sequence[Stage], attempt: str, now: float) -> RunningStage:
        leader, worker.leads, worker.lent_to, worker.polling = stages[0], attempt, None, False
        worker.memory = self._needs(leader).memory_bytes
        self._attempts[attempt] = [stage.key for stage in stages]
        for stage in stages:
            self.runs[stage.key] = RunningStage(stage.key, stage, attempt, worker.name, now, now, leader=leader.key)
            self.demand.line.start(stage.key)
        return self.runs[leader.key]

    def ended(self, key: str, attempt: str) -> RunningStage | None:
        """Close the books of an attempt at one key; None if it is not the one that counts."""
        run = self.runs.get(key)
        if run is None or run.attempt != attempt:
            return None
        del self.runs[key]
        self.demand.line.stop(key)
        self._closed.add((key, attempt))
        self._attempts[attempt].remove(key)
        if self._attempts[attempt]:
            return run
        del self._attempts[attempt]
        for worker in self.registry.workers.values():
            if worker.leads == attempt:
                worker.leads, worker.memory = None, 0
            if worker.lent_to == attempt:
                worker.lent_to = None
        return run

    def published(self, key: str, attempt: str, computed: bool, seconds: float, now: float) -> None:
        """An attempt ended well; the store has the last word."""
        known = (key, attempt) in self._closed
        run = self.ended(key, attempt)
        artifact = self.find(key)
        if artifact is None:
            if run is not None:
                self._give_up(key, FAILED, "FileNotFoundError: it ended, but its artifact is not in the store")
            return
        self._forget(key)
        self._apart.discard(key)
        if computed and not known:  # also one that ended while the broker was down
            name = key.rpartition("-")[0]
            self.computed[name] += 1
            self._closed.add((key, attempt))
            spent = float(artifact.record["seconds"]) if artifact.record.get("together") else seconds
            self.outbox.append(SchedulerEvent("published", key, name, run.worker if run else "", spent))
        self.demand.publish(artifact, computed)

    def failed(self, key: str, attempt: str, kind: str, cause: str, missing: str, now: float) -> bool:
        """An attempt raised; False if it is not the one that counts, or not the last word on its stage.

        A missing input is computed again first. Of a family it is unknown who is to blame, so its stages are made apart next.
        What ran out of memory runs once more with nothing beside it.
        """
        beside = [each for each in self._family(attempt) if each.key != key]
        run = self.ended(key, attempt)
        if run is None:
            return False
        for each in beside:
            self.ended(each.key, attempt)
        if kind == FAILED and not beside and self.find(key) is not None:
            # Another scheduler on this store was faster, which takes away what others are writing at the key.
            self.published(key, attempt, False, 0.0, now)
            return False
        if not missing and kind in (FAILED, OUT_OF_MEMORY) and (beside or self._alone.after_error(key, kind)):
            event = "apart" if beside else OUT_OF_MEMORY
            self.outbox.append(SchedulerEvent(event, key, run.stage.name, run.worker, now - run.since, cause))
            self._part([run, *beside])
            return False
        if kind == OUT_OF_MEMORY:
            kind, cause = FAILED, also_alone(cause)
        if kind != FAILED:
            for each in beside:
                self._give_up(each.key, kind, cause)
        if missing and self._patience.miss(key) and self.demand.miss(key, missing, now):
            return True
        self.outbox.append(SchedulerEvent("failed", key, run.stage.name, run.worker, now - run.since, cause))
        self._give_up(key, kind, cause)
        return True

    def _part(self, family: Sequence[RunningStage]) -> None:
        self._apart.update(run.key for run in family if len(family) > 1)
        for run in family:
            self.demand.forsake(run.key)

    def _needs(self, stage: Stage) -> ResourceRequest:
        return self._alone.needs(stage.key, self.needs(stage.name))

    def _give_up(self, key: str, kind: str, cause: str) -> None:
        self._forget(key)
        self.demand.fail(key, kind, cause)

    def _forget(self, key: str) -> None:
        """What went wrong with a stage before counts no more."""
        self._patience.forget(key)
        self._alone.forget(key)

    def lost(self, worker: Worker) -> None:
        """A worker asks for work without ever having received what it was given."""
        for run in self._family(worker.leads or ""):
            self.ended(run.key, run.attempt)
        worker.leads = None

    def gone(self, name: str, event: str, why: str, now: float) -> None:
        """A worker is no more: its attempt is fenced and its stage starts again, at most `DEATHS` times."""
        worker = self.registry.workers.pop(name, None)
        self.expected.gone(name)
        if worker is None:
            return
        # A cluster that is full lets wait as long as it likes.
        if worker.beat is None and event != "late" and self.hiring.count_stillborn(worker):
            self._bear_no_more(why)
        family = self._family(worker.leads or "")
        if not family:
            if not worker.leaving:
                self.outbox.append(SchedulerEvent(event, worker=name, cause=why))
            return
        lead = next((each for each in family if each.key == each.leader), family[0])
        self._fenced.add(lead.attempt)
        self.outbox.append(SchedulerEvent(event, lead.key, lead.stage.name, name, now - lead.since, why))
        for run in family:
            self.outbox.append(FenceAttempt(run.key, run.attempt))
            self.ended(run.key, run.attempt)
        self._part(family)
        if len(family) == 1:
            self._alone.after_death(lead.key, event)
        for run in family:
            # A worker that froze before it heard of the stage says nothing about the stage.
            if not self._patience.bear(run, run.seen or event != "fenced"):
                self._give_up(run.key, FAILED, f"WorkerDied: its worker died {DEATHS} times, the last time: {why}")

    def _bear_no_more(self, why: str) -> None:
        for key in [each for each in self.demand.wants if each not in self.runs]:
            if key in self.demand.wants:
                self._give_up(key, "failed", f"WorkerDied: workers die before their first heartbeat: {why}")

    # ---- what to do next

    def silent(self, now: float) -> None:
        """Give up workers that were not heard of for `dead_after` seconds, or that have not come after `LATE`."""
        for worker in list(self.registry.workers.values()):
            if worker.beat is not None and now - worker.beat > self.dead_after:
                self.outbox.append(KillWorker(worker))
                self.registry.silent.add(worker.node)
                self.gone(worker.name, "fenced", f"no heartbeat for {self.dead_after:g} s", now)
            elif worker.beat is None and self.expected.is_late(worker, now):
                self.outbox.append(KillWorker(worker))
                self.gone(worker.name, "late", f"it has not come within {LATE:g} s", now)
        self.expected.silent(now)

    def forgive(self, seconds: float) -> None:
        """The broker itself slept: silence in that time proves nothing."""
        for worker in self.registry.workers.values():
            if worker.beat is not None:
                worker.beat += seconds
        self.expected.forgive(seconds)

    def dispatch(self, now: float) -> None:
        """Start what can start, borrow idle workers for what can be split, hire where stages wait."""
        if self.expected.must_wait(now):
            return
        running = [self.runs[key] for key in self._alone.keys() & self.runs.keys()]
        self._alone.keep((run, self._needs(run.stage)) for run in running)
        openings = Placement(self.registry, now)
        for want in self.demand.among(self._alone.keys()):
            if want.stage.key in self.demand.wants:
                self._provide(want, openings)
        full: set[str] = set()
        for want in self.demand.queue():
            name = want.stage.name
            if name in full or want.stage.key in self.runs or want.stage.key in self._alone:
                continue  # no room for it, or begun with another one just now, or looked after above
            if not self._provide(want, openings):
                full.add(name)  # whoever else needs the same would find nothing either
                if full >= self.demand.line.names.keys():
                    break
        self.hiring.rest(openings)
        self._lend(openings)

    def _provide(self, want: PendingStage, openings: Placement) -> bool:
        """Start a stage, or see to a worker for it; False if it must wait for room."""
        needs, alone = self._needs(want.stage), want.stage.key in self._alone
        worker = self._alone.worker(want.stage.key, needs, openings)
        if worker is not None:
            self._give(worker, want.stage, openings.now)
        elif not self.registry.fits(needs):
            self._give_up(want.stage.key, FAILED, f"it needs {said(needs)}, more than any node of the cluster has")
        else:
            return self.hiring.hire(shape_of(needs), alone, openings)
        return True

    def _give(self, worker: Worker, stage: Stage, now: float) -> None:
        family = self._together(stage)
        run = self._start(worker, family, self.attempts(), now)
        given = replace(stage, beside=tuple(family[1:])) if len(family) > 1 else stage
        self.outbox.append(AssignStage(worker.name, given, run.attempt, self._alone.takes_few(stage.key)))
        self.outbox += [SchedulerEvent("started", each.key, each.name, worker.name) for each in family]

    def _together(self, stage: Stage) -> list[Stage]:
        """The stage and, after it, those of its family that could start now, too."""
        apart = self._apart | self._alone.keys()
        if not stage.family or stage.key in apart:
            return [stage]
        others = [each for each in self.demand.relatives(stage) if each.key not in apart]
        return [stage, *others[: FAMILY - 1]]

    def _lend(self, openings: Placement) -> None:
        names = {name for name in {run.stage.name for run in self.runs.values()} if self.needs(name).helpers}
        borrowing = [run for run in self.runs.values() if run.stage.name in names and run.key == run.leader]
        for run in sorted(borrowing, key=lambda run: run.since):
            if run.worker in self.registry.workers:
                shape = self.registry.workers[run.worker].shape
                self.hiring.lend(run.attempt, shape, self._needs(run.stage).helpers, openings)

    def helpers(self, attempt: str) -> list[str]:
        """Names of the workers that are lent to an attempt."""
        return self.hiring.helpers(attempt)

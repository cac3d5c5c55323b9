"""Which stage runs where and who waits for it: pure scheduling, told of events with their time, answering with actions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ktray.artifact import Artifact, Stage
from ktray.crew.books import Event, Fence, Give, Kill, Run, Want
from ktray.crew.causes import FAILED, OUT_OF_MEMORY, also_alone
from ktray.crew.demand import Demand
from ktray.crew.hiring import Hiring
from ktray.crew.needs import Needs
from ktray.crew.roster import Roster, Worker, shape_of

DEATHS = 3
FAMILY = 8  # most stages of one run: all of its outputs are in memory at once


class Ledger:
    """The books of the broker.

    Args:
        find: key -> artifact if it is in the store.
        needs: stage name -> what it needs.
        roster: the workers.
        attempts: names a new attempt.
        dead_after: seconds without a heartbeat after which a worker is taken for dead.
        seconds: how long a stage is thought to run.

    Every method that is told of an event leaves what follows from it in `outbox`.
    """

    def __init__(
        self,
        find: Callable[[str], Artifact | None],
        needs: Callable[[str], Needs],
        roster: Roster,
        attempts: Callable[[], str],
        dead_after: float = 15.0,
        seconds: Callable[[Stage], float] = lambda stage: 0.0,
    ) -> None:
        self.find, self.needs, self.roster, self.attempts, self.dead_after = find, needs, roster, attempts, dead_after
        self.outbox: list[Any] = []
        self.runs: dict[str, Run] = {}
        self.demand = Demand(find, self.runs.keys(), self.outbox, seconds)
        self.computed: Counter[str] = Counter()
        self._fenced: set[str] = set()
        self._closed: set[tuple[str, str]] = set()
        self._apart: set[str] = set()
        self._alone: set[str] = set()
        self.hiring = Hiring(roster, self.outbox)
        self._deaths: Counter[str] = Counter()
        self._missed: Counter[str] = Counter()
        self._expected: set[str] = set()
        self._quiet_until = 0.0

    # ---- what workers tell

    def expect(self, names: Iterable[str], now: float) -> None:
        """After a restart: dispatch nothing until these workers were heard of, or are given up."""
        self._expected = set(names)
        self.roster.skip(self._expected)
        self._quiet_until = now + self.dead_after

    def beat(
        self, worker: Worker, key: str, stage: Stage | None, attempt: str, progress: Mapping[str, float], now: float
    ) -> bool:
        """A heartbeat; False if this worker must die because its attempt was fenced or another one runs."""
        worker.beat, self.hiring.stillborn = now, 0
        self._expected.discard(worker.name)
        if not attempt:
            return True
        run = self.runs.get(key)
        if attempt in self._fenced or (run is not None and run.attempt != attempt):
            return False
        if run is None:
            if stage is None or worker.leads is not None or (key, attempt) in self._closed:
                return True  # a late beat: its report was faster
            run = self._adopt(worker, stage, attempt, now)
        for each in self._family(attempt):
            each.seen = True
            if progress != each.progress:
                each.progress, each.moved = progress, now
        return True

    def _family(self, attempt: str) -> list[Run]:
        """The runs of one attempt; more than one where a worker makes several stages at once."""
        return [run for run in self.runs.values() if run.attempt == attempt]

    def _adopt(self, worker: Worker, stage: Stage, attempt: str, now: float) -> Run:
        family = [each for each in (replace(stage, beside=()), *stage.beside) if each.key not in self.runs]
        for each in family:
            self.demand.add(each, now)
        return self._start(worker, family, attempt, now)

    def _start(self, worker: Worker, stages: Sequence[Stage], attempt: str, now: float) -> Run:
        worker.leads, worker.lent_to, worker.polling = attempt, None, False
        leader = stages[0]
        worker.memory = self._needs(leader).memory_bytes
        for stage in stages:
            self.runs[stage.key] = Run(stage.key, stage, attempt, worker.name, now, now, leader=leader.key)
        return self.runs[leader.key]

    def ended(self, key: str, attempt: str) -> Run | None:
        """Close the books of an attempt at one key; None if it is not the one that counts."""
        run = self.runs.get(key)
        if run is None or run.attempt != attempt:
            return None
        del self.runs[key]
        self._closed.add((key, attempt))
        if self._family(attempt):
            return run
        for worker in self.roster.workers.values():
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
                self._give_up(key, "failed", "FileNotFoundError: it ended, but its artifact is not in the store")
            return
        self._deaths.pop(key, None)
        self._missed.pop(key, None)
        self._apart.discard(key)
        self._alone.discard(key)
        if computed and not known:  # also one that ended while the broker was down
            name = key.rpartition("-")[0]
            self.computed[name] += 1
            self._closed.add((key, attempt))
            spent = float(artifact.record["seconds"]) if artifact.record.get("together") else seconds
            self.outbox.append(Event("published", key, name, run.worker if run else "", spent))
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
        if not missing and kind in (FAILED, OUT_OF_MEMORY) and (beside or self._again_alone(key, kind)):
            event = "apart" if beside else OUT_OF_MEMORY
            self.outbox.append(Event(event, key, run.stage.name, run.worker, now - run.since, cause))
            self._part([run, *beside])
            return False
        if kind == OUT_OF_MEMORY:
            kind, cause = FAILED, also_alone(cause)
        if kind != FAILED:
            for each in beside:
                self._give_up(each.key, kind, cause)
        self._missed[key] += bool(missing)
        if missing and self._missed[key] < DEATHS and self.demand.miss(key, missing, now):
            return True
        self.outbox.append(Event("failed", key, run.stage.name, run.worker, now - run.since, cause))
        self._give_up(key, kind, cause)
        return True

    def _part(self, family: Sequence[Run]) -> None:
        self._apart.update(run.key for run in family if len(family) > 1)
        for run in family:
            self.demand.forsake(run.key)

    def _again_alone(self, key: str, kind: str) -> bool:
        if kind != OUT_OF_MEMORY or key in self._alone:
            return False
        self._alone.add(key)
        return True

    def _needs(self, stage: Stage) -> Needs:
        needs = self.needs(stage.name)
        if stage.key not in self._alone:
            return needs
        return replace(needs, gpus=float(math.ceil(needs.gpus)), helpers=0)

    def _give_up(self, key: str, kind: str, cause: str) -> None:
        self._deaths.pop(key, None)
        self._missed.pop(key, None)
        self._alone.discard(key)
        self.demand.fail(key, kind, cause)

    def lost(self, worker: Worker) -> None:
        """A worker asks for work without ever having received what it was given."""
        for run in self._family(worker.leads or ""):
            self.ended(run.key, run.attempt)
        worker.leads = None

    def gone(self, name: str, event: str, why: str, now: float) -> None:
        """A worker is no more: its attempt is fenced and its stage starts again, at most `DEATHS` times."""
        worker = self.roster.workers.pop(name, None)
        self._expected.discard(name)
        if worker is None:
            return
        if worker.beat is None:
            self._bear_no_more(why)
        family = [each for each in self.runs.values() if each.worker == name]
        if not family:
            if not worker.leaving:
                self.outbox.append(Event(event, worker=name, cause=why))
            return
        lead = next((each for each in family if each.key == each.leader), family[0])
        self._fenced.add(lead.attempt)
        self.outbox.append(Event(event, lead.key, lead.stage.name, name, now - lead.since, why))
        for run in family:
            self.outbox.append(Fence(run.key, run.attempt))
            self.ended(run.key, run.attempt)
        self._part(family)
        for run in family:
            # A worker that froze before it heard of the stage says nothing about the stage.
            self._deaths[run.key] += run.seen or event != "fenced"
            if self._deaths[run.key] >= DEATHS:
                self._give_up(run.key, "failed", f"WorkerDied: its worker died {DEATHS} times, the last time: {why}")

    def _bear_no_more(self, why: str) -> None:
        self.hiring.stillborn += 1
        if self.hiring.stillborn < DEATHS:
            return
        self.hiring.stillborn = 0
        for key in [each for each in self.demand.wants if each not in self.runs]:
            if key in self.demand.wants:
                self._give_up(key, "failed", f"WorkerDied: workers die before their first heartbeat: {why}")

    # ---- what to do next

    def silent(self, now: float) -> None:
        """Give up workers that were not heard of for `dead_after` seconds."""
        for worker in list(self.roster.workers.values()):
            if worker.beat is not None and now - worker.beat > self.dead_after:
                self.outbox.append(Kill(worker))
                self.gone(worker.name, "fenced", f"no heartbeat for {self.dead_after:g} s", now)

    def forgive(self, seconds: float) -> None:
        """The broker itself slept: silence in that time proves nothing."""
        for worker in self.roster.workers.values():
            if worker.beat is not None:
                worker.beat += seconds
        self._quiet_until += seconds

    def dispatch(self, now: float) -> None:
        """Start what can start, borrow idle workers for what can be split, hire where stages wait."""
        if self._expected and now < self._quiet_until:
            return
        self.roster.kept.clear()
        for run in self.runs.values():
            if run.key in self._alone and not self._needs(run.stage).gpus and run.worker in self.roster.workers:
                self.roster.keep(self.roster.workers[run.worker].node)
        self.hiring.coming.clear()
        queue, hopeless = self.demand.queue(), set[tuple[Needs, bool]]()
        for want in sorted(queue, key=lambda want: want.stage.key not in self._alone):
            if want.stage.key not in self.demand.wants or want.stage.key in self.runs:
                continue  # failed, or begun, with another one just now
            needs, alone = self._needs(want.stage), want.stage.key in self._alone
            if (needs, alone) in hopeless:
                continue
            worker = self._worker(want, needs, now)
            if worker is not None:
                self._give(worker, self._together(want, queue), now)
            elif not self.roster.fits(needs):
                self._give_up(want.stage.key, "failed", f"it needs {_said(needs)}, more than any node of the cluster has")
            elif not self.hiring.hire(want, shape_of(needs), alone, now):
                hopeless.add((needs, alone))  # whoever comes after it finds nothing either
        self._lend(now)

    def _worker(self, want: Want, needs: Needs, now: float) -> Worker | None:
        alone = want.stage.key in self._alone
        if alone and not needs.gpus and any(each.shape == shape_of(needs) for each in self.roster.workers.values()):
            return self.roster.quiet(needs, now)
        return self.roster.idle(needs, now)

    def _give(self, worker: Worker, family: Sequence[Stage], now: float) -> None:
        run = self._start(worker, family, self.attempts(), now)
        stage = replace(family[0], beside=tuple(family[1:]))
        self.outbox.append(Give(worker.name, stage, run.attempt, stage.key in self._alone))
        self.outbox += [Event("started", each.key, each.name, worker.name) for each in family]

    def _together(self, want: Want, queue: Sequence[Want]) -> list[Stage]:
        """The stage of `want` and, after it, those of its family that could start now, too."""
        stage = want.stage
        if not stage.family or stage.key in self._apart:
            return [stage]
        others = [
            each.stage
            for each in queue
            if each.stage.family == stage.family
            and each.stage.key in self.demand.wants
            and not {each.stage.key} & (self.runs.keys() | self._apart | {stage.key})
        ]
        return [stage, *others[: FAMILY - 1]]

    def _lend(self, now: float) -> None:
        for run in sorted(self.runs.values(), key=lambda run: run.since):
            leader, helpers = self.roster.workers.get(run.worker), self._needs(run.stage).helpers
            if helpers and run.key == run.leader and leader is not None:
                self.hiring.lend(run.attempt, leader.shape, helpers, now)

    def helpers(self, attempt: str) -> list[str]:
        """Names of the workers that are lent to an attempt."""
        return self.hiring.helpers(attempt)


def _said(needs: Needs) -> str:
    shape = shape_of(needs)
    what = f"{shape.gpus:g} GPU" if shape.gpus else f"{shape.cpus:g} CPU"
    return f"{what} and {needs.memory_bytes / 2**30:.1f} GiB" if needs.memory_bytes else what

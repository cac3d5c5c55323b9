"""Which stage runs where and who waits for it: pure scheduling, told of events with their time, answering with actions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ktray.artifact import Artifact, Stage
from ktray.crew.books import Dismiss, Event, Fence, Give, Hire, Kill, Run
from ktray.crew.demand import Demand
from ktray.crew.needs import Needs
from ktray.crew.openings import Openings
from ktray.crew.roster import Roster, Shape, Worker, shape_of

DEATHS = 3
LATE = 120.0  # seconds after which another worker is hired in place of one that froze while it started


class Ledger:
    """The books of the broker.

    Args:
        find: key -> artifact if it is in the store.
        needs: stage name -> what it needs.
        roster: the workers.
        attempts: names a new attempt.
        dead_after: seconds without a heartbeat after which a worker is taken for dead.

    Every method that is told of an event leaves what follows from it in `outbox`.
    """

    def __init__(
        self,
        find: Callable[[str], Artifact | None],
        needs: Callable[[str], Needs],
        roster: Roster,
        attempts: Callable[[], str],
        dead_after: float = 15.0,
    ) -> None:
        self.find, self.needs, self.roster, self.attempts, self.dead_after = find, needs, roster, attempts, dead_after
        self.outbox: list[Any] = []
        self.runs: dict[str, Run] = {}
        self.demand = Demand(find, self.runs.keys(), self.outbox)
        self.computed: Counter[str] = Counter()
        self._fenced: set[str] = set()
        self._closed: set[str] = set()
        self._stillborn = 0
        self._deaths: Counter[str] = Counter()
        self._furthest: dict[str, float] = {}
        self._hired: dict[str, float] = {}
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
        worker.beat, self._stillborn = now, 0
        self.roster.silent.discard(worker.node)
        self._expected.discard(worker.name)
        if not attempt:
            return True
        run = self.runs.get(key)
        if attempt in self._fenced or (run is not None and run.attempt != attempt):
            return False
        if run is None:
            if stage is None or worker.leads is not None or attempt in self._closed:
                return True  # a late beat: its report was faster
            run = self._adopt(worker, stage, attempt, now)
        run.seen = True
        if progress != run.progress:
            run.progress, run.moved, run.moves = progress, now, run.moves + 1
        return True

    def _adopt(self, worker: Worker, stage: Stage, attempt: str, now: float) -> Run:
        self.demand.add(stage, now)
        return self._start(worker, stage, attempt, now)

    def _start(self, worker: Worker, stage: Stage, attempt: str, now: float) -> Run:
        worker.leads, worker.lent_to, worker.polling = attempt, None, False
        worker.memory = self.needs(stage.name).memory_bytes
        self.runs[stage.key] = Run(stage.key, stage, attempt, worker.name, now, now)
        self.demand.line.start(stage.key)
        return self.runs[stage.key]

    def ended(self, key: str, attempt: str) -> Run | None:
        """Close the books of an attempt; None if it is not the one that counts."""
        run = self.runs.get(key)
        if run is None or run.attempt != attempt:
            return None
        del self.runs[key]
        self.demand.line.stop(key)
        self._closed.add(attempt)
        for worker in self.roster.workers.values():
            if worker.leads == attempt:
                worker.leads, worker.memory = None, 0
            if worker.lent_to == attempt:
                worker.lent_to = None
        return run

    def published(self, key: str, attempt: str, computed: bool, seconds: float, now: float) -> None:
        """An attempt ended well; the store has the last word."""
        known = attempt in self._closed
        run = self.ended(key, attempt)
        artifact = self.find(key)
        if artifact is None:
            if run is not None:
                self._give_up(key, "failed", "FileNotFoundError: it ended, but its artifact is not in the store")
            return
        for counts in (self._deaths, self._missed, self._furthest):
            counts.pop(key, None)
        if computed and not known:  # also one that ended while the broker was down
            name = key.rpartition("-")[0]
            self.computed[name] += 1
            self._closed.add(attempt)
            self.outbox.append(Event("published", key, name, run.worker if run else "", seconds))
        self.demand.publish(artifact, computed)

    def failed(self, key: str, attempt: str, kind: str, cause: str, missing: str, now: float) -> bool:
        """An attempt raised; False if it is not the one that counts. A missing input is computed again first."""
        run = self.ended(key, attempt)
        if run is None:
            return False
        self._missed[key] += bool(missing)
        if missing and self._missed[key] < DEATHS and self.demand.miss(key, missing, now):
            return True
        self.outbox.append(Event("failed", key, run.stage.name, run.worker, now - run.since, cause))
        self._give_up(key, kind, cause)
        return True

    def _give_up(self, key: str, kind: str, cause: str) -> None:
        for counts in (self._deaths, self._missed, self._furthest):
            counts.pop(key, None)
        self.demand.fail(key, kind, cause)

    def lost(self, worker: Worker) -> None:
        """A worker asks for work without ever having received what it was given."""
        run = next((each for each in self.runs.values() if each.attempt == worker.leads), None)
        if run is not None:
            self.ended(run.key, run.attempt)
        worker.leads = None

    def gone(self, name: str, event: str, why: str, now: float) -> None:
        """A worker is no more: its attempt is fenced and its stage starts again, at most `DEATHS` times."""
        worker = self.roster.workers.pop(name, None)
        self._expected.discard(name)
        self._hired.pop(name, None)
        if worker is None:
            return
        if worker.beat is None and event != "late":  # a cluster that is full lets wait as long as it likes
            self._bear_no_more(why)
        run = next((each for each in self.runs.values() if each.worker == name), None)
        if run is None:
            if not worker.leaving:
                self.outbox.append(Event(event, worker=name, cause=why))
            return
        self._fenced.add(run.attempt)
        self.outbox += [Fence(run.key, run.attempt), Event(event, run.key, run.stage.name, name, now - run.since, why)]
        self.ended(run.key, run.attempt)
        if run.progress.get("epoch", 0) > self._furthest.get(run.key, 0):
            self._furthest[run.key] = run.progress["epoch"]
            self._deaths[run.key] = 0  # a stage that gets further each time does not kill its workers
        # A worker that froze before it heard of the stage says nothing about the stage.
        self._deaths[run.key] += run.seen or event != "fenced"
        if self._deaths[run.key] >= DEATHS:
            self._give_up(run.key, "failed", f"WorkerDied: its worker died {DEATHS} times, the last time: {why}")
        else:
            self.demand.forsake(run.key)

    def _bear_no_more(self, why: str) -> None:
        self._stillborn += 1
        if self._stillborn < DEATHS:
            return
        self._stillborn = 0
        for key in [each for each in self.demand.wants if each not in self.runs]:
            if key in self.demand.wants:
                self._give_up(key, "failed", f"WorkerDied: workers die before their first heartbeat: {why}")

    # ---- what to do next

    def silent(self, now: float) -> None:
        """Give up workers that were not heard of for `dead_after` seconds, or that have not come after `LATE`."""
        for worker in list(self.roster.workers.values()):
            if worker.beat is not None and now - worker.beat > self.dead_after:
                self.outbox.append(Kill(worker))
                self.roster.silent.add(worker.node)
                self.gone(worker.name, "fenced", f"no heartbeat for {self.dead_after:g} s", now)
            elif worker.beat is None and now - self._hired.setdefault(worker.name, now) > LATE:
                self.outbox.append(Kill(worker))
                self.gone(worker.name, "late", f"it has not come within {LATE:g} s", now)

    def forgive(self, seconds: float) -> None:
        """The broker itself slept: silence in that time proves nothing."""
        for worker in self.roster.workers.values():
            if worker.beat is not None:
                worker.beat += seconds
        self._hired = {name: since + seconds for name, since in self._hired.items()}
        self._quiet_until += seconds

    def dispatch(self, now: float) -> None:
        """Start what can start, borrow idle workers for what can be split, hire where stages wait."""
        if self._expected and now < self._quiet_until:
            return
        openings, coming, full = Openings(self.roster, now), Counter[Shape](), set[str]()
        for want in self.demand.queue():
            name = want.stage.name
            if name in full:
                continue
            needs = self.needs(name)
            worker = openings.take(needs)
            if worker is not None:
                run = self._start(worker, want.stage, self.attempts(), now)
                self.outbox += [Give(worker.name, want.stage, run.attempt), Event("started", run.key, name, worker.name)]
            elif not self.roster.fits(needs):
                self._give_up(want.stage.key, "failed", f"it needs {_said(needs)}, more than any node of the cluster has")
            elif not self._hire(shape_of(needs), coming, openings):
                full.add(name)  # whoever else needs the same would find nothing either
                if full >= self.demand.line.names.keys():
                    break
        self._lend(openings)

    def warm(self, workers: int) -> None:
        """Hire usual workers before the first stage comes."""
        openings = Openings(self.roster, 0.0)
        for _ in range(0 if self._stillborn else workers - len(self.roster.workers)):
            worker = openings.hire(Shape())
            if worker is not None:
                self.outbox.append(Hire(worker))

    def _hire(self, shape: Shape, coming: Counter[Shape], openings: Openings) -> bool:
        """See to one more worker of this shape; False if there is no room for one."""
        coming[shape] += 1
        if openings.starting[shape] >= coming[shape]:
            return True
        worker = openings.hire(shape)
        if worker is not None:
            self.outbox.append(Hire(worker))
        else:
            self.outbox += [Dismiss(each.name) for each in openings.give_up(shape)]
        return worker is not None

    def _lend(self, openings: Openings) -> None:
        borrowing = [run for run in self.runs.values() if self.needs(run.stage.name).helpers]
        for run in sorted(borrowing, key=lambda run: run.since):
            needs = self.needs(run.stage.name)
            missing, shape = needs.helpers - openings.lent[run.attempt], shape_of(needs)
            for worker in openings.lendable(shape)[: max(0, missing)]:
                worker.lent_to, missing = run.attempt, missing - 1
            for _ in range(missing - openings.starting[shape]):
                hired = None if self._stillborn else openings.hire(shape)
                if hired is None:
                    break
                self.outbox.append(Hire(hired))

    def helpers(self, attempt: str) -> list[str]:
        """Names of the workers that are lent to an attempt."""
        return [worker.name for worker in self.roster.workers.values() if worker.lent_to == attempt]


def _said(needs: Needs) -> str:
    shape = shape_of(needs)
    what = f"{shape.gpus:g} GPU" if shape.gpus else f"{shape.cpus:g} CPU"
    return f"{what} and {needs.memory_bytes / 2**30:.1f} GiB" if needs.memory_bytes else what

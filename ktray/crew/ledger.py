"""Which stage runs where and who waits for it: pure scheduling, told of events with their time, answering with actions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ktray.artifact import Artifact, Stage
from ktray.crew.books import Answer, Dismiss, Event, Fence, Give, Hire, Kill, Request, Run, Want
from ktray.crew.needs import Needs
from ktray.crew.roster import Roster, Shape, Worker, shape_of

DEATHS = 3


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
        self.wants: dict[str, Want] = {}
        self.runs: dict[str, Run] = {}
        self.requests: dict[str, Request] = {}
        self.known: dict[str, Stage] = {}
        self.computed: Counter[str] = Counter()
        self.reused: Counter[str] = Counter()
        self._present: set[str] = set()
        self._unclaimed: set[str] = set()
        self._fenced: set[str] = set()
        self._closed: set[str] = set()
        self._stillborn = 0
        self._deaths: Counter[str] = Counter()
        self._missed: Counter[str] = Counter()
        self._expected: set[str] = set()
        self._quiet_until = 0.0
        self._orders = 0

    # ---- what callers want

    def request(self, name: str, waiter: str, session: str, stages: Sequence[Stage], priority: int, now: float) -> None:
        """Enter a request; a second time under the same name, as after a crash of the broker, changes nothing."""
        if name in self.requests:
            return
        self.known.update({stage.key: stage for stage in stages})
        request = Request(name, waiter, session, priority, now, tuple(stage.key for stage in stages))
        self.requests[name] = request
        for stage in stages:
            self._enter(stage, request, now)
        self._settle(request)

    def _enter(self, stage: Stage, request: Request, now: float) -> None:
        key = stage.key
        want = self.wants.get(key)
        if want is None:
            artifact = self.find(key)
            if artifact is not None:
                self._note_present(artifact, request)
                return
            self._present.discard(key)
            self._orders += 1
            want = self.wants[key] = Want(stage, self._orders, now)
        request.pending.add(key)
        want.requests.add(request.name)
        if request.waiter and not want.owner:
            want.owner = request.name
        for absent in self._absent(stage):
            if absent in self.known:
                self._enter(self.known[absent], request, now)

    def _note_present(self, artifact: Artifact, request: Request) -> None:
        self._present.add(artifact.key)
        request.found[artifact.key] = artifact
        claimed = request.waiter and artifact.key in self._unclaimed
        request.states[artifact.key] = "computed" if claimed else "reused"
        if claimed:  # a prefetch computed it for nobody in particular: who comes first has caused it
            self._unclaimed.discard(artifact.key)
        elif request.waiter:
            self.reused[artifact.key.rpartition("-")[0]] += 1

    def _absent(self, stage: Stage) -> list[str]:
        return [key for key in stage.inputs.values() if key not in self.wants and not self._is_present(key)]

    def _is_present(self, key: str) -> bool:
        if key not in self._present and self.find(key) is not None:
            self._present.add(key)
        return key in self._present

    def release(self, waiter: str, session: str | None = None) -> None:
        """End the requests of a waiter, or of all waiters of a session; running stages run on."""
        for request in list(self.requests.values()):
            if request.session == session if session is not None else request.waiter == waiter:
                self._drop(request)
                self.outbox.append(Answer(request.name, kind="released", cause="the wait was cancelled"))

    def _drop(self, request: Request) -> None:
        del self.requests[request.name]
        for key in request.pending:
            want = self.wants.get(key)
            if want is None:
                continue
            want.requests.discard(request.name)
            if want.owner == request.name:
                want.owner = min((name for name in want.requests if self.requests[name].waiter), default="")
            if not want.requests and key not in self.runs:
                del self.wants[key]

    def _settle(self, request: Request) -> None:
        if request.pending or request.name not in self.requests:
            return
        del self.requests[request.name]
        outcomes = tuple(
            {
                "key": key,
                "state": request.states[key],
                "seconds": float(request.found[key].record.get("seconds", 0.0)),
                "metrics": dict(request.found[key].metrics),
            }
            for key in request.keys
        )
        self.outbox.append(Answer(request.name, outcomes))

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
        if progress != run.progress:
            run.progress, run.moved = progress, now
        return True

    def _adopt(self, worker: Worker, stage: Stage, attempt: str, now: float) -> Run:
        if stage.key not in self.wants:
            self._orders += 1
            self.wants[stage.key] = Want(stage, self._orders, now)
        self.known[stage.key] = stage
        return self._start(worker, stage, attempt, now)

    def _start(self, worker: Worker, stage: Stage, attempt: str, now: float) -> Run:
        worker.leads, worker.lent_to, worker.polling = attempt, None, False
        worker.memory = self.needs(stage.name).memory_bytes
        self.runs[stage.key] = Run(stage.key, stage, attempt, worker.name, now, now)
        return self.runs[stage.key]

    def ended(self, key: str, attempt: str) -> Run | None:
        """Close the books of an attempt; None if it is not the one that counts."""
        run = self.runs.get(key)
        if run is None or run.attempt != attempt:
            return None
        del self.runs[key]
        self._closed.add(attempt)
        for worker in self.roster.workers.values():
            if worker.leads == attempt:
                worker.leads, worker.memory = None, 0
            if worker.lent_to == attempt:
                worker.lent_to = None
        return run

    def published(self, key: str, attempt: str, computed: bool, seconds: float, now: float) -> None:
        """An attempt ended well; the store has the last word."""
        run = self.ended(key, attempt)
        artifact = self.find(key)
        if artifact is None:
            if run is not None:
                self.fail(key, "failed", "FileNotFoundError: it ended, but its artifact is not in the store")
            return
        self._present.add(key)
        self._deaths.pop(key, None)
        self._missed.pop(key, None)
        name = key.rpartition("-")[0]
        if run is not None and computed:
            self.computed[name] += 1
            self.outbox.append(Event("published", key, name, run.worker, seconds))
        want = self.wants.pop(key, None)
        if want is None:
            return
        if computed and not want.owner:
            self._unclaimed.add(key)
        for request in [self.requests[each] for each in want.requests]:
            request.pending.discard(key)
            request.found[key] = artifact
            caused = "computed" if want.owner == request.name else "joined"
            request.states[key] = caused if computed else "reused"
            if request.waiter and request.states[key] != "computed":
                self.reused[name] += 1
            self._settle(request)

    def failed(self, key: str, attempt: str, kind: str, cause: str, missing: str, now: float) -> bool:
        """An attempt raised; False if it is not the one that counts. A missing input is computed again first."""
        run = self.ended(key, attempt)
        if run is None:
            return False
        self._missed[key] += bool(missing)
        want = self.wants[key]
        if missing and missing in self.known and self._missed[key] < DEATHS:
            self._present.discard(missing)
            for request in [self.requests[each] for each in want.requests]:
                request.found.pop(missing, None)
                self._enter(self.known[missing], request, now)
            if missing in self.wants or self._is_present(missing):
                return True
        self.outbox.append(Event("failed", key, run.stage.name, run.worker, now - run.since, cause))
        self.fail(key, kind, cause)
        return True

    def fail(self, key: str, kind: str, cause: str) -> None:
        """Give up a wanted stage and all that reads it: each request that waits for them ends once, with this cause."""
        self._deaths.pop(key, None)
        self._missed.pop(key, None)
        want = self.wants.pop(key, None)
        for name in sorted(want.requests) if want else ():
            self._drop(self.requests[name])
            self.outbox.append(Answer(name, failed=key, cause=cause, kind=kind))
        readers = [other for other, each in self.wants.items() if key in each.stage.inputs.values() and other not in self.runs]
        for other in readers:
            if other in self.wants:
                self.fail(other, kind, f"it reads {key}, which failed: {cause}")

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
        if worker is None:
            return
        if worker.beat is None:
            self._bear_no_more(why)
        run = next((each for each in self.runs.values() if each.worker == name), None)
        if run is None:
            if not worker.leaving:
                self.outbox.append(Event(event, worker=name, cause=why))
            return
        self._fenced.add(run.attempt)
        self.outbox += [Fence(run.key, run.attempt), Event(event, run.key, run.stage.name, name, now - run.since, why)]
        self.ended(run.key, run.attempt)
        self._deaths[run.key] += 1
        if self._deaths[run.key] >= DEATHS:
            self.fail(run.key, "failed", f"WorkerDied: its worker died {DEATHS} times, the last time: {why}")
        elif not self.wants[run.key].requests:
            del self.wants[run.key]

    def _bear_no_more(self, why: str) -> None:
        self._stillborn += 1
        if self._stillborn < DEATHS:
            return
        self._stillborn = 0
        for key in [each for each in self.wants if each not in self.runs]:
            if key in self.wants:
                self.fail(key, "failed", f"WorkerDied: workers die before their first heartbeat: {why}")

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
        coming: Counter[Shape] = Counter()
        for want in sorted((each for key, each in self.wants.items() if key not in self.runs), key=self._rank):
            if not self._ready(want.stage):
                continue
            needs = self.needs(want.stage.name)
            worker = self.roster.idle(needs, now)
            if worker is not None:
                run = self._start(worker, want.stage, self.attempts(), now)
                self.outbox += [
                    Give(worker.name, want.stage, run.attempt),
                    Event("started", run.key, want.stage.name, worker.name),
                ]
            elif not self.roster.fits(needs):
                self.fail(want.stage.key, "failed", f"it needs {_said(needs)}, more than any node of the cluster has")
            else:
                self._hire(shape_of(needs), coming, now)
        self._lend(now)

    def warm(self, workers: int) -> None:
        """Hire usual workers before the first stage comes."""
        for _ in range(0 if self._stillborn else workers - len(self.roster.workers)):
            worker = self.roster.hire(Shape())
            if worker is not None:
                self.outbox.append(Hire(worker))

    def _hire(self, shape: Shape, coming: Counter[Shape], now: float) -> None:
        coming[shape] += 1
        if self.roster.starting(shape) >= coming[shape]:
            return
        worker = self.roster.hire(shape)
        if worker is not None:
            self.outbox.append(Hire(worker))
        else:
            self.outbox += [Dismiss(each.name) for each in self.roster.give_up(shape, now)]

    def _lend(self, now: float) -> None:
        for run in sorted(self.runs.values(), key=lambda run: run.since):
            needs = self.needs(run.stage.name)
            missing = needs.helpers - len(self.helpers(run.attempt))
            for worker in self.roster.workers.values():
                if (
                    missing > 0
                    and worker.shape == shape_of(needs)
                    and worker.lent_to is None
                    and self.roster.available(worker, now)
                ):
                    worker.lent_to, missing = run.attempt, missing - 1
            for _ in range(missing - self.roster.starting(shape_of(needs))):
                hired = None if self._stillborn else self.roster.hire(shape_of(needs))
                if hired is None:
                    break
                self.outbox.append(Hire(hired))

    def helpers(self, attempt: str) -> list[str]:
        """Names of the workers that are lent to an attempt."""
        return [worker.name for worker in self.roster.workers.values() if worker.lent_to == attempt]

    def _ready(self, stage: Stage) -> bool:
        """All that it reads is there, and no shorter training that it would continue is on its way."""
        if any(key in self.wants for key in stage.starts):
            return False
        return all(key not in self.wants for key in stage.inputs.values())

    def _rank(self, want: Want) -> tuple[float, float, int]:
        priority = max((self.requests[name].priority for name in want.requests), default=0)
        return (-priority, -len(want.requests), want.order)


def _said(needs: Needs) -> str:
    shape = shape_of(needs)
    what = f"{shape.gpus:g} GPU" if shape.gpus else f"{shape.cpus:g} CPU"
    return f"{what} and {needs.memory_bytes / 2**30:.1f} GiB" if needs.memory_bytes else what

"""What is wanted, by whom, and how each request ends. Pure, like the core that it is a part of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from ktray.artifact import Artifact, Stage
from ktray.scheduler.messages import PendingStage, Request, RequestResult
from ktray.scheduler.ready_queue import ReadyQueue


class RequestTable:
    """Requests and the stages that they want.

    Args:
        find: key -> artifact if it is in the store.
        running: keys of the stages that run now, kept by the core.
        outbox: where answers are left.
        seconds: how long a stage is thought to run; asked when it is first wanted.
    """

    def __init__(
        self,
        find: Callable[[str], Artifact | None],
        running: Collection[str],
        outbox: list[Any],
        seconds: Callable[[Stage], float] = lambda stage: 0.0,
    ) -> None:
        self.find, self.running, self.outbox, self.seconds = find, running, outbox, seconds
        self.wants: dict[str, PendingStage] = {}
        self.requests: dict[str, Request] = {}
        self.known: dict[str, Stage] = {}
        self.reused: Counter[str] = Counter()
        self.line = ReadyQueue()
        self._families: dict[str, set[str]] = {}
        self._present: set[str] = set()
        self._unclaimed: set[str] = set()
        self._orders = 0

    def request(self, name: str, waiter: str, session: str, stages: Sequence[Stage], priority: int, now: float) -> None:
        """Enter a request; a second time under the same name, as after a crash of the broker, changes nothing."""
        if name in self.requests:
            return
        self.known.update({stage.key: stage for stage in stages})
        request = Request(name, waiter, session, priority, now, tuple(stage.key for stage in stages))
        self.requests[name] = request
        for stage in stages:
            self.enter(stage, request, now)
        self._settle(request)

    def enter(self, stage: Stage, request: Request, now: float) -> None:
        """Have `request` want this stage, and what it reads, unless the store has it."""
        key = stage.key
        want = self.wants.get(key)
        if want is None:
            artifact = self.find(key)
            if artifact is not None:
                self._note_present(artifact, request)
                return
            want = self.add(stage, now)
        request.pending.add(key)
        self._count(want, request)
        if request.waiter and not want.owner:
            want.owner = request.name
        for absent in self._absent(stage):
            if absent in self.known:
                self.enter(self.known[absent], request, now)

    def _count(self, want: PendingStage, request: Request, here: bool = True) -> None:
        """Note that a request wants it, or no more; counted, since thousands may share a stage."""
        if (request.name in want.requests) == here:
            return
        step = 1 if here else -1
        want.requests ^= {request.name}
        want.trials += step * bool(request.waiter)
        want.priorities[request.priority] += step
        if not want.priorities[request.priority]:
            del want.priorities[request.priority]
        self.line.rank(want.stage.key, self._rank(want))

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
        return [key for key in stage.inputs.values() if key not in self.wants and not self.is_present(key)]

    def add(self, stage: Stage, now: float) -> PendingStage:
        """A want of nobody yet, or the one that is there."""
        if stage.key not in self.wants:
            self._orders += 1
            self.known[stage.key] = stage
            self._present.discard(stage.key)
            want = self.wants[stage.key] = PendingStage(stage, self._orders, now, seconds=self.seconds(stage))
            want.path = want.seconds + max((self.wants[each].path for each in self.line.readers(stage.key)), default=0.0)
            self.line.enter(stage.key, (*stage.starts, *stage.inputs.values()), self._rank(want))
            self._lengthen(want)
            if stage.family:
                self._families.setdefault(stage.family, set()).add(stage.key)
        return self.wants[stage.key]

    def _lengthen(self, want: PendingStage) -> None:
        """Tell all that this want waits for how long the path through it is."""
        longer = [want]
        while longer:
            last = longer.pop()
            for key in self.line.behind(last.stage.key):
                before = self.wants[key]
                if before.path < before.seconds + last.path:
                    before.path = before.seconds + last.path
                    self.line.rank(key, self._rank(before))
                    longer.append(before)

    def _forget(self, key: str) -> PendingStage | None:
        """The want of this key, which is none any more."""
        want = self.wants.pop(key, None)
        if want is None:
            return None
        self.line.leave(key)
        family = want.stage.family
        if family:
            self._families[family].discard(key)
            if not self._families[family]:
                del self._families[family]
        return want

    def is_present(self, key: str) -> bool:
        """Whether the store has it, as far as was seen."""
        if key not in self._present and self.find(key) is not None:
            self._present.add(key)
        return key in self._present

    def release(self, session: str, waiter: str | None = None) -> None:
        """End the requests of a session, or of one of its waiters: two searches may call theirs alike. Stages run on."""
        for request in list(self.requests.values()):
            if request.session == session and waiter in (None, request.waiter):
                self._drop(request)
                self.outbox.append(RequestResult(request.name, kind="released", cause="the wait was cancelled"))

    def _drop(self, request: Request) -> None:
        del self.requests[request.name]
        for key in request.pending:
            want = self.wants.get(key)
            if want is None:
                continue
            self._count(want, request, here=False)
            if want.owner == request.name:
                want.owner = min((name for name in want.requests if self.requests[name].waiter), default="")
            if not want.requests and key not in self.running:
                self._forget(key)

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
        self.outbox.append(RequestResult(request.name, outcomes))

    def publish(self, artifact: Artifact, computed: bool) -> None:
        """Tell all who want it that it is in the store; `computed` if this scheduler has just put it there."""
        key, name = artifact.key, artifact.key.rpartition("-")[0]
        self._present.add(key)
        want = self._forget(key)
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

    def fail(self, key: str, kind: str, cause: str) -> None:
        """Give up a wanted stage and all that reads it: each request that waits for them ends once, with this cause."""
        readers = sorted(self.line.readers(key))
        want = self._forget(key)
        for name in sorted(want.requests) if want else ():
            self._drop(self.requests[name])
            self.outbox.append(RequestResult(name, failed=key, cause=cause, kind=kind))
        for other in readers:
            each = self.wants.get(other)
            if each is not None and key in each.stage.inputs.values() and other not in self.running:
                self.fail(other, kind, f"it reads {key}, which failed: {cause}")

    def miss(self, key: str, missing: str, now: float) -> bool:
        """An input of a wanted stage is not in the store after all; whether it is on its way now."""
        if missing not in self.known:
            return False
        self._present.discard(missing)
        for request in [self.requests[each] for each in self.wants[key].requests]:
            self.enter(self.known[missing], request, now)
        return missing in self.wants or self.is_present(missing)

    def forsake(self, key: str) -> None:
        """Forget a stage that no longer runs, if nobody wants it."""
        if key in self.wants and not self.wants[key].requests:
            self._forget(key)

    def queue(self) -> Iterator[PendingStage]:
        """Wants that do not run and whose inputs are there, in the order in which they should begin.

        Higher priority first, then what more trials wait for, then the longer path of what waits for it, then the older.
        A stage also waits while a shorter training that it would continue is on its way.
        """
        return (self.wants[key] for key in self.line if key in self.wants)

    def among(self, keys: Collection[str]) -> list[PendingStage]:
        """Those of `keys` that `queue` would give, in its order."""
        return [self.wants[key] for key in self.line.of(keys)]

    def relatives(self, stage: Stage) -> list[Stage]:
        """Others of its family that could begin now, too, as `queue` would give them."""
        return [want.stage for want in self.among(self._families.get(stage.family, set()) - {stage.key})]

    def _rank(self, want: PendingStage) -> tuple[float, float, float, int]:
        waiting = want.trials or len(want.requests)  # trials, or what will become some
        return (-max(want.priorities, default=0), -waiting, -want.path, want.order)

"""What is wanted, by whom, and how each request ends. Pure, like the ledger that it is a part of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from ktray.artifact import Artifact, Stage
from ktray.crew.books import Answer, Request, Want
from ktray.crew.line import Line


class Demand:
    """Requests and the stages that they want.

    Args:
        find: key -> artifact if it is in the store.
        running: keys of the stages that run now, kept by the ledger.
        outbox: where answers are left.
    """

    def __init__(self, find: Callable[[str], Artifact | None], running: Collection[str], outbox: list[Any]) -> None:
        self.find, self.running, self.outbox = find, running, outbox
        self.wants: dict[str, Want] = {}
        self.requests: dict[str, Request] = {}
        self.known: dict[str, Stage] = {}
        self.reused: Counter[str] = Counter()
        self.line = Line()
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
        want.priority = max(want.priority, request.priority) if want.requests else request.priority
        want.requests.add(request.name)
        self.line.rank(key, self._rank(want))
        if request.waiter and not want.owner:
            want.owner = request.name
        for absent in self._absent(stage):
            if absent in self.known:
                self.enter(self.known[absent], request, now)

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

    def add(self, stage: Stage, now: float) -> Want:
        """A want of nobody yet, or the one that is there."""
        if stage.key not in self.wants:
            self._orders += 1
            self.known[stage.key] = stage
            self._present.discard(stage.key)
            want = self.wants[stage.key] = Want(stage, self._orders, now)
            self.line.enter(stage.key, (*stage.starts, *stage.inputs.values()), self._rank(want))
        return self.wants[stage.key]

    def _forget(self, key: str) -> Want | None:
        """The want of this key, which is none any more."""
        if key in self.wants:
            self.line.leave(key)
        return self.wants.pop(key, None)

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
            if want.priority == request.priority:
                want.priority = max((self.requests[name].priority for name in want.requests), default=0)
            self.line.rank(key, self._rank(want))
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
        self.outbox.append(Answer(request.name, outcomes))

    def publish(self, artifact: Artifact, computed: bool) -> None:
        """Tell all who want it that it is in the store; `computed` if this crew has just put it there."""
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
        want = self._forget(key)
        for name in sorted(want.requests) if want else ():
            self._drop(self.requests[name])
            self.outbox.append(Answer(name, failed=key, cause=cause, kind=kind))
        for other, each in list(self.wants.items()):
            if key in each.stage.inputs.values() and other not in self.running and other in self.wants:
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

    def queue(self) -> Iterator[Want]:
        """Wants that do not run and whose inputs are there: higher priority first, then more waiters, then older.

        A stage also waits while a shorter training that it would continue is on its way.
        """
        return (self.wants[key] for key in self.line if key in self.wants)

    def _rank(self, want: Want) -> tuple[float, float, int]:
        return (-want.priority, -len(want.requests), want.order)

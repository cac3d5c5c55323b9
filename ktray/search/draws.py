"""New trials: what is planned first, then what the sampler proposes, never the same pair twice."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Literal, Protocol

from ktray.errors import UserError
from ktray.fingerprint import canonical, fingerprint, seed_of
from ktray.search.sampler import DrawCost, Quote, Sampler, at_random
from ktray.search.space import Space
from ktray.search.space_tree import Params, Scalar
from ktray.search.trial import State, Trial

REPEATS = 3  # proposals in a row that equal an earlier trial before an unseen draw is looked for
LISTED = 20_000  # finite spaces up to this size are listed for it
ATTEMPTS = 16  # proposals in a row that may all be too dear
TRIES = 1_000  # random draws that may all be known before a larger space counts as exhausted


class DrawSource(Protocol):
    """Where new trials come from."""

    def told(self, trial: Trial) -> None:
        """A trial is new or has changed; one of another study has a number below 0."""

    def ask_prices(self, quote: Quote) -> None:
        """From now on `quote` tells what a draw would cost."""

    def retry(self) -> int:
        """Draw the pairs of failed trials again before any other; how many there are."""

    def following(self, spent: DrawCost, left: float = math.inf) -> Trial | Literal["dear"] | None:
        """The next trial: to run, or settled already; None: there is no other, "dear": none for as little as `left`."""


class SampledDraws:
    """The draws of a space, one after the other; what was drawn is known from the trials that it is told of."""

    def __init__(self, space: Space, quote: Quote | None = None) -> None:
        self.space = space
        self.sampler = Sampler(space, quote)
        self._numbers: dict[str, int] = {}  # identity of a pair -> number of the trial that drew it first
        self._count = 0
        self._planned: set[int] = set()  # which of `start_with` were drawn
        self._last: deque[State] = deque(maxlen=REPEATS)
        self._failed: dict[str, Params] = {}  # identity of a pair -> what drew it, if its last trial failed
        self._again: deque[Params] = deque()
        self._listed: Iterator[Params] | None = None  # what `_unseen` has yet to look at

    def told(self, trial: Trial) -> None:
        """A trial is new or has changed."""
        self.sampler.told(trial)
        if trial.number >= self._count:
            self._count = trial.number + 1
            if trial.planned is not None:
                self._planned.add(trial.planned)
            self._last.append(trial.state)
            if trial.state != "duplicate":
                self._numbers.setdefault(fingerprint(trial.pair), trial.number)
        if trial.number >= 0 and trial.state == "failed":
            self._failed[fingerprint(trial.pair)] = dict(trial.params)
        elif self._failed and trial.state != "duplicate":
            self._failed.pop(fingerprint(trial.pair), None)

    def ask_prices(self, quote: Quote) -> None:
        """From now on `quote` tells the sampler what a draw would cost."""
        self.sampler.quote = quote

    def retry(self) -> int:
        """Draw the pairs of failed trials again before any other, unless they are no valid pairs; how many there are."""
        for identity, params in self._failed.items():
            if self._identity(params) == identity:
                self._numbers.pop(identity, None)
                self._again.append(params)
        return len(self._again)

    def following(self, spent: DrawCost, left: float = math.inf) -> Trial | Literal["dear"] | None:
        """The next trial: to run, or already a duplicate, or failed as no valid pair; None if the space is exhausted.

        Args:
            spent: what the trials so far cost.
            left: seconds that it may cost up to its first rung. What costs more is passed over, and waits if it was planned.
        """
        for _ in range(len(self._again)):
            if (again := self._paid(self._trial(self._again[0]), left)) != "dear":
                self._again.popleft()
                return again
            self._again.rotate(-1)
        for index, start in enumerate(self.space.start_with):
            if index not in self._planned:
                planned = self._trial(self.sampler.propose(self._count, spent, start), index)
                if self._paid(planned, left) != "dear":
                    return planned
        if len(self._last) == REPEATS and set(self._last) == {"duplicate"}:
            unseen = self._unseen()
            if unseen is None:
                return "dear" if self._again else None
            self._again.append(unseen)  # it is found only once, and may have to wait
            return self.following(spent, left)
        for attempt in range(ATTEMPTS):
            found = self._paid(self._trial(self.sampler.propose(self._count, spent, left=left, attempt=attempt)), left)
            if found != "dear":
                return found
        return "dear"

    def _paid(self, trial: Trial, left: float) -> Trial | Literal["dear"]:
        asked = self.sampler.quote if left < math.inf and trial.state == "running" else None
        price = asked(dict(trial.params)) if asked else None
        return trial if price is None or sum(price) <= left else "dear"

    def _trial(self, params: Params, planned: int | None = None) -> Trial:
        try:
            pair = self.space.pair(params).model_dump(mode="json")
        except UserError as error:
            plain = self.space.plain(params)
            return Trial(self._count, params, plain, "failed", cause=str(error), planned=planned)
        earlier = self._numbers.get(fingerprint(pair))
        state: State = "running" if earlier is None else "duplicate"
        return Trial(self._count, params, pair, state, duplicate_of=earlier, planned=planned)

    def _unseen(self) -> Params | None:
        for params in self._candidates():
            if canonical(params) not in self.sampler.made:
                identity = self._identity(params)
                if identity is not None and identity not in self._numbers:
                    return params
        return None

    def _candidates(self) -> Iterator[Params]:
        """Of a finite space all draws in a random order that never changes, so that what was passed over once stays behind."""
        size = self.space.size()
        if size is not None and size <= LISTED:
            if self._listed is None:
                listed = list(self.space.draws())
                random.Random(seed_of(self.space.seed, "unseen")).shuffle(listed)
                self._listed = iter(listed)
            yield from self._listed
        else:
            seed = seed_of(self.space.seed, "unseen", self._count)
            for number in range(TRIES):
                yield at_random(self.space, seed_of(seed, number))

    def _identity(self, params: Mapping[str, Scalar]) -> str | None:
        try:
            return fingerprint(self.space.pair(params).model_dump(mode="json"))
        except UserError:
            return None

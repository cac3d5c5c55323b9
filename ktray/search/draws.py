"""New trials: what is planned first, then what the sampler proposes, never the same pair twice."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

from ktray.errors import UserError
from ktray.fingerprint import canonical, fingerprint, seed_of
from ktray.search import sampler
from ktray.search.space import Space
from ktray.search.tree import Params, Scalar
from ktray.search.trial import State, Trial

REPEATS = 3  # proposals in a row that equal an earlier trial before an unseen draw is looked for
LISTED = 20_000  # finite spaces up to this size are listed for it
TRIES = 1_000  # random draws that may all be known before a larger space counts as exhausted


class Draws:
    """The draws of a space, one after the other; what was drawn is read from the trials that the caller has."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._identities: dict[int, str] = {}

    def following(self, trials: Sequence[Trial]) -> Trial | None:
        """The next trial: to run, or already a duplicate, or failed as no valid pair; None if the space is exhausted.

        Args:
            trials: all trials so far, in the order of their numbers.
        """
        seen = self._seen(trials)
        planned = sum(trial.planned is not None for trial in trials)
        if planned < len(self.space.start_with):
            params = sampler.propose(self.space, trials, self.space.start_with[planned])
            return self._trial(params, len(trials), seen, planned)
        if len(trials) >= REPEATS and all(trial.state == "duplicate" for trial in trials[-REPEATS:]):
            unseen = self._unseen(trials, seen)
            return None if unseen is None else self._trial(unseen, len(trials), seen)
        return self._trial(sampler.propose(self.space, trials), len(trials), seen)

    def _seen(self, trials: Sequence[Trial]) -> dict[str, int]:
        for trial in trials:
            if trial.state != "duplicate" and trial.number not in self._identities:
                self._identities[trial.number] = fingerprint(trial.pair)
        return {identity: number for number, identity in self._identities.items()}

    def _trial(self, params: Params, number: int, seen: Mapping[str, int], planned: int | None = None) -> Trial:
        try:
            pair = self.space.pair(params).model_dump(mode="json")
        except UserError as error:
            return Trial(number, params, self.space.plain(params), "failed", cause=str(error), planned=planned)
        earlier = seen.get(fingerprint(pair))
        state: State = "running" if earlier is None else "duplicate"
        return Trial(number, params, pair, state, duplicate_of=earlier, planned=planned)

    def _unseen(self, trials: Sequence[Trial], seen: Mapping[str, int]) -> Params | None:
        known = {canonical(dict(trial.params)) for trial in trials}
        for params in self._candidates(len(trials)):
            if canonical(params) not in known and self._identity(params) not in {None, *seen}:
                return params
        return None

    def _candidates(self, count: int) -> Iterator[Params]:
        seed = seed_of(self.space.seed, "unseen", count)
        size = self.space.size()
        if size is not None and size <= LISTED:
            listed = list(self.space.draws())
            random.Random(seed).shuffle(listed)
            yield from listed
        else:
            for number in range(TRIES):
                yield sampler.at_random(self.space, seed_of(seed, number))

    def _identity(self, params: Mapping[str, Scalar]) -> str | None:
        try:
            return fingerprint(self.space.pair(params).model_dump(mode="json"))
        except UserError:
            return None

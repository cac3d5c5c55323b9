"""Draws that no sampler makes: a fixed list, or chance. What a simulation, a grid or a comparison searches by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ktray.fingerprint import fingerprint, seed_of
from ktray.search.sampler import DrawCost, Quote, at_random
from ktray.search.space import Space
from ktray.search.space_tree import Scalar
from ktray.search.trial import State, Trial

Params = Mapping[str, Scalar]


class FixedDraws:
    """The draws of a list, one after the other; a pair that was there before is a duplicate, as in any search.

    Args:
        draw: number of the trial -> its parameters, each a parameter of the space; None when there are no more.
    """

    def __init__(self, space: Space, draw: Callable[[int], Params | None]) -> None:
        self.space, self.draw = space, draw
        self._seen: dict[str, int] = {}
        self._count = 0

    def told(self, trial: Trial) -> None:
        """A trial is new or has changed; only the new ones of this study matter."""
        if trial.number >= self._count:
            self._count = trial.number + 1
            self._seen.setdefault(fingerprint(trial.pair), trial.number)

    def ask_prices(self, quote: Quote) -> None:
        """Nothing: a list is followed whatever it costs."""

    def retry(self) -> int:
        """None: a list is drawn once."""
        return 0

    def following(self, spent: DrawCost, left: float = math.inf) -> Trial | None:
        """The next trial: to run, or a duplicate; None at the end of the list."""
        number = self._count
        params = self.draw(number)
        if params is None:
            return None
        pair = self.space.pair(params).model_dump(mode="json")
        earlier = self._seen.get(fingerprint(pair))
        state: State = "running" if earlier is None else "duplicate"
        return Trial(number, dict(params), pair, state, duplicate_of=earlier)


def fixed_draws(space: Space, entries: Sequence[Params]) -> FixedDraws:
    """The draws of `entries`, in their order."""
    return FixedDraws(space, lambda number: entries[number] if number < len(entries) else None)


def random_draws(space: Space) -> FixedDraws:
    """Independent random draws, by the seed of the space: what knows nothing of results."""
    return FixedDraws(space, lambda number: at_random(space, seed_of(space.seed, "chance", number)))

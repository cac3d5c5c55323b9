"""Sources of new trials: planned draws followed by a sampler's, or a fixed list. No pair runs twice."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from ktray.errors import UserError
from ktray.fingerprint import canonical, fingerprint, seed_of
from ktray.search.budget import CostEstimate, PrefixSuffixSeconds
from ktray.search.sampler import Sampler, random_draw
from ktray.search.space import Space
from ktray.search.space_tree import Params, Scalar
from ktray.search.trial import State, Trial
from ktray.spec import TOLERANCE

MAX_DUPLICATES = 3  # duplicates in a row after which the source itself searches for an unseen draw
MAX_ENUMERATED = 20_000  # largest size of a space that this search enumerates; in a larger one it tries random draws
MAX_TOO_EXPENSIVE = 16  # unaffordable proposals in a row after which the source gives up
MAX_RANDOM_TRIES = 1_000  # random draws without an unseen one after which a larger space counts as exhausted


def pair_identity(pair: Mapping[str, Any]) -> str:
    """Hash of a pair as plain data, equal for pairs that differ only in how many unreadable images they tolerate."""
    return fingerprint(_without_max_unreadable(pair))


def _without_max_unreadable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_max_unreadable(each) for name, each in value.items() if name != TOLERANCE}
    return [_without_max_unreadable(each) for each in value] if isinstance(value, list | tuple) else value


NoDraw = Literal["exhausted", "too_expensive"]
"""Why there is no next trial: every draw was made, or the remaining ones cost more than is left of the budget."""


class DrawSource(Protocol):
    """Where new trials come from."""

    def record_trial(self, trial: Trial) -> None:
        """Adds a new trial, or updates a changed one; trials of other studies have numbers below 0."""

    def set_cost_estimate(self, cost_estimate: CostEstimate) -> None:
        """Sets the function that estimates the cost of a draw from now on."""

    def requeue_failed_pairs(self) -> int:
        """Queues the pairs of failed trials to be drawn again first; returns their number."""

    def next_trial(self, spent: PrefixSuffixSeconds, affordable: float = math.inf) -> Trial | NoDraw:
        """The next trial (running, or final if it is a duplicate or no valid pair), or the reason why there is none."""


class SampledDraws:
    """Planned draws, then those of a sampler; which draws were made before follows from the observed trials.

    It counts all trials, duplicates and failures included, to number them; `Study.draw_count` leaves duplicates out.
    """

    def __init__(self, space: Space, cost_estimate: CostEstimate | None = None) -> None:
        self.space = space
        self.sampler = Sampler(space, cost_estimate)
        self._first_trials: dict[str, int] = {}  # identity of a pair -> number of its first trial
        self._trial_count = 0  # all trials, duplicates and failures included; the number of the next one
        self._planned: set[int] = set()  # indices into `start_with` of planned draws that were made
        self._last_states: deque[State] = deque(maxlen=MAX_DUPLICATES)
        self._failed: dict[str, Params] = {}  # identity of a pair -> its parameters, if its last trial failed
        self._queue: deque[Params] = deque()  # draws to make before the sampler is asked
        self._unexamined_draws: Iterator[Params] | None = None  # candidates that `_find_unseen_draw` has not examined yet

    def record_trial(self, trial: Trial) -> None:
        """Adds a new trial, or updates a changed one."""
        self.sampler.record_trial(trial)
        if trial.number >= self._trial_count:
            self._trial_count = trial.number + 1
            if trial.planned is not None:
                self._planned.add(trial.planned)
            self._last_states.append(trial.state)
            if trial.state != "duplicate":
                self._first_trials.setdefault(pair_identity(trial.pair), trial.number)
        if trial.number >= 0 and trial.state == "failed":
            self._failed[pair_identity(trial.pair)] = dict(trial.params)
        elif self._failed and trial.state != "duplicate":
            self._failed.pop(pair_identity(trial.pair), None)

    def set_cost_estimate(self, cost_estimate: CostEstimate) -> None:
        """Sets the function that estimates the cost of a draw from now on."""
        self.sampler.cost_estimate = cost_estimate

    def requeue_failed_pairs(self) -> int:
        """Queues the pairs of failed trials, except invalid ones, to be drawn again first; returns the queue's length."""
        for identity, params in self._failed.items():
            if self._pair_fingerprint(params) == identity:
                self._first_trials.pop(identity, None)
                self._queue.append(params)
        return len(self._queue)

    def next_trial(self, spent: PrefixSuffixSeconds, affordable: float = math.inf) -> Trial | NoDraw:
        """The next trial (running, or final if it is a duplicate or no valid pair), or the reason why there is none.

        Args:
            spent: cost of the trials so far.
            affordable: seconds that it may cost up to its first rung. More expensive draws are skipped; planned and queued
                ones are kept for later.
        """
        for _ in range(len(self._queue)):
            queued = self._make_trial(self._queue[0])
            if self._is_affordable(queued, affordable):
                self._queue.popleft()
                return queued
            self._queue.rotate(-1)
        for index, start in enumerate(self.space.start_with):
            if index not in self._planned:
                planned = self._make_trial(self.sampler.propose(self._trial_count, spent, start), index)
                if self._is_affordable(planned, affordable):
                    return planned
        if len(self._last_states) == MAX_DUPLICATES and set(self._last_states) == {"duplicate"}:
            unseen = self._find_unseen_draw()
            if unseen is None:
                return "too_expensive" if self._queue else "exhausted"
            self._queue.append(unseen)  # `_find_unseen_draw` returns it only once, and it may not be affordable yet
            return self.next_trial(spent, affordable)
        for refusals in range(MAX_TOO_EXPENSIVE):
            proposed = self._make_trial(
                self.sampler.propose(self._trial_count, spent, affordable=affordable, refusals=refusals)
            )
            if self._is_affordable(proposed, affordable):
                return proposed
        return "too_expensive"

    def _is_affordable(self, trial: Trial, affordable: float) -> bool:
        estimate = self.sampler.cost_estimate
        if affordable == math.inf or trial.state != "running" or estimate is None:
            return True
        cost = estimate(dict(trial.params))
        return cost is None or sum(cost) <= affordable

    def _make_trial(self, params: Params, planned: int | None = None) -> Trial:
        try:
            pair = self.space.pair(params).model_dump(mode="json")
        except UserError as error:
            plain = self.space.plain_pair(params)
            return Trial(self._trial_count, params, plain, "failed", cause=str(error), planned=planned)
        earlier = self._first_trials.get(pair_identity(pair))
        state: State = "running" if earlier is None else "duplicate"
        return Trial(self._trial_count, params, pair, state, duplicate_of=earlier, planned=planned)

    def _find_unseen_draw(self) -> Params | None:
        """A valid draw that was never made; None if it finds none."""
        for params in self._enumerated_or_random_draws():
            if canonical(params) not in self.sampler.drawn:
                identity = self._pair_fingerprint(params)
                if identity is not None and identity not in self._first_trials:
                    return params
        return None

    def _enumerated_or_random_draws(self) -> Iterator[Params]:
        """All draws of a small space, once in random order; random draws of a larger one."""
        size = self.space.draw_count()
        if size is not None and size <= MAX_ENUMERATED:
            if self._unexamined_draws is None:
                draws = list(self.space.all_draws())
                random.Random(seed_of(self.space.seed, "unseen")).shuffle(draws)
                self._unexamined_draws = iter(draws)
            yield from self._unexamined_draws
        else:
            seed = seed_of(self.space.seed, "unseen", self._trial_count)
            for number in range(MAX_RANDOM_TRIES):
                yield random_draw(self.space, seed_of(seed, number))

    def _pair_fingerprint(self, params: Mapping[str, Scalar]) -> str | None:
        """Fingerprint of the pair with these parameters; None if it is no valid pair."""
        try:
            return pair_identity(self.space.pair(params).model_dump(mode="json"))
        except UserError:
            return None


class _NonAdaptiveDraws:
    """Draws that do not depend on results: a list, a grid, random search.

    Args:
        draw: number of a trial -> its parameters, each a parameter of the space; None when there are no more.
    """

    def __init__(self, space: Space, draw: Callable[[int], Mapping[str, Scalar] | None]) -> None:
        self.space, self.draw = space, draw
        self._first_trials: dict[str, int] = {}
        self._trial_count = 0  # duplicates included; the number of the next one

    def record_trial(self, trial: Trial) -> None:
        """Adds a new trial; changed trials and those of other studies are ignored."""
        if trial.number >= self._trial_count:
            self._trial_count = trial.number + 1
            self._first_trials.setdefault(pair_identity(trial.pair), trial.number)

    def set_cost_estimate(self, cost_estimate: CostEstimate) -> None:
        """Does nothing: the draws do not depend on costs."""

    def requeue_failed_pairs(self) -> int:
        """Returns 0: no draw is made again."""
        return 0

    def next_trial(self, spent: PrefixSuffixSeconds, affordable: float = math.inf) -> Trial | NoDraw:
        """The next trial, running or a duplicate; "exhausted" at the end of the list."""
        number = self._trial_count
        params = self.draw(number)
        if params is None:
            return "exhausted"
        pair = self.space.pair(params).model_dump(mode="json")
        earlier = self._first_trials.get(pair_identity(pair))
        state: State = "running" if earlier is None else "duplicate"
        return Trial(number, dict(params), pair, state, duplicate_of=earlier)


def fixed_draw_source(space: Space, entries: Sequence[Mapping[str, Scalar]]) -> DrawSource:
    """A source of the draws in a list, in its order."""
    return _NonAdaptiveDraws(space, lambda number: entries[number] if number < len(entries) else None)


def random_search_source(space: Space) -> DrawSource:
    """A source of independent random draws, seeded by the space: random search."""
    return _NonAdaptiveDraws(space, lambda number: random_draw(space, seed_of(space.seed, "chance", number)))

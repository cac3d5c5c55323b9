"""What to draw next, over what the trials so far have shown: at random, by Optuna's TPE, or with spending in balance.

A pair costs little if what comes before its student is there already, so how often a new teacher is worth its price decides
what a search can afford. The balanced sampler asks what a surrogate expects of many draws and takes the best of those that it
can afford: all before the student (the prefix) costs no more than the student and its judges (the suffix), or whatever has been
spent on prefixes stays below what has been spent on suffixes. So cheap teachers come first, a dear one when students have cost
as much, and a poor choice wastes at most half of what was spent. If nothing is affordable it takes the best that there is.
A weight on gain per cost instead, as in the literature on cost-aware search, locks itself into the first teachers.
`experiments/compare_samplers.py` measures all of them on real pairs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from optuna.study import StudyDirection

from ktray.fingerprint import canonical, seed_of
from ktray.search.budget import CostEstimate, DrawCost
from ktray.search.observations import Observations
from ktray.search.space import Space
from ktray.search.space_tree import Choice, Parameter, Params, Scalar, all_values
from ktray.search.surrogate import Surrogate
from ktray.search.tpe import ParzenEstimators
from ktray.search.trial import PREFIX_STATES, Trial

STARTUP = 10  # trials with a result before TPE has anything to say, as in Optuna
FRESH = 64  # random draws that are compared,
NEARBY = 64  # draws that differ from a good trial in one part,
BUILDING = 32  # and random students on prefixes that exist
SHOWN = 96  # trials that the surrogate is shown
TRUST = 0.6  # a trial is varied so often as often as the next better one
QUOTED = 16  # draws of a new prefix whose price is asked for, the most promising ones


@dataclass(frozen=True)
class _Prefix:
    """Everything before a student, as parameters; `holders` are the trials that have it, unless they failed or it is poor."""

    params: Params
    holders: set[int] = field(default_factory=set)


class Sampler:
    """Proposes draws; knows the trials that it was told of.

    Args:
        cost_estimate: the price of a draw; None: nothing is too dear.
    """

    def __init__(self, space: Space, cost_estimate: CostEstimate | None = None) -> None:
        self.space, self.cost_estimate = space, cost_estimate
        self.observations = Observations(space)
        self._parzen, self._surrogate = ParzenEstimators(space), Surrogate(space)
        self.drawn: set[str] = set()  # canonical text of the params of all draws
        self._prefixes: dict[str, _Prefix] = {}
        self._prefix_of: dict[int, str] = {}
        self._waiting: dict[str, set[int]] = {}  # teacher -> trials that it has earned no student so far

    def observe(self, trial: Trial) -> None:
        """A trial is new or has changed."""
        self.observations.update(trial)
        if trial.number < 0:  # another study's: evidence, but none of its draws is one of ours
            return
        if trial.number not in self._prefix_of:
            self.drawn.add(canonical(dict(trial.params)))
            params = self.space.prefix(trial.params)
            self._prefix_of[trial.number] = name = canonical(params)
            self._prefixes.setdefault(name, _Prefix(params))
        holders = self._prefixes[self._prefix_of[trial.number]].holders
        holds = trial.state in PREFIX_STATES and not trial.waits_for_teacher
        (holders.add if holds else holders.discard)(trial.number)
        waiting = self._waiting.setdefault(self._teacher(trial.params), set())
        waits = trial.waits_for_teacher and trial.state == "paused"  # who was pruned does not wait: its teacher may have risen
        (waiting.add if waits else waiting.discard)(trial.number)

    def propose(
        self,
        count: int,
        spent: DrawCost,
        planned: Mapping[str, Scalar] | None = None,
        affordable: float = math.inf,
        attempt: int = 0,
    ) -> Params:
        """The next draw.

        The seed is the space's together with the number of trials: the same journal gives the same draw, and a search that is
        resumed does not repeat its own.

        Args:
            count: trials so far, duplicates and failures included.
            spent: what they have cost and will cost.
            planned: values that are settled beforehand; the others are drawn.
            left: seconds; of the draws that are asked for their price those that cost more come last.
            attempt: how many proposals after as many trials were refused.
        """
        seed = seed_of(self.space.seed, "sampler", count, *([attempt] if attempt else []))
        how = self.space.sampler
        if how == "balanced":
            return self._balanced(random.Random(seed), spent, planned or {}, affordable)
        if how == "random" or len(self.observations) < STARTUP:
            return random_draw(self.space, seed, planned)
        return self._parzen.densities(*self.observations.split(), seed).best(planned or {})

    def _balanced(self, generator: random.Random, spent: DrawCost, planned: Mapping[str, Scalar], affordable: float) -> Params:
        ranked, unknown = self.observations.ranked(SHOWN)
        draws = self._candidates([dict(trial.params) for trial in ranked], generator, planned)
        if not draws:  # all that is likely was made: whoever asked knows how to look for the rest
            return random_draw(self.space, generator.getrandbits(32), planned)
        if ranked:
            gains = self.expected_improvement(ranked, unknown, draws)
            draws = [draws[index] for index in np.argsort(-gains, kind="stable")]
        return (
            draws[0]
            if planned or self.cost_estimate is None
            else self._affordable(draws, spent, self.cost_estimate, affordable)
        )

    def expected_improvement(
        self, ranked: Sequence[Trial], unknown: Sequence[Trial], draws: Sequence[Params]
    ) -> NDArray[np.float64]:
        """What the surrogate expects of each draw, as `Surrogate.gain` says; trials as `Evidence.ranked` gives them."""
        left = [self.observations.left(trial) for trial in ranked]
        return self._surrogate.expected_improvement(
            [each.params for each in ranked], [each.params for each in unknown], draws, left
        )

    def _affordable(self, draws: Sequence[Params], spent: DrawCost, cost_estimate: CostEstimate, affordable: float) -> Params:
        """The first that can be afforded; else the first that `left` pays for, or the cheapest where nothing was bought yet."""
        asked: list[tuple[float, Params]] = []
        new = 0
        for draw in draws:
            exists = self._exists(draw)
            if exists and affordable == math.inf:
                return draw
            new += not exists
            if (exists or new <= QUOTED) and (price := cost_estimate(draw)) is not None and sum(price) <= affordable:
                asked.append((price.prefix, draw))
                balanced = price.prefix <= price.suffix or spent.prefix + price.prefix <= spent.suffix + price.suffix
                if exists or balanced:
                    return draw
        nothing = not any(each.holders for each in self._prefixes.values())
        if nothing and asked:
            return min(asked, key=lambda each: each[0])[1]
        return asked[0][1] if asked and affordable < math.inf else draws[0]

    def _candidates(self, ranked: Sequence[Params], generator: random.Random, planned: Mapping[str, Scalar]) -> list[Params]:
        """Draws that were never made: random ones, variations of good trials, and random students on prefixes that exist.

        A teacher that waits for others to be poorer than itself would get no student, so it is left out.
        """
        drawn = lambda given: random_draw(self.space, generator.getrandbits(32), {**given, **planned})  # noqa: E731
        found = [drawn({}) for _ in range(FRESH)]
        if ranked:
            found += [self._varied(_often_the_first(ranked, generator), generator, drawn) for _ in range(NEARBY)]
        existing = [each.params for each in self._prefixes.values() if each.holders]
        if existing:
            found += [drawn(generator.choice(existing)) for _ in range(BUILDING)]
        poor = {name for name, waiting in self._waiting.items() if waiting}
        new = {canonical(draw): draw for draw in found}
        return [draw for name, draw in new.items() if name not in self.drawn and not (poor and self._teacher(draw) in poor)]

    def _varied(self, draw: Params, generator: random.Random, drawn: Callable[[Params], Params]) -> Params:
        """The same with one parameter drawn again, and with whatever another branch asks for."""
        again = generator.choice(sorted(draw))
        return drawn({name: value for name, value in draw.items() if name != again})

    def _teacher(self, params: Mapping[str, Scalar]) -> str:
        """Which teacher a draw has, as canonical text."""
        return canonical({name: value for name, value in params.items() if name in self.space.teacher_parameters})

    def _exists(self, draw: Params) -> bool:
        known = self._prefixes.get(canonical(self.space.prefix(draw)))
        return known is not None and bool(known.holders)


def _often_the_first(ranked: Sequence[Params], generator: random.Random) -> Params:
    """One of the trials; each `TRUST` times as often as the one before it."""
    return ranked[min(len(ranked) - 1, int(generator.expovariate(-math.log(TRUST))))]


def propose(space: Space, trials: Sequence[Trial], planned: Mapping[str, Scalar] | None = None) -> Params:
    """The draw that follows these trials if nothing has a price."""
    sampler = Sampler(space)
    for trial in trials:
        sampler.observe(trial)
    return sampler.propose(len(trials), DrawCost(), planned)


def random_draw(space: Space, seed: int, planned: Mapping[str, Scalar] | None = None) -> Params:
    """A draw that ignores what is known; each parameter uniform, or log-uniform where the space says so."""
    generator = random.Random(seed)

    def ask(parameter: Parameter) -> Scalar:
        if planned and parameter.name in planned:
            return planned[parameter.name]
        values = all_values(parameter)
        if values is not None:
            return generator.choice(values)
        if not isinstance(parameter, Choice) and parameter.log:
            return float(min(parameter.high, parameter.low * (parameter.high / parameter.low) ** generator.random()))
        return generator.uniform(parameter.low, parameter.high)  # type: ignore[union-attr]

    return space.suggest(ask)


def directions(space: Space) -> list[StudyDirection | Literal["minimize", "maximize"]]:
    """Optuna's name for which way each objective is better."""
    return ["minimize" if objective.mode == "min" else "maximize" for objective in space.objectives]

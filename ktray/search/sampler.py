"""What to draw next, given the trials so far: at random, by Optuna's TPE, or balanced.

A pair costs little if what comes before its student exists already (its prefix), so how often a search pays for a new teacher
decides what it can afford. The balanced sampler ranks many candidate draws by their expected improvement and takes the best
that is affordable: one whose prefix exists, or costs no more than its student and evaluations (the suffix), or whose prefix
leaves the total spent on prefixes below the total spent on suffixes. So cheap teachers come first, an expensive one once as
much was spent on students, and a poor choice wastes at most half of the spending. If nothing is affordable, it takes the best.
Weighting improvement per cost instead, as the literature on cost-aware search does, gets stuck with the first teachers.
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
RANDOM_CANDIDATES = 64  # candidates drawn at random,
NEIGHBOURS = 64  # good trials with one parameter drawn again,
REUSING_CANDIDATES = 32  # and random students on prefixes that exist
MAX_OBSERVATIONS = 96  # trials that the surrogate is fitted to
PARENT_DECAY = 0.6  # a trial is chosen as the parent of a neighbour this many times as often as the next better one
MAX_ESTIMATES = 16  # candidates with a new prefix whose cost is estimated, the most promising ones


@dataclass(frozen=True)
class _Prefix:
    """All before a student, as parameters; `trials` are those that have it, unless they failed or their teacher is poor."""

    params: Params
    trials: set[int] = field(default_factory=set)


class Sampler:
    """Proposes draws from the trials that it observed.

    Args:
        cost_estimate: of a draw; None: everything is affordable.
    """

    def __init__(self, space: Space, cost_estimate: CostEstimate | None = None) -> None:
        self.space, self.cost_estimate = space, cost_estimate
        self.observations = Observations(space)
        self._parzen, self._surrogate = ParzenEstimators(space), Surrogate(space)
        self.drawn: set[str] = set()  # canonical text of the params of all draws
        self._prefixes: dict[str, _Prefix] = {}
        self._prefix_of: dict[int, str] = {}
        self._paused_by_teacher: dict[str, set[int]] = {}  # teacher -> trials that wait for it to be among the best

    def observe(self, trial: Trial) -> None:
        """Takes in a trial that is new or has changed."""
        self.observations.update(trial)
        if trial.number < 0:  # another study's: an observation, but not one of our draws
            return
        if trial.number not in self._prefix_of:
            self.drawn.add(canonical(dict(trial.params)))
            params = self.space.prefix(trial.params)
            self._prefix_of[trial.number] = name = canonical(params)
            self._prefixes.setdefault(name, _Prefix(params))
        trials = self._prefixes[self._prefix_of[trial.number]].trials
        usable = trial.state in PREFIX_STATES and not trial.waits_for_teacher
        (trials.add if usable else trials.discard)(trial.number)
        paused = self._paused_by_teacher.setdefault(self._teacher(trial.params), set())
        waits = trial.waits_for_teacher and trial.state == "paused"  # a pruned one does not: its teacher may have risen since
        (paused.add if waits else paused.discard)(trial.number)

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
            spent: what they cost, expected costs included.
            planned: values that are fixed; the others are drawn.
            affordable: seconds; candidates whose estimated cost is higher come last.
            attempt: how many proposals were refused since the last trial.
        """
        seed = seed_of(self.space.seed, "sampler", count, *([attempt] if attempt else []))
        method = self.space.sampler
        if method == "balanced":
            return self._balanced(random.Random(seed), spent, planned or {}, affordable)
        if method == "random" or len(self.observations) < STARTUP:
            return random_draw(self.space, seed, planned)
        return self._parzen.propose(*self.observations.split(), seed, planned or {})

    def _balanced(self, generator: random.Random, spent: DrawCost, planned: Mapping[str, Scalar], affordable: float) -> Params:
        ranked, pending = self.observations.ranked(MAX_OBSERVATIONS)
        draws = self._candidates([dict(trial.params) for trial in ranked], generator, planned)
        if not draws:  # all candidates were drawn before: the caller looks for an unseen draw
            return random_draw(self.space, generator.getrandbits(32), planned)
        if ranked:
            improvement = self.expected_improvement(ranked, pending, draws)
            draws = [draws[index] for index in np.argsort(-improvement, kind="stable")]
        if planned or self.cost_estimate is None:
            return draws[0]
        return self._affordable(draws, spent, self.cost_estimate, affordable)

    def expected_improvement(
        self, ranked: Sequence[Trial], pending: Sequence[Trial], draws: Sequence[Params]
    ) -> NDArray[np.float64]:
        """(len(draws),) as `Surrogate.expected_improvement` says; trials as `Observations.ranked` returns them."""
        ahead = [self.observations.rungs_ahead(trial) for trial in ranked]
        return self._surrogate.expected_improvement(
            [trial.params for trial in ranked], [trial.params for trial in pending], draws, ahead
        )

    def _affordable(self, draws: Sequence[Params], spent: DrawCost, cost_estimate: CostEstimate, affordable: float) -> Params:
        """The first draw that keeps the balance; else the first within `affordable`, or the cheapest if no prefix exists."""
        estimated: list[tuple[float, Params]] = []
        new = 0
        for draw in draws:
            exists = self._exists(draw)
            if exists and affordable == math.inf:
                return draw
            new += not exists
            if (exists or new <= MAX_ESTIMATES) and (cost := cost_estimate(draw)) is not None and sum(cost) <= affordable:
                estimated.append((cost.prefix, draw))
                balanced = cost.prefix <= cost.suffix or spent.prefix + cost.prefix <= spent.suffix + cost.suffix
                if exists or balanced:
                    return draw
        no_prefix = not any(prefix.trials for prefix in self._prefixes.values())
        if no_prefix and estimated:
            return min(estimated, key=lambda entry: entry[0])[1]
        return estimated[0][1] if estimated and affordable < math.inf else draws[0]

    def _candidates(self, ranked: Sequence[Params], generator: random.Random, planned: Mapping[str, Scalar]) -> list[Params]:
        """New draws: random ones, neighbours of good trials, and random students on prefixes that exist.

        Draws with a teacher that is not among the best are left out: they would only pause, too.
        """

        def complete(given: Mapping[str, Scalar]) -> Params:
            return random_draw(self.space, generator.getrandbits(32), {**given, **planned})

        found = [complete({}) for _ in range(RANDOM_CANDIDATES)]
        if ranked:
            found += [self._neighbour(_parent(ranked, generator), generator, complete) for _ in range(NEIGHBOURS)]
        existing = [prefix.params for prefix in self._prefixes.values() if prefix.trials]
        if existing:
            found += [complete(generator.choice(existing)) for _ in range(REUSING_CANDIDATES)]
        poor = {teacher for teacher, paused in self._paused_by_teacher.items() if paused}
        distinct = {canonical(draw): draw for draw in found}
        return [
            draw for text, draw in distinct.items() if text not in self.drawn and not (poor and self._teacher(draw) in poor)
        ]

    def _neighbour(self, draw: Params, generator: random.Random, complete: Callable[[Params], Params]) -> Params:
        """The same draw with one parameter drawn again, and with the parameters of its new branch if that chose one."""
        again = generator.choice(sorted(draw))
        return complete({name: value for name, value in draw.items() if name != again})

    def _teacher(self, params: Mapping[str, Scalar]) -> str:
        """Which teacher a draw has, as canonical text."""
        return canonical({name: value for name, value in params.items() if name in self.space.teacher_parameters})

    def _exists(self, draw: Params) -> bool:
        known = self._prefixes.get(canonical(self.space.prefix(draw)))
        return known is not None and bool(known.trials)


def _parent(ranked: Sequence[Params], generator: random.Random) -> Params:
    """One of the trials; each is chosen `PARENT_DECAY` times as often as the one before it."""
    return ranked[min(len(ranked) - 1, int(generator.expovariate(-math.log(PARENT_DECAY))))]


def propose(space: Space, trials: Sequence[Trial], planned: Mapping[str, Scalar] | None = None) -> Params:
    """The draw that follows these trials if costs do not matter."""
    sampler = Sampler(space)
    for trial in trials:
        sampler.observe(trial)
    return sampler.propose(len(trials), DrawCost(), planned)


def random_draw(space: Space, seed: int, planned: Mapping[str, Scalar] | None = None) -> Params:
    """A draw that ignores all trials; each parameter uniform, or log-uniform where the space says so."""
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
    """Optuna's direction of each objective."""
    return ["minimize" if mode == "min" else "maximize" for _, mode in space.objectives]

"""Proposes the next draw from the trials so far: at random, by Optuna's TPE, or by the balanced sampler.

A pair is cheap if its prefix exists already (everything before its student), so the number of new teachers determines what a
search costs. The balanced sampler ranks many candidate draws by expected improvement and takes the best one that keeps the
balance: its prefix exists, or costs no more than its suffix (the student and its evaluations), or total spending on prefixes,
this one included, stays at or below total spending on suffixes. So cheap teachers come first, an expensive teacher follows
when as much has been spent on students, and poor teachers waste at most half of the spending. If no candidate keeps the
balance, it takes the best one. Ranking by improvement per cost instead, as in the literature on cost-aware search, gets stuck
with the first teachers. `experiments/compare_samplers.py` compares all of these methods on real pairs.
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
from ktray.search.budget import CostEstimate, PrefixSuffixSeconds
from ktray.search.observations import Observations
from ktray.search.space import Space
from ktray.search.space_tree import Choice, Parameter, Params, Scalar, all_values
from ktray.search.surrogate import Surrogate
from ktray.search.tpe import TpeProposer
from ktray.search.trial import PREFIX_STATES, Trial

STARTUP = 10  # trials with a result before TPE replaces random draws, as in Optuna
RANDOM_CANDIDATES = 64  # candidates drawn at random
NEIGHBOURS = 64  # candidates that are good trials with one parameter drawn again
REUSING_CANDIDATES = 32  # candidates that are random students on existing prefixes
MAX_OBSERVATIONS = 96  # trials that the surrogate is fitted to
GOOD_DRAW_DECAY = 0.6  # ratio between the probabilities of a trial and of the next better one that a neighbour is made of it
MAX_ESTIMATES = 16  # the most promising candidates with a new prefix, for which the cost is estimated


@dataclass(frozen=True)
class _Prefix:
    """The parameters of a prefix, and the trials that have it, except failed ones and those with a poor teacher."""

    params: Params
    trials: set[int] = field(default_factory=set)


class Sampler:
    """Proposes draws, based on the trials that it has observed.

    Args:
        cost_estimate: estimates the cost of a draw; None: everything is affordable.
    """

    def __init__(self, space: Space, cost_estimate: CostEstimate | None = None) -> None:
        self.space, self.cost_estimate = space, cost_estimate
        self.observations = Observations(space)
        self._tpe, self._surrogate = TpeProposer(space), Surrogate(space)
        self.drawn: set[str] = set()  # canonical text of the parameters of each draw
        self._prefixes: dict[str, _Prefix] = {}
        self._prefix_of: dict[int, str] = {}
        self._paused_by_teacher: dict[str, set[int]] = {}  # teacher -> trials paused at rung 0

    def record_trial(self, trial: Trial) -> None:
        """Adds a new trial, or updates a changed one."""
        self.observations.update(trial)
        if trial.number < 0:  # from another study: an observation, but not a draw of this one
            return
        if trial.number not in self._prefix_of:
            self.drawn.add(canonical(dict(trial.params)))
            params = self.space.params_of_prefix(trial.params)
            self._prefix_of[trial.number] = name = canonical(params)
            self._prefixes.setdefault(name, _Prefix(params))
        trials = self._prefixes[self._prefix_of[trial.number]].trials
        usable = trial.state in PREFIX_STATES and not trial.is_stopped_at_teacher_rung
        (trials.add if usable else trials.discard)(trial.number)
        paused = self._paused_by_teacher.setdefault(self._teacher_identity(trial.params), set())
        waits = trial.is_stopped_at_teacher_rung and trial.state == "paused"  # once pruned, its teacher may be drawn again
        (paused.add if waits else paused.discard)(trial.number)

    def propose(
        self,
        count: int,
        spent: PrefixSuffixSeconds,
        planned: Mapping[str, Scalar] | None = None,
        affordable: float = math.inf,
        refusals: int = 0,
    ) -> Params:
        """The next draw.

        The random seed consists of the space's seed and the number of trials: the same journal gives the same draw, and a
        resumed search does not repeat earlier draws.

        Args:
            count: number of trials so far, duplicates and failures included.
            spent: their cost, expected costs included.
            planned: values that are fixed; the others are drawn.
            affordable: seconds; candidates with a higher estimated cost come last.
            refusals: number of proposals that were refused since the last trial.
        """
        seed = seed_of(self.space.seed, "sampler", count, *([refusals] if refusals else []))
        method = self.space.sampler_name
        if method == "balanced":
            return self._propose_balanced(random.Random(seed), spent, planned or {}, affordable)
        if method == "random" or len(self.observations) < STARTUP:
            return random_draw(self.space, seed, planned)
        return self._tpe.propose(*self.observations.good_and_bad(), seed, planned or {})

    def _propose_balanced(
        self, generator: random.Random, spent: PrefixSuffixSeconds, planned: Mapping[str, Scalar], affordable: float
    ) -> Params:
        ranked, pending = self.observations.ranked_and_pending(MAX_OBSERVATIONS)
        draws = self._candidates([dict(trial.params) for trial in ranked], generator, planned)
        if not draws:  # all candidates were drawn before: the caller searches for an unseen draw
            return random_draw(self.space, generator.getrandbits(32), planned)
        if ranked:
            improvement = self.expected_improvement(ranked, pending, draws)
            draws = [draws[index] for index in np.argsort(-improvement, kind="stable")]
        if planned or self.cost_estimate is None:
            return draws[0]
        return self._pick_balanced_draw(draws, spent, self.cost_estimate, affordable)

    def expected_improvement(
        self, ranked: Sequence[Trial], pending: Sequence[Trial], draws: Sequence[Params]
    ) -> NDArray[np.float64]:
        """(len(draws),) as in `Surrogate.expected_improvement`, for trials that `Observations.ranked` returned."""
        ahead = [self.observations.rungs_ahead(trial) for trial in ranked]
        return self._surrogate.expected_improvement(
            [trial.params for trial in ranked], [trial.params for trial in pending], draws, ahead
        )

    def _pick_balanced_draw(
        self, draws: Sequence[Params], spent: PrefixSuffixSeconds, cost_estimate: CostEstimate, affordable: float
    ) -> Params:
        """The first draw that keeps the balance; else the first within `affordable`, or the cheapest prefix if none exists."""
        estimated: list[tuple[float, Params]] = []
        new = 0
        for draw in draws:
            exists = self._has_existing_prefix(draw)
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
        """New draws: random ones, neighbours of good trials, and random students on existing prefixes.

        Leaves out teachers for which trials are already paused at rung 0: further trials would only pause there, too.
        """

        def complete(given: Mapping[str, Scalar]) -> Params:
            return random_draw(self.space, generator.getrandbits(32), {**given, **planned})

        found = [complete({}) for _ in range(RANDOM_CANDIDATES)]
        if ranked:
            found += [self._neighbour(_pick_good_draw(ranked, generator), generator, complete) for _ in range(NEIGHBOURS)]
        existing = [prefix.params for prefix in self._prefixes.values() if prefix.trials]
        if existing:
            found += [complete(generator.choice(existing)) for _ in range(REUSING_CANDIDATES)]
        poor = {teacher for teacher, paused in self._paused_by_teacher.items() if paused}
        distinct = {canonical(draw): draw for draw in found}
        return [
            draw
            for text, draw in distinct.items()
            if text not in self.drawn and not (poor and self._teacher_identity(draw) in poor)
        ]

    def _neighbour(self, draw: Params, generator: random.Random, complete: Callable[[Params], Params]) -> Params:
        """The same draw with one parameter drawn again; if that changes a branch, so are the branch's parameters."""
        again = generator.choice(sorted(draw))
        return complete({name: value for name, value in draw.items() if name != again})

    def _teacher_identity(self, params: Mapping[str, Scalar]) -> str:
        """Identity of a draw's teacher, as canonical text."""
        return canonical({name: value for name, value in params.items() if name in self.space.teacher_parameters})

    def _has_existing_prefix(self, draw: Params) -> bool:
        """Whether a usable trial has the prefix of this draw."""
        known = self._prefixes.get(canonical(self.space.params_of_prefix(draw)))
        return known is not None and bool(known.trials)


def _pick_good_draw(ranked: Sequence[Params], generator: random.Random) -> Params:
    """A random one of these draws, the best first; each is picked `GOOD_DRAW_DECAY` times as often as the one before it."""
    return ranked[min(len(ranked) - 1, int(generator.expovariate(-math.log(GOOD_DRAW_DECAY))))]


def propose_ignoring_costs(space: Space, trials: Sequence[Trial], planned: Mapping[str, Scalar] | None = None) -> Params:
    """The draw that follows these trials, ignoring costs."""
    sampler = Sampler(space)
    for trial in trials:
        sampler.record_trial(trial)
    return sampler.propose(len(trials), PrefixSuffixSeconds(), planned)


def random_draw(space: Space, seed: int, planned: Mapping[str, Scalar] | None = None) -> Params:
    """A draw that does not depend on trials; each parameter is uniform, or log-uniform if the space asks for that."""
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

    return space.build_draw(ask)


def optuna_directions(space: Space) -> list[StudyDirection | Literal["minimize", "maximize"]]:
    """Optuna's direction of each objective."""
    return ["minimize" if mode == "min" else "maximize" for _, mode in space.objectives]

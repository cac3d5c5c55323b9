"""What to draw next, over what the trials so far have shown: at random, by TPE, or by TPE with spending in balance.

A pair costs little if what comes before its student is there already, so how often a new teacher is worth its price decides
what a search can afford. The balanced sampler lets teachers cost as much as students do: while prefixes (all before the
student) have cost no more than suffixes, it takes TPE's own proposal. Else it takes the best of many draws that pay for
themselves: on a prefix that exists, or on one whose missing stages cost no more than its own student. A weight on gain per
cost instead, as in the literature on cost-aware search, locks itself into the first teachers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from optuna.study import StudyDirection

from ktray.fingerprint import canonical, seed_of
from ktray.search.evidence import Evidence
from ktray.search.space import Space
from ktray.search.tpe import Densities, Parzen
from ktray.search.tree import Choice, Parameter, Params, Scalar, all_values
from ktray.search.trial import Trial

STARTUP = 10  # trials with a result before TPE has anything to say, as in Optuna
TEACHERS = 3  # that exist before spending is balanced
DRAWS = 48  # that are compared when a new teacher is too dear
QUOTED = 6  # of them, the most promising, whose price is asked for

HOLDS = frozenset({"running", "paused", "completed", "pruned"})  # states of trials whose prefix is there or on its way
NO_TEACHER = canonical(None)


class Spend(NamedTuple):
    """Seconds of stages before the student, and of the student and what judges it."""

    prefix: float = 0.0
    suffix: float = 0.0


Quote = Callable[[Params], Spend | None]
"""What a draw would add to what is spent; None if it is no valid pair."""


def of_student(name: str) -> bool:
    """Whether a parameter is read by the student or its evaluations alone; all others decide what comes before."""
    return name.split(".")[0] in ("student", "evals")


def prefix(params: Mapping[str, Scalar]) -> Params:
    """The parameters of a draw that decide what comes before its student."""
    return {name: value for name, value in params.items() if not of_student(name)}


@dataclass(frozen=True)
class _Prefix:
    """Everything before a student, as parameters; `holders` are the trials that have it, unless they failed or it is poor."""

    params: Params
    teacher: str
    holders: set[int] = field(default_factory=set)


def _judged(params: Mapping[str, Scalar]) -> str:
    """Which teacher a draw has, by its parameters: what a teacher is judged by has no part in how it is transferred."""
    return canonical({name: value for name, value in params.items() if name.split(".")[0] in ("data", "teacher")})


def _trained(trial: Trial) -> str:
    """What a teacher is before a layer of it is read, so that two layers are one teacher."""
    teacher = trial.pair.get("teacher")
    return canonical(teacher and {name: value for name, value in teacher.items() if name not in ("layer", "pool", "dtype")})


class Sampler:
    """Proposes draws; knows the trials that it was told of.

    Args:
        quote: the price of a draw; None: only what exists already is known to be cheap.
    """

    def __init__(self, space: Space, quote: Quote | None = None) -> None:
        self.space, self.quote = space, quote
        self.evidence = Evidence(space)
        self._parzen = Parzen(space)
        self.made: set[str] = set()  # canonical text of the params of all draws
        self._prefixes: dict[str, _Prefix] = {}
        self._prefix_of: dict[int, str] = {}
        self._waiting: dict[str, set[int]] = {}  # teacher -> trials that it has earned no student so far

    def told(self, trial: Trial) -> None:
        """A trial is new or has changed."""
        self.evidence.update(trial)
        if trial.number < 0:  # another study's: evidence, but none of its draws is one of ours
            return
        if trial.number not in self._prefix_of:
            self.made.add(canonical(dict(trial.params)))
            params = prefix(trial.params)
            self._prefix_of[trial.number] = name = canonical(params)
            self._prefixes.setdefault(name, _Prefix(params, _trained(trial)))
        holders = self._prefixes[self._prefix_of[trial.number]].holders
        holds = trial.state in HOLDS and not trial.waits_for_teacher
        (holders.add if holds else holders.discard)(trial.number)
        waiting = self._waiting.setdefault(_judged(trial.params), set())
        (waiting.add if trial.waits_for_teacher else waiting.discard)(trial.number)

    def propose(self, count: int, spent: Spend, planned: Mapping[str, Scalar] | None = None) -> Params:
        """The next draw.

        The seed is the space's together with the number of trials: the same journal gives the same draw, and a search that is
        resumed does not repeat its own.

        Args:
            count: trials so far, duplicates and failures included.
            spent: what they have cost and will cost.
            planned: values that are settled beforehand; the others are drawn.
        """
        seed = seed_of(self.space.seed, "sampler", count)
        how = self.space.sampler
        if how == "random":
            return at_random(self.space, seed, planned)
        densities = None
        if len(self.evidence) >= STARTUP:
            densities = self._parzen.densities(*self.evidence.split(), seed)
        if how == "balanced" and not planned and self._in_debt(spent):
            found = self._thrifty(densities, seed)
            if found is not None:
                return found
        return at_random(self.space, seed, planned) if densities is None else densities.best(planned or {})

    def _in_debt(self, spent: Spend) -> bool:
        """Whether teachers have cost more than their share."""
        teachers = {each.teacher for each in self._prefixes.values() if each.holders} - {NO_TEACHER}
        return len(teachers) >= TEACHERS and spent.prefix > spent.suffix

    def _thrifty(self, densities: Densities | None, seed: int) -> Params | None:
        """The best of many new draws that pay for themselves; None if none does."""
        generator = random.Random(seed)
        if densities is None:
            fresh = [at_random(self.space, seed_of(seed, index)) for index in range(DRAWS)]
        else:
            fresh = densities.draws(DRAWS)
        draws = self._candidates(fresh, generator)
        scores = [0.0] * len(draws) if densities is None else densities.scores(draws).tolist()
        asked = 0
        for index in sorted(range(len(draws)), key=lambda index: -scores[index]):
            draw = draws[index]
            if self._exists(draw):
                return draw
            if self.quote is not None and asked < QUOTED:
                asked += 1
                price = self.quote(draw)
                if price is not None and price.prefix <= price.suffix:
                    return draw
        return None

    def _candidates(self, fresh: Sequence[Params], generator: random.Random) -> list[Params]:
        """Each draw as it is, on a prefix that exists, and on one that differs from that in one parameter; none made before.

        A teacher that waits for others to be poorer than itself would get no student, so it is left out.
        """
        existing = sorted(name for name, each in self._prefixes.items() if each.holders)
        found: dict[str, Params] = {}
        for draw in fresh:
            old = self._prefixes[generator.choice(existing)].params
            both = sorted(old.keys() & draw.keys())
            changed = {name: draw[name] for name in [generator.choice(both)]} if both else {}
            for params in ({**draw, **old, **changed}, {**draw, **old}, draw):
                whole = self.space.complete(params)
                found.setdefault(canonical(whole), whole)
        poor = {name for name, waiting in self._waiting.items() if waiting}
        return [draw for name, draw in found.items() if name not in self.made and not (poor and _judged(draw) in poor)]

    def _exists(self, draw: Params) -> bool:
        known = self._prefixes.get(canonical(prefix(draw)))
        return known is not None and bool(known.holders)


def propose(space: Space, trials: Sequence[Trial], planned: Mapping[str, Scalar] | None = None) -> Params:
    """The draw that follows these trials if nothing has a price."""
    sampler = Sampler(space)
    for trial in trials:
        sampler.told(trial)
    return sampler.propose(len(trials), Spend(), planned)


def at_random(space: Space, seed: int, planned: Mapping[str, Scalar] | None = None) -> Params:
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

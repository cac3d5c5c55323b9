"""What to draw next: TPE over what the trials so far have shown.

The sampler keeps nothing between draws. Each time it sees the ledger through a study in memory, for three reasons: a paused
trial is RUNNING in the ledger, and TPE would take it for a bad one although its rung has a score; duplicates and failures would
count as evidence; and proposing must not leave a trial behind.

Source: Watanabe, "Tree-Structured Parzen Estimator" (2023), arXiv:2304.11127; for several objectives Ozaki et al.,
"Multiobjective Tree-Structured Parzen Estimator" (JAIR 2022); both as in Optuna.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from ktray.fingerprint import seed_of
from ktray.search import rungs
from ktray.search.space import Space
from ktray.search.tree import Choice, Parameter, Params, Scalar, all_values, parameters
from ktray.search.trial import Trial


def propose(space: Space, trials: Sequence[Trial], planned: Mapping[str, Scalar] | None = None) -> Params:
    """The next draw.

    The seed is the space's together with the number of trials: the same ledger gives the same draw, and a search that is
    resumed does not repeat its own.

    Args:
        planned: values that are settled beforehand; the others are drawn.
    """
    study = _seen(space, trials)
    if planned:
        study.enqueue_trial(dict(planned))
    trial = study.ask()

    def ask(parameter: Parameter) -> Scalar:
        value: Scalar
        if isinstance(parameter, Choice):
            value = trial.suggest_categorical(parameter.name, parameter.labels)
        elif parameter.whole:
            value = trial.suggest_int(parameter.name, int(parameter.low), int(parameter.high), log=parameter.log)
        else:
            value = trial.suggest_float(parameter.name, parameter.low, parameter.high, log=parameter.log)
        return value

    return space.suggest(ask)


def at_random(space: Space, seed: int) -> Params:
    """A draw that ignores what is known; each parameter uniform, or log-uniform where the space says so."""
    generator = random.Random(seed)

    def ask(parameter: Parameter) -> Scalar:
        values = all_values(parameter)
        if values is not None:
            return generator.choice(values)
        if not isinstance(parameter, Choice) and parameter.log:
            return float(min(parameter.high, parameter.low * (parameter.high / parameter.low) ** generator.random()))
        return generator.uniform(parameter.low, parameter.high)  # type: ignore[union-attr]

    return space.suggest(ask)


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Optuna's name for what each parameter of a space is drawn from."""
    return {parameter.name: _distribution(parameter) for parameter, _ in parameters(space.root)}


def directions(space: Space) -> list[StudyDirection | Literal["minimize", "maximize"]]:
    """Optuna's name for which way each objective is better."""
    return ["minimize" if objective.mode == "min" else "maximize" for objective in space.objectives]


def _distribution(parameter: Parameter) -> BaseDistribution:
    if isinstance(parameter, Choice):
        return CategoricalDistribution(parameter.labels)
    if parameter.whole:
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _seen(space: Space, trials: Sequence[Trial]) -> optuna.Study:
    seed = seed_of(space.seed, "sampler", len(trials)) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `group`: the only way to draw branches jointly
        sampler = TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(sampler=sampler, directions=directions(space))
    finally:
        optuna.logging.set_verbosity(level)
    known = distributions(space)
    study.add_trials([_evidence(space, trial, known) for trial in in_order(space, trials)])
    return study


def in_order(space: Space, trials: Sequence[Trial]) -> list[Trial]:
    """Trials that say something: completed; then those with a score at a rung, furthest and best first; then the unknown.

    TPE fills its good part with completed trials and then with pruned ones. It would rank these by a value of the (single)
    objective; without one it takes them in this order, which also serves several objectives and a rung metric that is none.
    """
    completed = [trial for trial in trials if trial.state == "completed"]
    judged = [trial for trial in trials if trial.state in ("running", "paused", "pruned") and trial.scores]
    ranked: list[Trial] = []
    for rung in sorted({max(trial.scores) for trial in judged}, reverse=True):
        ranked += rungs.best_first(space.early_stop, [trial for trial in judged if max(trial.scores) == rung], rung)
    unknown = [trial for trial in trials if trial.state == "running" and not trial.scores]
    return [*completed, *ranked, *unknown]


def _evidence(space: Space, trial: Trial, known: Mapping[str, BaseDistribution]) -> FrozenTrial:
    state, values = (TrialState.PRUNED if trial.scores else TrialState.RUNNING), None
    if trial.state == "completed":
        state, values = TrialState.COMPLETE, [trial.objectives[o.metric] for o in space.objectives]
    drawn_from = {name: known[name] for name in trial.params}
    return create_trial(state=state, values=values, params=dict(trial.params), distributions=drawn_from)

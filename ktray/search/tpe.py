"""TPE: tree-structured Parzen estimators of the densities of good and bad trials, over the branches of a space.

Optuna's own sampler reads the whole study for each draw and treats rungs and failures differently from ktray. So this file, and
no other, uses a private part of Optuna: the estimator that its `TPESampler` builds from trials. Therefore `pyproject.toml`
keeps Optuna below its next major version, and a test compares our draws with those of Optuna's estimators.

Source: Watanabe, "Tree-Structured Parzen Estimator" (2023), arXiv:2304.11127; for several objectives Ozaki et al.,
"Multiobjective Tree-Structured Parzen Estimator" (JAIR 2022); both as in Optuna, with parameters of a branch drawn together.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler

from ktray.search.space import Space
from ktray.search.space_tree import Choice, Parameter, Params, Scalar, parameters_with_conditions
from ktray.search.trial import Trial

CANDIDATES = 24  # of which the best is proposed, as in Optuna


def optuna_distributions(space: Space) -> dict[str, BaseDistribution]:
    """Optuna's distribution of each parameter of a space."""
    return {parameter.name: _distribution(parameter) for parameter, _ in parameters_with_conditions(space.root)}


def _distribution(parameter: Parameter) -> BaseDistribution:
    if isinstance(parameter, Choice):
        return CategoricalDistribution(parameter.labels)
    if parameter.integer:
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _parameter_groups(space: Space) -> list[dict[str, BaseDistribution]]:
    """Groups of parameters that are always drawn together because they are in the same branches; single values are left out."""
    known, found = optuna_distributions(space), {}  # type: ignore[var-annotated]
    for parameter, conditions in parameters_with_conditions(space.root):
        if not known[parameter.name].single():
            found.setdefault(tuple(sorted(conditions.items())), {})[parameter.name] = known[parameter.name]
    return [dict(sorted(group.items())) for group in found.values()]


class TpeProposer:
    """Proposes draws of one space by TPE; caches each trial's parameters in the form that Optuna's estimators take."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._groups = _parameter_groups(space)
        self._rows: list[dict[int, list[float]]] = [{} for _ in self._groups]
        self._encoded: set[int] = set()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._optuna: Any = TPESampler(multivariate=True, group=True)

    def propose(self, good: Sequence[Trial], bad: Sequence[Trial], seed: int, planned: Mapping[str, Scalar]) -> Params:
        """What Optuna would propose: of each group of parameters the best of `CANDIDATES` draws from the good trials' density.

        With many trials, later ones count more.

        Args:
            seed: of the draws.
            planned: values that are fixed; the others are drawn.
        """
        for trial in (*good, *bad):
            self._cache_encoded_values(trial)
        generator = np.random.RandomState(seed % 2**32)
        values: dict[str, Scalar] = {}
        for index, group in enumerate(self._groups):
            of_good, of_bad = (self._fit_estimator(index, trials) for trials in (good, bad))
            rows = of_good.sample(generator, CANDIDATES)
            for name in planned.keys() & group.keys():
                rows[name] = np.full(CANDIDATES, group[name].to_internal_repr(planned[name]))
            winner = int(np.argmax(of_good.log_pdf(rows) - of_bad.log_pdf(rows)))
            values |= {name: group[name].to_external_repr(rows[name][winner].item()) for name in group}
        return self.space.build_draw(lambda parameter: {**values, **planned}.get(parameter.name, _single_value(parameter)))

    def _fit_estimator(self, index: int, trials: Sequence[Trial]) -> Any:
        """Optuna's estimator for one group of parameters, fitted to the trials that have all of them."""
        group, rows = self._groups[index], self._rows[index]
        found = [rows[trial.number] for trial in trials if trial.number in rows]
        columns = np.array(found).reshape(len(found), len(group)).T
        observed = dict(zip(group, columns, strict=True))
        return self._optuna._parzen_estimator_cls(observed, group, self._optuna._parzen_estimator_parameters)

    def _cache_encoded_values(self, trial: Trial) -> None:
        """Caches a trial's values of each group, if it has all parameters of the group."""
        if trial.number in self._encoded:
            return
        self._encoded.add(trial.number)
        for group, rows in zip(self._groups, self._rows, strict=True):
            if group.keys() <= trial.params.keys():
                rows[trial.number] = [known.to_internal_repr(trial.params[name]) for name, known in group.items()]


def _single_value(parameter: Parameter) -> Scalar:
    return parameter.labels[0] if isinstance(parameter, Choice) else parameter.low

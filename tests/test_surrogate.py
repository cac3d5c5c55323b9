"""The surrogate and its expected improvement, against scikit-learn's Gaussian process and over the branches of a space."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm, rankdata
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern

from ktray.search import sampler
from ktray.search.observations import Observations
from ktray.search.space import Space
from ktray.search.surrogate import (
    DIFFERENT,
    LENGTH_SCALE,
    NOISE_VARIANCES,
    RUNG_CORRELATIONS,
    SHARED_VARIANCE,
    Surrogate,
    _covariance,
    _fit_hyperparameters,
)
from ktray.search.trial import Trial
from tests.toy_space import toy_space

Columns = NDArray[np.float64]
INFINITE = 1e9  # a length scale so long that the distance has no effect
HOG = {"descriptor": {"kind": "hog"}}


def one_rate(folder: Path) -> Space:
    """A space with one parameter, a learning rate from 0.01 to 0.1 on a logarithmic scale."""
    return toy_space(folder, {"teacher": HOG, "transfer": {"kind": "clusters", "k": 5}})


def rates(*exponents: float) -> list[dict[str, Any]]:
    """Draws at these positions of the range, from 0 to 1."""
    return [{"student.schedule.lr": 0.01 * 10**exponent} for exponent in exponents]


def judged_process(seen: Columns, scores: Columns, step: float, noise: float) -> GaussianProcessRegressor:
    """Fitted to (n, 2) positions and rungs ahead; the similarity decreases with the number of rungs between two results."""
    rate = ConstantKernel(DIFFERENT) + ConstantKernel(1 - DIFFERENT) * RBF([LENGTH_SCALE, INFINITE])
    rungs = Matern([INFINITE, -1 / np.log(step) if step < 1 else INFINITE], nu=0.5)
    process = GaussianProcessRegressor(ConstantKernel(SHARED_VARIANCE) + rate * rungs, alpha=noise, optimizer=None)
    return process.fit(seen, scores)


@pytest.mark.parametrize("seed", range(6))
def test_expected_improvement_equals_that_of_the_most_likely_process_of_scikit_learn(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    seen, asked = np.stack([rng.random(24), np.sort(rng.integers(0, 3, 24))], 1), np.stack([rng.random(30), np.zeros(30)], 1)
    if seed % 2:  # the final order is the reverse of that at the rung: the rung predicts little
        first, last = seen[:, 1] > 0, seen[:, 1] == 0
        seen[first, 0], seen[last, 0] = np.sort(seen[first, 0]), np.sort(seen[last, 0])[::-1]
    scores = norm.ppf(1 - (rankdata(np.arange(24)) - 0.5) / 24)
    processes = [judged_process(seen, scores, step, noise) for step in RUNG_CORRELATIONS for noise in NOISE_VARIANCES]
    process = max(processes, key=lambda each: each.log_marginal_likelihood_value_)
    mean, deviation = process.predict(asked, return_std=True)
    above = (mean - process.predict(seen * [1, 0]).max()) / deviation
    expected = deviation * (above * norm.cdf(above) + norm.pdf(above))
    found = Surrogate(one_rate(tmp_path)).expected_improvement(
        rates(*seen[:, 0]), [], rates(*asked[:, 0]), seen[:, 1].astype(int).tolist()
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_rung_correlation_and_noise_are_fitted_to_the_trials(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers, space = ("conv3", "conv4", "conv5"), toy_space(tmp_path)
    layer, ahead = np.arange(30) % 3, np.repeat([0.0, 2.0], 15)
    draws = [sampler.random_draw(space, n, {"teacher": "rotation", "teacher.rotation.layer": layers[n % 3]}) for n in range(30)]
    surrogate = Surrogate(space)
    alike = surrogate._kernel_matrix(surrogate.encode_draws(draws), surrogate.encode_draws(draws))

    def fitted(worth_at_end: list[float], noise: float) -> tuple[float, float]:
        worth = np.where(ahead == 0, np.array(worth_at_end)[layer], np.array([1.2, 0.0, -1.2])[layer])
        return _fit_hyperparameters(alike, ahead, worth + noise * rng.normal(size=30))

    assert fitted([1.2, 0.0, -1.2], 0.2)[0] > 0.8 > fitted([-1.2, 0.0, 1.2], 0.2)[0]
    assert fitted([1.2, 0.0, -1.2], 0.2)[1] < fitted([1.2, 0.0, -1.2], 0.8)[1]


def test_a_pending_trial_lowers_the_improvement_expected_at_its_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys.modules["ktray.search.surrogate"], "NOISE_VARIANCES", NOISE_VARIANCES[:1]
    )  # two trials cannot determine the noise
    surrogate = Surrogate(one_rate(tmp_path))
    seen, asked = rates(0.0, 0.1), rates(0.6, 1.0)
    without, with_pending = (
        surrogate.expected_improvement(seen, [], asked),
        surrogate.expected_improvement(seen, rates(1.0), asked),
    )
    assert with_pending[1] < 0.6 * without[1]
    assert with_pending[0] < without[0]


def test_a_student_that_did_well_with_one_teacher_is_expected_to_with_another(tmp_path: Path) -> None:
    student = {"backbone": {"kind": "alexnet", "width": {"choice": [0.125, 0.25]}}, "schedule": {"epochs": 9}}
    space = toy_space(tmp_path, {"student": student})

    def draw(width: float, seed: int, **fixed: Any) -> dict[str, Any]:
        return sampler.random_draw(space, seed, {**fixed, "student.backbone.width": width})

    hogs = [draw(0.25, seed, teacher="hog") for seed in range(4)] + [draw(0.125, seed, teacher="hog") for seed in range(4)]
    asked = [draw(width, 9, teacher="rotation") for width in (0.25, 0.125)]
    wide, narrow = Surrogate(space).expected_improvement(hogs, [], asked)
    assert wide > 1.5 * narrow


def test_two_layers_of_a_teacher_are_more_similar_than_two_teachers(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    base = sampler.random_draw(space, 0, {"teacher": "rotation", "teacher.rotation.layer": "conv3"})
    layer = {**base, "teacher.rotation.layer": "conv4"}
    other = sampler.random_draw(space, 0, {**base, "teacher": "hog"})
    bad = [{**base, "transfer.k": k} for k in (5, 10, 20)]
    good = [sampler.random_draw(space, 0, {**other, "transfer.k": k, "teacher.hog.descriptor.cell": 4}) for k in (5, 10, 20)]
    rows = Surrogate(space)
    ours = rows._kernel_matrix(rows.encode_draws([base]), rows.encode_draws([layer, other]))[0]
    assert ours[0] > ours[1]
    gains = rows.expected_improvement([*good, *bad], [], [layer, {**other, "teacher.hog.descriptor.cell": 7}])
    assert gains[1] > gains[0]


def test_trials_stopped_at_a_rung_do_not_outweigh_completed_ones_of_the_same_layer(tmp_path: Path) -> None:
    space = toy_space(tmp_path)

    def draw(layer: str, number: int) -> dict[str, Any]:
        return sampler.random_draw(space, number, {"teacher": "rotation", "teacher.rotation.layer": layer})

    ended = [draw("conv4", number) for number in range(3)] + [draw("conv3", number) for number in range(9)]
    stopped = [draw("conv3", number) for number in range(9, 12)] + [draw("conv4", number) for number in range(3, 12)]
    ranked, asked = [*ended, *stopped], [draw("conv4", 99), draw("conv3", 99)]
    left = [0] * len(ended) + [2] * len(stopped)
    best, often = Surrogate(space).expected_improvement(ranked, [], asked, left)
    assert best > 2 * often
    best, often = Surrogate(space).expected_improvement(ranked, [], asked)  # as if all were completed
    assert best < often


@pytest.mark.parametrize("partial", [False, True])
def test_similarity_over_branches_is_positive_definite(tmp_path: Path, partial: bool) -> None:
    space = toy_space(tmp_path)
    draws = [sampler.random_draw(space, seed) for seed in range(80)]
    if partial:  # as in results of a study without some of the parameters
        rng = np.random.default_rng(0)
        draws = [{name: value for name, value in draw.items() if rng.random() < 0.7} for draw in draws]
    surrogate = Surrogate(space)
    ahead = np.arange(len(draws)) % 4.0  # rungs
    covariance = _covariance(
        surrogate._kernel_matrix(surrogate.encode_draws(draws), surrogate.encode_draws(draws)), ahead, ahead, 0.6
    )
    assert np.linalg.eigvalsh(covariance).min() > -1e-9
    assert np.isfinite(surrogate.expected_improvement(draws[:40], draws[40:44], draws[44:])).all()
    if not partial:
        np.testing.assert_allclose(np.diag(covariance), SHARED_VARIANCE + 1)


def test_neighbouring_numbers_of_a_choice_are_similar(tmp_path: Path) -> None:
    space = toy_space(
        tmp_path, {"teacher": HOG, "student": {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": {"epochs": 9}}}
    )
    surrogate = Surrogate(space)
    rows = surrogate.encode_draws([{"transfer.k": k} for k in (5, 10, 20)])
    near, far = surrogate._kernel_matrix(rows[:1], rows)[0, 1:]
    assert near > far


def test_a_search_with_the_surrogate_beats_random_search_on_a_space_with_branches(tmp_path: Path) -> None:
    """Compares the best of 20 draws, mean over ten seeds, for a score with its maximum in one branch."""

    def value(params: dict[str, Any]) -> float:
        bonus = 0.5 if params.get("teacher.rotation.layer") == "conv4" else 0.0
        return bonus - abs(np.log10(params["student.schedule.lr"]) + 1.5) + params["transfer.k"] / 40

    def best(how: str, seed: int) -> float:
        space = toy_space(tmp_path, sampler=how, seed=seed, early_stop=None)
        proposing, values = sampler.Sampler(space), []
        for number in range(20):
            params = proposing.propose(number, sampler.PrefixSuffixSeconds())
            values.append(value(params))
            trial = Trial(number, params, {}, "completed", objectives={"linear_probe/top1": values[-1]})
            proposing.record_trial(trial)
        return max(values)

    ours, chance = (np.mean([best(how, seed) for seed in range(10)]) for how in ("balanced", "random"))
    top = 0.5 + 20 / 40
    assert top - ours < 0.5 * (top - chance)


def test_only_the_order_of_results_matters(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    found = []
    for stretch in (1.0, 1000.0):
        trials = []
        for number in range(12):
            params = sampler.random_draw(space, number)
            trial = Trial(number, params, {}, "completed")
            trials.append(dataclasses.replace(trial, objectives={"linear_probe/top1": stretch * np.exp(number % 5)}))
        proposing = sampler.Sampler(space)
        for trial in trials:
            proposing.record_trial(trial)
        assert Observations(space, trials).ranked_and_pending(3)[0][0].number == 4
        found.append(proposing.propose(12, sampler.PrefixSuffixSeconds()))
    assert found[0] == found[1]

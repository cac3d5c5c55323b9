"""Proposals of the sampler: reproducible from the journal, and concentrated on what scored well."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ktray.search import sampler
from ktray.search.observations import Observations
from ktray.search.space import Space
from ktray.search.trial import Trial
from tests.toy_space import ranked_numbers, score, toy_space

TWO = [{"metric": "linear_probe/top1", "mode": "max"}, {"metric": "cost/seconds", "mode": "min"}]


def history(space: Space, count: int) -> list[Trial]:
    trials: list[Trial] = []
    for number in range(count):
        params = sampler.random_draw(space, number)
        trials.append(Trial(number, params, space.pair(params).model_dump(mode="json")))
    return trials


def paused(trials: list[Trial]) -> list[Trial]:
    return [dataclasses.replace(trial, state="paused", epoch=1, scores={1: score(trial)}) for trial in trials]


def completed(trials: list[Trial]) -> list[Trial]:
    return [
        dataclasses.replace(trial, state="completed", objectives={"linear_probe/top1": score(trial), "cost/seconds": 1.0})
        for trial in trials
    ]


def proposals(space: Space, trials: list[Trial], count: int = 20) -> list[str]:
    """Teachers of draws after histories that differ only in failed trials, which are counted but not learned from."""
    failed = [dataclasses.replace(trials[0], number=len(trials) + i, state="failed") for i in range(count)]
    return [str(sampler.propose_ignoring_costs(space, [*trials, *failed[:index]])["teacher"]) for index in range(count)]


def test_the_same_history_gives_the_same_draw(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    trials = completed(history(space, 12))
    assert sampler.propose_ignoring_costs(space, trials) == sampler.propose_ignoring_costs(space, trials)


def test_one_more_trial_gives_another_draw(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    draws = [sampler.propose_ignoring_costs(space, history(space, count))["student.schedule.lr"] for count in range(6)]
    assert len(set(draws)) == 6


def test_another_seed_gives_another_draw(tmp_path: Path) -> None:
    first, second = toy_space(tmp_path), toy_space(tmp_path, seed=1)
    assert sampler.propose_ignoring_costs(first, []) != sampler.propose_ignoring_costs(second, [])


def test_planned_values_are_kept_and_the_others_are_drawn(tmp_path: Path) -> None:
    params = sampler.propose_ignoring_costs(toy_space(tmp_path), [], {"teacher": "rotation", "transfer.k": 20})
    assert (params["teacher"], params["transfer.k"]) == ("rotation", 20)
    assert set(params) == {
        *("teacher", "teacher.rotation.layer", "teacher.rotation.schedule.epochs", "transfer.k", "student.schedule.lr")
    }


@pytest.mark.parametrize("objectives", [TWO[:1], TWO])
def test_scores_at_a_rung_attract_the_sampler(tmp_path: Path, objectives: list[dict[str, str]]) -> None:
    space = toy_space(tmp_path, objectives=objectives)
    trials = history(space, 40)
    share = proposals(space, trials).count("rotation") / 20
    assert proposals(space, paused(trials)).count("rotation") / 20 >= max(0.8, share)


@pytest.mark.parametrize("objectives", [TWO[:1], TWO])
def test_good_completed_trials_attract_the_sampler(tmp_path: Path, objectives: list[dict[str, str]]) -> None:
    space = toy_space(tmp_path, objectives=objectives)
    assert proposals(space, completed(history(space, 40))).count("rotation") >= 15


def test_observations_are_ranked_by_rung_and_then_by_score(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    zero, one, two, three, four, five = history(space, 6)
    trials = [
        zero,
        dataclasses.replace(one, state="paused", epoch=1, scores={1: 0.3}),
        dataclasses.replace(two, state="pruned", epoch=3, scores={1: 0.1, 3: 0.1}),
        dataclasses.replace(three, state="running", epoch=1, scores={1: 0.4}),
        dataclasses.replace(four, state="duplicate"),
        dataclasses.replace(five, state="completed", scores={1: 0.0}, objectives={"linear_probe/top1": 0.1}),
    ]
    assert ranked_numbers(Observations(space, trials)) == [5, 2, 3, 1, 0]


def test_failures_and_duplicates_are_no_observations(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    trials = history(space, 4)
    assert ranked_numbers(Observations(space, [dataclasses.replace(trial, state="failed") for trial in trials])) == []
    assert ranked_numbers(Observations(space, [dataclasses.replace(trial, state="duplicate") for trial in trials])) == []


def test_random_draws_stay_inside_the_space(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    draws = [sampler.random_draw(space, seed) for seed in range(200)]
    rates = [float(draw["student.schedule.lr"]) for draw in draws]  # type: ignore[arg-type]
    assert min(rates) >= 0.01
    assert max(rates) <= 0.1
    assert 0.02 < sorted(rates)[100] < 0.05  # the median of a log-uniform draw is near 0.032, of a uniform one near 0.055
    assert {draw["teacher"] for draw in draws} == {"hog", "rotation"}

"""Observations of a sampler: ranked, split into good and bad, limited in number, and independent of the order of updates."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.study._multi_objective import _fast_non_domination_rank

from ktray.search.observations import MAX_SPLIT, Observations, _nondominated_order
from ktray.search.trial import Trial
from tests.toy_space import toy_space

TWO = [{"metric": "linear_probe/top1", "mode": "max"}, {"metric": "cost/seconds", "mode": "min"}]


def trials(count: int, seed: int = 0) -> list[Trial]:
    rng = random.Random(seed)
    found = []
    for number in range(count):
        trial = Trial(number, {}, {}, rng.choice(["running", "paused", "completed", "failed", "duplicate", "pruned"]))  # type: ignore[arg-type]
        scores = {rung: rng.random() for rung in (1, 3)[: rng.randrange(1, 3)]} if trial.state != "running" else {}
        objectives = {"linear_probe/top1": rng.random(), "cost/seconds": rng.random()}
        found.append(dataclasses.replace(trial, scores=scores, objectives=objectives if trial.state == "completed" else {}))
    return found


@pytest.mark.parametrize("objectives", [TWO[:1], TWO])
def test_observations_do_not_depend_on_the_order_of_updates_or_on_earlier_states(
    tmp_path: Path, objectives: list[dict[str, str]]
) -> None:
    space, final = toy_space(tmp_path, objectives=objectives), trials(500)
    straight, shuffled = Observations(space, final), Observations(space)
    for trial in final:
        shuffled.update(dataclasses.replace(trial, state="running", scores={}, objectives={}))
    rng = random.Random(1)
    rng.shuffle(final)
    for trial in final:
        if trial.scores and trial.state not in ("failed", "duplicate"):
            shuffled.update(dataclasses.replace(trial, state="paused", scores={1: trial.scores[1]}, objectives={}))
        shuffled.update(trial)
    assert straight.ranked_and_pending(200) == shuffled.ranked_and_pending(200)
    assert straight.good_and_bad() == shuffled.good_and_bad()


def test_the_best_tenth_is_good_but_at_most_twenty_five(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    for count, good in ((10, 1), (95, 10), (600, 25)):
        split = Observations(space, [completed(number, number / count) for number in range(count)]).good_and_bad()
        assert [trial.number for trial in split[0]] == list(range(count - good, count))


def completed(number: int, value: float, seconds: float = 1.0) -> Trial:
    return Trial(number, {}, {}, "completed", objectives={"linear_probe/top1": value, "cost/seconds": seconds})


def test_a_large_split_keeps_the_good_and_the_newest_trials(tmp_path: Path) -> None:
    best = [completed(number, 2 + number) for number in range(25)]
    good, bad = Observations(
        toy_space(tmp_path), [*best, *(completed(number, 0.5) for number in range(25, 2000))]
    ).good_and_bad()
    assert [trial.number for trial in good] == list(range(25))
    assert [trial.number for trial in bad] == list(range(2000 - MAX_SPLIT + 25, 2000))


def test_a_large_ranking_keeps_the_best_and_the_newest_trials(tmp_path: Path) -> None:
    best = [completed(number, 2 - number / 100) for number in range(25)]
    many = [*best, *(completed(number, number / 10_000) for number in range(25, 2000))]
    ranked, _ = Observations(toy_space(tmp_path), many).ranked_and_pending(50)
    assert [trial.number for trial in ranked] == [*range(25), *range(1999, 1974, -1)]


def test_rungs_ahead_end_with_the_full_training_of_the_student(tmp_path: Path) -> None:
    space = toy_space(tmp_path)  # rungs after 1, 3 and 9 epochs
    observations = Observations(space)
    pair = {"student": {"schedule": {"epochs": 9}}}
    stopped = [Trial(0, {}, pair, "pruned", scores=scores) for scores in ({1: 0.5}, {1: 0.5, 3: 0.6})]
    assert [observations.rungs_ahead(trial) for trial in (*stopped, completed(1, 0.7))] == [2, 1, 0]
    assert observations.rungs_ahead(Trial(2, {}, pair, "pruned", teacher_score=0.4)) == 3
    assert observations.rungs_ahead(Trial(3, {}, {"student": {"schedule": {"epochs": 3}}}, "paused", scores={1: 0.5})) == 1


def test_an_old_trial_on_the_pareto_front_stays_good(tmp_path: Path) -> None:
    rng = random.Random(0)
    many = [completed(number, rng.random(), 1 + rng.random()) for number in range(1, 1000)]
    good, _ = Observations(toy_space(tmp_path, objectives=TWO), [completed(0, 0.99, 0.5), *many]).good_and_bad()
    assert good[0].number == 0


@pytest.mark.parametrize("count", [3, 20, 60])
def test_fronts_are_ranked_as_by_optuna(count: int) -> None:
    import numpy as np

    losses = np.random.default_rng(count).integers(0, 8, size=(60, 2)).astype(float)
    ranks = _fast_non_domination_rank(losses)
    assert sorted(ranks[_nondominated_order(losses, count)]) == sorted(ranks)[:count]


def test_a_running_trial_counts_as_bad(tmp_path: Path) -> None:
    running: Callable[[int], Trial] = lambda number: Trial(number, {}, {})  # noqa: E731
    good, bad = Observations(toy_space(tmp_path), [*(completed(n, n) for n in range(10)), running(10)]).good_and_bad()
    assert ([trial.number for trial in good], bad[-1].number) == ([9], 10)

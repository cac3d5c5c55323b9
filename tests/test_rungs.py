"""Who goes on at a rung: successive halving by promotion, on hand-made scores."""

from __future__ import annotations

import dataclasses
import random

import pytest

from ktray.search.halving import RungScores, best_first, next_rung, rung_epochs
from ktray.search.space_file import EarlyStop
from ktray.search.trial import State, Trial

STOP = EarlyStop(metric="knn/top1", rungs=(1, 3, 9), reduction=3, mode="max")


def promotion(stop: EarlyStop | None, trials: list[Trial]) -> Trial | None:
    number = RungScores(stop, trials).promotion()
    return None if number is None else next(trial for trial in trials if trial.number == number)


def best_unfinished(stop: EarlyStop, trials: list[Trial]) -> Trial | None:
    number = RungScores(stop, trials).best_unfinished()
    return None if number is None else next(trial for trial in trials if trial.number == number)


def trial(number: int, scores: dict[int, float], state: State = "paused", epochs: int = 9) -> Trial:
    pair = {"student": {"schedule": {"epochs": epochs}}}
    return Trial(number, {}, pair, state, epoch=max(scores, default=0), scores=scores)


def at_first_rung(*scores: float) -> list[Trial]:
    return [trial(number, {1: score}) for number, score in enumerate(scores)]


def test_the_last_rung_is_the_full_training_of_each_student() -> None:
    assert rung_epochs(STOP, 9) == (1, 3, 9)
    assert rung_epochs(STOP, 5) == (1, 3, 5)
    assert rung_epochs(STOP, 3) == (1, 3)
    assert rung_epochs(STOP, 1) == (1,)
    assert rung_epochs(None, 9) == (9,)


def test_a_trial_goes_to_its_next_rung() -> None:
    assert next_rung(STOP, trial(0, {})) == 1
    assert next_rung(STOP, trial(0, {1: 0.1})) == 3
    assert next_rung(STOP, trial(0, {1: 0.1}, epochs=2)) == 2
    with pytest.raises(ValueError, match="all of its 9 epochs"):
        next_rung(STOP, trial(0, {9: 0.1}))


def test_nobody_goes_on_before_enough_have_come() -> None:
    assert promotion(STOP, at_first_rung(0.9, 0.8)) is None


def test_the_best_third_goes_on() -> None:
    found = promotion(STOP, at_first_rung(0.1, 0.9, 0.5))
    assert found is not None
    assert found.number == 1


def test_in_mode_min_the_smallest_goes_on() -> None:
    found = promotion(STOP.model_copy(update={"mode": "min"}), at_first_rung(0.5, 0.9, 0.1))
    assert found is not None
    assert found.number == 2


def test_a_trial_is_promoted_once() -> None:
    trials = at_first_rung(0.1, 0.9, 0.5)
    trials[1] = dataclasses.replace(trials[1], state="running")
    assert promotion(STOP, trials) is None


def test_a_late_better_trial_opens_a_place_although_another_went_on_before() -> None:
    trials = [*at_first_rung(0.1, 0.9, 0.5, 0.4, 0.3), trial(5, {1: 0.95})]
    trials[1] = trial(1, {1: 0.9, 3: 0.91})
    found = promotion(STOP, trials)
    assert found is not None
    assert found.number == 5


def test_of_equal_scores_the_earlier_draw_goes_on() -> None:
    found = promotion(STOP, at_first_rung(0.5, 0.5, 0.5))
    assert found is not None
    assert found.number == 0


def test_the_highest_rung_is_served_first() -> None:
    high = [trial(number, {1: 0.5, 3: score}) for number, score in enumerate((0.1, 0.2, 0.3))]
    low = [trial(number, {1: 0.9}) for number in range(3, 12)]
    found = promotion(STOP, [*high, *low])
    assert found is not None
    assert (found.number, found.epoch) == (2, 3)


def test_a_failed_trial_leaves_its_place_to_the_next() -> None:
    trials = at_first_rung(0.1, 0.9, 0.5)
    trials[1] = dataclasses.replace(trials[1], state="failed")
    found = promotion(STOP, trials)
    assert found is not None
    assert found.number == 2


def test_a_pruned_trial_keeps_its_place_and_never_goes_on() -> None:
    trials = at_first_rung(0.9, 0.1, 0.5)
    trials[0] = dataclasses.replace(trials[0], state="pruned")
    assert promotion(STOP, trials) is None


def test_without_early_stop_nobody_is_promoted() -> None:
    assert promotion(None, at_first_rung(0.1, 0.9, 0.5)) is None


def test_the_last_hope_is_the_furthest_and_then_the_best() -> None:
    trials = [*at_first_rung(0.9, 0.1), trial(2, {1: 0.2, 3: 0.3}), trial(3, {1: 0.2, 3: 0.4})]
    found = best_unfinished(STOP, trials)
    assert found is not None
    assert found.number == 3


def test_there_is_no_last_hope_once_something_is_complete() -> None:
    assert best_unfinished(STOP, [*at_first_rung(0.9), trial(1, {9: 0.1}, "completed")]) is None
    assert best_unfinished(STOP, []) is None


def plainly_promoted(stop: EarlyStop, trials: list[Trial]) -> Trial | None:
    """The same rule, looking at every trial each time."""
    for rung in reversed(stop.rungs):
        reached = [each for each in trials if rung in each.scores]
        ranked = best_first(stop, [each for each in reached if each.state != "failed"], rung)
        places = ranked[: len(reached) // stop.reduction]
        due = [each for each in places if each.state == "paused" and each.epoch == rung]
        if due:
            return due[0]
    return None


def plain_hope(stop: EarlyStop, trials: list[Trial]) -> Trial | None:
    paused = [each for each in trials if each.state == "paused"]
    if not paused or any(each.state == "completed" for each in trials):
        return None
    furthest = max(each.epoch for each in paused)
    return best_first(stop, [each for each in paused if each.epoch == furthest], furthest)[0]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("mode", ["max", "min"])
def test_standings_promote_whom_all_scores_would_whatever_happened_before(seed: int, mode: str) -> None:
    """The oracle looks at every trial each time; scores are coarse, so that many are equal."""
    chance, stop = random.Random(seed), STOP.model_copy(update={"mode": mode})
    standings, trials = RungScores(stop), list[Trial]()

    def tell(new: Trial) -> None:
        standings.update(trials[new.number] if new.number < len(trials) else None, new)
        trials[new.number : new.number + 1] = [new]

    promoted = 0
    for _ in range(200):
        due, hope = plainly_promoted(stop, trials), plain_hope(stop, trials)
        assert standings.promotion() == (None if due is None else due.number)
        assert standings.best_unfinished() == (None if hope is None else hope.number)
        if due is not None and chance.random() < 0.7:
            promoted += 1
            tell(dataclasses.replace(due, state="running"))
        running = [each for each in trials if each.state == "running"]
        if not running or chance.random() < 0.5:
            tell(trial(len(trials), {}, "running"))
            continue
        one = chance.choice(running)
        ahead = [rung for rung in stop.rungs if rung > one.epoch]
        scores = {**one.scores, ahead[0]: chance.randrange(8) / 8}
        state: State = chance.choices(["paused", "failed", "pruned"], [8, 1, 1])[0]
        if state == "failed":
            scores = dict(one.scores)
        elif len(ahead) == 1:
            state = "completed"
        tell(dataclasses.replace(one, state=state, scores=scores, epoch=max(scores, default=0)))
    assert promoted > 10

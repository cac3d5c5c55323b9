"""Successive halving: which trial is promoted at a rung, on hand-made scores."""

from __future__ import annotations

import dataclasses
import random

import pytest

from ktray.search.halving import RungScores, next_stop_epoch, rung_epochs, sorted_by_rung_score
from ktray.search.space_file import EarlyStop
from ktray.search.trial import State, Trial

STOP = EarlyStop(metric="knn/top1", rungs=(1, 3, 9), reduction=3, mode="max")


def promotion(stop: EarlyStop | None, trials: list[Trial]) -> Trial | None:
    number = RungScores(stop, trials).promotion()
    return None if number is None else next(trial for trial in trials if trial.number == number)


def best_paused_if_none_completed(stop: EarlyStop, trials: list[Trial]) -> Trial | None:
    number = RungScores(stop, trials).best_paused_if_none_completed()
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
    assert next_stop_epoch(STOP, trial(0, {})) == 1
    assert next_stop_epoch(STOP, trial(0, {1: 0.1})) == 3
    assert next_stop_epoch(STOP, trial(0, {1: 0.1}, epochs=2)) == 2
    with pytest.raises(ValueError, match="all of its 9 epochs"):
        next_stop_epoch(STOP, trial(0, {9: 0.1}))


def test_no_trial_is_promoted_before_enough_reached_the_rung() -> None:
    assert promotion(STOP, at_first_rung(0.9, 0.8)) is None


def test_the_best_third_is_promoted() -> None:
    found = promotion(STOP, at_first_rung(0.1, 0.9, 0.5))
    assert found is not None
    assert found.number == 1


def test_in_mode_min_the_smallest_score_is_promoted() -> None:
    found = promotion(STOP.model_copy(update={"mode": "min"}), at_first_rung(0.5, 0.9, 0.1))
    assert found is not None
    assert found.number == 2


def test_a_trial_is_promoted_once() -> None:
    trials = at_first_rung(0.1, 0.9, 0.5)
    trials[1] = dataclasses.replace(trials[1], state="running")
    assert promotion(STOP, trials) is None


def test_a_better_late_trial_is_promoted_although_another_was_before() -> None:
    trials = [*at_first_rung(0.1, 0.9, 0.5, 0.4, 0.3), trial(5, {1: 0.95})]
    trials[1] = trial(1, {1: 0.9, 3: 0.91})
    found = promotion(STOP, trials)
    assert found is not None
    assert found.number == 5


def test_of_equal_scores_the_earlier_draw_is_promoted() -> None:
    found = promotion(STOP, at_first_rung(0.5, 0.5, 0.5))
    assert found is not None
    assert found.number == 0


def test_the_highest_rung_is_promoted_from_first() -> None:
    high = [trial(number, {1: 0.5, 3: score}) for number, score in enumerate((0.1, 0.2, 0.3))]
    low = [trial(number, {1: 0.9}) for number in range(3, 12)]
    found = promotion(STOP, [*high, *low])
    assert found is not None
    assert (found.number, found.epoch) == (2, 3)


def test_a_failed_trial_gives_up_its_rank_to_the_next() -> None:
    trials = at_first_rung(0.1, 0.9, 0.5)
    trials[1] = dataclasses.replace(trials[1], state="failed")
    found = promotion(STOP, trials)
    assert found is not None
    assert found.number == 2


def test_a_pruned_trial_keeps_its_rank_and_is_never_promoted() -> None:
    trials = at_first_rung(0.9, 0.1, 0.5)
    trials[0] = dataclasses.replace(trials[0], state="pruned")
    assert promotion(STOP, trials) is None


def test_without_early_stop_no_trial_is_promoted() -> None:
    assert promotion(None, at_first_rung(0.1, 0.9, 0.5)) is None


def test_the_best_unfinished_trial_is_the_best_at_the_highest_rung() -> None:
    trials = [*at_first_rung(0.9, 0.1), trial(2, {1: 0.2, 3: 0.3}), trial(3, {1: 0.2, 3: 0.4})]
    found = best_paused_if_none_completed(STOP, trials)
    assert found is not None
    assert found.number == 3


def test_there_is_no_best_unfinished_trial_once_one_is_completed() -> None:
    assert best_paused_if_none_completed(STOP, [*at_first_rung(0.9), trial(1, {9: 0.1}, "completed")]) is None
    assert best_paused_if_none_completed(STOP, []) is None


def promotion_by_full_scan(stop: EarlyStop, trials: list[Trial]) -> Trial | None:
    """The rule of `RungScores.promotion`, applied to all trials."""
    for rung in reversed(stop.rungs):
        reached = [each for each in trials if rung in each.scores]
        ranked = sorted_by_rung_score(stop, [each for each in reached if each.state != "failed"], rung)
        promotable = ranked[: len(reached) // stop.reduction]
        due = [each for each in promotable if each.state == "paused" and each.epoch == rung]
        if due:
            return due[0]
    return None


def best_paused_by_full_scan(stop: EarlyStop, trials: list[Trial]) -> Trial | None:
    paused = [each for each in trials if each.state == "paused"]
    if not paused or any(each.state == "completed" for each in trials):
        return None
    furthest = max(each.epoch for each in paused)
    return sorted_by_rung_score(stop, [each for each in paused if each.epoch == furthest], furthest)[0]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("mode", ["max", "min"])
def test_incremental_updates_promote_the_same_trials_as_a_full_scan(seed: int, mode: str) -> None:
    """The scores are coarse, so that many are equal."""
    generator, stop = random.Random(seed), STOP.model_copy(update={"mode": mode})
    rung_scores, trials = RungScores(stop), list[Trial]()

    def update(new: Trial) -> None:
        rung_scores.update(trials[new.number] if new.number < len(trials) else None, new)
        trials[new.number : new.number + 1] = [new]

    promoted = 0
    for _ in range(200):
        due, unfinished = promotion_by_full_scan(stop, trials), best_paused_by_full_scan(stop, trials)
        assert rung_scores.promotion() == (None if due is None else due.number)
        assert rung_scores.best_paused_if_none_completed() == (None if unfinished is None else unfinished.number)
        if due is not None and generator.random() < 0.7:
            promoted += 1
            update(dataclasses.replace(due, state="running"))
        running = [each for each in trials if each.state == "running"]
        if not running or generator.random() < 0.5:
            update(trial(len(trials), {}, "running"))
            continue
        chosen = generator.choice(running)
        ahead = [rung for rung in stop.rungs if rung > chosen.epoch]
        scores = {**chosen.scores, ahead[0]: generator.randrange(8) / 8}
        state: State = generator.choices(["paused", "failed", "pruned"], [8, 1, 1])[0]
        if state == "failed":
            scores = dict(chosen.scores)
        elif len(ahead) == 1:
            state = "completed"
        update(dataclasses.replace(chosen, state=state, scores=scores, epoch=max(scores, default=0)))
    assert promoted > 10

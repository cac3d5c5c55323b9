"""The balanced sampler and the budget: teachers cost no more than students, existing prefixes come before expensive ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import TPESampler

from ktray.errors import UserError
from ktray.fingerprint import canonical
from ktray.search import sampler, tpe
from ktray.search.budget import CostEstimate, PrefixSuffixSeconds, Spending
from ktray.search.sampler import Sampler
from ktray.search.space import Space
from ktray.search.space_tree import Params
from ktray.search.study import Study
from ktray.search.trial import Trial
from tests.toy_space import FINITE, drive, end_segment, next_assignment, score, states, toy_space

OVER_BALANCE = PrefixSuffixSeconds(prefix=100.0, suffix=99.0)


def teacher(space: Space, params: Params) -> str:
    """Identity of the teacher: the prefix without layer and k."""
    prefix = space.params_of_prefix(params)
    return canonical({name: value for name, value in prefix.items() if not name.endswith(("layer", ".k"))})


def history(space: Space, count: int, judge: Callable[[Trial], float] = score) -> list[Trial]:
    trials = []
    for number in range(count):
        params = sampler.random_draw(space, number)
        trial = Trial(number, params, space.pair(params).model_dump(mode="json"), "completed")
        trials.append(dataclasses.replace(trial, objectives={"linear_probe/top1": judge(trial)}))
    return trials


def observing(space: Space, trials: list[Trial], cost_estimate: CostEstimate | None = None) -> Sampler:
    found = Sampler(space, cost_estimate)
    for trial in trials:
        found.record_trial(trial)
    return found


def new_costs(seconds: dict[str, float]) -> CostEstimate:
    """A prefix costs the seconds of its teacher's branch, and a suffix 10 s."""
    return lambda params: PrefixSuffixSeconds(seconds[str(params["teacher"])], 10.0)


def wide(folder: Path, **fields: Any) -> Space:
    """A space with many teachers, of which a short history contains only a few."""
    rotation = {
        "pretext": {"kind": "rotation"},
        "backbone": {"kind": "alexnet", "width": 0.125},
        "layer": {"choice": ["conv3", "conv4", "conv5"]},
        "schedule": {"epochs": {"choice": [2, 4, 8, 16]}, "lr": {"choice": [0.01, 0.02, 0.05, 0.1]}},
    }
    hog = {"descriptor": {"kind": "hog", "cell": {"choice": [4, 7]}}}
    return toy_space(folder, {"teacher": {"one_of": {"hog": hog, "rotation": rotation}}}, **fields)


@pytest.mark.parametrize("count", [6, 30])
def test_over_balance_only_existing_prefixes_are_drawn_if_new_ones_are_expensive(tmp_path: Path, count: int) -> None:
    space = wide(tmp_path)
    trials = history(space, count)
    ours = observing(space, trials, new_costs({"hog": 1000.0, "rotation": 1000.0}))
    existing = {canonical(space.params_of_prefix(trial.params)) for trial in trials}
    draws = [ours.propose(count + index, OVER_BALANCE) for index in range(20)]
    assert {canonical(space.params_of_prefix(draw)) for draw in draws} <= existing
    assert len({draw["student.schedule.lr"] for draw in draws}) == 20


def test_over_balance_a_cheap_prefix_is_still_drawn(tmp_path: Path) -> None:
    space = wide(tmp_path)
    trained = [trial for trial in history(space, 60, lambda trial: 0.5) if trial.params["teacher"] == "rotation"][:4]
    trials = [dataclasses.replace(trial, number=number) for number, trial in enumerate(trained)]
    cheap, expensive = (observing(space, trials, new_costs({"hog": hog, "rotation": 1000.0})) for hog in (1.0, 1000.0))
    assert "hog" in {cheap.propose(20 + index, OVER_BALANCE)["teacher"] for index in range(20)}
    assert {expensive.propose(20 + index, OVER_BALANCE)["teacher"] for index in range(20)} == {"rotation"}


def test_costs_change_nothing_while_everything_is_affordable(tmp_path: Path) -> None:
    space = wide(tmp_path)
    trials = history(space, 30)
    with_costs, without_costs = (
        observing(space, trials, new_costs({"hog": 1000.0, "rotation": 1000.0})),
        observing(space, trials),
    )
    for count in range(30, 36):
        assert with_costs.propose(count, PrefixSuffixSeconds(0.0, 2000.0)) == without_costs.propose(count, OVER_BALANCE)


def test_a_new_teacher_is_drawn_once_suffixes_have_cost_as_much_as_all_prefixes_with_it(tmp_path: Path) -> None:
    space = wide(tmp_path)
    trials = history(space, 3, lambda trial: 0.5)
    ours, known = (
        observing(space, trials, new_costs({"hog": 100.0, "rotation": 100.0})),
        {teacher(space, trial.params) for trial in trials},
    )
    for spent, new in (
        (PrefixSuffixSeconds(300.0, 389.0), False),
        (PrefixSuffixSeconds(300.0, 391.0), True),
    ):  # its student costs 10
        assert any(teacher(space, ours.propose(3 + index, spent)) not in known for index in range(10)) is new


def test_the_first_draw_has_a_cheap_teacher(tmp_path: Path) -> None:
    for seed in range(5):
        space = wide(tmp_path, seed=seed)
        assert (
            observing(space, [], new_costs({"hog": 50.0, "rotation": 1000.0})).propose(0, PrefixSuffixSeconds())["teacher"]
            == "hog"
        )


def test_if_nothing_keeps_the_balance_the_most_promising_draw_is_made(tmp_path: Path) -> None:
    """In a space where the only teacher so far has no other student left."""
    hogs = {"descriptor": {"kind": "hog", "cell": {"choice": [4, 7, 14]}}}
    student = {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": {"epochs": 9}}
    space = toy_space(tmp_path, {"teacher": hogs, "transfer": {"kind": "clusters", "k": 5}, "student": student})
    params: Params = {"teacher.descriptor.cell": 4}
    trial = Trial(0, params, space.pair(params).model_dump(mode="json"), "completed", objectives={"linear_probe/top1": 0.5})
    ours = observing(space, [trial], lambda params: PrefixSuffixSeconds(100.0, 1.0))
    assert ours.propose(1, OVER_BALANCE)["teacher.descriptor.cell"] in (7, 14)


def test_the_prefix_of_a_failed_trial_does_not_count_as_existing(tmp_path: Path) -> None:
    space = wide(tmp_path)
    trials = history(space, 12)
    failed = [dataclasses.replace(trial, state="failed") for trial in trials[6:]]
    ours = observing(space, [*trials[:6], *failed], new_costs({"hog": 1000.0, "rotation": 1000.0}))
    existing = {canonical(space.params_of_prefix(trial.params)) for trial in trials[:6]}
    assert {canonical(space.params_of_prefix(ours.propose(12 + index, OVER_BALANCE))) for index in range(20)} <= existing


def test_a_poor_teacher_is_not_drawn_again_with_another_k(tmp_path: Path) -> None:
    space = wide(tmp_path)

    def is_poor(draw: Mapping[str, Any]) -> bool:
        return draw.get("teacher.hog.descriptor.cell") == 4

    trials = history(space, 30, lambda trial: 0.9 if is_poor(trial.params) else 0.1)
    waits: dict[str, Any] = {"state": "paused", "teacher_score": 0.9, "objectives": {}}
    judged = [dataclasses.replace(trial, **waits) if is_poor(trial.params) else trial for trial in trials]
    free = lambda params: PrefixSuffixSeconds(0.0, 1.0)  # noqa: E731
    before, after = (
        [observing(space, some, free).propose(30 + n, OVER_BALANCE) for n in range(20)] for some in (trials, judged)
    )
    assert any(map(is_poor, before))
    assert not any(map(is_poor, after))


def test_a_teacher_with_pruned_trials_may_be_drawn_again_in_a_later_session(tmp_path: Path) -> None:
    """Among more teachers it may be one of the best; here it is the only one left to draw."""
    hogs = {"descriptor": {"kind": "hog", "cell": {"choice": [4, 7]}}}
    space = toy_space(tmp_path, {**FINITE, "teacher": hogs})
    pairs = [(4, 5), (4, 10), (4, 20), (7, 5)]
    draws: list[Params] = [{"teacher.descriptor.cell": cell, "transfer.k": k} for cell, k in pairs]
    *good, poor = [Trial(n, draw, space.pair(draw).model_dump(mode="json"), teacher_score=0.9) for n, draw in enumerate(draws)]
    good = [dataclasses.replace(trial, state="completed", objectives={"linear_probe/top1": 0.5}) for trial in good]
    ours = observing(space, [*good, dataclasses.replace(poor, state="pruned", teacher_score=0.8)])
    left = [{"teacher.descriptor.cell": 7, "transfer.k": k} for k in (10, 20)]
    assert all(ours.propose(4 + n, PrefixSuffixSeconds()) in left for n in range(20))


def test_no_draw_is_proposed_twice_while_there_are_others(tmp_path: Path) -> None:
    space = wide(tmp_path)
    trials = history(space, 20)
    ours = observing(space, trials, new_costs({"hog": 1000.0, "rotation": 1000.0}))
    made = {canonical(dict(trial.params)) for trial in trials}
    assert not made & {canonical(ours.propose(20 + index, OVER_BALANCE)) for index in range(20)}


def test_random_draws_depend_on_neither_trials_nor_costs(tmp_path: Path) -> None:
    space = wide(tmp_path, sampler="random")
    assert observing(space, history(space, 40)).propose(40, OVER_BALANCE) == observing(space, []).propose(
        40, PrefixSuffixSeconds()
    )


def test_a_study_can_be_resumed_with_another_sampler(tmp_path: Path) -> None:
    Study.open(tmp_path, toy_space(tmp_path)).prune_and_close()
    Study.open(tmp_path, toy_space(tmp_path, sampler="random")).prune_and_close()
    with pytest.raises(UserError, match=r"sampler cannot be 'cheapest'. It is one of balanced, tpe, random"):
        toy_space(tmp_path, sampler="cheapest")


def test_tpe_draws_the_same_as_the_estimators_of_optuna(tmp_path: Path) -> None:
    """In a space without branches, compared with the estimators that Optuna's sampler builds from an Optuna study."""
    hog = {"descriptor": {"kind": "hog", "cell": {"choice": [4, 7]}}}
    space = toy_space(tmp_path, {"teacher": hog}, sampler="tpe")
    trials = history(space, 24, lambda trial: float(trial.params["student.schedule.lr"]))
    study = optuna.create_study(direction="maximize", sampler=TPESampler(multivariate=True, seed=0))
    known = tpe.optuna_distributions(space)
    for trial in trials:
        value = trial.objectives["linear_probe/top1"]
        study.add_trial(optuna.trial.create_trial(params=dict(trial.params), distributions=known, value=value))
    builder: Any = study.sampler
    split = optuna.samplers._tpe.sampler._split_trials(study, study.trials, 3)
    good, bad = (
        builder._build_parzen_estimator(study, dict(sorted(known.items())), some, handle_below=False) for some in split
    )
    rows = good.sample(np.random.RandomState(7), tpe.CANDIDATES)
    winner = int(np.argmax(good.log_pdf(rows) - bad.log_pdf(rows)))
    best = {name: known[name].to_external_repr(values[winner].item()) for name, values in rows.items()}
    assert tpe.TpeProposer(space).propose(*observing(space, trials).observations.good_and_bad(), 7, {}) == best


def test_the_cost_of_a_stage_is_attributed_to_a_trial(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path))
    first = next_assignment(study).trial.number
    study.attribute_expected_costs(first, {"prefix": {"teacher-1": 100.0}, "suffix": {"student-1": 10.0}})
    assert "teacher-1" in study.spending
    assert study.spending.spent == PrefixSuffixSeconds(100.0, 10.0)


def test_recorded_costs_replace_expected_ones_and_survive_a_resume(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    with Study.open(tmp_path, space) as study:
        first, second = next_assignment(study), next_assignment(study)
        study.attribute_expected_costs(
            first.trial.number, {"prefix": {"teacher-1": 100.0, "features-1": 5.0}, "suffix": {"student-1": 10.0}}
        )
        study.attribute_expected_costs(second.trial.number, {"prefix": {}, "suffix": {"student-2": 20.0}})
        study.record_costs(first.trial.number, {"teacher-1": 130.0, "features-1": 1.0, "student-1": 9.0})
        end_segment(study, first)
        study.record_costs(second.trial.number, {})  # its student failed: no record, no cost
        study.fail(second.trial.number, "out of memory")
        assert study.spending.spent == PrefixSuffixSeconds(131.0, 9.0)
    assert Study.open(tmp_path, space).spending.spent == PrefixSuffixSeconds(131.0, 9.0)


def test_a_search_starts_nothing_after_its_stage_hours_are_spent_and_resumes_with_more(tmp_path: Path) -> None:
    space = toy_space(tmp_path, budget={"trials": 9, "concurrent": 1, "hours": 1.5}, early_stop=None)
    with Study.open(tmp_path, space) as study:
        for _ in range(2):
            assignment = next_assignment(study)
            study.attribute_expected_costs(
                assignment.trial.number, {"prefix": {f"teacher-{assignment.trial.number}": 3000.0}, "suffix": {}}
            )
            end_segment(study, assignment)
        assert study.next() == "done"
        assert study.stop_reason == "1.67 of 1.5 stage hours are spent"
        assert study.prune_and_close() == []
    with Study.open(tmp_path, space) as study:
        assert study.next() == "done"
    with Study.open(tmp_path, toy_space(tmp_path, budget={"trials": 9, "concurrent": 1, "hours": 2}, early_stop=None)) as study:
        drive(study)
        assert study.draw_count == 9


def test_interrupted_trials_resume_although_their_costs_exceed_the_budget(tmp_path: Path) -> None:
    space = toy_space(tmp_path, budget={"trials": 9, "concurrent": 2, "hours": 1}, early_stop=None)
    with Study.open(tmp_path, space) as study:
        for assignment in (next_assignment(study), next_assignment(study)):
            study.attribute_expected_costs(
                assignment.trial.number, {"prefix": {f"teacher-{assignment.trial.number}": 2400.0}, "suffix": {}}
            )
    with Study.open(tmp_path, space) as study:
        drive(study)
        assert states(study) == {"completed": 2}
        assert study.stop_reason == "1.33 of 1 stage hours are spent"


def test_interrupted_trials_do_not_resume_after_the_time_limit(tmp_path: Path) -> None:
    now = [0.0]
    space = toy_space(tmp_path, budget={"trials": 9, "concurrent": 2, "hours": 1, "stop_after": "10s"}, early_stop=None)
    with Study.open(tmp_path, space, clock=lambda: now[0]) as study:
        next_assignment(study)
        now[0] = 11
        study.prune_and_close()
    with Study.open(tmp_path, space, clock=lambda: now[0]) as study:
        assert (study.next(), study.stop_reason) == ("done", "stop_after (10 s) is used up")


def costing(folder: Path, cost_estimate: CostEstimate, **fields: Any) -> Study:
    """A study with a budget of one stage hour and estimated costs of draws."""
    space = wide(folder, budget={"trials": 9, "concurrent": 2, "hours": 1}, early_stop=None, **fields)
    study = Study.open(folder, space)
    study.set_cost_estimate(cost_estimate)
    return study


def spend(study: Study, seconds: float) -> None:
    """Runs one trial with a teacher that takes this many seconds."""
    assignment = next_assignment(study)
    number = assignment.trial.number
    study.attribute_expected_costs(number, {"prefix": {f"teacher-{number}": seconds}, "suffix": {}})
    end_segment(study, assignment)


@pytest.mark.parametrize("how", ["balanced", "random", "tpe"])
def test_only_the_first_draw_may_cost_more_than_the_remaining_hours(tmp_path: Path, how: str) -> None:
    with costing(tmp_path, lambda params: PrefixSuffixSeconds(360_000.0, 10.0), sampler=how) as study:
        spend(study, 3240.0)
        assert study.next() == "done"
        assert study.stop_reason == "the 0.1 of 1 stage hours that are left pay for no other draw"
        assert study.draw_count == 1
    with Study.open(tmp_path, study.space) as again:
        again.set_cost_estimate(lambda params: PrefixSuffixSeconds(300.0, 10.0))
        next_assignment(again)


@pytest.mark.parametrize("how", ["balanced", "random", "tpe"])
def test_the_remaining_hours_are_spent_on_affordable_draws(tmp_path: Path, how: str) -> None:
    suffix_seconds = {"hog": 10.0, "rotation": 360_000.0}
    with costing(
        tmp_path, lambda params: PrefixSuffixSeconds(5.0, suffix_seconds[str(params["teacher"])]), sampler=how
    ) as study:
        spend(study, 3400.0)
        drive(study)
        assert {trial.params["teacher"] for trial in study.trials()[1:]} == {"hog"}
        assert study.draw_count == 9


def test_an_unaffordable_planned_draw_is_made_when_running_trials_cost_less_than_expected(tmp_path: Path) -> None:
    with costing(
        tmp_path, lambda params: PrefixSuffixSeconds(1000.0, 10.0), start_with=[{"teacher": "hog"}, {"teacher": "rotation"}]
    ) as study:
        assignment = next_assignment(study)
        study.attribute_expected_costs(assignment.trial.number, {"prefix": {"teacher-1": 3000.0}, "suffix": {}})
        assert study.next() == "wait"
        study.record_costs(assignment.trial.number, {"teacher-1": 100.0})
        end_segment(study, assignment)
        assert next_assignment(study).trial.params["teacher"] == "rotation"


def test_an_unaffordable_planned_draw_does_not_block_others(tmp_path: Path) -> None:
    start = [{"teacher": "hog", "teacher.hog.descriptor.cell": 4}, {"teacher": "rotation"}, {"teacher": "hog"}]
    prefix_seconds = {"hog": 15.0, "rotation": 360_000.0}
    with costing(
        tmp_path, lambda params: PrefixSuffixSeconds(prefix_seconds[str(params["teacher"])], 1.0), start_with=start
    ) as study:
        drive(study)
        assert study.draw_count == 9
        assert [trial.planned for trial in study.trials()][:3] == [0, 2, None]
    with Study.open(tmp_path, study.space, trials="+1") as again:
        again.set_cost_estimate(lambda params: PrefixSuffixSeconds(15.0, 1.0))
        assert next_assignment(again).trial.planned == 1


def test_a_search_that_spent_its_hours_before_any_result_still_completes_one_trial(tmp_path: Path) -> None:
    space = wide(tmp_path, budget={"trials": 9, "concurrent": 1, "hours": 1})
    with Study.open(tmp_path, space) as study:
        for _ in range(2):
            spend(study, 1900.0)
        assert states(study) == {"paused": 2}
        drive(study)
        assert states(study) == {"completed": 1, "paused": 1}
        assert study.stop_reason == "1.06 of 1 stage hours are spent"


def test_spending_counts_a_changed_trial_once() -> None:
    trial = Trial(0, {}, {}, attributed_costs={"prefix": {"a": 1.0}, "suffix": {"b": 2.0}})
    spending = Spending([trial, trial])
    spending.record_trial(dataclasses.replace(trial, attributed_costs={"prefix": {"a": 5.0}, "suffix": {}}))
    assert spending.spent == PrefixSuffixSeconds(5.0, 0.0)
    assert ("a" in spending, "b" in spending) == (True, False)

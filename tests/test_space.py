"""What a space's file may say, what its draws are, and how its mistakes are named."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from ktray.errors import UserError
from ktray.search import space
from ktray.search.space import Space
from ktray.spec import HandcraftedTeacher, PairSpec
from tests.toy_space import FINITE, PAIR, content, toy_space, write
from tests.toys import DATA


def test_a_parameter_is_named_by_its_path_with_the_branch_in_it(tmp_path: Path) -> None:
    assert toy_space(tmp_path).fill_with_first_values({"teacher": "rotation"}) == {
        "teacher": "rotation",
        "teacher.rotation.layer": "conv3",
        "teacher.rotation.schedule.epochs": 2,
        "transfer.k": 5,
        "student.schedule.lr": 0.01,
    }


def test_parameters_of_other_branches_are_never_asked_for(tmp_path: Path) -> None:
    asked = []
    found = toy_space(tmp_path).build_draw(lambda parameter: asked.append(parameter.name) or _first(parameter))
    assert found["teacher"] == "hog"
    assert not [name for name in asked if "rotation" in name]


def _first(parameter: Any) -> Any:
    return parameter.labels[0] if hasattr(parameter, "labels") else parameter.low


def test_a_draw_becomes_a_pair(tmp_path: Path) -> None:
    found = toy_space(tmp_path)
    pair = found.pair(found.fill_with_first_values({"teacher.hog.descriptor.cell": 7, "transfer.k": 20}))
    assert isinstance(pair.teacher, HandcraftedTeacher)
    assert pair.teacher.descriptor.cell == 7
    assert pair.transfer.k == 20


def test_every_draw_of_a_finite_space_is_listed_once(tmp_path: Path) -> None:
    found = toy_space(tmp_path, FINITE)
    draws = list(found.all_draws())
    assert found.draw_count() == len(draws) == (2 + 3 * 2) * 3
    assert len({tuple(sorted(draw.items())) for draw in draws}) == len(draws)


def test_a_continuous_space_has_no_size(tmp_path: Path) -> None:
    assert toy_space(tmp_path).draw_count() is None


def test_a_whole_number_range_counts_both_of_its_ends(tmp_path: Path) -> None:
    found = toy_space(tmp_path, {**FINITE, "transfer": {"kind": "clusters", "k": {"log_int": [2, 9]}}})
    assert found.draw_count() == (2 + 3 * 2) * 8


def test_boundary_draws_touch_every_option_of_every_branch_and_both_ends_of_every_range(tmp_path: Path) -> None:
    touched = {(name, value) for _, params in toy_space(tmp_path).boundary_draws() for name, value in params.items()}
    assert touched >= {
        *itertools.product(["teacher"], ["hog", "rotation"]),
        *itertools.product(["teacher.hog.descriptor.cell"], [4, 7]),
        *itertools.product(["teacher.rotation.layer"], ["conv3", "conv4", "conv5"]),
        *itertools.product(["teacher.rotation.schedule.epochs"], [2, 4]),
        *itertools.product(["transfer.k"], [5, 10, 20]),
        *itertools.product(["student.schedule.lr"], [0.01, 0.1]),
    }


def test_boundary_draws_are_labelled_by_branch_and_what_is_varied(tmp_path: Path) -> None:
    labels = [label for label, _ in toy_space(tmp_path).boundary_draws()]
    assert labels[0] == "teacher=hog"
    assert "teacher=rotation: teacher.rotation.layer=conv4" in labels
    assert len(labels) == len(set(labels))


def test_options_may_be_null_lists_and_whole_mappings(tmp_path: Path) -> None:
    schedules = [{"epochs": 9, "lr": 0.02}, {"epochs": 9, "lr": 0.1}]
    student = {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": {"choice": schedules}}
    transfer = {"kind": "clusters", "k": 5, "pca": {"choice": [None, 4]}}
    found = toy_space(tmp_path, {"student": student, "transfer": transfer})
    params = found.fill_with_first_values({"transfer.pca": None, "student.schedule": '{"epochs":9,"lr":0.1}'})
    assert all(not isinstance(value, dict | list) for value in params.values())
    assert found.pair(params).student.schedule.lr == 0.1


def test_branches_may_hold_branches(tmp_path: Path) -> None:
    inner = {
        "one_of": {"small": {"kind": "alexnet", "width": {"choice": [0.125, 0.25]}}, "deep": {"kind": "resnet", "depth": 18}}
    }
    teacher = {"one_of": {"rotation": {"pretext": "rotation", "backbone": inner, "schedule": {"epochs": 1}}, **_hog()}}
    found = toy_space(tmp_path, {**FINITE, "teacher": teacher, "transfer": {"kind": "clusters", "k": 5}})
    assert found.draw_count() == 2 + 1 + 1
    assert "teacher.rotation.backbone.small.width" in {name for draw in found.all_draws() for name in draw}


def _hog() -> dict[str, Any]:
    return {"hog": {"descriptor": "hog"}}


def test_a_branch_may_leave_the_teacher_out_together_with_the_transfer_that_needs_one(tmp_path: Path) -> None:
    references = {
        "floor": {**PAIR, **FINITE, "teacher": None, "transfer": "none"},
        "hog": {**PAIR, **FINITE, "teacher": {"descriptor": "hog"}, "transfer": {"kind": "clusters", "k": 5}},
    }
    path = write(tmp_path)
    found = Space.from_content({**content(), "pair": {"one_of": references}}, path.name)
    assert [found.pair(draw).transfer.kind for draw in found.all_draws()] == ["none", "clusters"]


def test_overrides_reach_into_branches_and_replace_operators(tmp_path: Path) -> None:
    found = space.load(write(tmp_path), ["transfer.k=50", "teacher.rotation.layer=conv4", "student.augment.flip=true"])
    pair = found.pair(found.fill_with_first_values({"teacher": "rotation"}))
    assert (pair.transfer.k, pair.teacher.layer, pair.student.augment.flip) == (50, "conv4", True)


def test_an_override_keeps_one_branch_and_the_names_in_it(tmp_path: Path) -> None:
    found = space.load(write(tmp_path), ["teacher=rotation"])
    assert {draw["teacher"] for _, draw in found.boundary_draws()} == {"rotation"}
    assert "teacher.rotation.layer" in found.fill_with_first_values({})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("teacher=hgo", "no branch 'hgo'"),
        ("teacher.rotaton.layer=conv4", "no branch 'rotaton'"),
        ("transfer.k.deep=1", "drawn as a whole"),
        ("evals.7.k=1", "a list of 2"),
        ("transfer.kk=1", "Did you mean 'k'?"),
        ("k", "sets nothing"),
    ],
)
def test_an_override_that_names_no_place_is_refused(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(UserError, match=_literally(said)):
        space.load(write(tmp_path), [override])


def _literally(text: str) -> str:
    import re

    return re.escape(text)


def refusal(tmp_path: Path, pair: dict[str, Any] | None = None, **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        toy_space(tmp_path, pair, **fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("operand", "said"),
    [
        ({"choice": []}, "needs a list of options"),
        ({"choice": 5}, "needs a list of options"),
        ({"choice": [5, 5]}, "there twice"),
        ({"choice": [5, {"int": [1, 2]}]}, "Use one_of"),
        ({"int": [10, 5]}, "is empty. Write [5, 10]"),
        ({"int": [5, 9.5]}, "whole numbers"),
        ({"int": [5]}, "two ends"),
        ({"log_int": [0, 10]}, "logarithmic range starts above 0"),
        ({"log_float": [-1, 10]}, "logarithmic range starts above 0"),
        ({"chioce": [5, 10]}, "Did you mean 'choice'?"),
        ({"uniform": [5, 10]}, "Did you mean 'float'?"),
        ({"choice": [5], "default": 5}, "must be the only key"),
        ({"one_of": []}, "needs a mapping of branches"),
        ({"one_of": {"a.b": {}}}, "without a dot; quote it"),
        ({"choice": [5, 0]}, "should be at least 2"),
        ({"int": [1, 50]}, "should be at least 2"),
        ({"float": [2.0, 50.0]}, "should be a whole number"),
    ],
)
def test_an_impossible_operator_is_refused_with_its_path(tmp_path: Path, operand: Any, said: str) -> None:
    text = refusal(tmp_path, {"transfer": {"kind": "clusters", "k": operand}})
    assert text.startswith("toy.yaml: pair.transfer.k")
    assert said.lower() in text.lower()


def test_a_wrong_value_in_a_branch_is_named_with_the_branch(tmp_path: Path) -> None:
    teacher = {"one_of": {"hog": {"descriptor": {"kind": "hog", "cell": {"choice": [4, 1]}}}}}
    assert refusal(tmp_path, {"teacher": teacher}).startswith("toy.yaml: pair.teacher.hog.descriptor.cell: cell is 1")


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"descriptor": {"kind": "hog", "cel": 4}}, "there is no field 'cel'. Did you mean 'cell'?"),
        ({"descriptor": {"kind": "hogg"}}, "there is no descriptor kind 'hogg'. Did you mean 'hog'?"),
        ({"descriptor": "hog", "schedule": {"epochs": 3}}, "a handcrafted teacher (one with 'descriptor') has no 'schedule'"),
        ({"descriptor": "hog", "pretext": "rotation"}, "a teacher has exactly one of"),
        ({"pretext": "rotation", "backbone": "alexnet"}, "'schedule' is missing"),
        ({"pretext": "rotation", "backbone": "alexnet", "schedule": {"epochs": 3, "kind": "cosin"}}, "Did you mean 'cosine'?"),
    ],
)
def test_a_misspelt_teacher_is_told_what_would_be_right(tmp_path: Path, teacher: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, {"teacher": teacher})


def test_a_misspelt_field_that_is_also_missing_is_said_once(tmp_path: Path) -> None:
    text = refusal(tmp_path, {"teacher": {"pretext": "rotation", "backbone": "alexnet", "schedul": {"epochs": 3}}})
    assert "Did you mean 'schedule'?" in text
    assert "missing" not in text


def test_several_mistakes_come_in_one_message_each_once(tmp_path: Path) -> None:
    text = refusal(
        tmp_path, {"transfer": {"kind": "clusters", "kk": 5}, "student": {"backbone": "alexnett", "schedule": {"epochs": 9}}}
    )
    assert text.count("\n  - ") == 2
    assert text.startswith("toy.yaml: 2 things are wrong")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"study": "my study"}, "study name 'my study'"),
        ({"study": "../evil"}, "study name"),
        ({"objectives": []}, "objectives"),
        ({"objectives": [{"metric": "linear_prob/top1"}]}, "Did you mean 'linear_probe/top1'?"),
        ({"objectives": [{"metric": "linear_probe/top1", "mode": "min"}]}, "is better when larger"),
        ({"objectives": [{"metric": "linear_probe/top1", "mode": "best"}]}, "mode cannot be 'best'"),
        ({"objectives": [{"metric": "student/parameters"}]}, "Write mode: min if less is better, or mode: max"),
        ({"objectives": [{"metric": "knn/top1"}, {"metric": "knn/top1"}]}, "there twice"),
        ({"buget": {"trials": 3}}, "Did you mean 'budget'?"),
        ({"budget": {"trials": 0}}, "budget.trials"),
        ({"budget": {"stop_after": "noon"}}, "not a duration"),
        ({"budget": {"stop_after": 0}}, "should be above 0"),
        ({"early_stop": {"metric": "knn/top5", "rungs": [1, 9]}}, "no evaluation of the pair gives 'knn/top5'"),
        ({"early_stop": {"metric": "cost/seconds", "rungs": [1, 9]}}, "does not evaluate the student"),
        ({"early_stop": {"metric": "knn/top1", "rungs": [9, 1]}}, "write [1, 9]"),
        ({"early_stop": {"metric": "knn/top1", "rungs": [1, 3]}}, "write [1, 3, 9]"),
        ({"early_stop": {"metric": "knn/top1", "rungs": [1, 30]}}, "write [1, 9]"),
        ({"start_with": [{"teachr": "hog"}]}, "Did you mean 'teacher'?"),
        ({"start_with": [{"teacher": "sift"}]}, "'sift' is not among the options"),
        ({"start_with": [{"student.schedule.lr": 7}]}, "outside the range"),
        ({"start_with": [{"teacher": "hog", "teacher.rotation.layer": "conv4"}]}, "Add teacher: rotation"),
    ],
)
def test_a_wrong_field_around_the_pair_is_refused(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, **fields)


def test_a_first_draw_must_be_a_pair_although_each_of_its_values_is_one_at_some_corner(tmp_path: Path) -> None:
    schedule = {"epochs": 9, "kind": {"choice": ["warmup_stable", "cosine"]}, "decay": {"choice": [0.0, 0.2]}}
    student = {**FINITE["student"], "schedule": schedule}
    start = [{"student.schedule.kind": "cosine"}, {"student.schedule.kind": "cosine", "student.schedule.decay": 0.2}]
    said = refusal(tmp_path, {"student": student}, start_with=start)
    assert "start_with.1: pair.student.schedule: decay belongs to warmup_stable" in said


def test_a_metric_must_be_there_in_every_branch(tmp_path: Path) -> None:
    evals = {"one_of": {"quick": [{"kind": "knn"}], "both": [{"kind": "knn"}, {"kind": "linear_probe"}]}}
    assert "no evaluation of the pair gives 'linear_probe/top1' (teacher=hog, evals=quick)" in refusal(
        tmp_path, {"evals": evals}
    )


def test_a_search_may_not_choose_by_the_test_split(tmp_path: Path) -> None:
    evals = [{"kind": "knn"}, {"kind": "linear_probe", "split": "test"}]
    assert "linear_probe evaluates on test" in refusal(tmp_path, {"evals": evals})


def test_rungs_may_not_be_judged_by_the_teacher(tmp_path: Path) -> None:
    evals = [{"kind": "knn", "of": "teacher"}, {"kind": "linear_probe"}]
    assert "evaluates the teacher" in refusal(tmp_path, {"evals": evals})


def test_modes_are_filled_in_from_the_evaluation(tmp_path: Path) -> None:
    found = toy_space(tmp_path, objectives=[{"metric": "linear_probe/loss"}, {"metric": "cost/seconds"}])
    assert [*found.objectives] == [("linear_probe/loss", "min"), ("cost/seconds", "min")]
    assert found.early_stop is not None
    assert found.early_stop.mode == "max"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("12h", 43200), ("1h30m", 5400), (60, 60), ("0.5d", 43200)]
)
def test_a_duration_is_read_with_its_unit(tmp_path: Path, text: Any, seconds: float) -> None:
    assert toy_space(tmp_path, budget={"stop_after": text}).budget.stop_after == seconds


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text() + "study: again\n")
    with pytest.raises(UserError, match=r"line \d+, column 1: .*'study' is there twice"):
        space.load(path, [])


def test_a_number_like_1e_3_is_a_number(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace("- 0.01\n", "- 1e-2\n"))
    assert "1e-2" in path.read_text()
    assert space.load(path, []).fill_with_first_values({})["student.schedule.lr"] == 0.01


def test_a_file_makes_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("study: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UserError, match=r"the tag !!python/object/apply:os.system is not known"):
        space.load(path, [])


def test_a_resumed_study_may_have_another_budget_and_name(tmp_path: Path) -> None:
    first = toy_space(tmp_path).resume_relevant_fields()
    assert toy_space(tmp_path, budget={"trials": 99}, study="other").resume_relevant_fields() == first
    assert toy_space(tmp_path, FINITE).resume_relevant_fields() != first


def test_a_continuous_teacher_is_warned_about_and_a_continuous_student_is_not(tmp_path: Path) -> None:
    assert toy_space(tmp_path).sharing_warnings() == []
    found = toy_space(tmp_path, {"transfer": {"kind": "clusters", "k": {"log_int": [5, 100]}}})
    assert found.sharing_warnings() == [
        "pair.transfer.k is one of 96 values: every draw is a new clustering; use choice so that draws share it"
    ]


@pytest.mark.parametrize("wrap", [True, False])
def test_a_pair_file_holds_one_pair(tmp_path: Path, wrap: bool) -> None:
    import yaml

    pair = {"data": DATA, "teacher": {"descriptor": "hog"}, "transfer": {"kind": "clusters", "k": 5}, **FINITE}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"pair": pair} if wrap else pair))
    assert not space.is_space(path)
    found = space.load_named_pair(path, ["transfer.k=7"])
    assert isinstance(found["mine"], PairSpec)
    assert found["mine"].transfer.k == 7
    with pytest.raises(UserError, match="Did you mean 'transfer'"):
        space.load_named_pair(path, ["transfr.k=7"])


def test_a_space_is_no_pair(tmp_path: Path) -> None:
    assert space.is_space(write(tmp_path))
    with pytest.raises(UserError, match="search space"):
        space.load_named_pair(write(tmp_path), [])


def test_a_pair_file_draws_nothing(tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"pair": PAIR}))
    with pytest.raises(UserError, match="draws nothing"):
        space.load_named_pair(path, [])

"""The sharing that `plan` reports equals what the draws of a space have in common when all of them are built."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from ktray.cli import main
from ktray.errors import UserError
from ktray.pipeline.pair_graph import build
from ktray.runs.plan import count_shared_stages
from ktray.search.space import Space
from tests.toy_space import FINITE, PAIR, content, toy_space, write
from tests.toys import DATA

NESTED = {
    **FINITE,
    "data": {**DATA, "seed": {"choice": [0, 1]}},
    "transfer": {"kind": "clusters", "k": {"choice": [5, 10, 20]}, "l2": {"choice": [True, False]}},
}


def keys_of(space: Space) -> Any:
    def keys(params: Any) -> list[tuple[str, str]]:
        try:
            pair = space.pair(params)
        except UserError:
            return []
        return [(stage.name, stage.key) for stage in build(pair, lambda spec: f"content {getattr(spec, 'seed', 0)}").stages]

    return keys


def distinct(draws: list[Any], keys: Any) -> dict[str, int]:
    found: dict[str, set[str]] = defaultdict(set)
    for params in draws:
        for name, key in keys(params):
            found[name].add(key)
    return {name: len(each) for name, each in found.items()}


ROTATION = PAIR["teacher"]["one_of"]["rotation"]
STUDENT = FINITE["student"]


def chain(**student: Any) -> dict[str, Any]:
    """A pair with the student of another pair as its teacher; `student` are fields of that student's schedule."""
    first = {
        "teacher": {**ROTATION, "layer": "conv3", "schedule": {"epochs": 2}},
        "transfer": {"kind": "clusters", "k": 5},
        "student": {**STUDENT, "schedule": {"epochs": 2, **student}},
    }
    return {**FINITE, "teacher": {"pair": first, "layer": "conv3"}}


CHAIN = chain(lr={"choice": [0.01, 0.02, 0.04]})


@pytest.mark.parametrize("pair", [FINITE, NESTED, CHAIN], ids=["branches", "data-and-projection", "chain"])
def test_possible_artifacts_are_those_of_all_draws(tmp_path: Path, pair: dict[str, Any]) -> None:
    space = toy_space(tmp_path, pair)
    keys = keys_of(space)
    everything = distinct(list(space.all_draws()), keys)
    assert {row.stage: row.possible for row in count_shared_stages(space, keys, 10)} == everything


@pytest.mark.parametrize("draws", [5, 40])
def test_expected_artifacts_are_the_average_over_random_draws(tmp_path: Path, draws: int) -> None:
    space = toy_space(tmp_path, FINITE)
    keys, rng = keys_of(space), random.Random(0)
    known = list(space.all_draws())
    by_branch = [[each for each in known if each["teacher"] == branch] for branch in ("hog", "rotation")]
    made = {json.dumps(params): keys(params) for params in known}
    totals: dict[str, float] = defaultdict(float)
    for _ in range(300):
        drawn = [rng.choice(rng.choice(by_branch)) for _ in range(draws)]
        for name, count in distinct(drawn, lambda params: made[json.dumps(params)]).items():
            totals[name] += count / 300
    for row in count_shared_stages(space, keys, draws):
        assert row.expected == pytest.approx(totals[row.stage], rel=0.12), row


def test_a_continuous_field_of_the_teacher_makes_every_draw_a_teacher(tmp_path: Path) -> None:
    teacher = {**PAIR["teacher"]["one_of"]["rotation"], "schedule": {"epochs": 2, "lr": {"log_float": [0.01, 0.1]}}}
    space = toy_space(tmp_path, {"teacher": teacher})
    rows = {row.stage: row for row in count_shared_stages(space, keys_of(space), 30)}
    assert (rows["teacher"].possible, rows["teacher"].expected) == (None, 30.0)
    assert (rows["images"].possible, rows["images"].expected) == (1, 1.0)


def test_plan_reports_sharing_and_warns_with_the_number_of_teachers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = {**PAIR["teacher"]["one_of"]["rotation"], "schedule": {"epochs": 2, "lr": {"log_float": [0.01, 0.1]}}}
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(content({"teacher": teacher}, budget={"trials": 40, "concurrent": 2})))
    assert main(["plan", str(path), "-v", "--home", str(tmp_path / "home")]) == 0
    said = capsys.readouterr().out
    assert "Expected number of distinct artifacts in 40 random draws (of all possible): " in said
    assert "images 1 of 1, teacher 40 of infinitely many" in said
    assert "note: pair.teacher.schedule.lr is continuous: every draw is a new teacher" in said
    assert "note: expect about 40 different teachers in 40 random draws" in said


@pytest.mark.parametrize(
    ("pair", "teachers"),
    [
        (chain(lr={"log_float": [0.01, 0.1]}), 40),  # its teacher is a student, and the stage `teacher` is always the same
        ({"teacher": {"descriptor": {"kind": "hog", "cell": {"int": [2, 14]}}}}, 12),  # no stage makes it
        ({"teacher": {"descriptor": {"kind": "bag_of_hog", "words": {"int": [2, 200]}}}}, 36),  # a stage does
    ],
    ids=["chain", "descriptor", "fitted-descriptor"],
)
def test_plan_counts_teachers_whatever_stage_makes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: dict[str, Any], teachers: int
) -> None:
    path = write(tmp_path, pair, budget={"trials": 40, "concurrent": 2})
    assert main(["plan", str(path), "--json", "--home", str(tmp_path / "home")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert "every draw is a new teacher" in answer["notes"][0]
    assert answer["notes"][1:] == [f"expect about {teachers} different teachers in 40 random draws"]


def test_plan_of_a_space_with_sharing_gives_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(write(tmp_path, FINITE)), "--json", "--home", str(tmp_path / "home")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["notes"] == []
    assert answer["sharing"]["draws"] == 6
    assert [row["stage"] for row in answer["sharing"]["stages"]][:3] == ["images", "teacher", "features"]

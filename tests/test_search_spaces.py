"""The spaces that ship: each checks, and every branch and option of each is drawn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

import ktray
from ktray.search import sampler, space
from ktray.search.space_tree import Choice, parameters_with_conditions
from ktray.spec import PairSpec
from tests.source import ROOT
from tests.toys import HOG, toy_spec

FILES = sorted((ROOT / "search_spaces").glob("*.yaml"))


def test_the_spaces_of_the_readme_are_there() -> None:
    assert {"quickstart", "cifar10_teachers"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_space_checks_and_its_draws_share_their_prefix(path: Path) -> None:
    assert space.load(path, []).sharing_warnings() == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_branch_and_option_of_a_shipped_space_is_drawn(path: Path) -> None:
    found = space.load(path, [])
    drawn = {(name, value) for seed in range(300) for name, value in sampler.random_draw(found, seed).items()}
    for parameter, _ in parameters_with_conditions(found.root):
        if isinstance(parameter, Choice):
            assert {(parameter.name, label) for label in parameter.labels} <= drawn


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_planned_draws_of_a_shipped_space_are_pairs(path: Path) -> None:
    found = space.load(path, [])
    for planned in found.start_with:
        assert found.pair(found.fill_with_first_values(planned)).evals


def test_a_plan_shows_one_draw_of_every_branch_of_teachers_transfers_and_students(tmp_path: Path, capsys, monkeypatch) -> None:
    from ktray.cli import main

    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    student = {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": {"epochs": 2}}
    branches = {
        "teacher": {"hog": HOG, "random": {"descriptor": {"kind": "random_network", "backbone": student["backbone"]}}},
        "transfer": {"few": {"kind": "clusters", "k": 5}, "many": {"kind": "clusters", "k": 9}},
        "student": {"short": student, "long": {**student, "schedule": {"epochs": 3}}},
    }
    pair = toy_spec(**{part: {"one_of": found} for part, found in branches.items()})
    planned = {"teacher": "random", "transfer": "many", "transfer.many": "x"}
    content = {"study": "toy", "objectives": [{"metric": "knn/top1"}], "pair": pair, "start_with": [planned]}
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["plan", str(path)]) == 2
    assert "start_with.0.transfer.many: there is no parameter" in capsys.readouterr().err
    del planned["transfer.many"]
    path.write_text(yaml.safe_dump(content))
    assert main(["plan", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["pairs"] == 8
    counts = Counter(row["stage"] for row in answer["stages"])
    # one draw shows the first branches, one more each of the others; the planned one is of another combination
    assert counts["features"] == 2
    assert counts["clusters"] == 4
    assert counts["student"] == 5


def shortened(plain: dict[str, Any]) -> dict[str, Any]:
    """A drawn pair on 96 procedural images, with trainings of two epochs and few clusters, words and permutations."""
    few = {"epochs": 2, "warmup": 0, "batch_size": 32, "k": 8, "words": 16, "permutations": 20, "neighbours": 4, "anchors": 32}

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: few[name] if name in few else changed(item) for name, item in value.items()}
        return value

    pair = PairSpec.model_validate(plain).model_dump(mode="json")
    return {**changed(pair), "data": {"kind": "synthetic", "count": 120, "size": 32}}


def branches() -> dict[str, dict[str, Any]]:
    """Name -> a draw that shows a branch of the full space which the draws before it do not."""
    found = space.load(ROOT / "search_spaces" / "cifar10_full.yaml", [])
    return {label: found.plain_pair(params) for label, params in found.branch_draws()}


def test_the_full_space_has_many_teachers_transfers_and_students() -> None:
    found = space.load(ROOT / "search_spaces" / "cifar10_full.yaml", [])
    counts = {name: len(found.root[name].branches) for name in ("teacher", "transfer", "student")}
    assert counts["teacher"] >= 8
    assert counts["transfer"] >= 3
    assert counts["student"] >= 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_branch_of_the_full_space_runs_a_trial_of_two_epochs(tmp_path: Path) -> None:
    for label, plain in branches().items():
        (done,) = ktray.run(shortened(plain), home=tmp_path, local=True, talk=0)
        assert 0 <= done["metrics"]["linear_probe/top1"] <= 1, label
        assert done["metrics"]["student/loss"] > 0, label

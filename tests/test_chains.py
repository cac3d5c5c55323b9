"""Chains: the student of one pair teaches the next, and what the two have in common is computed once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from ktray.cli import main
from ktray.errors import UserError
from ktray.features import extraction
from ktray.pipeline.naming import lineage, pair_name
from ktray.pipeline.pair_check import check_pair, data_loader
from ktray.pipeline.pair_graph import build, generations
from ktray.runs.coordinator import TrialCoordinator
from ktray.runs.simulation import VirtualClock, _NoTracker, _VirtualStore, simulate
from ktray.search.space import Space, parse_pair
from ktray.search.space_check import check_and_fill_modes
from ktray.search.study import Study
from ktray.spec import PairSpec, StudentTeacher
from ktray.stores.file import FileStore
from ktray.training import loop, snapshot
from tests import reports
from tests.searches import Home, toy_space
from tests.toys import DATA, HOG, ROTATION, STUDENT, toy_pair, toy_spec

CLUSTERS = {"kind": "clusters", "k": 5, "iterations": 5}
FIRST: dict[str, Any] = {"teacher": ROTATION, "transfer": CLUSTERS, "student": STUDENT}
OTHER = {**DATA, "seed": 1}


def taught_by(pair: dict[str, Any], layer: str | None = "conv3") -> dict[str, Any]:
    """A teacher that is the student of `pair`."""
    return {"pair": pair, "layer": layer}


def second(**changes: Any) -> dict[str, Any]:
    return {**FIRST, "teacher": taught_by(FIRST), "transfer": {**CLUSTERS, "k": 6}, **changes}


def identity(spec: Any) -> str:
    return f"content of {spec.kind} {getattr(spec, 'seed', 0)}"


def stages(pair: PairSpec) -> dict[str, Any]:
    return {stage.key: stage for stage in build(pair, identity).stages}


# --- what can be said


def test_a_pair_that_teaches_has_the_data_of_the_one_it_teaches_unless_it_says_otherwise() -> None:
    pair = toy_pair(**second(data=OTHER))
    assert isinstance(pair.teacher, StudentTeacher)
    assert pair.teacher.pair.data == pair.data
    pair = toy_pair(**second(data=OTHER, teacher=taught_by({**FIRST, "data": DATA})))
    assert [each.data.cluster.seed for each in generations(pair)] == [1, 0]  # type: ignore[attr-defined]


def test_a_chain_is_the_same_after_it_was_written_down_and_read_back() -> None:
    pair = toy_pair(**second(teacher=taught_by(second())))
    assert PairSpec.model_validate(json.loads(pair.model_dump_json())) == pair
    assert len(generations(pair)) == 3


def test_a_pair_that_teaches_is_judged_as_a_pair_of_its_own() -> None:
    with pytest.raises(ValidationError, match="leave its 'evals' out"):
        toy_pair(teacher=taught_by({**FIRST, "evals": ["knn"]}))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no field of a chain": ({"schedule": {"epochs": 3}}, "teacher.schedule: a teacher that was a student"),
    "a field of no transfer": (
        {"pair": {**FIRST, "transfer": {**CLUSTERS, "q": 3}}},
        "teacher.pair.transfer.q: there is no",
    ),
    "a data set of no kind": ({"pair": {**FIRST, "data": "cifar_10"}}, "teacher.pair.data: there is no dataset kind"),
    "two types at once": ({"descriptor": "hog"}, "teacher: a teacher has exactly one of"),
}


@pytest.mark.parametrize(("changes", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_a_pair_that_teaches_is_told_with_its_place(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=rf"^chain.yaml: {re.escape(said)}[^\n]*$"):
        parse_pair(toy_spec(teacher={**taught_by(FIRST), **changes}), "chain.yaml")


def test_data_that_all_generations_have_are_wrong_once() -> None:
    with pytest.raises(UserError, match=r"^chain.yaml: data: there is no dataset kind 'cifar_10'[^\n]*$"):
        parse_pair(toy_spec(data="cifar_10", teacher=taught_by(FIRST)), "chain.yaml")


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "k above the images": ({"transfer": {**CLUSTERS, "k": 999}}, r"teacher\.pair\.transfer\.k: k=999"),
    "no such layer": ({"teacher": {**ROTATION, "layer": "conv9"}}, r"teacher\.pair\.teacher\.layer: .*'conv9'"),
    "images too small": ({"data": {**DATA, "size": 8}, "teacher": HOG}, r"teacher\.pair\.teacher\.descriptor\.cell"),
}


@pytest.mark.parametrize(("changes", "said"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_what_cannot_work_in_an_earlier_generation_is_refused_before_anything_runs(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_pair(toy_pair(teacher=taught_by({**FIRST, **changes})), data_loader())


def test_no_generation_reads_labels_of_images_that_judge_the_last() -> None:
    supervised = {"data": {**DATA, "split": {"val": 0.1, "seed": 5}}, "transfer": "labels", "student": STUDENT}
    with pytest.raises(UserError, match=r"teacher\.pair\.data\.transfer\.split: .* which reads their labels"):
        check_pair(toy_pair(teacher=taught_by(supervised)), data_loader())


# --- what is shared


def test_a_chain_has_every_stage_of_the_pair_that_teaches_under_the_same_key() -> None:
    inner = stages(toy_pair(**FIRST, evals=[]))
    outer = stages(toy_pair(**second()))
    assert inner.keys() <= outer.keys()
    assert {outer[key].name for key in outer.keys() - inner.keys()} == {
        *("features", "clusters", "pseudo_labels", "student", "evaluation")
    }


def test_the_teacher_of_a_chain_is_the_student_of_the_pair_before() -> None:
    taught, before = build(toy_pair(**second()), identity), build(toy_pair(**FIRST), identity)
    assert taught.keys["teacher"] == before.keys["student"]
    assert taught.metric_prefixes()[taught.keys["teacher"]] == "teacher"


def test_another_layer_or_k_of_the_last_generation_shares_all_that_came_before() -> None:
    one = build(toy_pair(**second()), identity).keys
    two = build(toy_pair(**second(teacher=taught_by(FIRST, "conv4"))), identity).keys
    assert one["teacher"] == two["teacher"]
    assert one["features"] != two["features"]


def test_another_seed_of_an_early_student_changes_all_that_it_teaches() -> None:
    one = build(toy_pair(**second()), identity).keys
    two = build(toy_pair(**second(teacher=taught_by({**FIRST, "student": {**STUDENT, "seed": 1}}))), identity).keys
    assert all(one[stage] != two[stage] for stage in ("teacher", "features", "clusters", "pseudo_labels", "student"))


def test_milestones_of_an_early_generation_cut_its_own_trainings() -> None:
    cuts = {"pair.student": [1], "pair.teacher": [1], "student": [2]}
    graph = build(toy_pair(**second()), identity, milestones=cuts)
    assert graph.keys == build(toy_pair(**second()), identity).keys
    assert [(s.name, s.spec["epoch"]) for s in graph.stages if "epoch" in s.spec] == [
        *(("teacher", 1), ("teacher", 2), ("student", 1), ("student", 3), ("student", 2), ("student", 3))
    ]


def test_of_a_chain_only_the_last_student_and_what_judges_it_are_charged_to_students() -> None:
    cut = build(toy_pair(**second()), identity, milestones={"student": [1], "pair.student": [1]})
    late = sorted(stage.name for stage in cut.stages if stage.key in cut.student_keys())
    assert late == ["evaluation", "student", "student"]
    assert not cut.student_keys() & set(stages(toy_pair(**FIRST)))


# --- in a space


def chained_space(**changes: Any) -> Space:
    """HOG, rotation, and the student of a pair that a search of the first two runs as well."""
    inner = {**FIRST, "transfer": {**CLUSTERS, "k": {"choice": [5, 7]}}}
    content = {
        "study": "chained",
        "objectives": [{"metric": "knn/top1"}],
        "budget": {"trials": 8},
        "pair": {
            **toy_spec(transfer={**CLUSTERS, "k": {"choice": [5, 7]}}),
            "teacher": {"one_of": {"rotation": ROTATION, "chain": {"pair": inner, "layer": {"choice": ["conv3", "conv4"]}}}},
        },
        **changes,
    }
    return check_and_fill_modes(Space.from_content(content, "chained.yaml"))


def test_parameters_of_a_pair_that_teaches_have_dotted_paths() -> None:
    space = chained_space(start_with=[{"teacher": "chain", "teacher.chain.pair.transfer.k": 7}])
    drawn = [params for params in space.all_draws() if params["teacher"] == "chain"]
    assert set(drawn[0]) == {"teacher", "teacher.chain.pair.transfer.k", "teacher.chain.layer", "transfer.k"}
    pair = space.pair({**drawn[0], "teacher.chain.pair.transfer.k": 7})
    assert [each.transfer.k for each in generations(pair)] == [5, 7]  # type: ignore[attr-defined]
    assert space.draw_count() == 2 + 2 * 2 * 2


def test_a_search_of_a_chain_and_of_the_pair_that_begins_it_computes_that_pair_once(tmp_path: Path) -> None:
    space, clock = chained_space(budget={"trials": 10}), VirtualClock()
    study = Study.open(tmp_path, space, clock=clock)
    timeline = simulate(space, study, clock, lambda stage, epochs: 1.0, lambda stage: {"top1": 0.5, "loss": 1.0}, 2)
    keys = [key for _, key in timeline.computed]
    assert len(keys) == len(set(keys))
    done = [trial for trial in timeline.trials if trial.state == "completed"]
    assert len(done) == 10
    students = {trial.keys["student"] for trial in done}
    taught = {trial.keys["teacher"] for trial in done if trial.params["teacher"] == "chain"}
    assert taught < students, "what the chain learns from was drawn as a pair, too"
    assert len([key for key in keys if key.startswith("student-")]) == len(students) == 10


def test_of_a_planned_chain_also_what_makes_the_student_that_teaches_is_certain(tmp_path: Path) -> None:
    start = {"teacher": "chain", "teacher.chain.pair.transfer.k": 7, "teacher.chain.layer": "conv3"}
    mute: Any = _NoTracker()
    store: Any = _VirtualStore()
    with Study.open(tmp_path, space := chained_space(start_with=[start])) as study:
        stages = TrialCoordinator(space, study, store, lambda spec: "content", mute, lambda *said: None).planned_stages()
    known: set[str] = set()
    for stage in stages:
        assert known >= set(stage.inputs.values()), "nothing is asked for before what it reads"
        known.add(stage.key)
    names = [stage.name for stage in stages]
    assert [names.count(name) for name in ("teacher", "pseudo_labels", "student", "evaluation")] == [1, 1, 1, 0]


# --- what is told


def test_names_tell_generations_apart_and_the_lineage_reads_backwards() -> None:
    pair = toy_pair(**second(teacher=taught_by(second(), "conv4"))).model_dump()
    first = "rotation-alexnet-w0.125/conv3 k=5 -> alexnet w0.125"
    assert pair_name(pair) == f"(({first})/conv3 k=6 -> alexnet w0.125)/conv4 k=6 -> alexnet w0.125"
    assert lineage(pair) == (
        "alexnet w0.125 (k=6), taught by alexnet w0.125/conv4 (k=6), taught by alexnet w0.125/conv3 (k=5), "
        "taught by rotation-alexnet-w0.125/conv3"
    )
    assert lineage(toy_pair(teacher=None, transfer="labels").model_dump()) == "alexnet w0.125 (labels)"


def chained_report(store: Any, inner: dict[str, Any]) -> str:
    pair = reports.pair(teacher={"pair": inner, "layer": "layer3"})
    return reports.page_of([reports.trial(0, 0.6, pair=pair)], store).text("headline")


def test_the_report_says_who_taught_whom_and_whose_labels_were_read(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    text = chained_report(store, reports.pair(k=9))
    assert "A chain of 2 pairs: resnet18 (k=5), taught by resnet18/layer3 (k=9), taught by rotation-alexnet/conv4." in text
    assert "Trained without labels" in text
    text = chained_report(store, reports.pair(teacher=None, transfer={"kind": "labels"}))
    assert "taught by resnet18/layer3 (labels)." in text
    assert "Trained with the labels of its training images" in text
    loaded = {"checkpoint": f"{reports.HOME}/dino.pt", "backbone": {"kind": "resnet", "depth": 50}, "layer": "layer4"}
    text = chained_report(store, reports.pair(teacher=loaded))
    assert "what they were trained with is not known here" in text
    assert reports.HOME not in text


# --- end to end


def ran(path: Path, spec: dict[str, Any], capsys: Any, *words: str) -> dict[str, Any]:
    path.write_text(yaml.safe_dump(spec))
    assert main([*("run", str(path), "--local", "--json", "--quiet"), *words]) == 0
    return json.loads(capsys.readouterr().out)[0]


def test_three_generations_run_and_reuse_what_the_first_two_left(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    two = ran(tmp_path / "two.yaml", toy_spec(**second(teacher=taught_by({**FIRST, "teacher": HOG}))), capsys)
    judges = [{"kind": "knn"}, {"kind": "knn", "name": "teacher_knn", "of": "teacher"}]
    third = toy_spec(teacher=taught_by(second(teacher=taught_by({**FIRST, "teacher": HOG})), "conv4"), evals=judges)
    three = ran(tmp_path / "three.yaml", third, capsys)
    assert three["keys"]["teacher"] == two["keys"]["student"]
    assert three["computed"] == {"features": 1, "clusters": 1, "pseudo_labels": 1, "student": 1, "evaluation": 2}
    assert three["metrics"]["teacher/parameters"] == three["metrics"]["student/parameters"]

    directory = tmp_path / "home" / "store"
    pair = PairSpec.model_validate(third)
    teacher = loop.untrained_backbone(pair.teacher.backbone, 0)  # type: ignore[union-attr]
    snapshot.load_backbone(teacher, directory / two["keys"]["student"])
    images = np.load(next(directory.glob("images-*")) / "train.npy", allow_pickle=False)[:8]
    expected = extraction.layer_extractor(teacher, "conv4", pair.teacher.pool)  # type: ignore[union-attr]
    found = extraction.load(directory / three["keys"]["features"])[:8]
    np.testing.assert_allclose(found, expected(torch.from_numpy(images)).numpy(), rtol=1e-5, atol=1e-6)

    told = "alexnet w0.125 (k=5), taught by alexnet w0.125/conv4 (k=6), taught by alexnet w0.125/conv3 (k=5), taught by hog"
    assert json.loads((directory / three["keys"]["student"] / "record.json").read_text())["lineage"] == told
    for key in (three["keys"]["student"], three["keys"]["evaluation"]["knn"]):
        assert main(["show", key]) == 0
        assert told in capsys.readouterr().out


def test_an_experiment_may_hold_a_chain(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    (tmp_path / "chain.py").write_text(
        "from ktray.spec import PairSpec\n"
        "from tests.toys import HOG, STUDENT, toy_spec\n"
        "def pairs():\n"
        "    first = toy_spec(evals=[])\n"
        "    chained = toy_spec(teacher={'pair': first, 'layer': 'conv3'})\n"
        "    return {name: PairSpec.model_validate(spec) for name, spec in (('first', toy_spec()), ('second', chained))}\n"
    )
    assert main(["plan", str(tmp_path / "chain.py"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    shared = {row["stage"] for row in answer["stages"] if row["shared_by"] == 2}
    assert shared == {"images", "features", "clusters", "pseudo_labels", "student"}


@pytest.mark.slow
def test_a_search_on_ray_reaches_pairs_through_the_pairs_that_teach_them(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    chain = {"pair": {**FIRST, "teacher": HOG}, "layer": {"choice": ["conv3", "conv4"]}}
    path = toy_space(
        tmp_path,
        pair__teacher={"one_of": {"hog": HOG, "chain": chain}},
        start_with=[{"teacher": "chain", "teacher.chain.layer": layer} for layer in ("conv3", "conv4")],
    )
    ended = home.run("search", path, "--json")
    assert ended.code == 0, ended.err
    trials = home.study().trials
    chained = [trial for trial in trials if trial.params["teacher"] == "chain" and trial.state != "duplicate"]
    assert len(chained) >= 2
    assert len({trial.keys["teacher"] for trial in chained}) == 1
    shown = home.run("show", "toy/0")
    assert "taught by alexnet w0.125/conv3 (k=5), taught by hog" in shown.out
    page = home.run("report", "toy", "-o", tmp_path / "report.html")
    assert page.code == 0, page.err

"""Several teachers of one student: a cluster head per teacher and k, stages shared with pairs of one teacher each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ktray.errors import UserError
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.naming import lineage, teacher_name
from ktray.pipeline.pair_check import check_pair, data_loader
from ktray.pipeline.pair_graph import Graph, build, generations_with_paths, milestone_prefix
from ktray.pool import StageContext
from ktray.runs.dry_run import sample_size, small_pair
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.search.space import load
from ktray.spec import Augment, PairSpec
from ktray.stores.file import FileStore
from ktray.training.task import Labels, Targets
from ktray.transfer import soft_clusters
from tests.toys import HOG, ROTATION, toy_pair, toy_spec

torch.set_num_threads(1)

COLOURS = {"descriptor": {"kind": "colour_histogram"}}
TAUGHT = {"pair": toy_spec(evals=[], teacher=HOG)}
SEVERAL = {"several": [HOG, ROTATION, TAUGHT]}
K = {"kind": "clusters", "k": [5, 7], "iterations": 3}


def graph_of(teacher: Any, transfer: Any = K) -> Graph:
    return build(toy_pair(teacher=teacher, transfer=transfer, evals=[]), lambda spec: "content")


def test_the_stages_before_the_student_are_those_of_each_teacher_alone() -> None:
    several = graph_of(SEVERAL)
    before = {stage.key for stage in several.stages} - several.student_keys()
    alone = [graph_of(teacher) for teacher in SEVERAL["several"]]
    assert before == {stage.key for one in alone for stage in one.stages} - {key for one in alone for key in one.student_keys()}
    for index, one in enumerate(alone):
        for name, place in (("clusters", 0), ("clusters_2", 1)):
            number = 2 * index + place + 1
            assert several.keys["clusters" if number == 1 else f"clusters_{number}"] == one.keys[name]
    assert [several.keys[f"features{end}"] for end in ("", "_2", "_3")] == [one.keys["features"] for one in alone]
    assert {name for name in several.keys if name.startswith("teacher")} == {"teacher_2", "teacher_3"}, "HOG has no stage"
    student = next(stage for stage in several.stages if stage.key == several.keys["student"])
    assert len([role for role in student.inputs if role.startswith("pseudo_labels")]) == 6


def test_one_teacher_that_is_left_is_that_teacher_and_an_order_is_an_order() -> None:
    alone = toy_pair(teacher=HOG, transfer=K)
    assert toy_pair(teacher={"several": [None, HOG, None]}, transfer=K) == alone
    pair = toy_pair(teacher=SEVERAL, transfer=K)
    assert PairSpec.model_validate(json.loads(json.dumps(pair.model_dump(mode="json")))) == pair
    assert graph_of({"several": [HOG, ROTATION]}).keys["student"] != graph_of({"several": [ROTATION, HOG]}).keys["student"]


REFUSED = [
    ({"teacher": {"several": [None]}}, "no teacher is left"),
    ({"teacher": {"several": []}}, "at least 1 item"),
    ({"teacher": {"several": [HOG, {"several": [ROTATION, COLOURS]}]}}, "write all of them into one list"),
    ({"teacher": SEVERAL, "transfer": "regression"}, "here are several; use clusters or soft_clusters"),
    ({"teacher": SEVERAL, "evals": [{"kind": "knn", "of": "teacher"}]}, "judge each in a pair of its own"),
    ({"teacher": {"several": [HOG, {"descriptor": "hog", "pretext": "rotation"}]}}, "exactly one of"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_several_teachers_cannot_do_is_refused_with_what_to_do_instead(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        toy_pair(**changes)


def test_a_plan_finds_what_is_wrong_with_one_of_them_and_the_same_teacher_twice() -> None:
    load_data = data_loader()
    assert check_pair(toy_pair(teacher=SEVERAL, transfer=K), load_data) == []
    for wrong, where in (
        ([HOG, {**ROTATION, "layer": "conv9"}], "teacher.several.1.layer"),
        ([HOG, COLOURS, HOG], "teacher.several.2"),
    ):
        with pytest.raises(UserError) as refused:
            check_pair(toy_pair(teacher={"several": wrong}, transfer=K), load_data)
        assert refused.value.where == where


def test_names_and_milestones_tell_the_teachers_apart() -> None:
    pair = toy_pair(teacher=SEVERAL)
    plain = pair.model_dump(mode="json")
    assert teacher_name(plain) == "hog + rotation-alexnet-w0.125/conv3 + (hog k=5 -> alexnet w0.125)"
    assert lineage(plain).count(", taught by hog") == 2
    paths = [path for path, _ in generations_with_paths(pair)]
    assert paths == ["", "teacher.several.2.pair."]
    assert [milestone_prefix(path) for path in paths] == ["", "teacher_3.pair."]
    cut = build(pair, lambda spec: "content", milestones={"teacher_2": [1], "teacher_3.pair.student": [2]})
    trained = [stage.spec["epoch"] for stage in cut.stages if stage.name in ("teacher", "student")]
    assert sorted(trained) == [1, 2, 2, 3, 3]
    assert cut.keys == build(pair, lambda spec: "content").keys


def test_a_dry_run_shortens_every_teacher() -> None:
    pair = toy_pair(teacher={"several": [HOG, {**ROTATION, "schedule": {"epochs": 9, "batch_size": 300}}, TAUGHT]})
    assert sample_size(pair) == 300
    small = small_pair(pair, 40)
    assert small.teacher.several[1].schedule.epochs == 1  # type: ignore[union-attr]
    assert small.teacher.several[2].pair.student.schedule.epochs == 1  # type: ignore[union-attr]


def test_a_space_draws_the_subset_of_teachers(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    several = [HOG, {"one_of": {"colours": COLOURS, "without": None}}]
    spec = {
        **toy_spec(transfer={"kind": "clusters", "k": {"choice": [5, 7]}, "iterations": 3}),
        "teacher": {"several": several},
    }
    objectives = [{"metric": "knn/top1", "mode": "max"}]
    path.write_text(json.dumps({"study": "subsets", "objectives": objectives, "budget": {"trials": 4}, "pair": spec}))
    space = load(path, [])
    both, one = (space.pair({"teacher.several.1": name, "transfer.k": 5}) for name in ("colours", "without"))
    assert len(both.teacher.several) == 2  # type: ignore[union-attr]
    assert one == toy_pair(transfer={"kind": "clusters", "k": 5, "iterations": 3})
    assert {"teacher.several.1", "transfer.k"} <= space.prefix_parameters


def test_the_heads_of_a_student_learn_the_clusters_of_their_own_teachers(tmp_path: Path) -> None:
    pair = toy_pair(teacher={"several": [HOG, COLOURS]}, transfer={"kind": "clusters", "k": 4, "iterations": 3, "min_size": 1})
    graph, store = build(pair, data_identity()), FileStore(tmp_path)
    LocalScheduler(store, execute, StageContext(), lambda event: None).obtain(list(graph.stages), "test")
    labels = [np.load(store.find(graph.keys[name]).directory / "labels.npy") for name in ("pseudo_labels", "pseudo_labels_2")]  # type: ignore[union-attr]
    assert not np.array_equal(*labels)
    student = store.find(graph.keys["student"])
    assert student is not None
    record = json.loads((student.directory / "record.json").read_text())
    assert "taught by hog and by colour_histogram" in json.dumps(record)
    assert student.metrics["top1"] > 0.3


def test_soft_clusters_of_several_teachers_average_the_losses_of_their_heads() -> None:
    draws = np.random.default_rng(0)
    heads = tuple(
        Labels(near[:, 0], k, near, np.sort(draws.uniform(0.5, 2, near.shape), axis=1).astype(np.float32))
        for k in (5, 7)
        for near in [np.stack([draws.permutation(k)[:3] for _ in range(6)])]
    )
    pixels = torch.zeros(6, 8, 8, 3, dtype=torch.uint8)
    spec = soft_clusters.Spec(k=7, neighbours=3)
    both = soft_clusters.task(spec, Targets(6, heads), Augment(crop=0))
    _, soft = both.batch(pixels, torch.arange(6), {})
    logits = torch.randn(6, 12)
    alone = []
    for head, part in zip(heads, logits.split([5, 7], dim=1), strict=True):
        _, own = soft_clusters.task(spec, Targets(6, (head,)), Augment(crop=0)).batch(pixels, torch.arange(6), {})
        alone.append(nn.functional.cross_entropy(part, own))
    torch.testing.assert_close(both.loss(logits, soft)[0], torch.stack(alone).mean())

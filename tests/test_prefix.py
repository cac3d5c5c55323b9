"""The parameters that decide what is computed before the student are those that change a key before it, as graphs say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ktray import plugins
from ktray.errors import UserError
from ktray.pipeline.pair_graph import Graph, build
from ktray.search import space_tree
from ktray.search.sampler import Sampler
from ktray.search.space import Space, load
from ktray.search.space_tree import Params
from ktray.search.trial import Trial
from tests.source import ROOT
from tests.toy_space import FINITE, PAIR, toy_space

OPTIONS: dict[str, dict[str, list[Any]]] = {  # two values of each field of each kind
    "clusters": {
        "k": [5, 10],
        "l2": [True, False],
        "pca": [None, 4],
        "whiten": [False, True],
        "l2_after": [False, True],
        "iterations": [5, 10],
        "min_size": [2, 3],
        "small": ["drop", "merge"],
        "sampling": ["none", "uniform"],
        "label_smoothing": [0.0, 0.1],
        "seed": [0, 1],
    },
    "soft_clusters": {
        "k": [5, 10],
        "neighbours": [2, 3],
        "temperature": [0.1, 0.2],
        "l2": [True, False],
        "pca": [None, 4],
        "whiten": [False, True],
        "l2_after": [False, True],
        "iterations": [5, 10],
        "seed": [0, 1],
    },
    "similarity": {
        "anchors": [16, 32],
        "temperature": [0.04, 0.1],
        "teacher_temperature": [None, 0.1],
        "hidden": [[512], []],
        "seed": [0, 1],
    },
    "dense_clusters": {
        "k": [5, 10],
        "l2": [True, False],
        "pca": [None, 4],
        "whiten": [False, True],
        "l2_after": [False, True],
        "iterations": [5, 10],
        "seed": [0, 1],
        "grid": [1, 2],
        "sample": [100, 200],
        "whole": [None, 4],
        "layer": [None, "conv4"],
    },
    "queue_similarity": {
        "queue": [16, 32],
        "temperature": [0.04, 0.1],
        "teacher_temperature": [None, 0.1],
        "hidden": [[512], []],
    },
    "spatial_regression": {"grid": [1, 2], "layer": [None, "conv4"], "standardise": [True, False]},
    "queue_and_spatial": {
        "queue": [16, 32],
        "temperature": [0.04, 0.1],
        "teacher_temperature": [None, 0.1],
        "hidden": [[512], []],
        "grid": [1, 2],
        "layer": [None, "conv4"],
        "standardise": [True, False],
        "spatial": [1.0, 2.0],
    },
    "regression": {"loss": ["cosine", "l2"], "hidden": [[512], []], "standardise": [False, True]},
    "random_clusters": {"k": [5, 10], "seed": [0, 1], "label_smoothing": [0.0, 0.1]},
    "labels": {"label_smoothing": [0.0, 0.1]},
    "none": {},
}


def prefix_keys(graph: Graph) -> set[str]:
    """Keys of all stages but the student's and those that read it."""
    return {stage.key for stage in graph.stages} - graph.student_keys()


def changing(space: Space) -> tuple[set[str], set[str]]:
    """Parameters of which a value changes a key before the student, and all that were varied, by building graphs."""

    def keys(params: Params) -> set[str] | None:
        try:
            return prefix_keys(build(space.pair(params), lambda spec: f"content {spec}"))
        except UserError:
            return None

    changed, varied = set(), set()
    known = {parameter.name: parameter for parameter, _ in space_tree.parameters_with_conditions(space.root)}
    for _, base in space.branch_draws():
        before = keys(base)
        for name in base:
            for value in space_tree.values_to_check(known[name]):
                after = keys(space.fill_with_first_values({**base, name: value}))
                if value == base[name] or before is None or after is None:
                    continue
                varied.add(name)
                if after != before:
                    changed.add(name)
    return changed, varied


def test_every_field_of_every_transfer_is_compared_here() -> None:
    fields = {kind: set(plugins.module("transfer", kind).Spec.model_fields) - {"kind"} for kind in plugins.kinds("transfer")}
    assert fields == {kind: set(options) for kind, options in OPTIONS.items()}


@pytest.mark.parametrize("kind", [kind for kind, options in OPTIONS.items() if options])
@pytest.mark.parametrize("branch", [True, False], ids=["in-a-branch", "plain"])
def test_a_field_of_a_transfer_belongs_to_the_prefix_if_it_changes_a_key_before_the_student(
    tmp_path: Path, kind: str, branch: bool
) -> None:
    transfer: dict[str, Any] = {"kind": kind, **{field: {"choice": values} for field, values in OPTIONS[kind].items()}}
    taught = {"features", "clusters", "pseudo_labels"} & plugins.module("transfer", kind).NEEDS.keys()
    teacher = PAIR["teacher"]["one_of"]["hog"] if taught else None
    pair = {"teacher": teacher, "transfer": {"one_of": {"first": transfer}} if branch else transfer}
    changed, varied = changing(toy_space(tmp_path, pair))
    space = toy_space(tmp_path, pair)
    fields = {name for name in varied if name.startswith("transfer.")}
    assert {name.rpartition(".")[2] for name in fields} == set(OPTIONS[kind])
    assert {name for name in fields if name in space.prefix_parameters} == changed & fields


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.yaml")), ids=lambda path: path.stem)
def test_parameters_of_shipped_spaces_belong_to_the_prefix_if_they_change_a_key_before_the_student(path: Path) -> None:
    space = load(path, [])
    changed, varied = changing(space)
    assert changed
    assert {name for name in varied if name in space.prefix_parameters} == changed


def test_a_kind_that_is_drawn_itself_counts_with_the_fields_of_all_its_options(tmp_path: Path) -> None:
    transfer = {
        "kind": {"choice": ["similarity", "soft_clusters"]},
        "temperature": {"choice": [0.04, 0.1]},
        "seed": {"choice": [0, 1]},
    }
    names = toy_space(tmp_path, {"teacher": PAIR["teacher"]["one_of"]["hog"], "transfer": transfer}).prefix_parameters
    assert {"transfer.kind", "transfer.seed"} <= names
    assert "transfer.temperature" not in names


def test_draws_that_differ_in_a_temperature_of_the_student_share_their_prefix(tmp_path: Path) -> None:
    transfer = {"kind": "soft_clusters", "k": {"choice": [10, 20]}, "temperature": {"choice": [0.1, 0.2]}}
    space = toy_space(tmp_path, {**FINITE, "transfer": transfer})
    sampler = Sampler(space)
    params = space.fill_with_first_values({"teacher": "hog"})
    sampler.record_trial(Trial(0, params, space.pair(params).model_dump(mode="json"), "running"))
    assert sampler._has_existing_prefix({**params, "transfer.temperature": 0.2})
    assert not sampler._has_existing_prefix({**params, "transfer.k": 20})

"""Specs are frozen and strict, and what makes no sense cannot be said."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from ktray import plugins, spec
from ktray.errors import UserError
from ktray.fingerprint import canonical
from ktray.search.space_file import EarlyStop
from ktray.spec import DataRoles, DataSpec, HandcraftedTeacher, LoadedTeacher, PairSpec, TeacherSpec, TrainedTeacher

RESNET = {"kind": "resnet", "depth": 18}
TRAINED = {"pretext": "rotation", "backbone": RESNET, "schedule": {"epochs": 2}}
HANDCRAFTED = {"descriptor": {"kind": "hog", "cell": 4}}
LOADED = {"checkpoint": "weights.safetensors", "backbone": RESNET}
PAIR = {
    "data": "synthetic",
    "teacher": HANDCRAFTED,
    "transfer": {"kind": "clusters", "k": 10},
    "student": {"backbone": "alexnet", "schedule": {"epochs": 3}},
    "evals": [{"kind": "linear_probe"}, "knn"],
}


def pair(**changes: Any) -> PairSpec:
    """The toy pair with some top-level fields changed; None leaves one out."""
    return PairSpec.model_validate({name: value for name, value in {**PAIR, **changes}.items() if value is not None})


def data(value: Any) -> Any:
    """A data spec from what a person types."""
    return TypeAdapter(DataSpec).validate_python(value)


def teacher(value: Any) -> Any:
    """A teacher spec from what a person types."""
    return TypeAdapter(TeacherSpec).validate_python(value)


def paths(error: ValidationError) -> set[str]:
    """Dotted paths of all that is wrong."""
    return {".".join(map(str, problem["loc"])) for problem in error.errors()}


# --- frozen and strict


@pytest.mark.parametrize("kind", [(group, kind) for group in plugins.GROUPS for kind in plugins.kinds(group)], ids="-".join)
def test_every_kind_has_a_frozen_and_strict_spec_of_its_name(kind):
    group, name = kind
    model = plugins.module(group, name).Spec
    assert issubclass(model, spec.StrictSpec)
    assert model.model_config["frozen"]
    assert model.model_config["extra"] == "forbid"
    assert model.model_fields["kind"].default == name


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        pair().student.schedule.lr = 0.1


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"students": {}}, "students"),
        ({"student": {**PAIR["student"], "optimizer": "sgd"}}, "student.optimizer"),
        ({"student": {**PAIR["student"], "schedule": {"epochs": 1, "learning_rate": 1}}}, "student.schedule.learning_rate"),
        ({"transfer": {"kind": "clusters", "K": 10}}, "transfer.K"),
        ({"teacher": {"descriptor": {"kind": "hog", "cells": 4}}}, "teacher.descriptor.cells"),
        ({"evals": [{"kind": "knn", "neighbours": 5}]}, "evals.0.neighbours"),
    ],
)
def test_an_unknown_field_is_an_error_at_its_path(changes, path):
    with pytest.raises(ValidationError) as caught:
        pair(**changes)
    assert paths(caught.value) == {path}


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"student": {**PAIR["student"], "schedule": {"epochs": True}}}, "student.schedule.epochs"),
        ({"student": {**PAIR["student"], "schedule": {"epochs": 3, "lr": True}}}, "student.schedule.lr"),
        ({"student": {**PAIR["student"], "schedule": {"epochs": 3, "lr": "0.1"}}}, "student.schedule.lr"),
        ({"student": {**PAIR["student"], "augment": {"flip": "on"}}}, "student.augment.flip"),
        ({"student": {**PAIR["student"], "augment": {"flip": 1}}}, "student.augment.flip"),
        ({"student": {**PAIR["student"], "seed": "1"}}, "student.seed"),
        ({"transfer": {"kind": "clusters", "k": "5"}}, "transfer.k"),
        ({"transfer": {"kind": "clusters", "pca": True}}, "transfer.pca"),
        ({"evals": [{"kind": "knn", "pool": {"grid": "2"}}]}, "evals.0.pool.grid"),
    ],
)
def test_text_is_no_number_and_true_is_no_one(changes, path):
    with pytest.raises(ValidationError) as caught:
        pair(**changes)
    assert paths(caught.value) == {path}


def test_a_whole_number_is_also_a_number_and_a_list_a_tuple():
    assert pair(student={**PAIR["student"], "schedule": {"epochs": 3, "lr": 1}}).student.schedule.lr == 1.0
    assert EarlyStop.model_validate({"metric": "knn/top1", "rungs": [1, 2]}).rungs == (1, 2)
    with pytest.raises(ValidationError, match="whole number"):
        EarlyStop.model_validate({"metric": "knn/top1", "rungs": [True, 2]})


def test_every_wrong_field_is_named_at_once():
    with pytest.raises(ValidationError) as caught:
        pair(student={"backbone": "alexnet", "schedule": {"epochs": 0, "lr": -1}, "seed": -1})
    assert paths(caught.value) == {"student.schedule.epochs", "student.schedule.lr", "student.seed"}


def test_a_spec_survives_being_written_and_read():
    first = pair(teacher=TRAINED)
    assert PairSpec.model_validate(first.model_dump(mode="json")) == first
    assert PairSpec.model_validate_json(first.model_dump_json()) == first


def test_defaults_are_written_out_so_that_they_are_part_of_the_identity():
    dumped = pair().model_dump(mode="json")
    assert dumped["student"]["schedule"]["momentum"] == 0.9
    assert dumped["transfer"]["min_size"] == plugins.module("transfer", "clusters").Spec().min_size
    assert dumped["evals"][1]["k"] == 20


def test_saying_a_default_changes_nothing():
    said = pair(student={"backbone": {"kind": "alexnet", "width": 1}, "schedule": {"epochs": 3, "momentum": 0.9}, "seed": 0})
    assert canonical(said.model_dump(mode="json")) == canonical(pair().model_dump(mode="json"))


# --- kinds


@pytest.mark.parametrize(
    ("changes", "near"),
    [
        ({"transfer": {"kind": "cluster"}}, "clusters"),
        ({"student": {"backbone": "alexnett", "schedule": {"epochs": 1}}}, "alexnet"),
        ({"evals": ["linear_prob"]}, "linear_probe"),
        ({"data": "sythetic"}, "synthetic"),
    ],
)
def test_a_misspelt_kind_is_told_the_nearest_one(changes, near):
    with pytest.raises((UserError, ValidationError), match=f"Did you mean '{near}'"):
        pair(**changes)


def test_a_kind_that_is_like_no_other_is_told_all_of_them():
    with pytest.raises(UserError, match=r"Known: .*linear_probe"):
        plugins.module("evaluation", "xyzzy")


def test_a_kind_from_outside_loads_only_after_it_was_allowed(tmp_path, monkeypatch):
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab/__init__.py").write_text("")
    (tmp_path / "my_lab/colour.py").write_text(
        "from typing import Literal\nfrom ktray.strict import StrictSpec\nREVISION = 1\n"
        "class Spec(StrictSpec):\n    kind: Literal['my_lab.colour'] = 'my_lab.colour'\n    bins: int = 8\n"
        "def describe(spec, state, images):\n    return images.float().flatten(1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KTRAY_ALLOW_PLUGINS", "")
    given = {"descriptor": {"kind": "my_lab.colour", "bins": 4}}
    with pytest.raises((UserError, ValidationError), match="--allow-plugins my_lab"):
        teacher(given)
    plugins.allow(["my_lab"])
    assert teacher(given).descriptor.bins == 4


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("bare", "import math\n", r"bare\.py: .* defines no Spec and no REVISION and no describe"),
        ("slip", "x = 1\ndef describe(:\n", r"slip\.py, line 2: .*SyntaxError"),
        ("needy", "x = 1\nimport no_such_library\n", r"needy\.py, line 2: .*no_such_library"),
        ("broken", "\n1 / 0\n", r"broken\.py, line 2: .*ZeroDivisionError"),
        (None, "", r"my_broken_lab\.absent: .*cannot be imported"),
    ],
)
def test_a_plugin_that_is_wrong_is_named_by_its_file_and_what_it_lacks(file, text, said, tmp_path, monkeypatch):
    (tmp_path / "my_broken_lab").mkdir()
    if file:
        (tmp_path / "my_broken_lab" / f"{file}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KTRAY_ALLOW_PLUGINS", "my_broken_lab")
    for name in [name for name in sys.modules if name.split(".")[0] == "my_broken_lab"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=said):
        plugins.module("descriptor", f"my_broken_lab.{file or 'absent'}")


def test_a_name_that_leads_out_of_the_room_is_no_kind():
    for name in ("../spec", "..knn", ".", "__init__", "", "knn/../knn"):
        with pytest.raises(UserError, match="no evaluation kind"):
            plugins.module("evaluation", name)


def test_a_plugin_needs_a_kind():
    with pytest.raises((UserError, ValidationError), match="needs a 'kind'"):
        pair(transfer={"k": 5})


# --- teachers


@pytest.mark.parametrize(
    ("value", "kind"), [(TRAINED, TrainedTeacher), (HANDCRAFTED, HandcraftedTeacher), (LOADED, LoadedTeacher)]
)
def test_a_teacher_is_what_its_own_field_says(value, kind):
    assert type(teacher(value)) is kind


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "exactly one of"),
        ({"backbone": RESNET}, "exactly one of"),
        ({**TRAINED, **HANDCRAFTED}, "has pretext and descriptor"),
        ({**TRAINED, **LOADED}, "has pretext and checkpoint"),
    ],
)
def test_a_teacher_that_is_none_or_two_is_refused(value, words):
    with pytest.raises(ValidationError, match=words):
        teacher(value)


@pytest.mark.parametrize("field", [{"schedule": {"epochs": 1}}, {"seed": 1}, {"layer": "layer1"}])
def test_a_handcrafted_teacher_has_nothing_of_a_trained_one(field):
    with pytest.raises(ValidationError) as caught:
        teacher({**HANDCRAFTED, **field})
    assert paths(caught.value) == set(field)


def test_errors_of_a_teacher_speak_of_its_own_type_only():
    with pytest.raises(ValidationError) as caught:
        pair(teacher={**TRAINED, "schedule": {"epochs": 0}})
    assert paths(caught.value) == {"teacher.schedule.epochs"}


# --- data


def test_one_name_stands_for_all_four_roles():
    roles = pair(data="synthetic").data
    assert {getattr(roles, role).kind for role in DataRoles.model_fields} == {"synthetic"}
    assert pair(data={"kind": "synthetic"}).data == roles


def test_roles_may_differ():
    roles = {
        "pretext": "synthetic",
        "cluster": "synthetic",
        "transfer": "synthetic",
        "target": {"kind": "synthetic", "seed": 1},
    }
    assert pair(data=roles).data.target.seed == 1
    assert pair(data=DataRoles(**roles)).data.target.seed == 1
    with pytest.raises(ValidationError) as caught:
        pair(data={name: value for name, value in roles.items() if name != "transfer"})
    assert paths(caught.value) == {"data.transfer"}


@pytest.mark.parametrize(
    ("text", "mapping"),
    [
        ("synthetic", {"kind": "synthetic"}),
        ("synthetic?count=50&noise=0.2", {"kind": "synthetic", "count": 50, "noise": 0.2}),
        ("folder:/data/cats", {"kind": "folder", "path": "/data/cats"}),
        ("folder:relative/cats?size=32", {"kind": "folder", "path": "relative/cats", "size": 32}),
        ("parquet:/p/a.parquet?label=label", {"kind": "parquet", "path": "/p/a.parquet", "label": "label"}),
        (r"folder:C:\data\cats", {"kind": "folder", "path": r"C:\data\cats"}),
    ],
)
def test_data_can_be_named_in_one_string(text, mapping):
    assert data(text) == data(mapping)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("folder", "path"),
        ("synthetic?cuont=5", "cuont"),
        ("synthetic?count=many", "count"),
        ("nowhere:/p", "no dataset kind 'nowhere'"),
        ("", "no dataset kind ''"),
    ],
)
def test_a_wrong_data_string_is_refused(text, words):
    with pytest.raises((UserError, ValidationError), match=words):
        data(text)


@pytest.mark.parametrize("kind", plugins.kinds("dataset"))
def test_where_data_lies_is_declared_field_by_field(kind):
    module = plugins.module("dataset", kind)
    assert set(module.LOCATION) <= module.Spec.model_fields.keys()
    assert {"path", "download"} & module.Spec.model_fields.keys() <= set(module.LOCATION)


# --- pairs and schedules


def test_clusters_need_a_teacher():
    with pytest.raises(ValidationError, match="'clusters' needs a teacher"):
        pair(teacher=None)


@pytest.mark.parametrize("transfer", ["labels", "none"])
def test_a_reference_has_no_teacher_unless_the_teacher_is_judged(transfer):
    assert pair(transfer=transfer, teacher=None).teacher is None
    assert pair(transfer=transfer, evals=[{"kind": "knn", "of": "teacher"}]).teacher
    with pytest.raises(ValidationError, match="uses no teacher"):
        pair(transfer=transfer)


def test_a_pool_that_nothing_reads_is_refused():
    judged = {"kind": "knn", "of": "teacher", "pool": {"grid": 2}}
    with pytest.raises(ValidationError, match="give it a 'layer' for its 'pool'"):
        pair(evals=[judged])
    assert pair(evals=[{**judged, "layer": "conv3"}, {**judged, "name": "plain", "pool": {"grid": 1}}])


@pytest.mark.parametrize("name", ["student", "teacher", "clusters", "cost", "objective", "pseudo_labels/nmi", "test/knn"])
def test_an_evaluation_cannot_write_over_the_metrics_of_a_stage(name):
    with pytest.raises(ValidationError, match="other metrics begin with that word"):
        pair(evals=[{"kind": "knn", "name": name}])
    assert pair(evals=[{"kind": "knn", "name": f"{name}_knn".replace("/", "_")}])


def test_two_evaluations_of_one_name_need_names():
    with pytest.raises(ValidationError, match="two evals are called 'knn'"):
        pair(evals=["knn", {"kind": "knn", "k": 1}])
    assert len(pair(evals=["knn", {"kind": "knn", "k": 1, "name": "nearest"}]).evals) == 2

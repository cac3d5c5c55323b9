"""Raising the REVISION of a tool makes new whatever was computed with it."""

import ast
from importlib import import_module

import pytest

from ktray import plugins
from ktray.pipeline import pair_graph
from ktray.scheduler.resources import STAGES
from ktray.spec import Augment
from tests.source import NAMES, PACKAGE, ktray_imports
from tests.toys import DATA, HOG, ROTATION, STUDENT, toy_pair

KINDS = [(group, kind) for group in plugins.GROUPS for kind in plugins.kinds(group)]
NEEDED = {
    "random_network": {"backbone": STUDENT["backbone"]},
    **{
        kind: {"path": "/nowhere"}
        for kind in ("folder", "imagefolder", "parquet", "webdataset", "voc", "coco", "imagenet", "places365")
    },
}
TOOLS = {"ops", "training", "features", "clustering", "images", "classifiers", "scoring", "fine_tuning"}
IN_EVERY_KEY = {"image_decoding", "training_loop"}  # through the artifacts that a tool reads, so no tool needs to name them


def tools_of(name):
    """The modules with a REVISION, plugins excepted, that the source of a module imports."""
    source = next(module for module in PACKAGE if module.name == name)
    modules = [import_module(other) for other in sorted({*ktray_imports(source)} - {name}) if other in NAMES]
    return [module for module in modules if hasattr(module, "IDENTITY")]


def taught(transfer):
    """The transfer, with a teacher if it needs one."""
    needs = plugins.module("transfer", transfer["kind"]).NEEDS
    return {"transfer": transfer, "teacher": HOG if needs.keys() - {"labels"} else None}


def pair_with(group, spec):
    """A pair that uses `spec` in its group."""
    changes = {
        "dataset": {"data": spec},
        "backbone": {"student": {**STUDENT, "backbone": spec}},
        "pretext": {"teacher": {**ROTATION, "pretext": spec}},
        "descriptor": {"teacher": {"descriptor": spec}},
        "transfer": taught(spec) if group == "transfer" else {},
        "evaluation": {"evals": [spec]},
    }[group]
    return toy_pair(**{"data": DATA, **changes})


def keys_of(group, spec):
    """The keys that the kind is to blame for: those of its own stage, by group."""
    keys = pair_graph.build(pair_with(group, spec), lambda data: "content").keys
    stage = {"backbone": "student", "pretext": "teacher", "descriptor": "features", "transfer": "student"}.get(group)
    return keys[stage] if stage else keys["evaluation"]


@pytest.mark.parametrize(("group", "kind"), KINDS, ids=[".".join(names) for names in KINDS])
def test_every_tool_that_a_kind_imports_is_in_the_key_of_its_stage(group, kind, monkeypatch):
    spec = {"kind": kind, **NEEDED.get(kind, {})}
    before = keys_of(group, spec)
    module = plugins.module(group, kind)
    for tool in tools_of(module.__name__):
        if tool in getattr(module, "TOOLS_OF_SOME", ()):  # see the test of these
            continue
        with monkeypatch.context() as patch:
            patch.setattr(tool, "REVISION", tool.REVISION + 1)
            assert keys_of(group, spec) != before, f"{group} {kind} uses {tool.__name__} and does not name it in TOOLS"


def test_a_tool_names_the_tools_that_it_is_made_of():
    names = [m.name for m in PACKAGE if m.part in TOOLS and "IDENTITY" in ast.unparse(m.tree) and m.part != "images"]
    assert len(names) > 5
    for name in names:
        imported = {tool.IDENTITY for tool in tools_of(name)}
        module = import_module(name)
        some = {tool.IDENTITY for tool in getattr(module, "TOOLS_OF_SOME", ())}  # see the test below
        assert imported - IN_EVERY_KEY <= plugins.revisions(module).keys() | some, name


OF_SOME = {  # a field of student.augment or student.schedule -> the module whose revision counts with it
    "area": ({"area": 0.2}, "colour"),
    "jitter": ({"jitter": {}}, "colour"),
    "grey": ({"grey": 0.2}, "colour"),
    "blur": ({"blur": 0.5}, "colour"),
    "solarise": ({"solarise": 0.2}, "colour"),
    "randaugment": ({"randaugment": {}}, "randaugment"),
    "mixup": ({"mixup": 0.2}, "mixing"),
    "cutmix": ({"cutmix": 1.0}, "mixing"),
    "ema": ({"ema": 0.99}, "averaged_weights"),
    "layer_decay": ({"layer_decay": 0.7}, "optimisers"),
    "optimizer": ({"optimizer": "lars"}, "optimisers"),
}


@pytest.mark.parametrize(("fields", "tool"), OF_SOME.values(), ids=OF_SOME)
def test_a_tool_that_some_settings_use_counts_in_the_keys_of_those_alone(fields, tool):
    part = "augment" if fields.keys() <= Augment.model_fields.keys() else "schedule"
    with_it = {**STUDENT, part: {**STUDENT.get(part, {}), **fields}}
    plain, used = (
        next(s for s in pair_graph.build(toy_pair(student=each), lambda data: "content").stages if s.name == "student")
        for each in (STUDENT, with_it)
    )
    assert tool not in plain.revisions
    assert used.revisions.keys() - plain.revisions.keys() == {tool}


def test_fields_that_were_added_later_are_in_no_dump_and_no_key_at_their_default():
    dumped = toy_pair().model_dump(mode="json")
    assert dumped["student"]["augment"].keys() == {"crop", "flip"}
    assert dumped["student"]["schedule"].keys() == {
        *("kind", "epochs", "lr", "warmup", "decay", "batch_size", "optimizer", "momentum", "weight_decay", "precision")
    }
    assert "label_smoothing" not in dumped["transfer"]
    assert "drop_path" not in plugins.parse("backbone", "timm").model_dump()


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_features_and_what_is_judged_by_them_depend_on_how_pixels_become_numbers(of):
    built = pair_graph.build(toy_pair(evals=[{"kind": "knn", "of": of}]), lambda data: "content")
    revisions = {stage.name: stage.revisions.keys() for stage in built.stages}
    assert {"feature_extraction", "augmentation"} <= revisions["features"] & revisions["evaluation"]


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_the_revision_of_a_stage_is_in_its_key_and_not_in_those_of_the_stages_before_it(stage, monkeypatch):
    order = [*STAGES]
    before = pair_graph.build(toy_pair(teacher=ROTATION), lambda data: "content").stages
    monkeypatch.setattr(f"ktray.stages.{stage}_stage.REVISION", 2)
    after = pair_graph.build(toy_pair(teacher=ROTATION), lambda data: "content").stages
    changed = {old.name for old, new in zip(before, after, strict=True) if old.key != new.key}
    assert changed == set(order[order.index(stage) :])


def test_what_teacher_and_student_share_in_training_is_in_the_keys_of_both(monkeypatch):
    monkeypatch.setattr("ktray.stages.training_segment.REVISION", 2)
    built = pair_graph.build(toy_pair(teacher=ROTATION), lambda data: "content")
    assert {stage.name for stage in built.stages if stage.revisions.get("stage.training_segment") == 2} == {
        "teacher",
        "student",
    }


def test_every_module_of_the_stages_has_a_revision():
    modules = [module.name for module in PACKAGE if module.part == "stages" and module.name != "ktray.stages"]
    assert len(modules) == len(STAGES) + 1  # and the training that two of them share
    assert all(isinstance(import_module(name).REVISION, int) for name in modules)

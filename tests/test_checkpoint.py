"""Loaded teachers: weights trained elsewhere are imported completely or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ktray import plugins
from ktray.errors import StageFailed, UserError
from ktray.export import student_files
from ktray.features import extraction
from ktray.fingerprint import file_sha256
from ktray.pipeline import identity
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_graph import build
from ktray.pool import StageContext
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.spec import Student
from ktray.stores.file import FileStore
from ktray.training import loop, pretrained, snapshot
from tests.toys import ROTATION, STUDENT, toy_pair

torch.set_num_threads(1)

ALEXNET = plugins.parse("backbone", {"kind": "alexnet", "width": 0.125})
IDENTITY = data_identity()


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """The weights of a small alexnet."""
    return loop.untrained_backbone(ALEXNET, 3).state_dict()


def adopted(tensors: dict[str, torch.Tensor], folder: Path, backbone=ALEXNET) -> dict[str, torch.Tensor]:
    """What a snapshot holds that was made of these tensors."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "weights.safetensors")
    pretrained.import_weights(backbone, folder / "weights.safetensors", folder / "out")
    return load_file(folder / "out" / "weights.safetensors")


def exported(folder: Path, spec=ALEXNET) -> Path:
    """The folder of an exported student with a classifier."""
    network = loop.untrained_backbone(spec, 3)
    (folder / "snapshot").mkdir()
    named = {f"backbone.{n}": t for n, t in network.state_dict().items()}
    head = {"head.weight": torch.zeros(2, network.feature_dim), "head.bias": torch.zeros(2)}
    save_file(named | head, folder / "snapshot" / "weights.safetensors")
    student = Student.model_validate({**STUDENT, "backbone": spec.model_dump()})
    student_files.export_student(folder / "snapshot", student, 32, {}, {}, folder / "student", 2, head="classifier")
    return folder / "student"


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "module.backbone.", "model."])
def test_weights_are_found_under_all_common_name_prefixes(prefix, weights, tmp_path):
    found = adopted({f"{prefix}{name}": tensor for name, tensor in weights.items()}, tmp_path)
    assert all(torch.equal(found[f"backbone.{name}"], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    "head", ["fc.weight", "classifier.6.bias", "head.weight", "heads.head.weight", "head.target.conv1.0.weight"]
)
def test_a_classifier_is_dropped(head, weights, tmp_path):
    assert len(adopted({**weights, head: torch.zeros(3)}, tmp_path)) == len(weights)


def test_tensors_unknown_to_the_backbone_are_named(weights, tmp_path):
    strange = {f"layer{number}.weight": torch.zeros(number) for number in range(1, 6)}
    with pytest.raises(UserError, match=r"layer1\.weight of shape \(1,\), .*, layer3\.weight of shape \(3,\) and 2 more"):
        adopted({**weights, **strange}, tmp_path)
    assert not (tmp_path / "out").exists()


def test_weights_of_another_architecture_are_refused_with_the_first_names_of_both(tmp_path):
    other = loop.untrained_backbone(plugins.parse("backbone", {"kind": "vgg", "depth": 11, "width": 0.125}), 0)
    with pytest.raises(
        UserError, match=r"another architecture: it has no conv1\.0\.weight .*but has features\..*\(8, 3, 3, 3\)"
    ):
        adopted(other.state_dict(), tmp_path)
    wide = plugins.parse("backbone", {"kind": "alexnet", "width": 0.25})
    with pytest.raises(UserError, match=r"has no conv1\.0\.weight of shape \(16, 3, 3, 3\).* but has .*\(8, 3, 3, 3\)"):
        adopted(loop.untrained_backbone(ALEXNET, 0).state_dict(), tmp_path, wide)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, weights, tmp_path):
    weights["conv3.0.weight"][0, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"not finite, in conv3\.0\.weight"):
        adopted(weights, tmp_path)


def test_a_file_without_named_tensors_is_refused(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no named tensors"):
        pretrained.import_weights(ALEXNET, tmp_path / "list.pth", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither model\.safetensors, weights\.safetensors nor pytorch_model\.bin"):
        pretrained.import_weights(ALEXNET, tmp_path / "empty", tmp_path / "out")


def test_an_exported_student_is_a_checkpoint_by_its_folder(tmp_path):
    folder = exported(tmp_path)
    pretrained.import_weights(ALEXNET, folder, tmp_path / "out")
    loaded = loop.untrained_backbone(ALEXNET, 0)
    snapshot.load_backbone(loaded, tmp_path / "out")
    expected = student_files.load_student(folder).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.state_dict().items())


def test_the_error_for_an_exported_student_of_another_architecture_names_it(tmp_path):
    folder = exported(tmp_path, plugins.parse("backbone", {"kind": "alexnet", "width": 0.25}))
    with pytest.raises(UserError, match=r"'kind': 'alexnet'.*'width': 0\.25"):
        pretrained.import_weights(ALEXNET, folder, tmp_path / "out")


@pytest.mark.parametrize("file", ["model.safetensors", "student.json"])
def test_a_damaged_student_is_never_used_as_a_teacher(file, tmp_path):
    folder = exported(tmp_path)
    content = bytearray((folder / file).read_bytes())
    content[-3] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=f"damaged: {file}"):
        pretrained.import_weights(ALEXNET, folder, tmp_path / "out")


def test_a_folder_and_the_file_in_it_are_the_same_teacher(tmp_path):
    folder = exported(tmp_path)
    paths = [folder, folder / "model.safetensors"]
    keys = {build(toy_pair(teacher=loaded(path)), IDENTITY).keys["teacher"] for path in paths}
    assert len(keys) == 1
    with pytest.raises(UserError, match="no file absent"):
        build(toy_pair(teacher=loaded(tmp_path / "absent.pth")), IDENTITY)


def loaded(place: object, **fields: object) -> dict[str, object]:
    """A loaded teacher of the toy backbone."""
    return {"checkpoint": str(place), "backbone": ALEXNET.model_dump(), "layer": "conv3", **fields}


def run(pair, store):
    graph = build(pair, IDENTITY)
    LocalScheduler(store, execute, StageContext(), lambda event: None).obtain(list(graph.stages), "test")
    return graph.keys


@pytest.mark.parametrize("source", ["key", "folder"])
def test_the_teacher_of_one_pair_teaches_another_by_its_key_or_folder(source, tmp_path):
    store = FileStore(tmp_path / "store")
    first = run(toy_pair(teacher=ROTATION, evals=[]), store)
    place = first["teacher"] if source == "key" else store.find(first["teacher"]).directory
    second = run(toy_pair(teacher=loaded(place), evals=[{"kind": "knn", "of": "teacher"}]), store)
    assert second["teacher"] != first["teacher"]
    one, two = (extraction.load(store.find(keys["features"]).directory) for keys in (first, second))
    np.testing.assert_array_equal(one, two)
    assert store.find(second["teacher"]).metrics["parameters"] == sum(
        p.numel() for p in loop.untrained_backbone(ALEXNET, 0).parameters()
    )


def test_an_artifact_that_is_not_there_fails_the_stage_by_name(tmp_path):
    store = FileStore(tmp_path / "store")
    with pytest.raises(StageFailed, match=r"teacher-\w+ failed: .*the artifact student-0123456789ab is not in the store"):
        run(toy_pair(teacher=loaded("student-0123456789ab")), store)
    assert not any(key.startswith(("teacher", "features")) for key in list(store.keys()))


def test_a_checkpoint_of_another_architecture_fails_its_stage_and_publishes_nothing(tmp_path):
    store = FileStore(tmp_path / "store")
    save_file(
        loop.untrained_backbone(plugins.parse("backbone", {"kind": "vgg", "width": 0.125}), 0).state_dict(),
        tmp_path / "vgg.safetensors",
    )
    with pytest.raises(StageFailed, match=r"teacher-\w+ failed: .*another architecture"):
        run(toy_pair(teacher=loaded(tmp_path / "vgg.safetensors")), store)
    assert not list(store.keys())


def test_a_checkpoint_that_was_replaced_after_planning_is_not_published_under_the_old_key(weights, tmp_path):
    store, file = FileStore(tmp_path / "store"), tmp_path / "teacher.safetensors"
    save_file(weights, file)
    graph = build(toy_pair(teacher=loaded(file)), IDENTITY)
    save_file({name: tensor * 2 for name, tensor in weights.items()}, file)
    with pytest.raises(StageFailed, match=r"teacher.safetensors changed after the run was planned"):
        LocalScheduler(store, execute, StageContext(), lambda event: None).obtain(list(graph.stages), "test")
    assert store.find(graph.keys["teacher"]) is None
    assert build(toy_pair(teacher=loaded(file)), IDENTITY).keys["teacher"] != graph.keys["teacher"]


def test_a_checkpoint_is_hashed_again_only_after_it_changed(weights, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(identity, "file_sha256", lambda path: hashed.append(path) or file_sha256(path))
    monkeypatch.setattr("ktray.fingerprint.TIME_GRANULARITY_NS", 0)  # a file of just now counts as old
    file = tmp_path / "teacher.safetensors"
    save_file(weights, file)
    before = file.stat().st_mtime_ns
    assert identity.checkpoint_sha256(str(file)) == identity.checkpoint_sha256(str(file))
    assert len(hashed) == 1
    os.utime(file, ns=(before, before + 1))
    identity.checkpoint_sha256(str(file))
    assert len(hashed) == 2


def test_a_checkpoint_that_is_replaced_within_the_same_tick_of_the_clock_is_another_one(weights, tmp_path):
    file = tmp_path / "teacher.safetensors"
    save_file(weights, file)
    state, before = file.stat(), identity.checkpoint_sha256(str(file))
    save_file({name: tensor * 2 for name, tensor in weights.items()}, file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert identity.checkpoint_sha256(str(file)) != before


def test_only_an_artifact_key_is_treated_as_one():
    for text in ("teacher-3f9a1c0b2d44", "student-000000000000"):
        assert pretrained.ARTIFACT.fullmatch(text)
    for text in ("./teacher-3f9a1c0b2d44", "teacher-3f9a1c0b2d44.pth", "features-3f9a1c0b2d44", "teacher-final"):
        assert not pretrained.ARTIFACT.fullmatch(text)


def test_the_file_of_an_exported_student_is_the_one_that_its_card_names(tmp_path):
    folder = exported(tmp_path)
    assert pretrained.weights_file(folder).name in json.loads((folder / "student.json").read_text())["files"]

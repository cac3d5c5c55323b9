"""Networks that see images at a size of their own: resized as torchvision does it, before training and before judging."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ktray.cli import main
from ktray.features import extraction
from ktray.images import Images
from ktray.ops import resizing
from ktray.pipeline.pair_graph import build
from ktray.training import batches
from tests.toys import DATA, ROTATION, STUDENT, toy_pair, toy_spec

torch.set_num_threads(1)


def noise(size: int, count: int = 20) -> Images:
    """Images of noise, in which every pixel matters."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    boxes = tuple(np.array([[0, 0, size, size / 2, 1]], np.float32) for _ in range(count))
    return Images(count, size, lambda rows: pixels[rows], np.arange(count) % 2, boxes=boxes)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "to"), [(64, 24), (24, 64), (33, 20)])
def test_images_are_resized_as_by_torchvision(size: int, to: int, interpolation: Any) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    images, mode = noise(size), InterpolationMode(interpolation)
    seen = resizing.at_size(images, to, interpolation)
    floats = torch.from_numpy(images.read(np.arange(20))).permute(0, 3, 1, 2).double()
    expected = functional.resize(floats, [to, to], mode, antialias=True).clamp(0, 255).permute(0, 2, 3, 1)
    found = torch.from_numpy(seen.read(np.array([3, 1, 2])))
    assert found.shape == (3, to, to, 3)
    assert (found - expected[[3, 1, 2]]).abs().max() <= 1, "equal but for rounding"
    assert seen.boxes is not None
    assert seen.boxes[0].tolist() == [[0, 0, to, to / 2, 1]]
    assert resizing.at_size(images, size) is images


@pytest.mark.parametrize("resident", [True, False])
def test_a_training_sees_the_same_pixels_kept_on_the_device_or_read_batch_by_batch(
    resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not resident:
        monkeypatch.setattr(batches, "RESIDENT_BYTES", {})
    monkeypatch.setattr(batches, "_STORED_BYTES", 5 * 40**2 * 3)  # several blocks
    seen = resizing.at_size(noise(40), 16)
    task: Any = type("Task", (), {"keep": torch.arange(1, 20), "order": None})
    made = batches.Batches(seen, task, 8, 0, torch.device("cpu"))
    parts = made.order(1)
    for positions, pixels in zip(parts, made.pixels(parts), strict=True):
        assert np.array_equal(pixels.numpy(), seen.read(made.kept[positions].numpy()))
    assert (made.resident is not None) is resident


def test_features_are_those_of_the_resized_images() -> None:
    pair = toy_pair(student={**STUDENT, "image_size": 20})
    view = extraction.network_view(pair.student.backbone, "conv3", toy_pair().evals[0].pool, resize=(20, "bilinear"))
    seen = extraction.seen_by(view, noise(44))
    assert (seen.size, seen.stored and seen.stored.size) == (20, 44)
    network = torch.nn.Flatten()
    network.layers = ()  # type: ignore[assignment]
    run = extraction._forward(network, [(None, toy_pair().evals[0].pool)], "ktray", (20, "bilinear"))
    stored = torch.from_numpy(noise(44).read(np.arange(4)))
    on_device = run(stored, timed=False)[0][0]
    expected = run(torch.from_numpy(seen.read(np.arange(4))), timed=False)[0][0]
    assert torch.equal(on_device, expected), "a graph on a device resizes what is stored"


def test_keys_say_the_size_that_a_network_sees_and_are_as_they_were_without_one() -> None:
    judges = [{"kind": "knn"}, {"kind": "knn", "of": "teacher", "name": "taught"}]

    def keys(**changes: Any) -> dict[str, Any]:
        return dict(build(toy_pair(**{"teacher": ROTATION, "evals": judges, **changes}), lambda data: "content").keys)

    plain = keys()
    explicit = keys(student={**STUDENT, "image_size": None}, teacher={**ROTATION, "image_size": None})
    assert explicit == plain
    small = keys(student={**STUDENT, "image_size": 20})
    assert small["teacher"] == plain["teacher"]
    assert small["features"] == plain["features"]
    assert small["student"] != plain["student"]
    assert small["evaluation"]["knn"] != plain["evaluation"]["knn"]
    assert small["evaluation"]["taught"] == plain["evaluation"]["taught"]
    taught = keys(teacher={**ROTATION, "image_size": 20})
    assert taught["teacher"] != plain["teacher"]
    assert taught["evaluation"]["taught"] != plain["evaluation"]["taught"]


def test_networks_are_trained_and_judged_at_sizes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Every stage runs, and `cost` counts the operations of a student of data of its size."""
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    student = {**STUDENT, "image_size": 20, "schedule": {**STUDENT["schedule"], "epochs": 1}}
    teacher = {**ROTATION, "image_size": 24, "schedule": {**ROTATION["schedule"], "epochs": 1}}
    evals = [{"kind": "knn"}, {"kind": "cost", "repetitions": 3, "onnx": False}]
    spec = toy_spec(data={**DATA, "count": 60, "size": 48}, teacher=teacher, student=student, evals=evals)
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(spec))
    assert main(["run", str(tmp_path / "pair.yaml"), "--local", "--json", "--quiet"]) == 0, capsys.readouterr().err
    answer = json.loads(capsys.readouterr().out)[0]
    smaller = {**spec, "student": {**student, "image_size": None}, "data": {**spec["data"], "size": 20}}
    smaller["teacher"] = {**teacher, "image_size": None}
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(smaller))
    assert main(["run", str(tmp_path / "pair.yaml"), "--local", "--json", "--quiet"]) == 0
    other = json.loads(capsys.readouterr().out)[0]
    assert other["metrics"]["cost/gflops"] == answer["metrics"]["cost/gflops"]


def test_the_wrapped_images_keep_names_and_labels() -> None:
    images = replace(noise(32), names=tuple(map(str, range(20))))
    seen = resizing.at_size(images, 16)
    assert (seen.names, len(seen)) == (images.names, 20)
    assert seen.labels is images.labels
    assert resizing.at_size(seen, 8).stored is images, "resized once, from what is stored"

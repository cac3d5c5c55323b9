"""Inputs that cannot work: each is a clear error that names its stage or its field, and nothing of it is published."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from ktray.cli import main
from ktray.plugins import parse
from ktray.training import loop
from tests.pictures import noise
from tests.precomputed_files import npy, numbers, paths
from tests.toys import HOG, ROTATION, STUDENT, toy_spec

ALEXNET = {"kind": "alexnet", "width": 0.125}
COUNT = 40
Changes = Callable[[Path], dict[str, Any]]


class Trap:
    """What touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def folder(root: Path, sides: tuple[int, ...] = (32,), colour: int | None = None, size: int = 28) -> dict[str, Any]:
    """Images of noise, or of one colour, of these sides in turn."""
    root.mkdir(exist_ok=True)
    for index in range(COUNT):
        side = sides[index % len(sides)]
        pixels = noise(side, side, seed=index)
        Image.fromarray(pixels if colour is None else np.full_like(pixels, colour)).save(root / f"{index:03}.png")
    return {"kind": "folder", "path": str(root), "size": size}


def loaded(file: Path, backbone: Any = ALEXNET) -> dict[str, Any]:
    return {"checkpoint": str(file), "backbone": backbone}


def pickled(at: Path, content: Any) -> dict[str, Any]:
    torch.save(content, at / "weights.pth")
    return {"teacher": loaded(at / "weights.pth")}


def of_another_architecture(at: Path) -> dict[str, Any]:
    torch.save(models.resnet18().state_dict(), at / "resnet18.pth")
    return {"teacher": loaded(at / "resnet18.pth")}


def of_another_depth(at: Path) -> dict[str, Any]:
    network = loop.untrained_backbone(parse("backbone", {"kind": "resnet", "depth": 34, "width": 0.125}), 0)
    save_file(network.state_dict(), at / "deep.safetensors")
    return {"teacher": loaded(at / "deep.safetensors", {"kind": "resnet", "depth": 18, "width": 0.125})}


def cut_off(at: Path) -> dict[str, Any]:
    save_file(loop.untrained_backbone(parse("backbone", ALEXNET), 0).state_dict(), at / "cut.safetensors")
    content = (at / "cut.safetensors").read_bytes()
    (at / "cut.safetensors").write_bytes(content[: len(content) // 2])
    return {"teacher": loaded(at / "cut.safetensors")}


def features_with_nan(at: Path) -> dict[str, Any]:
    values = numbers(COUNT)
    values[5:9, 1] = np.nan
    return {"teacher": npy(at / "ready", values, paths(folder(at / "x")))}


def roles(at: Path, **changed: dict[str, Any]) -> dict[str, Any]:
    same = folder(at / "x")
    return {"data": {role: changed.get(role, same) for role in ("pretext", "cluster", "transfer", "target")}}


FAILS: dict[str, tuple[Changes, str, str]] = {  # what is wrong -> (changes of the pair, the stage, what is said)
    "an artifact that is not there": (
        lambda at: {"teacher": loaded(Path("student-0123456789ab"))},
        "teacher",
        "the artifact student-0123456789ab is not in the store: run the pair that makes it first",
    ),
    "features with NaN": (features_with_nan, "features", "images have features of type float32 that are not finite"),
    "one colour": (lambda at: {"data": folder(at / "grey", colour=9)}, "clusters", "all 36 rows of the features are equal"),
    "one colour to a network": (
        lambda at: {"data": folder(at / "grey", colour=9), "teacher": ROTATION},
        "clusters",
        "all 36 rows of the features are equal",
    ),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def told(at: Path, changes: dict[str, Any], capsys: Any, verb: str = "run") -> tuple[int, str]:
    """Exit code and what is said; always one sentence and no traceback."""
    pair = at / "pair.yaml"
    spec = {"data": folder(at / "x"), "evals": ["effective_rank"], "teacher": HOG, **changes}
    pair.write_text(yaml.safe_dump(toy_spec(**spec)))
    code = main([verb, str(pair), "--quiet", *(["--local"] if verb == "run" else [])])
    err = capsys.readouterr().err
    assert err.startswith("ktray: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return code, err


ORDER = ("images", "teacher", "features", "clusters", "pseudo_labels", "student", "evaluation")


@pytest.mark.parametrize(("changes", "stage", "said"), FAILS.values(), ids=FAILS.keys())
def test_what_only_a_run_can_see_fails_its_stage_by_name_and_publishes_nothing_of_it(
    changes: Changes, stage: str, said: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    code, err = told(tmp_path, changes(tmp_path), capsys)
    assert code == 3
    assert re.match(rf"ktray: {stage}-[0-9a-f]{{12}} failed: ", err), err
    assert said in err
    published = {path.name.partition("-")[0] for path in home.glob("store/*-*")}
    assert published <= set(ORDER[: ORDER.index(stage)]), "neither the stage nor what reads it"
    key = err.removeprefix("ktray: ").partition(" ")[0]
    assert main(["show", key]) == 0
    assert "state: failed" in capsys.readouterr().out


REFUSED: dict[str, tuple[Changes, str]] = {  # what is wrong -> (changes of the pair, what is said)
    "a pickled network": (
        lambda at: pickled(at, models.resnet18()),
        "teacher.checkpoint: weights.pth contains no named tensors but objects of Python, such as torchvision.models",
    ),
    "a trap for who unpickles": (
        lambda at: pickled(at, {"conv": Trap(at / "sprung")}),
        "teacher.checkpoint: weights.pth contains no named tensors but objects of Python",
    ),
    "half a checkpoint": (cut_off, "teacher.checkpoint: cut.safetensors is cut off: it has 73,"),
    "weights of another architecture": (
        of_another_architecture,
        "teacher.checkpoint: resnet18.pth is of another architecture: it has no conv1.0.weight",
    ),
    "weights of another depth": (
        of_another_depth,
        "teacher.checkpoint: deep.safetensors is of another architecture: it has layer1.2",
    ),
    "features with the wrong N": (
        lambda at: {"teacher": npy(at / "ready", numbers(COUNT - 1), None)},
        "teacher.features: clip.npy has 39 rows, but the data set has 40 training images",
    ),
    "k larger than the images": (
        lambda at: {"transfer": {"kind": "clusters", "k": 37}},
        "transfer.k: k=37 clusters cannot be made from 36 images",
    ),
    "images of different sizes in two roles": (
        lambda at: roles(at, transfer={**folder(at / "y"), "size": 35}),
        "data.transfer.size: images of 28 px have 324 features each and those of 35 px 576",
    ),
    "images smaller than the network's": (
        lambda at: {"student": {**STUDENT, "backbone": {"kind": "alexnet", "form": "full", "width": 0.125}}},
        "student.backbone: the alexnet cannot take images of 28 px",
    ),
}


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_can_be_seen_before_a_run_is_refused_with_its_field(
    changes: Changes, said: str, verb: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    code, err = told(tmp_path, changes(tmp_path), capsys, verb)
    assert code == 2
    assert f"pair.yaml: {said}" in err
    assert not list(home.glob("store/*-*"))
    assert not (tmp_path / "sprung").exists()


def test_a_plan_refuses_a_teacher_that_is_not_in_the_store(home: Path, tmp_path: Path, capsys: Any) -> None:
    code, err = told(tmp_path, {"teacher": loaded(Path("student-0123456789ab"))}, capsys, "plan")
    assert code == 2
    assert "pair.yaml: teacher.checkpoint: the artifact student-0123456789ab is not in the store" in err
    assert "Run the pair that makes it first" in err


def test_images_of_different_sizes_in_one_folder_are_no_mistake(home: Path, tmp_path: Path, capsys: Any) -> None:
    data = folder(tmp_path / "x", sides=(9, 28, 50, 200))
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(toy_spec(data=data, evals=["effective_rank"])))
    assert main(["run", str(tmp_path / "pair.yaml"), "--local", "--quiet"]) == 0, capsys.readouterr().err


def test_run_says_that_it_does_not_use_a_tracker(home: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(toy_spec(data=folder(tmp_path / "x"), evals=["effective_rank"])))
    assert main(["run", str(tmp_path / "pair.yaml"), "--local", "--tracking", f"sqlite:///{tmp_path}/t.db"]) == 0
    assert "--tracking is not used: run logs nothing to MLflow" in capsys.readouterr().err
    assert not (tmp_path / "t.db").exists()

"""The four data roles are four different sets, of other sizes and channels each: it works, or the plan says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ktray import plugins
from ktray.cli import main
from ktray.errors import UserError
from ktray.pipeline.pair_check import check_pair, data_loader
from tests.pictures import noise
from tests.toys import HOG, ROTATION, STUDENT, toy_pair, toy_spec

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK")
SCHEDULE = {"epochs": 1, "lr": 0.02, "batch_size": 64}
LOAD = data_loader()


def synthetic(size: int, seed: int, channels: str = "rgb") -> dict[str, Any]:
    return {"kind": "synthetic", "count": 64, "test": 20, "size": size, "seed": seed, "channels": channels}


FOUR = {  # grey and coloured, no two of one size
    "pretext": synthetic(28, 0, "grey"),
    "cluster": synthetic(32, 1),
    "transfer": synthetic(40, 2),
    "target": synthetic(24, 3, "grey"),
}


def pictures_of_all_modes(root: Path, count: int) -> dict[str, Any]:
    """A folder of images of other sizes, shapes and channels each."""
    root.mkdir()
    for index in range(count):
        mode, height, width = MODES[index % len(MODES)], 30 + 3 * (index % 7), 25 + 5 * (index % 5)
        pixels = Image.fromarray(noise(height, width, seed=index))
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(pixels.convert("L")).astype(np.uint16) * 257)
        else:
            picture = pixels.convert(mode)
        picture.save(root / f"{index:03}-{mode.replace(';', '')}.{'jpg' if mode == 'CMYK' else 'png'}")
    return {"kind": "folder", "path": str(root), "size": 40}


def classes_of_pictures(root: Path, count: int) -> dict[str, Any]:
    """A dark and a bright class of grey images."""
    for index in range(count):
        path = root / ("dark" if index % 2 else "bright") / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = noise(20 + index % 9, 24, channels=1, seed=index) // 4 + (0 if index % 2 else 190)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return {"kind": "imagefolder", "path": str(root), "size": 24}


def test_four_real_sets_of_other_sizes_and_channels_make_one_pair(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    data = {
        "pretext": "fashion_mnist_mini",  # 28 px, grey
        "cluster": {"kind": "synthetic", "count": 200, "size": 32},
        "transfer": pictures_of_all_modes(tmp_path / "pictures", 80),
        "target": classes_of_pictures(tmp_path / "classes", 40),
    }
    judges = ["linear_probe", {"kind": "knn"}, {"kind": "knn", "of": "teacher", "name": "teacher_knn"}, "cluster_quality"]
    pair = toy_spec(data=data, teacher={**ROTATION, "schedule": {**SCHEDULE, "batch_size": 256}}, evals=judges)
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(pair))
    assert main(["run", str(tmp_path / "pair.yaml"), "--local", "--json", "--quiet"]) == 0, capsys.readouterr().err
    answer = json.loads(capsys.readouterr().out)[0]
    assert answer["computed"]["images"] == 4
    assert answer["computed"]["features"] == 2

    def record(key: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / "home/store" / key / "record.json").read_text())
        return found

    def read_by(stage: str) -> set[str]:
        """Kinds of the data sets that a stage reads."""
        key = answer["keys"][stage] if stage != "evaluation" else answer["keys"]["evaluation"]["knn"]
        return {record(each)["spec"]["kind"] for each in record(key)["inputs"].values() if each.startswith("images-")}

    assert read_by("teacher") == {"fashion_mnist_mini"}
    assert read_by("features") == {"synthetic"}
    assert read_by("pseudo_labels") == read_by("student") == {"folder"}
    assert read_by("evaluation") == {"imagefolder"}
    labels = np.load(tmp_path / "home/store" / answer["keys"]["pseudo_labels"] / "labels.npy", allow_pickle=False)
    assert len(labels) == 72
    assert answer["metrics"]["teacher_knn/top1"] == 1.0, "dark and bright are not hard to tell apart"


SMALL = {"timm": None, "alexnet": {"width": 0.125}, "resnet": {"width": 0.125}, "vgg": {"width": 0.125}}


@pytest.mark.parametrize("kind", [kind for kind in plugins.kinds("backbone") if kind != "timm"])
def test_every_network_in_its_form_for_small_images_takes_four_sizes(kind: str) -> None:
    backbone = {"kind": kind, **(SMALL.get(kind) or {})}
    teacher = {"pretext": "rotation", "backbone": backbone, "schedule": SCHEDULE}
    judges = [{"kind": "knn"}, {"kind": "knn", "of": "teacher", "name": "of_teacher"}]
    check_pair(toy_pair(data=FOUR, teacher=teacher, student={"backbone": backbone, "schedule": SCHEDULE}, evals=judges), LOAD)


@pytest.mark.parametrize("kind", plugins.kinds("pretext"))
def test_every_pretext_task_is_learned_on_images_of_one_size_and_read_on_others(kind: str) -> None:
    coloured = {**FOUR, "pretext": synthetic(28, 0)}
    check_pair(toy_pair(data=coloured, teacher={**ROTATION, "pretext": {"kind": kind}}), LOAD)


def test_colours_matter_to_the_data_of_the_pretext_task_alone() -> None:
    teacher = {**ROTATION, "pretext": {"kind": "colorization"}}
    with pytest.raises(UserError, match=r"teacher\.pretext\.kind: .* needs colours, and the images of its data are grey"):
        check_pair(toy_pair(data=FOUR, teacher=teacher), LOAD)
    grey_elsewhere = {**FOUR, "pretext": synthetic(28, 0), "cluster": synthetic(32, 1, "grey")}
    check_pair(toy_pair(data=grey_elsewhere, teacher=teacher), LOAD)


WIDTHS = {  # teacher, and what it makes of 32 and of 40 px: cells of 8 px with 9 orientations, 3 numbers per pixel
    "hog": ({"descriptor": {"kind": "hog", "cell": 8, "block": 1, "orientations": 9}}, 4 * 4 * 9, 5 * 5 * 9),
    "raw_pixels": ({"descriptor": "raw_pixels"}, 32 * 32 * 3, 40 * 40 * 3),
}


@pytest.mark.parametrize(("teacher", "at_32", "at_40"), WIDTHS.values(), ids=WIDTHS.keys())
def test_features_whose_width_follows_the_size_of_the_images_cannot_be_clustered_elsewhere(
    teacher: dict[str, Any], at_32: int, at_40: int
) -> None:
    said = (
        rf"data\.transfer\.size: images of 32 px have {at_32} features each and those of 40 px {at_40}, .* Use 32 px for both"
    )
    with pytest.raises(UserError, match=said):
        check_pair(toy_pair(data=FOUR, teacher=teacher), LOAD)
    check_pair(toy_pair(data={**FOUR, "transfer": synthetic(32, 2)}, teacher=teacher), LOAD)


def test_pooled_features_have_one_width_at_every_size() -> None:
    for teacher in (
        {**ROTATION, "pool": {"grid": 2}},
        {"descriptor": {"kind": "random_network", "backbone": STUDENT["backbone"]}},
    ):
        check_pair(toy_pair(data=FOUR, teacher=teacher), LOAD)
    check_pair(toy_pair(data=FOUR, teacher={"descriptor": {"kind": "raw_pixels", "side": 8}}), LOAD)


def test_images_too_small_for_a_network_are_refused_with_their_role() -> None:
    full = {"kind": "alexnet", "form": "full", "width": 0.125}
    large = {role: {**spec, "size": 96} for role, spec in FOUR.items()}
    places = {"pretext": "teacher.backbone", "transfer": "teacher", "target": r"evals\.0"}
    for role, place in places.items():
        data = {**large, role: {**FOUR[role], "size": 16}}
        student = {**STUDENT, "backbone": full if role == "target" else STUDENT["backbone"]}
        with pytest.raises(UserError, match=rf"^{place}: the alexnet cannot (take|learn rotation from) images of 16 px"):
            check_pair(toy_pair(data=data, teacher={**ROTATION, "backbone": full, "layer": None}, student=student), LOAD)


def test_a_descriptor_that_no_block_of_fits_into_the_judged_images_is_refused() -> None:
    data = {**FOUR, "transfer": synthetic(32, 2), "target": synthetic(8, 3)}
    with pytest.raises(UserError, match=r"teacher\.descriptor\..*images of 8 x 8 px"):
        check_pair(toy_pair(data=data, teacher=HOG), LOAD)

"""From a folder of mixed images to an exported student with the commands of the README, and no failed trial."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ktray
from ktray import plugins
from ktray.cli import main
from ktray.search.history import read_study


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """300 images: JPEG, PNG, CMYK, grey, RGBA and turned by EXIF; three are broken, one is called HEIC."""
    folder = tmp_path / "photos"
    folder.mkdir()
    spec = plugins.parse("dataset", {"kind": "fashion_mnist_mini"})
    read, sizes = plugins.module_of("dataset", spec).load(spec).train.read, np.random.default_rng(0)
    for number in range(296):
        width, height = (int(side) for side in sizes.integers(80, 240, 2))
        image, path = Image.fromarray(read(number)).resize((width, height)), folder / f"IMG_{number:04d}"
        turned = Image.Exif()
        turned[0x0112] = 6
        save = (
            lambda image, path: image.save(f"{path}.jpg"),
            lambda image, path: image.save(f"{path}.png"),
            lambda image, path: image.convert("CMYK").save(f"{path}.JPG"),
            lambda image, path: image.convert("L").save(f"{path}.png"),
            lambda image, path: image.convert("RGBA").save(f"{path}.png"),
            lambda image, path, turned=turned: image.save(f"{path}.jpeg", exif=turned),
        )[number % 6]
        save(image, path)
    (folder / "broken1.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    (folder / "broken2.png").write_bytes(b"")
    (folder / "broken3.jpg").write_bytes((folder / "IMG_0000.jpg").read_bytes()[:600])
    (folder / "IMG_9999.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_folder_of_300_mixed_images_becomes_an_exported_student_and_no_trial_fails(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", str(photos), "--minutes", "3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kind"], said["space"]["images"]) == ("folder", 237)
    assert sorted(said["data"]["decoded"]["unreadable"]) == ["broken1.jpg", "broken2.png", "broken3.jpg"]
    assert said["data"]["left_out"] == {".heic (images that ktray does not read)": 1}
    assert said["data"]["decoded"]["turned"] == 49
    assert said["estimate"]["low"] < said["estimate"]["seconds"] < said["estimate"]["high"]
    assert main(["search", "photos.yaml"]) == 0
    study = read_study(tmp_path / ".ktray", "photos")
    assert {trial.state for trial in study.trials} <= {"completed", "pruned", "duplicate"}
    assert len([trial for trial in study.trials if trial.state != "duplicate"]) == said["space"]["trials"]
    print(f"estimated {said['estimate']['seconds']:.0f} s, took {study.elapsed:.0f} s")
    assert main(["export", "photos", "student"]) == 0
    student = ktray.load_student("student")
    side = said["space"]["data"]["size"]
    assert torch.isfinite(student(torch.zeros(2, 3, side, side))).all()

"""`ktray init`: which kind of data set a folder is, a space that fits it, and the spaces that come with ktray."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from ktray.cli import main
from ktray.errors import UserError
from ktray.runs.machine import Machine
from ktray.runs.recognition import recognise
from ktray.runs.shipped_spaces import shipped_spaces
from ktray.runs.space_draft import FEWEST_TRIALS, Draft, draft_for, fitted, render, study_name, with_epochs
from ktray.search.space import parse
from tests.pictures import noise, png

SMALL, LARGE = Machine(2, 8 << 30), Machine(32, 200 << 30, ("H200",), 140 << 30)


def tree(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            path.write_bytes(png(noise(32, 32, seed=number)))
        else:
            path.write_text("")
    return root


def of(folder: str, count: int) -> list[str]:
    return [f"{folder}/{number}.png" for number in range(count)]


FOLDERS = {
    "images beside each other": (["a.png", "b.png"], "folder", ""),
    "folders of classes": ([*of("cat", 3), *of("dog", 3)], "imagefolder", ""),
    "splits of classes": ([*of("train/cat", 3), *of("train/dog", 3), *of("test/cat", 2)], "imagefolder", ""),
    "splits without classes": ([*of("train", 3), *of("test", 3)], "folder", ""),
    "a folder around the classes": ([*of("data/cat", 3), *of("data/dog", 3)], "imagefolder", "data"),
    "classes beside loose images": ([*of("cat", 3), *of("dog", 3), "loose.png"], "folder", ""),
    "albums by date": ([*of("2019-05", 3), *of("2020", 3), *of("2021_12_24", 2)], "folder", ""),
    "folders of a camera": ([*of("100CANON", 3), *of("101CANON", 3)], "folder", ""),
    "classes by number": ([*of("0", 3), *of("1", 3), *of("2", 3)], "imagefolder", ""),
    "one image per folder": ([*of("ann", 1), *of("bob", 1), *of("eve", 1)], "folder", ""),
    "WordNet numbers": ([*of("train/n01440764", 2), *of("train/n01443537", 2)], "imagenet", ""),
}


@pytest.mark.parametrize(("names", "kind", "below"), FOLDERS.values(), ids=FOLDERS.keys())
def test_the_kind_of_a_folder_is_recognised_and_why_is_said(tmp_path: Path, names: list[str], kind: str, below: str) -> None:
    found = recognise(str(tree(tmp_path, *names)))
    assert found.spec.kind == kind
    assert found.because
    assert getattr(found.spec, "path", None) == str(tmp_path / below).rstrip("/")


def test_parquet_is_recognised_with_its_label(tmp_path: Path) -> None:
    content = {"picture": [png(noise(8, 8, seed=n)) for n in range(4)], "Label": [0, 1, 0, 1]}
    parquet.write_table(pyarrow.table(content), tmp_path / "train.parquet")
    for path in (tmp_path, tmp_path / "train.parquet"):
        found: Any = recognise(str(path))
        assert (found.spec.kind, found.spec.label) == ("parquet", "Label")
        assert "labels from its column 'Label'" in found.because


def test_voc_and_coco_are_recognised_by_their_layout(tmp_path: Path) -> None:
    voc = tree(tmp_path / "v", "VOCdevkit/VOC2012/JPEGImages/a.png", "VOCdevkit/VOC2012/ImageSets/Main/train.txt")
    coco = tree(tmp_path / "c", "annotations/instances_train2017.json", "annotations/instances_val2017.json", "train2017/a.png")
    found: Any = recognise(str(voc))
    assert (found.spec.kind, found.spec.year) == ("voc", "2012")
    found = recognise(str(coco))
    assert (found.spec.kind, found.spec.train, found.spec.test) == ("coco", "train2017", "val2017")


def test_a_kind_that_is_named_is_not_questioned(tmp_path: Path) -> None:
    tree(tmp_path, *of("cat", 3), *of("dog", 3))
    found = recognise(f"folder:{tmp_path}?size=32")
    assert (found.spec.kind, found.spec.size, found.because) == ("folder", 32, "")


@pytest.mark.parametrize(("names", "said"), [([], "no images"), (["notes.txt"], "no images"), (None, "there is no folder")])
def test_a_folder_without_images_is_refused(tmp_path: Path, names: list[str] | None, said: str) -> None:
    folder = tmp_path / "x"
    if names is not None:
        folder.mkdir()
        tree(folder, *names)
    with pytest.raises(UserError, match=said):
        recognise(str(folder))


def described(images: int, *, classes: int = 0, unreadable: int = 0, side: int = 100, val: bool = False) -> dict[str, Any]:
    split = {"images": images, "classes": classes, "labelled": classes > 0, "several_labels": False}
    names = {f"broken{number}.jpg": "cut" for number in range(unreadable)}
    splits = {"train": split, **({"val": {"images": images // 10}} if val else {})}
    return {"splits": splits, "decoded": {"unreadable": names, "median_side": side}, "warnings": []}


CASES = {
    "a few photographs": (described(60), SMALL),
    "unreadable ones": (described(299, unreadable=3), SMALL),
    "small pictures": (described(3000, classes=10, side=28), SMALL),
    "many classes": (described(20_000, classes=300, side=500), SMALL),
    "a million": (described(1_000_000, classes=1000, side=300), LARGE),
    "a val of its own": (described(5000, classes=2, val=True), LARGE),
}


@pytest.mark.parametrize(("found", "machine"), CASES.values(), ids=CASES.keys())
def test_the_space_is_valid_and_fits_the_images(found: dict[str, Any], machine: Machine, tmp_path: Path) -> None:
    spec: Any = recognise(f"folder:{tmp_path}").spec
    draft = draft_for(spec, found, machine, "mine")
    space = parse(render(draft, "What?"), [], "drafted")
    images = found["splits"]["train"]["images"]
    assert all(2 <= k <= max(2, draft.images / 8) for k in draft.ks)
    assert draft.data["size"] <= found["decoded"]["median_side"]
    assert draft.batch <= draft.images / 2
    assert 4 <= draft.epochs <= 200
    assert ("val" in found["splits"]) == ("split" not in draft.data and draft.images == images)
    unreadable = len(found["decoded"]["unreadable"])
    assert unreadable <= draft.data.get("max_unreadable", 0.01) * images
    metric = space.objectives[0][0]
    assert metric == ("linear_probe/top1" if found["splits"]["train"]["labelled"] else "effective_rank/rank")


def test_too_few_images_and_mostly_broken_ones_are_refused(tmp_path: Path) -> None:
    spec: Any = recognise(f"folder:{tmp_path}").spec
    with pytest.raises(UserError, match="12 images are too few"):
        draft_for(spec, described(12), SMALL, "mine")
    with pytest.raises(UserError, match=r"90 of 100 images cannot be read, such as broken0.jpg: cut"):
        draft_for(spec, described(100, unreadable=90), SMALL, "mine")


def cost(draft: Draft) -> float:
    """Seconds that grow as those of a search do."""
    return 20 + draft.trials * draft.epochs * 0.5


@pytest.mark.parametrize("minutes", [5, 30, 240])
def test_a_longer_time_gives_a_longer_search_that_fits_it(minutes: int, tmp_path: Path) -> None:
    spec: Any = recognise(f"folder:{tmp_path}").spec
    draft = fitted(draft_for(spec, described(500), SMALL, "mine"), 60 * minutes, cost)
    assert 0.3 * 60 * minutes < cost(draft) <= 60 * minutes


def test_if_nothing_fits_the_smallest_search_is_drafted(tmp_path: Path) -> None:
    spec: Any = recognise(f"folder:{tmp_path}").spec
    draft = fitted(draft_for(spec, described(500), SMALL, "mine"), 1, cost)
    assert draft.trials == FEWEST_TRIALS
    assert draft == with_epochs(draft, 1)


@pytest.mark.parametrize(("name", "study"), [("My photos (2019)", "My-photos-2019"), ("été", "t"), ("…", "images")])
def test_a_study_is_called_after_its_folder(name: str, study: str) -> None:
    assert study_name(Path("/data") / name) == study


# ---- the spaces that come with ktray


def test_examples_are_listed_and_written_and_never_replaced_without_force(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--example"]) == 0
    assert re.search(r"quickstart +Which teacher gives a small AlexNet", capsys.readouterr().out)
    assert main(["init", "--example", "quickstart"]) == 0
    assert (tmp_path / "quickstart.yaml").read_text() == shipped_spaces()["quickstart"].text
    capsys.readouterr()
    (tmp_path / "quickstart.yaml").write_text("mine")
    assert main(["init", "--example", "quickstart"]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"
    assert main(["init", "--example", "quikstart"]) == 2
    assert "Did you mean 'quickstart'?" in capsys.readouterr().err
    assert main(["init", "--example", "quickstart", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": "quickstart.yaml"}
    assert not (tmp_path / ".ktray").exists()


@pytest.mark.slow
def test_a_wheel_holds_the_spaces_and_an_installed_ktray_writes_them(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    copy = tmp_path / "source"
    files = subprocess.run(["git", "-C", root, "ls-files"], check=True, capture_output=True, text=True).stdout.splitlines()
    for name in files:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_symlink():
            target.symlink_to(os.readlink(root / name))
        elif (root / name).is_file():
            target.write_bytes((root / name).read_bytes())
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--no-deps", "-q", "-w", tmp_path, copy], check=True)
    wheel = next(tmp_path.glob("ktray-*.whl"))
    names = {f"ktray/search_spaces/{name}.yaml" for name in shipped_spaces()}
    assert names <= set(zipfile.ZipFile(wheel).namelist())
    subprocess.run([*pip, "install", "--no-deps", "-q", "--target", tmp_path / "site", wheel], check=True)
    command = [sys.executable, "-m", "ktray", "init", "--example", "quickstart"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "quickstart.yaml").read_text() == shipped_spaces()["quickstart"].text

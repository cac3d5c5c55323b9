"""`ktray data check` says what it assumed; a study resumes only with the images that it was started with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ktray.cli import main
from ktray.errors import UserError
from ktray.pipeline.identity import data_identity
from ktray.runs.data_check import FILE, describe, refuse_changed_data
from ktray.search.trial import Trial
from tests.pictures import data_spec, noise, png
from tests.toy_space import toy_space


def test_a_data_set_is_described_by_the_images_of_each_class_in_each_split() -> None:
    answer = describe(data_spec("synthetic?count=60&classes=3&test=30"))
    assert {name: sum(split["images_of_class"].values()) for name, split in answer["splits"].items()} == {
        "train": 60,
        "test": 30,
    }
    assert answer["held_out"] == {"images": 6, "share": 0.1, "seed": 0}
    assert answer["warnings"] == []


def test_a_data_set_of_one_class_is_described_with_a_warning() -> None:
    first, second = describe(data_spec("synthetic?count=60&classes=1&test=30"))["warnings"]
    assert "all images of train have the class 'red disc'" in first
    assert "all images of test" in second


JUDGED, FAILED = [Trial(0, {}, {}, "paused")], [Trial(0, {}, {}, "failed")]


def images(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(noise(32, 32, seed=number)))
    return folder


@pytest.fixture
def space(tmp_path: Path) -> Any:
    data = {"kind": "folder", "path": str(images(tmp_path / "photos", 12)), "size": 28}
    pair = {"data": data, "evals": [{"kind": "effective_rank"}]}
    return toy_space(tmp_path, pair, objectives=[{"metric": "effective_rank/rank"}], early_stop=None)


def test_missing_images_stop_the_study_and_it_resumes_once_they_are_back(space: Any, tmp_path: Path) -> None:
    study, photo = tmp_path / "studies" / "photos", tmp_path / "photos" / "3.png"
    study.mkdir(parents=True)
    refuse_changed_data(space, JUDGED, data_identity(tmp_path / "cache"), study)
    kept = photo.read_bytes()
    photo.unlink()
    with pytest.raises(UserError, match=r"no longer those that the study 'photos' was begun with.*--name"):
        refuse_changed_data(space, JUDGED, data_identity(tmp_path / "cache"), study)
    photo.write_bytes(kept)
    refuse_changed_data(space, JUDGED, data_identity(tmp_path / "cache"), study)
    assert len((study / FILE).read_text().splitlines()) == 3


def test_another_study_may_have_the_new_images(space: Any, tmp_path: Path) -> None:
    (tmp_path / "photos" / "3.png").unlink()
    other = tmp_path / "studies" / "other"
    other.mkdir(parents=True)
    refuse_changed_data(space, JUDGED, data_identity(tmp_path / "cache"), other)


def test_images_may_be_corrected_until_something_was_evaluated(space: Any, tmp_path: Path) -> None:
    study = tmp_path / "studies" / "photos"
    study.mkdir(parents=True)
    refuse_changed_data(space, FAILED, data_identity(tmp_path / "cache"), study)
    (tmp_path / "photos" / "3.png").unlink()
    refuse_changed_data(space, FAILED, data_identity(tmp_path / "cache"), study)
    refuse_changed_data(space, JUDGED, data_identity(tmp_path / "cache"), study)


def test_a_class_whose_name_breaks_the_line_forges_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a\nwarning: forged", "b"):
        for index in range(3):
            path = tmp_path / "data" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (80 * index, 0, 0)).save(path)
    assert main(["data", "check", f"imagefolder:{tmp_path}/data", "--home", str(tmp_path / "home")]) == 0
    out = capsys.readouterr().out
    assert "a\\nwarning: forged 3" in out
    assert not any(line.startswith("warning: forged") for line in out.splitlines())


DATA_TEXTS = {
    "a mapping": ("{{kind: folder, path: {folder}, split: {{val: 0.5}}}}", 0, "val: 2 of train (50%)"),
    "a mapping with a question mark": ("{{kind: folder, path: '{folder}?'}}", 0, "train: 4 images"),
    "a question mark in a path": ("folder:{folder}?", 0, "train: 4 images"),
    "a question mark in the only path": ("folder:{folder}/b?", 2, "fields follow the first ?"),
    "null": ("folder:{folder}?range=null&size=16", 0, "train: 4 images"),
    "a range in words": ("folder:{folder}?range=wide", 2, "range is 'wide' and should be two numbers, such as 0,4095"),
    "an open bracket": ("{{kind: folder", 2, "A bracket or a quote is not closed."),
    "no kind": ("{{path: {folder}}}", 2, "names no kind of data set"),
    "nothing": ("", 2, "names no kind of data set"),
    "a misspelt kind": ("{{kind: foldr}}", 2, "Did you mean 'folder'?"),
}


@pytest.mark.parametrize(("text", "code", "said"), DATA_TEXTS.values(), ids=DATA_TEXTS)
def test_a_data_set_is_named_by_a_text_or_a_mapping(
    text: str, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    for folder in ("a", "a?", "a/b?"):
        images(tmp_path / folder, 4) if folder != "a/b?" else (tmp_path / folder).mkdir()
    assert main(["data", "check", text.format(folder=tmp_path / "a")]) == code
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
    assert printed.err.count("\n") <= 1

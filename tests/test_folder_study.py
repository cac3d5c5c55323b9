"""A user with a folder of mixed images and no labels: a finished study, and all that can be asked of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ktray.cli import VERBS, main
from tests.pictures import noise
from tests.searches import CommandResult, Home
from tests.toys import STUDENT

pytestmark = pytest.mark.slow  # a real search
NAMES = list(VERBS)


def mixed_folder(root: Path, images: int, broken: int) -> Path:
    """JPEG, PNG, greyscale, RGBA and GIF files of several sizes in nested folders, files that are no images, and a note."""
    for i in range(images):
        place = root / "ab"[i % 2] / str(i % 3)
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(noise(36 + i % 7, 40, seed=i) // 8 + np.uint8(8 * (i % 25)), 0, 255).astype(np.uint8)
        grey, clear = pixels[:, :, 0], np.dstack([pixels, np.full(pixels.shape[:2], 200, np.uint8)])
        form, name = [(pixels, "jpg"), (pixels, "PNG"), (grey, "png"), (clear, "png"), (grey, "gif")][i % 5]
        Image.fromarray(form).save(place / f"{i}.{name}")
    for i in range(broken):
        (root / f"broken{i}.jpg").write_bytes([b"", b"no image", b"\xff\xd8\xff\xe0 cut off"][i % 3])
    (root / "notes.txt").write_text("not an image, and not counted")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mine")


@pytest.fixture(scope="module")
def space(folder: Path) -> Path:
    content = {
        "study": "mine",
        "objectives": [{"metric": "effective_rank/rank"}],
        "budget": {"trials": 2, "concurrent": 2},
        "pair": {
            "data": {"kind": "folder", "path": str(mixed_folder(folder / "photos", 60, 3)), "size": 28, "max_unreadable": 0.1},
            "teacher": {"one_of": {"hog": {"descriptor": {"kind": "hog", "cell": 7}}, "raw": {"descriptor": "raw_pixels"}}},
            "transfer": {"kind": "clusters", "k": {"choice": [3, 5]}},
            "student": {**STUDENT, "schedule": {"epochs": 1, "batch_size": 32}},
            "evals": ["effective_rank"],
        },
        "start_with": [{"teacher": "hog", "transfer.k": 3}, {"teacher": "raw", "transfer.k": 3}],
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def home(folder: Path) -> Home:
    return Home(folder / "home")


@pytest.fixture(scope="module")
def searched(home: Home, space: Path) -> CommandResult:
    return home.run("search", space, "--json")


@pytest.fixture
def ask(home: Home, searched: CommandResult, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a verb on the searched home: (exit code, stdout, stderr)."""
    monkeypatch.setenv("KTRAY_HOME", str(home.path))

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(each) for each in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_a_search_on_an_unlabelled_folder_of_mixed_files_says_what_it_could_not_read(searched: CommandResult) -> None:
    assert searched.code == 0, searched.err
    assert searched.answer["trials"]["completed"] == 2
    assert searched.answer["best"]["objectives"]["effective_rank/rank"] > 1
    assert "3 of 63 images were unreadable and left out: broken0.jpg" in searched.err


def test_its_report_says_that_no_labels_were_used(ask: Any, folder: Path) -> None:
    assert ask("report", "mine", "-o", folder / "mine.html")[0] == 0
    page = (folder / "mine.html").read_text()
    assert "No labels were used, neither to train nor to select." in page
    assert "unreadable images, left out" in page


def test_its_report_is_still_written_after_the_images_have_moved(ask: Any, folder: Path) -> None:
    (folder / "photos").rename(folder / "elsewhere")
    try:
        assert ask("report", "mine", "-o", folder / "later.html")[0] == 0
    finally:
        (folder / "elsewhere").rename(folder / "photos")


ASKED = [
    ["best", "mine"],
    ["best", "mine", "--pareto"],
    ["best", "mine", "--per", "teacher"],
    ["status", "mine"],
    ["show", "mine"],
    ["show", "mine/1"],
    ["show", "mine/0001"],
    ["show", "kinds"],
    ["report", "mine", "-o", "OUT/again.html"],
    ["export", "mine/1", "OUT/student"],
    ["cache", "list"],
    ["cache", "verify"],
    ["cache", "prune"],
    ["plan", "SPACE"],
    ["data", "check", "fashion_mnist_mini"],
]


@pytest.mark.parametrize("command", ASKED, ids=" ".join)
def test_json_is_all_that_stdout_holds_and_quiet_is_quiet(ask: Any, command: list[str], space: Path, tmp_path: Path) -> None:
    words = [str(space) if word == "SPACE" else word.replace("OUT", str(tmp_path)) for word in command]
    code, out, err = ask(*words, "--json", "--quiet")
    assert code == 0, err
    assert json.loads(out)
    assert err == ""


@pytest.mark.parametrize("verb", ["best", "show", "status", "report"])
def test_an_unknown_study_is_named_with_those_that_there_are(ask: Any, verb: str) -> None:
    code, out, err = ask(verb, "main")
    assert (code, out) == (2, "")
    assert err.endswith("there is no study 'main'. Existing studies: mine.\n")


def test_an_artifact_tells_its_record_and_what_keeps_it_from_serving_another_pair(ask: Any, home: Home, tmp_path: Path) -> None:
    (key, *_) = home.keys("clusters")
    assert json.loads(ask("show", key, "--json")[1])["metrics"]["inertia"] > 0
    pair = home.study("mine").trials[0].pair
    same, other, none = (tmp_path / name for name in ("same.yaml", "other.yaml", "none.yaml"))
    same.write_text(yaml.safe_dump(dict(pair)))
    other.write_text(yaml.safe_dump({**pair, "transfer": {**pair["transfer"], "iterations": 7}}))
    none.write_text(yaml.safe_dump({**pair, "teacher": None, "transfer": {"kind": "none"}}))
    own = home.study("mine").trials[0].keys["clusters"]
    assert "no difference" in ask("show", own, "--against", same)[1]
    rows = json.loads(ask("show", own, "--against", other, "--json")[1])
    assert [(row["field"], row["artifact"], row["pair"]) for row in rows] == [("spec.iterations", "20", "7")]
    code, _, err = ask("show", own, "--against", none)
    assert (code, "the pair has no stage 'clusters'" in err) == (2, True)


@pytest.mark.parametrize("name", ["", ".", ".scratch", "..", "features-0123456789ab"])
def test_a_name_that_is_no_artifact_is_refused_and_moves_nothing(ask: Any, home: Home, name: str) -> None:
    before = home.artifacts()
    assert ask("show", name)[0] == 2
    assert home.artifacts() == before


def test_an_occupied_folder_is_no_place_for_an_export(ask: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    code, _, err = ask("export", "mine", tmp_path)
    assert code == 2
    assert str(tmp_path) in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_pruning_takes_only_what_no_study_rests_on(ask: Any, home: Home, space: Path) -> None:
    kept = home.artifacts()
    (key, *_) = home.keys("student")
    orphan = home.store / "student-000000000000"
    shutil.copytree(home.store / key, orphan)
    assert json.loads(ask("cache", "prune", "--json")[1])["keys"] == [orphan.name]
    assert orphan.exists(), "without --yes it only says"
    assert ask("cache", "prune", "--yes")[0] == 0
    assert home.artifacts() == kept
    again = home.run("search", space, "--json")
    assert again.answer["stages"]["computed"] == {}


def test_nothing_is_pruned_under_a_running_search(ask: Any, home: Home) -> None:
    from ktray.stores.locks import lock_store_shared

    lock = lock_store_shared(f"file://{home.store}")
    assert lock
    code, _, err = ask("cache", "prune", "--yes")
    lock.release()
    assert code == 2
    assert "uses the store" in err


def test_a_study_that_was_killed_in_its_first_moment_is_named_and_hinders_nothing(ask: Any, home: Home) -> None:
    begun = home.path / "studies" / "begun"
    begun.mkdir()
    (begun / "journal.log").touch()
    try:
        assert "never begun" in ask("best", "begun")[2]
        assert ask("cache", "prune")[0] == 0
    finally:
        shutil.rmtree(begun)

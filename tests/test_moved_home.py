"""A home that was moved or copied writes and shows MLflow's artifacts where it is now, those of its old runs included."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from ktray.tracking import StageRun, default_uri
from ktray.tracking.artifact_locations import follow_home
from tests.trackers import client, runs_of, session, spool_of


@pytest.fixture(autouse=True)
def _no_tracker_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two studies, of one stage with an image each, and a registered model. Its name needs quoting in URIs."""
    home = tmp_path_factory.mktemp("a home%41") / "first"
    for study in ("shapes", "colours"):
        log(home, study, "clusters-1")
    return home


@pytest.fixture
def home(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it at a place of its own that believes it has always been there."""
    shutil.copytree(pristine, tmp_path / "home")
    follow_home(tmp_path / "home" / "mlflow.db", tmp_path / "home")
    assert set(locations(tmp_path / "home").values()) == {tmp_path / "home"}
    return tmp_path / "home"


def log(home: Path, study: str, key: str, uri: str = "") -> None:
    """Search a study: one stage was computed that has an image in the store."""
    image = home / "store" / key / "sheet.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(f"{key} of {study}".encode())
    tracker = session(home, study, uri)
    tracker.log_stage(StageRun(key, key, {}, {}, [], [image], span=(1000.0, 1001.0)))
    assert tracker.close("FINISHED", 120)


def locations(home: Path, uri: str = "") -> dict[str, Path]:
    """Study -> home in which MLflow keeps the artifacts of its experiment and of its runs; they agree."""
    found = {}
    for experiment in client(uri or default_uri(home)).search_experiments(filter_string="name != 'Default'"):
        runs = client(uri or default_uri(home)).search_runs([experiment.experiment_id])
        places = {path_of(run.info.artifact_uri).parents[3] for run in runs} | {
            path_of(experiment.artifact_location).parents[1]
        }
        assert len(places) == 1, places
        found[experiment.name] = places.pop()
    return found


def path_of(location: str) -> Path:
    return Path(unquote(urlsplit(location).path))


def images(home: Path, study: str) -> dict[str, bytes]:
    """Stage -> its image, as MLflow finds it."""
    tracker = client(default_uri(home))
    return {
        name: Path(tracker.download_artifacts(run.info.run_id, "images/sheet.png")).read_bytes()
        for name, run in runs_of(default_uri(home), study).items()
        if name.startswith("clusters")
    }


def test_a_moved_home_writes_and_shows_artifacts_where_it_is_now(home: Path, tmp_path: Path) -> None:
    moved = home.rename(tmp_path / "elsewhere %20")
    log(moved, "shapes", "clusters-2")
    assert not home.exists()
    assert images(moved, "shapes") == {f"clusters-{n}": f"clusters-{n} of shapes".encode() for n in (1, 2)}
    assert images(moved, "colours") == {"clusters-1": b"clusters-1 of colours"}
    assert set(locations(moved).values()) == {moved}


def test_a_copied_home_leaves_the_first_one_alone(home: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(home, tmp_path / "copy"))
    before = {path: path.read_bytes() for path in home.rglob("*.png")}
    log(copied, "shapes", "clusters-2")
    assert {path: path.read_bytes() for path in home.rglob("*.png")} == before
    assert len(images(copied, "shapes")) == 2
    log(home, "shapes", "clusters-3")
    assert images(home, "shapes").keys() == {"clusters-1", "clusters-3"}
    shutil.rmtree(home)
    assert len(images(copied, "shapes")) == 2
    assert len(images(copied, "colours")) == 1


@pytest.mark.slow
def test_a_study_that_had_no_artifacts_yet_writes_its_first_ones_into_the_copy(home: Path, tmp_path: Path) -> None:
    shutil.rmtree(home / "mlartifacts" / "shapes")
    copied = Path(shutil.copytree(home, tmp_path / "copy"))
    log(copied, "shapes", "clusters-2")
    assert not (home / "mlartifacts" / "shapes").exists()
    assert (locations(copied)["shapes"], locations(copied)["colours"]) == (copied, copied)


@pytest.mark.slow
def test_artifacts_that_were_left_behind_are_still_shown(home: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(home, tmp_path / "copy"))
    shutil.rmtree(copied / "mlartifacts")
    log(copied, "shapes", "clusters-2")
    assert images(copied, "shapes") == {f"clusters-{n}": f"clusters-{n} of shapes".encode() for n in (1, 2)}
    assert [path.parts[-5] for path in copied.rglob("mlartifacts/**/*.png")] == ["shapes"]


def test_a_home_that_uses_the_database_of_another_keeps_its_own_artifacts(home: Path, tmp_path: Path) -> None:
    log(tmp_path / "second", "textures", "clusters-1", default_uri(home))
    log(home, "shapes", "clusters-2")
    follow_home(home / "mlflow.db", home)
    found = locations(home)
    assert (found["textures"], found["shapes"]) == (tmp_path / "second", home)


def test_images_that_wait_for_the_tracker_are_sent_from_where_the_home_is_then(home: Path, tmp_path: Path) -> None:
    image = home / "store" / "clusters-9" / "sheet.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"late")
    tracker = session(home, "shapes", "http://127.0.0.1:9")  # nothing listens there
    tracker.log_stage(StageRun("clusters-9", "clusters-9", {}, {}, [], [image], span=(1000.0, 1001.0)))
    assert not tracker.close("KILLED", 0.5)
    assert str(tmp_path) not in (spool_of(home, "shapes") / "events.jsonl").read_text()
    moved = home.rename(tmp_path / "elsewhere")
    assert session(moved, "shapes").close("FINISHED", 120)
    assert images(moved, "shapes")["clusters-9"] == b"late"


def test_what_a_model_of_the_registry_names_moves_too_and_other_versions_of_mlflow_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "mlartifacts" / "shapes" / "models" / "m-1").mkdir(parents=True)
    with sqlite3.connect(tmp_path / "mlflow.db") as tables:
        tables.execute("CREATE TABLE experiments (experiment_id INTEGER, name TEXT, artifact_location TEXT)")
        tables.execute(
            "INSERT INTO experiments VALUES (1, 'shapes', 'file:///old/mlartifacts/shapes'), (2, 'far', 's3://a/far')"
        )
        tables.execute("CREATE TABLE model_versions (storage_location TEXT)")
        tables.execute("INSERT INTO model_versions VALUES ('file:///old/mlartifacts/shapes/models/m-1'), ('runs:/1/student')")
    follow_home(tmp_path / "mlflow.db", tmp_path)
    here = (tmp_path / "mlartifacts" / "shapes").as_uri()
    with sqlite3.connect(tmp_path / "mlflow.db") as tables:
        assert [row for (row,) in tables.execute("SELECT artifact_location FROM experiments")] == [here, "s3://a/far"]
        assert [row for (row,) in tables.execute("SELECT * FROM model_versions")] == [f"{here}/models/m-1", "runs:/1/student"]

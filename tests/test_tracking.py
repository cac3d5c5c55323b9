"""What MLflow shows of a study after it was logged."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ktray.errors import UserError
from ktray.fingerprint import fingerprint
from ktray.tracking import StageRun, Tracker, default_uri, mlflow_names
from tests.trackers import (
    history,
    python,
    runs_of,
    session,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one home for all tests of this file, as creating a database takes seconds. Its name needs quoting in URIs."""
    return tmp_path_factory.mktemp("a home%41")


@pytest.fixture(autouse=True)
def _no_tracker_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_a_trial_is_a_named_run_under_its_search_with_dotted_params_curves_and_objectives(home: Path) -> None:
    uri = default_uri(home)
    tracker = session(home, "shown", version_tags={"ktray.version": "0.1.0"})
    name = "rotation-resnet18/layer3 k=500 -> alexnet"
    tracker.begin_trial(42, name, {"transfer.k": 500, "transfer.pca": None, "student.schedule.lr": 0.05}, {"state": "new"})
    tracker.log_metrics(42, {"knn/top1": 0.5}, step=5)
    tracker.log_curve(42, [{"epoch": epoch, "student/loss": 1 / epoch} for epoch in range(1, 6)])
    tracker.end_trial(42, "FINISHED", {"ktray.state": "COMPLETE"}, {"objective/linear_probe/top1": 0.75})
    assert tracker.close("FINISHED", timeout=60)

    runs = runs_of(uri, "shown")
    search, trial = runs["shown"], runs[f"0042 {name}"]
    assert search.data.tags["ktray.version"] == "0.1.0"
    assert {search.info.status, trial.info.status} == {"FINISHED"}
    assert trial.data.tags["mlflow.parentRunId"] == search.info.run_id
    assert trial.data.tags["ktray.trial"] == "42"
    assert trial.data.tags["ktray.state"] == "COMPLETE"
    assert trial.data.params == {"transfer.k": "500", "transfer.pca": "null", "student.schedule.lr": "0.05"}
    assert trial.data.metrics["objective/linear_probe/top1"] == 0.75
    assert history(uri, trial, "student/loss") == [(epoch, 1 / epoch) for epoch in range(1, 6)]
    assert history(uri, trial, "knn/top1") == [(5, 0.5)]


def test_a_continued_trial_keeps_its_run_its_params_and_one_copy_of_its_curve(home: Path) -> None:
    uri = default_uri(home)
    for last, rate in ((3, 0.1), (6, 0.2)):
        tracker = session(home, "continued")
        tracker.begin_trial(0, "pair", {"lr": rate, f"only.{last}": True}, {})
        tracker.log_curve(0, [{"epoch": epoch, "student/loss": epoch / 7} for epoch in range(1, last + 1)])
        if last == 6:
            tracker.end_trial(0, "FINISHED", {}, {})
        assert tracker.close("FINISHED", timeout=60)
    run = runs_of(uri, "continued")["0000 pair"]
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1", "only.3": "true", "only.6": "true"}
    assert run.data.tags["ktray.changed_params"] == "lr"
    assert history(uri, run, "student/loss") == [(epoch, epoch / 7) for epoch in range(1, 7)]


def test_a_stage_is_a_run_with_its_key_and_images_and_its_trial_links_to_it(home: Path, tmp_path: Path) -> None:
    uri, key = default_uri(home), "clusters-3f9a1c0b2d44"
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sheet.png").write_bytes(folder.encode())
    tracker = session(home, "stages")
    note = f"[clusters](stage/{key}) [sheet](stage/{key}/images/a.png) [teacher](stage/teacher-0) [all](view)"
    tracker.begin_trial(7, "pair", {}, {"ktray.stage.clusters": key}, note)  # before the stage is logged
    images = [tmp_path / "a" / "sheet.png", tmp_path / "b" / "sheet.png", tmp_path / "gone.png"]
    rows = [{"epoch": 1, "clusters/inertia": 2.0}]
    metrics = {"clusters/empty": 0.0, "clusters/inertia": 2.0}
    tags = {"ktray.device": "cpu"}
    tracker.log_stage(StageRun(key, key, metrics, tags, rows, images, params={"k": 50}, span=(1000.0, 1002.5)))
    assert tracker.close("FINISHED", timeout=60)
    runs = runs_of(uri, "stages")
    stage, trial = runs[key], runs["0007 pair"]
    assert stage.info.status == "FINISHED"
    assert stage.data.tags["ktray.key"] == key
    assert stage.data.tags["mlflow.parentRunId"] == runs["stages"].info.run_id
    assert stage.data.metrics == metrics
    assert history(uri, stage, "clusters/inertia") == [(1, 2.0)]  # no second end at step 0
    assert stage.data.params == {"k": "50"}
    assert (stage.info.start_time, stage.info.end_time) == (1_000_000, 1_002_500)
    stored = sorted(path.read_bytes() for path in (home / "mlartifacts").rglob("sheet.png"))
    assert stored == [b"a", b"b"]
    page = f"#/experiments/{stage.info.experiment_id}/runs"
    clusters = f"[clusters]({page}/{stage.info.run_id}?workflowType=machine_learning)"
    sheet = f"[sheet]({page}/{stage.info.run_id}/artifacts/images/a.png?workflowType=machine_learning)"
    everything = f"[all]({page}?viewStateShareKey=ktray&workflowType=machine_learning)"
    assert trial.data.tags["mlflow.note.content"] == f"{clusters} {sheet} teacher {everything}"


def test_values_that_mlflow_cannot_hold_are_left_out_or_cut_and_named_in_a_tag(home: Path) -> None:
    uri = default_uri(home)
    tracker = session(home, "values")
    tracker.begin_trial(1, "pair", {"long": "x" * 9000, "odd key?": "\ud800\0"}, {"long": "y" * 9000})
    tracker.log_metrics(1, {"nan": float("nan"), "good": 1.0, "inf": float("inf"), "text": "none"}, 3)  # type: ignore[dict-item]
    tracker.log_metrics(1, None, "x")  # type: ignore[arg-type]
    tracker.log_curve(1, [{"epoch": float("nan")}])
    tracker.end_trial(1, "FINISHED", {}, {"after": 2.0})
    assert not tracker.close("FINISHED", timeout=60)  # two calls had invalid arguments, so something is missing
    run = runs_of(uri, "values")["0001 pair"]
    assert run.data.params == {"long": "x" * 6000, "odd key_-" + fingerprint("odd key?")[:12]: r"\ud800\x00"}
    assert run.data.tags["ktray.truncated"] == "long"
    assert run.data.metrics == {"good": 1.0, "after": 2.0}
    assert run.data.tags["ktray.nonfinite.nan"] == "nan at step 3"
    assert {"ktray.nonfinite.inf", "ktray.nonfinite.text"} <= set(run.data.tags)


@pytest.mark.parametrize(
    "name", ["teacher.rotation.schedule.lr", "a//b", "../up", "..", ".", "/root", "a/../../b", "ü ?*\n", "x" * 999, "a/", ""]
)
def test_every_key_is_one_that_mlflow_accepts(name: str) -> None:
    from mlflow.utils import validation

    key = mlflow_names.key_of(name)
    validation._validate_param_name(key)
    assert len(key) <= validation.MAX_ENTITY_KEY_LENGTH
    assert mlflow_names.key_of("teacher.rotation.schedule.lr") == "teacher.rotation.schedule.lr"


ALIKE = [
    "acc@1",
    "acc_1",
    "acc?1",
    "acc 1",
    "acc/1",
    "acc//1",
    "/acc/1",
    "acc/./1",
    "acc/1/",
    "acc/x/../1",
    "acc\n1",
    "acc\\1",
    "acc$1",
]
ALIKE += ["", ".", "..", "_", "../a", "._/a", "_./a", "é@", "é_", "x" * 250, "x" * 251, "x" * 250 + "@", "x" * 251 + "y"]


@pytest.mark.parametrize("make", [lambda names: names, lambda names: list(reversed(names))], ids=["one order", "the other"])
def test_names_that_mlflow_would_write_alike_stay_apart_in_any_order(make: Any, home: Path) -> None:
    uri, names = default_uri(home), make(ALIKE)
    values = {name: float(ALIKE.index(name)) for name in names}
    tracker = session(home, "alike")
    tracker.begin_trial(0, "pair", values, {name: str(value) for name, value in values.items()})
    for name, value in values.items():  # also in calls that do not know of each other
        tracker.log_metrics(0, {name: value}, 1)
    tracker.log_metrics(0, dict.fromkeys(names, float("nan")), 2)
    assert tracker.close("FINISHED", timeout=60)
    data = runs_of(uri, "alike")["0000 pair"].data
    keys = {name: mlflow_names.key_of(name) for name in names}
    assert len(set(keys.values())) == len(ALIKE)
    assert data.metrics == {keys[name]: value for name, value in values.items()}
    assert data.params == {keys[name]: mlflow_names.text_of(value) for name, value in values.items()}
    assert {data.tags[mlflow_names.key_of(f"ktray.{name}")] for name in names} == {str(value) for value in values.values()}
    assert sum(tag.startswith("ktray.nonfinite.") for tag in data.tags) == len(ALIKE)
    unchanged = ["acc_1", "acc 1", "acc/1", "_", "é_", "x" * 250]
    assert [keys[name] for name in unchanged] == unchanged


def test_a_tag_with_and_without_the_prefix_of_ktray_are_two_tags() -> None:
    assert sorted(mlflow_names.tags_of({"state": "a", "ktray.state": "b"}).values()) == ["a", "b"]
    assert mlflow_names.tags_of({"ktray.state": "b", "state": "a"})["ktray.state"] == "b"


def test_hundreds_of_params_and_thousands_of_metrics_fit_into_the_batches_of_mlflow(home: Path) -> None:
    uri = default_uri(home)
    tracker = session(home, "many")
    tracker.begin_trial(0, "pair", {f"p.{index}": index for index in range(250)}, {f"t.{index}": "x" for index in range(150)})
    tracker.log_curve(0, [{"epoch": epoch, "a": epoch, "b": -epoch} for epoch in range(1200)])
    assert tracker.close("FINISHED", timeout=60)
    run = runs_of(uri, "many")["0000 pair"]
    assert len(run.data.params) == 250
    assert run.data.tags["ktray.t.149"] == "x"
    assert history(uri, run, "b") == [(epoch, -epoch) for epoch in range(1200)]


def test_the_tracker_is_the_users_or_the_homes_and_never_depends_on_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_uri(Path("home")) == f"sqlite:///{tmp_path}/home/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    assert default_uri(Path("home")) == f"sqlite:///{tmp_path}/mine.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.lab")
    assert default_uri(Path("home")) == "https://mlflow.lab"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(UserError, match="file store"):
        default_uri(Path("home"))


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("./mlruns", "file store"),
        ("file:///runs", "file store"),
        (" ", "file store"),
        ("databricks", "Databricks"),
        ("databricks://profile", "Databricks"),
        ("databricks-uc", "Databricks"),
        ("localhost:5000", "Write http://localhost:5000"),
        ("127.0.0.1:5000", "Write http://127.0.0.1:5000"),
        ("[::1]:5000/path", "Write http://[::1]:5000/path"),
        ("https//mlflow.lab", "file store"),
        ("http://", "names no host"),
        ("http:mlflow", "names no host"),
        ("http://:5000", "names no host"),
        ("http://mlflow.lab:99999", "Port out of range"),
        ("http://mlflow.lab:0", "port 0"),
        ("http://mlflow.lab:port", "is no URL"),
        ("http://[::1", "no tracker"),
        ("http://mlflow lab", "space"),
        ("s3://bucket/runs", "no tracker"),
        ("uc:http://x", "no tracker"),
        ("redis://host", "no tracker"),
        ("postgres://host/db", "no tracker"),
        ("postgresql+nonsense://host/db", "no URL of a database"),
        ("mysql+pymysql://host/db", "needs the package pymysql"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:runs.db", "names no file"),
        ("SQLITE:///runs.db", "names no file"),
        ("sqlite+pysqlite:///runs.db", "names no file"),
        ("sqlite:////", "is a folder"),
        ("sqlite:////no/such/folder/runs.db", "which does not exist"),
        ("sqlite:////dev/null", "is no file"),
        ("sqlite:///text.db", "is no sqlite database"),
        ("sqlite:///cut.db", "is damaged"),
        ("sqlite:///flipped.db", "is damaged"),
    ],
)
def test_a_uri_that_is_no_tracker_is_refused_with_what_to_write(
    uri: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.db").write_text("this is no database")
    with closing(sqlite3.connect("cut.db")) as database, database:
        database.execute("CREATE TABLE wide AS SELECT zeroblob(100000) AS zeros")
    whole = Path("cut.db").read_bytes()
    Path("cut.db").write_bytes(whole[: len(whole) // 2])
    Path("flipped.db").write_bytes(whole[:18] + b"\xff" + whole[19:])
    with pytest.raises(UserError) as refused:
        Tracker(uri, tmp_path, "toy")
    assert problem in str(refused.value)
    assert refused.value.where == "--tracking or MLFLOW_TRACKING_URI"
    assert refused.value.instead
    assert sorted(os.listdir(tmp_path)) == ["cut.db", "flipped.db", "text.db"]


def test_trials_that_went_to_a_database_that_is_gone_are_known_to_be_missing(tmp_path: Path) -> None:
    for number in (0, 1):
        tracker = session(tmp_path, "toy")
        tracker.begin_trial(number, f"000{number}", {}, {})
        assert tracker.close("FINISHED")
    assert tracker.trials_written() == {0, 1}
    (tmp_path / "mlflow.db").unlink()
    code = """
import sys
from pathlib import Path
from tests.trackers import session
tracker = session(Path(sys.argv[1]), "toy")
tracker.begin_trial(2, "0002", {}, {})
assert tracker.close("FINISHED", 60)
print(tracker.trials_written())
"""  # in another process: MLflow keeps connections to a database in this one
    assert python(code, str(tmp_path)).communicate(timeout=90)[0].strip() == "{2}"


@pytest.mark.parametrize(
    "uri", ["http://host", "HTTPS://host:443/path", "http://[::1]:5000", "https://me:word@host", "sqlite:///new.db"]
)
def test_a_uri_that_may_be_a_tracker_is_accepted(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Tracker(uri, tmp_path, "toy")


def test_tracking_is_imported_without_mlflow() -> None:
    process = python("import sys, ktray.tracking, ktray.tracking.ui_server\nprint('mlflow' in sys.modules)")
    assert process.communicate(timeout=60)[0].strip() == "False"

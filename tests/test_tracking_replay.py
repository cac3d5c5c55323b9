"""A tracker that is down, slow or killed costs a search nothing, and what it missed is written later, once."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from ktray.tracking import StageRun, default_uri
from ktray.tracking.spool import Position, Spool
from tests.trackers import (
    client,
    free_port,
    history,
    python,
    runs_of,
    server,
    session,
    spool_of,
    wait_for,
    wait_for_all_written,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one home for all tests of this file, as creating a database takes seconds. Its name needs quoting in URIs."""
    return tmp_path_factory.mktemp("a home%41")


@pytest.fixture(autouse=True)
def _no_tracker_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_runs_of_a_killed_search_are_ended_as_killed_and_other_studies_are_not_touched(home: Path) -> None:
    uri = default_uri(home)
    other = session(home, "neighbour")
    other.begin_trial(0, "pair", {}, {})
    tracker = session(home, "orphans")
    for number in (0, 1):
        tracker.begin_trial(number, "pair", {}, {})
    tracker.end_trial(1, "FINISHED", {}, {})
    assert tracker.close("KILLED", timeout=60)
    assert runs_of(uri, "orphans")["0000 pair"].info.status == "RUNNING"
    again = session(home, "orphans")
    assert again.close("FINISHED", timeout=60)
    runs = runs_of(uri, "orphans")
    assert [runs[name].info.status for name in ("orphans", "0000 pair", "0001 pair")] == ["FINISHED", "KILLED", "FINISHED"]
    wait_for_all_written(home, "neighbour")
    assert runs_of(uri, "neighbour")["0000 pair"].info.status == "RUNNING"
    assert other.close("FINISHED")


KILLED_SEARCH = """
import os, pathlib, signal, sys, time
from ktray.tracking import Tracker
from ktray.tracking.spool import Spool

uri, home, study, moment = sys.argv[1:]
save = Spool.save_position

def die_with_a_batch_applied_and_its_position_not_saved(spool, position):
    if moment == "applied" and len(position.runs) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(spool, position)

Spool.save_position = die_with_a_batch_applied_and_its_position_not_saved
tracker = Tracker(uri, pathlib.Path(home), study)
tracker.start()
for number in range(1000):
    tracker.begin_trial(number, "pair", {"k": number}, {})
    tracker.log_metrics(number, {"knn/top1": number / 1000}, 1)
    print(number, flush=True)
    time.sleep(0.2)
"""


@pytest.mark.parametrize("moment", ["applied", "any"])
def test_a_search_killed_with_kill_9_loses_nothing_that_was_logged_and_repeats_nothing(home: Path, moment: str) -> None:
    uri, study = default_uri(home), f"killed-{moment}"
    process = python(KILLED_SEARCH, uri, str(home), study, moment)
    assert process.stdout
    position = spool_of(home, study) / "position.json"
    if moment == "any":
        wait_for(position.exists)
        time.sleep(0.5)
        process.kill()
    logged = [int(line) for line in process.stdout.read().split()]
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    waiting = (spool_of(home, study) / "events.jsonl").read_text()
    assert session(home, study).close("FINISHED", timeout=60)
    runs = runs_of(uri, study)
    assert moment == "any" or '"do":"trial"' in waiting  # although MLflow has those runs already
    for number in logged:
        run = runs[f"{number:04d} pair"]
        assert run.data.params == {"k": str(number)}
        assert history(uri, run, "knn/top1") == [(1, number / 1000)]
    assert len(runs) in (len(logged) + 1, len(logged) + 2)  # one may have been logged and not yet printed
    position.unlink()  # even without the saved run ids, no run is created twice
    again = session(home, study)
    again.begin_trial(0, "pair", {"k": 0}, {})
    assert again.close("FINISHED", timeout=60)
    assert runs_of(uri, study).keys() == runs.keys()
    assert runs_of(uri, study)["0001 pair"].info.status == "KILLED"


def test_two_searches_that_start_at_once_on_a_fresh_home_are_both_logged(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from ktray.tracking import Tracker, default_uri\n"
        "home = pathlib.Path(sys.argv[1])\n"
        "trackers = [Tracker(default_uri(home), home, study) for study in sys.argv[2:4]]\n"
        "[tracker.start() for tracker in trackers]\n"
        "[tracker.begin_trial(int(sys.argv[4]), 'pair', {}, {}) for tracker in trackers]\n"
        "print([tracker.close('FINISHED', timeout=90) for tracker in trackers])\n"
    )
    processes = [python(code, str(tmp_path), study, "shared", number) for study, number in (("a", "0"), ("b", "1"))]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [output.strip() for output, _ in outputs] == ["[True, True]"] * 2, outputs
    uri = default_uri(tmp_path)
    assert set(runs_of(uri, "a")) == {"a", "0000 pair"}
    assert set(runs_of(uri, "b")) == {"b", "0001 pair"}
    assert set(runs_of(uri, "shared")) == {"shared", "0000 pair", "0001 pair"}


def test_a_tracker_that_is_down_delays_neither_start_nor_close_and_the_next_session_writes_everything(home: Path) -> None:
    began = time.monotonic()
    tracker = session(home, "dead", f"http://someone:secret@127.0.0.1:{free_port()}")
    tracker.begin_trial(3, "pair", {"k": 1}, {})
    assert time.monotonic() - began < 0.5
    assert not tracker.close("FINISHED")
    assert time.monotonic() - began < 15
    kept = "".join(path.read_text() for path in spool_of(home, "dead").iterdir())
    assert "pair" in kept
    assert "secret" not in kept
    assert session(home, "dead").close("FINISHED", timeout=60)
    assert runs_of(default_uri(home), "dead")["0003 pair"].data.params == {"k": "1"}


def test_a_tracker_that_is_down_is_mentioned_once_and_without_its_password(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = session(home, "quiet", f"http://someone:secret@127.0.0.1:{free_port()}")
    time.sleep(2.5)
    tracker.close("KILLED")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1, warnings
    assert "secret" not in caplog.text


def test_an_event_that_the_tracker_refuses_does_not_block_the_others(home: Path) -> None:
    uri = default_uri(home)
    tracker = session(home, "refused")
    tracker.begin_trial(0, "pair", {}, {})
    wait_for_all_written(home, "refused")
    deleted = runs_of(uri, "refused")["0000 pair"].info.run_id
    client(uri).delete_run(deleted)  # as a user can in MLflow's pages while the trial runs
    tracker.log_metrics(0, {"knn/top1": 0.5}, 1)
    tracker.begin_trial(1, "pair", {}, {})
    assert not tracker.close("FINISHED", timeout=60)
    assert "0001 pair" in runs_of(uri, "refused")
    assert "knn/top1" in (spool_of(home, "refused") / "rejected.jsonl").read_text()


def test_a_torn_line_loses_only_itself(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append({"do": "a"})
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'{"do": "to')
    assert [event for event, _ in spool.read(0)] == [{"do": "a"}]
    spool.append({"do": "b"})
    entries = spool.read(0)
    assert [event for event, _ in entries] == [{"do": "a"}, {}, {"do": "b"}]
    assert entries[-1][1] == spool.size()
    position = Position(offset=entries[0][1])
    spool.truncate_if_applied(position)
    assert spool.size() == entries[-1][1]  # not truncated while an event waits
    position.offset = entries[-1][1]
    spool.truncate_if_applied(position)
    assert (spool.size(), position.offset, spool.load_position().offset) == (0, 0, 0)


def test_only_one_spool_at_a_time_has_the_claim_on_a_study(tmp_path: Path) -> None:
    first, second = Spool(tmp_path), Spool(tmp_path)
    assert first.claim()
    assert not second.claim()
    first.release()
    assert second.claim()
    assert first.study_id() == second.study_id()


@pytest.mark.slow
def test_a_server_that_is_killed_and_restarted_shows_everything_once_and_images_only_if_shared(tmp_path: Path) -> None:
    home, port = tmp_path / "home", free_port()
    image = tmp_path / "sheet.png"
    image.write_bytes(b"sheet")
    with server(tmp_path / "mlflow.db", port) as uri:
        tracker = session(home, "remote", uri)
        tracker.begin_trial(0, "pair", {"k": 1}, {})
        tracker.log_stage(StageRun("private", "private", images=[image]))
        wait_for_all_written(home, "remote")
    for step in range(20):
        tracker.log_metrics(0, {"knn/top1": step / 20}, step)
        time.sleep(0.1)
    with server(tmp_path / "mlflow.db", port) as uri:
        tracker.end_trial(0, "FINISHED", {}, {"objective/knn/top1": 1.0})
        assert tracker.close("FINISHED", timeout=60)
        sharing = session(home, "remote", uri, share_images=True)
        sharing.log_stage(StageRun("public", "public", images=[image]))
        assert sharing.close("FINISHED", timeout=60)
        runs = runs_of(uri, "remote")
        trial = runs["0000 pair"]
        assert history(uri, trial, "knn/top1") == [(step, step / 20) for step in range(20)]
        assert trial.data.metrics["objective/knn/top1"] == 1.0
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        artifacts = {name: client(uri).list_artifacts(run.info.run_id, "images") for name, run in runs.items()}
        assert artifacts["private"] == []
        assert [file.path for file in artifacts["public"]] == ["images/sheet.png"]
        assert "kept at home" in runs["private"].data.tags["ktray.images"]

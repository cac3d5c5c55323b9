"""A study that has been searched is sent to another tracker, whole and once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ktray import cli
from ktray.errors import UserError
from ktray.runs.settings import make_settings
from ktray.runs.study_sync import sync
from ktray.search.history import read_study
from ktray.search.journal import DRIVER_LOCK
from ktray.search.ranking import ranked
from ktray.stores.locks import name_of_this_process, try_lock
from tests.synthetic_study import write_study
from tests.trackers import client


@pytest.mark.slow  # creates a database of MLflow
def test_a_study_is_sent_whole_at_the_times_that_it_had_and_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home, uri = write_study(tmp_path / "home", 12), f"sqlite:///{tmp_path / 'other.db'}"
    lines = {name: {"metrics": {"linear_probe/top1": 0.5}, "keys": {}} for name in ("random student", "supervised ceiling")}
    (home / "studies" / "quickstart" / "references.json").write_text(json.dumps(lines))
    trials = read_study(home, "quickstart").trials
    for _ in range(2):
        assert cli.main(["sync", "quickstart", uri, "--home", str(home)]) == 0
        assert "sent 12 trials" in capsys.readouterr().out
        found = client(uri).search_runs([client(uri).get_experiment_by_name("quickstart").experiment_id], max_results=100)
        by_role: dict[str, list] = {}
        for run in found:
            by_role.setdefault(run.data.tags["ktray.role"], []).append(run)
        assert {role: len(runs) for role, runs in by_role.items()} == {"search": 1, "trial": 12, "trial-reference": 2}
        for run in by_role["trial"]:
            trial = trials[int(run.data.tags["ktray.trial"])]
            assert run.info.start_time == round(trial.started * 1000)
            assert run.info.end_time == round(trial.ended * 1000)
            assert run.data.tags["ktray.state"] == trial.state
            assert run.data.params["student.schedule.lr"] == str(trial.params["student.schedule.lr"])
            assert run.data.metrics["knn/top1"] == pytest.approx(trial.scores[trial.epoch], rel=1e-4)
            if trial.state == "completed":
                assert run.data.metrics["objective/linear_probe/top1"] == pytest.approx(
                    trial.objectives["linear_probe/top1"], rel=1e-4
                )
        (search,) = by_role["search"]
        note = search.data.tags["mlflow.note.content"]
        assert f"[plots](#/experiments/1/runs/{search.info.run_id}/artifacts/result.html?" in note
        stored = {Path(file.path).name for file in client(uri).list_artifacts(search.info.run_id)}
        assert stored == {"result.html", "leaderboard.json"}
        table = json.loads(Path(client(uri).download_artifacts(search.info.run_id, "leaderboard.json")).read_text())
        best = [trial.number for trial in ranked(trials, [("linear_probe/top1", "max")])]
        assert [row[0] for row in table["data"]] == best
        assert json.loads(search.data.tags["mlflow.loggedArtifacts"]) == [{"path": "leaderboard.json", "type": "table"}]
    assert not (home / "mlflow.db").exists()


def test_a_study_that_is_being_searched_or_absent_or_a_tracker_of_no_kind_is_refused(tmp_path: Path) -> None:
    home = write_study(tmp_path / "home", 3)
    settings = make_settings(home, verbosity=0)
    with pytest.raises(UserError, match="no study 'other'"):
        sync("other", f"sqlite:///{tmp_path}/a.db", settings)
    with pytest.raises(UserError, match="lacks its scheme"):
        sync("quickstart", "mlflow.example.org:5000", settings)
    lock = try_lock(home / "studies" / "quickstart" / DRIVER_LOCK, name_of_this_process())
    assert lock is not None
    with lock, pytest.raises(UserError, match="is being searched"):
        sync("quickstart", f"sqlite:///{tmp_path}/a.db", settings)


@pytest.mark.slow
def test_what_a_tracker_that_is_down_has_not_got_waits_and_is_said(tmp_path: Path) -> None:
    home = write_study(tmp_path / "home", 3)
    sent = sync("quickstart", "http://127.0.0.1:9", make_settings(home, verbosity=0), longest=6)
    assert sent.missing.waiting > 3

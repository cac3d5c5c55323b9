"""What MLflow shows of a real search: trials with their curves, stages with their images, and links between them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from ktray.runs.study_logger import TrialLogger
from ktray.search.history import StudySnapshot
from ktray.search.study import Study
from ktray.tracking import default_uri
from tests import searches
from tests.searches import Home
from tests.toy_space import toy_space
from tests.trackers import client, history, runs_of, session

pytestmark = pytest.mark.slow  # three real commands


@dataclass(frozen=True)
class Searched:
    """A study and what MLflow has stored of it."""

    home: Home

    @cached_property
    def study(self) -> StudySnapshot:
        return self.home.study()

    @cached_property
    def uri(self) -> str:
        return f"sqlite:///{self.home.path / 'mlflow.db'}"

    @cached_property
    def experiment(self) -> Any:
        return client(self.uri).get_experiment_by_name("toy")

    def runs(self, role: str) -> list[Any]:
        return [run for run in self.home.runs() if run.data.tags["ktray.role"] == role]

    @cached_property
    def trials(self) -> dict[int, Any]:
        """Number -> run."""
        return {int(run.data.tags["ktray.trial"]): run for run in self.runs("trial")}

    @cached_property
    def stages(self) -> dict[str, Any]:
        """Key -> run."""
        return {run.data.tags["ktray.key"]: run for run in self.runs("stage")}

    def steps(self, run: Any, metric: str) -> list[int]:
        return [step for step, _ in history(self.uri, run, metric)]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    folder = tmp_path_factory.mktemp("mlflow")
    space = searches.toy_space(
        folder,
        budget={"trials": 5, "concurrent": 3},
        early_stop={"metric": "knn/top1", "rungs": [1, 2], "reduction": 2},
        pair__data__count=150,
        pair__student__schedule__epochs=2,
    )
    home = Home(folder / "home")
    ended = home.run("search", space)
    assert ended.code == 0, ended.err
    return Searched(home)


def test_every_trial_is_one_run_under_the_run_of_the_search(searched: Searched) -> None:
    (search,) = searched.runs("search")
    assert search.info.run_name == "toy"
    assert searched.trials.keys() == {trial.number for trial in searched.study.trials}
    assert len(searched.trials) == len(searched.runs("trial"))
    children = [*searched.trials.values(), *searched.stages.values()]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {search.info.run_id}
    assert {run.info.status for run in [search, *children]} == {"FINISHED"}


def test_a_trial_has_its_params_by_dotted_path_and_its_state(searched: Searched) -> None:
    for trial in searched.study.trials:
        run = searched.trials[trial.number]
        assert run.data.params == {name: str(value) for name, value in trial.params.items()}
        assert run.data.tags["ktray.state"] == trial.state
        assert run.info.run_name.startswith(f"{trial.number:04d} {'hog' if trial.params['teacher'] == 'hog' else 'rotation-'}")
    states = Counter(run.data.tags["ktray.state"] for run in searched.trials.values())
    assert states["completed"] >= 1
    assert states["pruned"] >= 1


def test_curves_have_epochs_as_steps_and_scores_have_the_epochs_of_their_rungs(searched: Searched) -> None:
    for trial in searched.study.trials:
        run = searched.trials[trial.number]
        assert searched.steps(run, "student/loss") == list(range(1, trial.epoch + 1))
        expected = [(epoch, pytest.approx(score, rel=1e-4)) for epoch, score in sorted(trial.scores.items())]
        assert history(searched.uri, run, "knn/top1") == expected
        assert max(trial.scores) == trial.epoch


def test_only_completed_trials_have_objectives_and_the_summary_names_the_best_pair(searched: Searched) -> None:
    for trial in searched.study.trials:
        found = {name: value for name, value in searched.trials[trial.number].data.metrics.items() if "objective/" in name}
        assert found == {f"objective/{name}": pytest.approx(value, rel=1e-4) for name, value in trial.objectives.items()}
        assert bool(found) == (trial.state == "completed")
    best = searched.home.run("best", "toy", "--json").answer[0]
    (search,) = searched.runs("search")
    assert search.data.metrics["best/knn/top1"] == best["objectives"]["knn/top1"]
    assert searched.trials[best["trial"]].info.run_id in search.data.tags["mlflow.note.content"]
    assert {"reference/random student/knn/top1", "reference/supervised ceiling/knn/top1"} <= search.data.metrics.keys()


def test_every_stage_that_ran_is_one_run_with_its_times_and_its_curve(searched: Searched) -> None:
    assert searched.stages.keys() == searched.home.artifacts().keys()
    assert len(searched.stages) == len(searched.runs("stage"))
    for key, run in searched.stages.items():
        record = searched.home.record(key)
        assert run.info.run_name.startswith(record["stage"])
        assert run.data.tags["ktray.stage"] == record["stage"]
        assert run.info.end_time == datetime.fromisoformat(record["published"]).timestamp() * 1000
        assert run.info.end_time - run.info.start_time == pytest.approx(1000 * record["seconds"], abs=2)
        if record["stage"] in ("teacher", "student") and record["spec"]["epoch"]:
            assert searched.steps(run, f"{record['stage']}/loss") == list(range(1, record["spec"]["epoch"] + 1))


def test_the_cluster_sheet_is_an_artifact_of_its_stage(searched: Searched) -> None:
    keys = searched.home.keys("pseudo_labels")
    assert keys
    for key in keys:
        run = searched.stages[key]
        assert [file.path for file in client(searched.uri).list_artifacts(run.info.run_id, "images")] == ["images/clusters.png"]
        stored = Path(client(searched.uri).download_artifacts(run.info.run_id, "images/clusters.png"))
        assert stored.read_bytes() == (searched.home.store / key / "clusters.png").read_bytes()


def test_the_description_of_a_trial_links_to_all_its_stages_and_to_the_cluster_sheet(searched: Searched) -> None:
    for trial in searched.study.trials:
        tags = searched.trials[trial.number].data.tags
        assert {tags[name] for name in tags if name.startswith("ktray.stage.")} >= trial.artifact_keys
        runs = {searched.stages[key].info.run_id for key in trial.artifact_keys}
        assert all(f"/runs/{run}?workflowType=machine_learning)" in tags["mlflow.note.content"] for run in runs)
        sheet = searched.stages[trial.keys["pseudo_labels"]].info.run_id
        assert f"/runs/{sheet}/artifacts/images/clusters.png?workflowType" in tags["mlflow.note.content"]


def test_a_trial_lists_the_stages_that_other_trials_had_computed(searched: Searched) -> None:
    reused = {number: run.data.tags.get("ktray.reused", "").split(", ") for number, run in searched.trials.items()}
    teachers = [trial.number for trial in searched.study.trials if "teacher" in trial.keys]
    assert sum("teacher" not in reused[number] for number in teachers) == 1  # the trial that had it computed
    assert len(teachers) >= 4


def test_the_pages_open_on_the_trials_best_first_with_columns_that_exist(searched: Searched) -> None:
    tags = searched.experiment.tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(json.loads(tags["mlflow.sharedViewState.ktray"])["state"])
    order = f"{view['orderByKey']} {'ASC' if view['orderByAsc'] else 'DESC'}"
    found = client(searched.uri).search_runs([searched.experiment.experiment_id], view["searchFilter"], order_by=[order])
    references = searched.runs("trial-reference")
    assert {run.data.tags["ktray.reference"] for run in references} == {"random student", "supervised ceiling"}
    assert {run.info.run_id for run in found} == {run.info.run_id for run in [*searched.trials.values(), *references]}
    values = [run.data.metrics["objective/knn/top1"] for run in found if "objective/knn/top1" in run.data.metrics]
    best = max(trial.objectives["knn/top1"] for trial in searched.study.trials if trial.state == "completed")
    assert values == sorted(values, reverse=True)
    assert max(values) >= round(best, 4)
    assert len(values) == 2 + sum(trial.state == "completed" for trial in searched.study.trials)
    assert all(len(f"{value:g}") <= 7 for value in values), "MLflow shows every digit"
    assert [chart["type"] for chart in view["compareRunCharts"]][:2] == ["BAR", "SCATTER"]
    assert view["compareRunCharts"][0]["metricKey"] == "objective/knn/top1"
    present = {
        f"{kind}.`{name}`" for run in found for kind in ("metrics", "params", "tags") for name in getattr(run.data, kind)
    }
    assert set(view["selectedColumns"]) <= present
    assert set(view["selectedColumns"]) <= set(view["columnOrder"])


def test_failed_duplicate_paused_and_interrupted_trials_are_distinguished_and_none_stays_running(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    uri, tracker = default_uri(tmp_path), session(tmp_path, "toy")
    trial_logger = TrialLogger(tracker, space)
    with Study.open(tmp_path, space) as study:
        drawn = [study.next() for _ in range(2)]
    trials = [replace(drawn[0].trial, number=number) for number in range(4)]  # type: ignore[union-attr]
    for trial in trials:
        trial_logger.begin_trial(trial, {"student": f"student-{trial.number:012d}"})
    trial_logger.end_trial(replace(trials[0], state="failed", cause="ValueError: 12 features are NaN"), {}, {})
    trial_logger.end_trial(replace(trials[1], state="paused", scores={1: 0.25}), {}, {})
    trial_logger.end_trial(trials[2], {}, {})
    trial_logger.log_unrun_draw(replace(trials[3], state="duplicate", duplicate_of=0))
    assert tracker.close("KILLED", timeout=60)
    runs = {int(name[:4]): run for name, run in runs_of(uri, "toy").items() if name != "toy"}
    shown = [(runs[n].info.status, runs[n].data.tags["ktray.state"], runs[n].data.tags.get("ktray.result")) for n in range(4)]
    assert shown == [
        ("FAILED", "failed", "ValueError: 12 features are NaN"),
        ("FINISHED", "paused", "knn/top1 0.2500 at epoch 1"),
        ("KILLED", "interrupted", None),
        ("FINISHED", "duplicate", "the same pair as trial 0"),
    ]


def test_an_exported_student_is_registered_as_champion_and_computes_the_same_features(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import torch

    from ktray.export.student_files import load_student

    ended = searched.home.run("export", "toy", tmp_path / "best", "--register")
    assert ended.code == 0, ended.err
    assert "registered version 1 of ktray-toy as champion" in ended.out
    best = json.loads(searched.home.run("best", "toy", "--json").out)[0]
    version = client(searched.uri).get_model_version_by_alias("ktray-toy", "champion")
    assert version.tags["ktray.trial"] == str(best["trial"])
    assert version.run_id == searched.trials[best["trial"]].info.run_id
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    mlflow.set_tracking_uri(searched.uri)
    model = mlflow.pytorch.load_model("models:/ktray-toy@champion")
    images = torch.randn(3, 3, 28, 28)
    torch.testing.assert_close(model(images), load_student(tmp_path / "best")(images).detach(), rtol=1e-5, atol=1e-5)
    again = searched.home.run("export", "toy", tmp_path / "again", "--register")
    assert "registered version 2 of ktray-toy as champion" in again.out


def test_a_student_whose_trial_is_not_in_the_tracker_is_not_registered(searched: Searched, tmp_path: Path) -> None:
    elsewhere = f"sqlite:///{tmp_path / 'other.db'}"
    ended = searched.home.run("export", "toy", tmp_path / "best", "--register", "--tracking", elsewhere)
    assert ended.code == 2
    assert "the tracker has no run of trial" in ended.err

"""The stage of clusters goes on where a killed attempt ended, with the same bits, and says how long it will take."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ktray.clustering import projection, pseudo_labelling
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_graph import build
from ktray.pool import StageContext
from ktray.stages import pseudo_labels_stage
from ktray.stores.file import FileStore
from tests.toys import toy_pair


class Killed(BaseException):
    """Ends a stage as a signal would."""


def dying_after(iteration: int):
    def progress(values) -> None:
        if values.get("iteration") == iteration:
            raise Killed

    return progress


def test_a_killed_clustering_goes_on_from_its_last_iteration(tmp_path: Path) -> None:
    transfer = {"kind": "clusters", "k": 20, "iterations": 12, "pca": 8}
    stages = [stage for stage in build(toy_pair(transfer=transfer), data_identity()).stages]
    clusters = next(stage for stage in stages if stage.name == "clusters")
    store, context = FileStore(tmp_path / "store"), StageContext(checkpoint_seconds=0.0)
    for stage in stages[: stages.index(clusters)]:
        execute(stage, store, "a", context)
    with pytest.raises(Killed):
        execute(clusters, store, "killed", replace(context, progress=dying_after(3)))
    reports: list = []
    artifact, _ = execute(clusters, store, "b", replace(context, progress=reports.append))
    assert artifact.record["started_from"] == "checkpoint-000003"
    assert artifact.record["seconds_alone"] > artifact.record["seconds"]
    done = [report["iteration"] for report in reports if "iteration" in report]
    assert done[0] == 3
    assert done == list(range(3, 3 + len(done)))
    assert all(report["seconds_left"] >= 0 for report in reports if report.get("iteration", 0) > 3)
    assert not [path for path in artifact.directory.iterdir() if path.name.startswith("checkpoint")]
    whole = FileStore(tmp_path / "whole")
    for stage in stages[: stages.index(clusters) + 1]:
        other, _ = execute(stage, whole, "a", context)
    assert other.metrics == artifact.metrics
    for name in ("codebook.npz", "centroids.npy", "projection.npz", "iterations.json", "labels.npy"):
        assert (other.directory / name).read_bytes() == (artifact.directory / name).read_bytes()


def test_the_projection_is_fitted_once_for_several_k_of_the_same_features(tmp_path: Path, monkeypatch) -> None:
    fits: list[Path] = []

    def fit(shards, **rest):
        fits.append(shards[0])
        return fit_projection(shards, **rest)

    fit_projection = projection.fit
    monkeypatch.setattr(projection, "fit", fit)
    store, made = FileStore(tmp_path / "store"), {}
    for k, whiten in ((20, True), (30, True), (20, False)):
        transfer = {"kind": "clusters", "k": k, "iterations": 2, "pca": 8, "whiten": whiten}
        for stage in build(toy_pair(transfer=transfer), data_identity()).stages:
            if stage.name in ("images", "teacher", "features", "clusters"):
                made[k, whiten], _ = execute(stage, store, "a", StageContext())
    assert len(fits) == 2
    records = [artifact.record for artifact in made.values()]
    assert ["kept_projection" in record["conditions"] for record in records] == [False, True, False]
    assert records[1]["seconds_alone"] >= records[1]["conditions"]["kept_projection"]["seconds"]
    first, second, third = ((artifact.directory / "projection.npz").read_bytes() for artifact in made.values())
    assert first == second != third


def test_images_that_were_clustered_keep_the_labels_of_the_clustering(tmp_path: Path, monkeypatch) -> None:
    store, stages = FileStore(tmp_path / "store"), build(toy_pair(), data_identity()).stages
    labels = next(stage for stage in stages if stage.name == "pseudo_labels")
    for stage in stages[: stages.index(labels)]:
        execute(stage, store, "a", StageContext())
    shutil.copytree(store.root, tmp_path / "other")
    monkeypatch.setattr(pseudo_labels_stage, "LABELS", "absent.npy")
    searched, _ = execute(labels, FileStore(tmp_path / "other"), "a", StageContext())
    monkeypatch.undo()
    monkeypatch.setattr(pseudo_labelling, "assign", None)
    kept, _ = execute(labels, store, "a", StageContext())
    assert (kept.directory / "labels.npy").read_bytes() == (searched.directory / "labels.npy").read_bytes()
    assert kept.metrics == searched.metrics

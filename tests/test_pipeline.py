"""A pair runs through the real stages, once."""

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ktray import plugins
from ktray.errors import StageFailed
from ktray.pipeline import pair_metrics
from ktray.pipeline.execute import _latest_snapshot, execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_graph import build
from ktray.pipeline.record import _commit
from ktray.pool import StageContext
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.stages import training_segment
from ktray.stores.file import FileStore
from tests.toys import HOG, ROTATION, STUDENT, toy_pair


@pytest.fixture
def store(tmp_path):
    return FileStore(tmp_path / "store")


def run(pair, store, **cuts):
    graph = build(pair, data_identity(), **cuts)
    scheduler = LocalScheduler(store, execute, StageContext(), lambda event: None)
    outcomes = scheduler.obtain(list(graph.stages), "test")
    return graph, outcomes, pair_metrics.published_artifacts(graph, store)


def test_the_second_run_computes_nothing(store):
    pair = toy_pair(teacher=ROTATION, evals=[{"kind": "knn"}, {"kind": "linear_probe"}])
    graph, first, artifacts = run(pair, store)
    assert all(outcome["state"] == "computed" for outcome in first)
    _, second, _ = run(pair, store)
    assert all(outcome["state"] == "reused" for outcome in second)
    metrics = pair_metrics.metrics(graph, artifacts)
    assert 0 <= metrics["knn/top1"] <= 1
    assert metrics["cost/seconds"] > 0
    assert metrics["student/parameters"] > 0


def test_cut_into_segments_the_student_is_bitwise_the_same(store, tmp_path):
    pair = toy_pair()
    whole, _, _ = run(pair, store)
    other = FileStore(tmp_path / "other")
    cut, _, _ = run(pair, other, milestones={"student": [1, 2]})
    assert whole.keys == cut.keys
    files = [s.find(whole.keys["student"]).record["files"] for s in (store, other)]
    assert files[0]["weights.safetensors"] == files[1]["weights.safetensors"]


def test_a_student_goes_on_from_a_published_snapshot_and_its_cost_counts_the_whole(store):
    run(toy_pair(student={**STUDENT, "schedule": {**STUDENT["schedule"], "epochs": 2}}), store)
    graph, _, artifacts = run(toy_pair(), store)
    record = artifacts[graph.keys["student"]].record
    assert record["started_from"].startswith("student-")
    assert record["seconds_alone"] > record["seconds"]


def test_the_record_says_how_the_artifact_came_to_be(store):
    graph, _, artifacts = run(toy_pair(), store)
    record = json.loads((artifacts[graph.keys["clusters"]].directory / "record.json").read_text())
    assert record["spec"]["k"] == 5
    assert record["inputs"] == {"features": graph.keys["features"]}
    assert record["versions"].keys() >= {"torch", "numpy", "scipy", "scikit-learn", "pillow"}
    assert record["device"].startswith("cpu")
    assert record["peak_bytes"] > 1e6
    assert set(record["files"]) >= {"centroids.npy", "projection.npz"}


def test_pseudo_labels_cover_every_training_image(store):
    graph, _, artifacts = run(toy_pair(), store)
    labels = np.load(artifacts[graph.keys["pseudo_labels"]].directory / "labels.npy")
    assert labels.shape == (216,)
    assert labels.min() >= -1
    assert labels.max() < 5


def test_a_stage_that_raises_is_named_once_and_leaves_no_artifact(store):
    pair = toy_pair(transfer={"kind": "clusters", "k": 5, "min_size": 10_000})
    with pytest.raises(StageFailed, match="min_size=10000"):
        run(pair, store)
    key = build(pair, data_identity()).keys["pseudo_labels"]
    assert store.find(key) is None
    assert "min_size" in store.failure(key)["cause"]


@pytest.mark.parametrize("min_size", [1, 10_000], ids=["that ends", "that raises"])
def test_a_stage_uses_one_thread_and_leaves_the_process_as_many_as_it_had(min_size, store, monkeypatch):
    before = torch.get_num_threads()
    inside = []
    monkeypatch.setattr("ktray.pipeline.execute.reset_peaks", lambda device: inside.append(torch.get_num_threads()))
    torch.set_num_threads(3)
    try:
        with contextlib.suppress(StageFailed):
            run(toy_pair(transfer={"kind": "clusters", "k": 5, "min_size": min_size}, evals=[]), store)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(inside) == {1}


def test_random_student_and_supervised_ceiling_are_pairs_like_any_other(store):
    for kind in ("none", "labels"):
        graph, _, artifacts = run(toy_pair(teacher=None, transfer={"kind": kind}), store)
        assert "knn/top1" in pair_metrics.metrics(graph, artifacts)


def test_a_checkpoint_of_a_killed_attempt_is_continued(store):
    pair = toy_pair()
    graph = build(pair, data_identity())
    scheduler = LocalScheduler(
        store, execute, StageContext(checkpoint_seconds=0.0, progress=_stop_at_epoch_two), lambda event: None
    )
    with pytest.raises(KeyboardInterrupt):
        scheduler.obtain(list(graph.stages), "test")
    assert [path.name for path in store.checkpoints(graph.keys["student"])] == ["checkpoint-000001"]
    _, _, artifacts = run(pair, store)
    assert artifacts[graph.keys["student"]].record["started_from"] == "checkpoint-000001"


def _two_checkpoints(store, tmp_path):
    """The stage of a student whose killed attempts left checkpoints of epochs 1 and 2."""
    graph = build(toy_pair(), data_identity())
    student = next(stage for stage in graph.stages if stage.name == "student")
    run(toy_pair(), store, milestones={"student": [1, 2]})
    finished = {store.find(key).metrics["epoch"]: store.find(key) for key in list(store.keys()) if key.startswith("student")}
    fresh = FileStore(tmp_path / "fresh")
    for epoch in (1, 2):
        scratch = fresh.scratch(student.key, f"killed-{epoch}")
        shutil.copytree(finished[epoch].directory, scratch / f"checkpoint-{epoch:06d}")
    assert [path.name[-1] for path in fresh.checkpoints(student.key)] == ["2", "1"]
    return student, fresh


def test_a_torn_checkpoint_gives_way_to_the_one_before_it(store, tmp_path, caplog):
    student, fresh = _two_checkpoints(store, tmp_path)
    newest = fresh.checkpoints(student.key)[0]
    assert _latest_snapshot(student, fresh) == newest
    for name in ("state.json", "weights.safetensors", "optimizer.safetensors", "history.parquet"):
        for length in (0, (newest / name).stat().st_size // 2):
            shutil.copytree(newest, kept := tmp_path / f"{name}-{length}")
            (newest / name).write_bytes((newest / name).read_bytes()[:length])
            caplog.clear()
            assert _latest_snapshot(student, fresh).name == "checkpoint-000001"
            assert f"checkpoint-000002 is damaged ({name} has {length} bytes" in caplog.text
            kept.rename(newest)
    assert _latest_snapshot(student, FileStore(tmp_path / "empty")) is None


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
    on_epoch = training_segment._checkpointing(tmp_path, 3, StageContext(checkpoint_seconds=0.0))
    on_epoch(1, {}, lambda directory: (directory / "weights.safetensors").write_bytes(b"0"))
    assert synced[0].name.startswith(".record.json")  # under its first name, before it is complete
    folder = tmp_path / "checkpoint-partial"
    assert set(synced[1:]) == {folder / "weights.safetensors", folder / "record.json", folder}
    assert (tmp_path / "checkpoint-000001").is_dir()


def test_the_commit_is_that_of_our_own_tree_and_says_whether_it_was_modified(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for place in ("ktray", "venv/ktray"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "module.py").write_text("A = 1")
    git("init")
    git("add", ".")
    git("commit", "-m", "Begin")
    monkeypatch.setattr("ktray.pipeline.record._PACKAGE", tmp_path / "ktray")
    (tmp_path / "notes.txt").touch()
    assert _commit() == git("rev-parse", "HEAD")
    (tmp_path / "ktray" / "module.py").write_text("A = 2")
    assert _commit() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setattr("ktray.pipeline.record._PACKAGE", tmp_path / "venv" / "ktray")
    assert _commit() is None


def _stop_at_epoch_two(values):
    if values.get("epoch") == 2:
        raise KeyboardInterrupt


TRANSFERS = {
    "several k": {"kind": "clusters", "k": [5, 9], "sampling": "uniform", "min_size": 20, "small": "merge"},
    "soft_clusters": {"kind": "soft_clusters", "k": 5, "neighbours": 3},
    "regression": {"kind": "regression", "standardise": True},
    "similarity": {"kind": "similarity", "anchors": 50},
    "random_clusters": {"kind": "random_clusters", "k": 5},
}


@pytest.mark.parametrize("transfer", TRANSFERS.values(), ids=TRANSFERS.keys())
def test_every_transfer_teaches_a_student_that_is_judged_and_may_be_cut(transfer, store, tmp_path):
    quality = [{"kind": "cluster_quality"}] if "clusters" in plugins.module("transfer", transfer["kind"]).NEEDS else []
    teacher = None if transfer["kind"] == "random_clusters" else HOG
    pair = toy_pair(transfer=transfer, teacher=teacher, evals=[{"kind": "knn"}, *quality])
    graph, _, artifacts = run(pair, store)
    metrics = pair_metrics.metrics(graph, artifacts)
    curve = [row["loss"] for row in pair_metrics.learning_curve(artifacts[graph.keys["student"]])]
    assert curve[-1] < curve[0]
    assert 0 <= metrics["knn/top1"] <= 1
    if transfer["kind"] == "clusters":
        assert metrics["cluster_quality/clusters"] <= 5, "the first k is judged"
        assert metrics["pseudo_labels/kept"] == metrics["pseudo_labels_2/kept"] == 1
    other = FileStore(tmp_path / "other")
    run(pair, other, milestones={"student": [1, 2]})
    files = [s.find(graph.keys["student"]).record["files"] for s in (store, other)]
    assert files[0]["weights.safetensors"] == files[1]["weights.safetensors"]

"""Evaluations of one snapshot send each image through its network once, and get what each would get on its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ktray import plugins
from ktray.conditions import KEPT_ROWS
from ktray.features import extraction, shared_features
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_graph import build
from ktray.pool import StageContext
from ktray.spec import Pooling
from ktray.stores.file import FileStore
from ktray.training import loop, snapshot
from tests.toy_images import toy_images
from tests.toys import toy_pair

UNTRAINED = {"transfer": {"kind": "none"}, "teacher": None}
EVALS = [
    {"kind": "knn"},
    {"kind": "effective_rank"},
    {"kind": "knn", "name": "conv2", "layer": "conv2"},
    {"kind": "knn", "name": "rough", "network_precision": "bfloat16"},
]


@pytest.fixture(autouse=True)
def _nothing_kept():
    shared_features.forget()
    yield
    shared_features.forget()


@pytest.fixture
def passes(monkeypatch):
    """(layers, number of images) of every pass over images."""
    found = []
    extract = extraction.extract_views

    def counted(views, weights, state, images, *arguments, **options):
        found.append((tuple(view["layer"] for view in views), len(images)))
        return extract(views, weights, state, images, *arguments, **options)

    monkeypatch.setattr(extraction, "extract_views", counted)
    return found


def run(store: FileStore, context=StageContext(), **changes):  # noqa: B008 - a frozen record
    graph = build(toy_pair(**UNTRAINED, evals=EVALS, **changes), data_identity())
    return graph, {stage.key: execute(stage, store, "a", context)[0] for stage in graph.stages}


def test_evaluations_of_a_snapshot_share_one_pass_per_split_and_precision_over_all_their_layers(tmp_path, passes):
    graph, artifacts = run(FileStore(tmp_path / "store"))
    both = (None, "conv2")
    assert passes == [(both, 216), (both, 24), ((None,), 216), ((None,), 24)]
    by_name = {name: artifacts[key] for name, key in graph.keys["evaluation"].items()}
    for name in ("effective_rank", "conv2"):
        record = by_name[name].record
        assert record["conditions"][KEPT_ROWS]["seconds"] > 0
        assert record["seconds_alone"] > record["seconds"]
    assert by_name["knn"].record["conditions"] == {}


def test_the_seconds_that_were_saved_are_those_of_all_splits_together(tmp_path, monkeypatch):
    extracted = shared_features._extracted

    def taking(*arguments):  # as many seconds as images, whatever the machine
        return {name: replace(kept, seconds=float(len(kept.rows))) for name, kept in extracted(*arguments).items()}

    monkeypatch.setattr(shared_features, "_extracted", taking)
    graph, artifacts = run(FileStore(tmp_path / "store"))
    record = artifacts[graph.keys["evaluation"]["conv2"]].record
    assert record["conditions"][KEPT_ROWS] == {"seconds": 216 + 24}
    assert record["seconds_alone"] == pytest.approx(record["seconds"] + 216 + 24, abs=0.002)


def test_what_is_shared_changes_no_metric_and_no_key(tmp_path, monkeypatch):
    graph, together = run(FileStore(tmp_path / "store"))
    monkeypatch.setattr(shared_features, "LIMIT_BYTES", 0)
    shared_features.forget()
    _, apart = run(FileStore(tmp_path / "other"))
    assert {key: artifact.metrics for key, artifact in together.items()} == {
        key: artifact.metrics for key, artifact in apart.items()
    }
    alone = build(toy_pair(**UNTRAINED, evals=EVALS[2:3]), data_identity())
    assert alone.keys["evaluation"]["conv2"] == graph.keys["evaluation"]["conv2"]


def test_without_memory_every_evaluation_extracts_its_own_layer(tmp_path, passes, monkeypatch):
    monkeypatch.setattr(shared_features, "LIMIT_BYTES", 0)
    run(FileStore(tmp_path / "store"))
    assert len(passes) == 7  # the effective rank reads one split
    assert not shared_features._kept


def test_the_features_of_another_snapshot_are_not_taken_for_those_of_this_one(tmp_path, passes):
    student = {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": {"epochs": 1}}
    _, first = run(FileStore(tmp_path / "store"), student={**student, "seed": 1})
    _, second = run(FileStore(tmp_path / "store"), student={**student, "seed": 2})
    assert len(passes) == 8
    ranks = [[a.metrics["rank"] for a in artifacts.values() if "rank" in a.metrics] for artifacts in (first, second)]
    assert ranks[0] != ranks[1]


def test_a_snapshot_that_was_computed_again_is_extracted_again(tmp_path, passes):
    store = FileStore(tmp_path / "store")
    graph, _ = run(store)
    before = len(passes)
    for stage in graph.stages:
        if stage.name != "images":
            store.remove(stage.key)
    run(store)
    assert len(passes) == 2 * before


def test_kept_rows_stay_within_the_limit_and_the_latest_stay(monkeypatch):
    monkeypatch.setattr(shared_features, "LIMIT_BYTES", 1000)
    for number in range(5):
        rows = np.zeros((10, 10), np.float32)
        shared_features._kept[str(number)] = shared_features._Kept(rows, 1.0, {})
        shared_features._keep_within_limit()
    assert list(shared_features._kept) == ["3", "4"]


def test_rows_that_are_shared_cannot_be_written_to(tmp_path):
    run(FileStore(tmp_path / "store"))
    assert shared_features._kept
    assert not any(kept.rows.flags.writeable for kept in shared_features._kept.values())


def test_the_limit_leaves_room_for_the_workers_of_small_machines(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": (64 << 30) // 4096}[name])
    assert 64 * shared_features.limit_bytes() <= (64 << 30) // 8


def test_features_of_images_that_an_evaluation_made_itself_are_not_kept(tmp_path, passes):
    backbone = plugins.parse("backbone", {"kind": "alexnet", "width": 0.125})
    snapshot.write_untrained(loop.untrained_backbone(backbone, 0), tmp_path / "weights")
    judged = shared_features.Judged(tmp_path / "weights", None, "cpu", None)
    for _ in range(2):
        shared_features.rows_of(judged, [extraction.network_view(backbone, None, Pooling())], [], toy_images(4), None, 4)
    assert len(passes) == 2
    assert not shared_features._kept

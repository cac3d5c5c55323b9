"""Dense clusters: positions are clustered and all assigned, labels follow the views, and the loss is that of each position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ktray.clustering import position_rows, pseudo_labelling
from ktray.errors import UserError
from ktray.ops import augmentation
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_check import check_pair, data_loader
from ktray.pipeline.pair_graph import build
from ktray.pool import StageContext
from ktray.runs.dry_run import small_pair
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.spec import Augment
from ktray.stores.file import FileStore
from ktray.training import feature_maps, loop
from ktray.training.task import Labels, Targets
from ktray.transfer import dense_clusters
from tests.networks import BACKBONE
from tests.toys import HOG, ROTATION, STUDENT, toy_pair

torch.set_num_threads(1)

GRID = 3
MAPS = {**ROTATION, "pool": {"grid": GRID}}
DENSE = {"kind": "dense_clusters", "k": 6, "grid": GRID, "iterations": 4, "sample": 300}


def test_rows_of_positions_are_those_of_the_maps_image_by_image(tmp_path):
    maps = np.random.default_rng(0).normal(size=(7, 4, GRID, GRID)).astype(np.float32)
    rows = position_rows.of_maps(maps.reshape(7, -1), GRID)
    expected = [maps[image, :, y, x] for image in range(7) for y in range(GRID) for x in range(GRID)]
    np.testing.assert_array_equal(rows, np.stack(expected))
    np.testing.assert_allclose(position_rows.means(maps.reshape(7, -1), GRID), maps.mean(axis=(2, 3)), rtol=1e-6)
    with pytest.raises(ValueError, match="no maps of 5 x 5"):
        position_rows.of_maps(maps.reshape(7, -1), 5)
    shards = [tmp_path / "a.npy", tmp_path / "b.npy"]
    np.save(shards[0], maps[:4].reshape(4, -1))
    np.save(shards[1], maps[4:].reshape(3, -1))
    with position_rows.position_files(shards, GRID, tmp_path, sample=(20, 5)) as files:
        found = np.concatenate([np.load(path) for path in files])
        np.testing.assert_array_equal(found, rows[position_rows.sampled(63, 20, 5)])
    with position_rows.position_files(shards, GRID, tmp_path) as files:
        np.testing.assert_array_equal(np.concatenate([np.load(path) for path in files]), rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "b.npy"]


def test_a_sample_is_a_function_of_its_seed():
    first, again, other = (position_rows.sampled(1000, 50, seed) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    assert len(set(first.tolist())) == 50
    assert position_rows.sampled(30, 50, 0).tolist() == list(range(30))


def test_the_loss_is_the_cross_entropy_of_each_position_and_of_the_whole_image():
    draws = np.random.default_rng(0)
    labels, whole = draws.integers(0, 5, (8, GRID**2)), draws.integers(0, 3, 8)
    spec = dense_clusters.Spec(k=5, grid=GRID, whole=3)
    pixels = torch.randint(0, 256, (8, 28, 28, 3), dtype=torch.uint8)
    for heads in ((Labels(labels, 5),), (Labels(labels, 5), Labels(whole, 3))):
        task = dense_clusters.task(spec, Targets(8, heads, size=28), Augment(crop=0))
        torch.manual_seed(0)
        backbone = loop.untrained_backbone(BACKBONE, 0)
        model = nn.ModuleDict({"backbone": backbone, "head": task.head(int(backbone.feature_dim))})  # type: ignore[arg-type]
        task.prepare(model)  # type: ignore[misc]
        inputs, wanted = task.batch(pixels, torch.arange(8), {})
        with torch.no_grad():
            outputs = task.forward(model.eval(), inputs)  # type: ignore[misc]
        logits = outputs[:, : 5 * GRID**2].reshape(8, 5, GRID**2)
        each = [
            nn.functional.cross_entropy(logits[image : image + 1, :, cell], torch.tensor([labels[image, cell]]))
            for image in range(8)
            for cell in range(GRID**2)
        ]
        expected = torch.stack(each).mean()
        if len(heads) == 2:
            expected = (expected + nn.functional.cross_entropy(outputs[:, -3:], torch.from_numpy(whole))) / 2
        loss, metrics = task.loss(outputs, wanted)
        torch.testing.assert_close(loss, expected)
        assert ("whole_top1" in metrics) == (len(heads) == 2)


def test_labels_of_positions_are_mirrored_with_the_image():
    labels = torch.arange(4 * 9).view(4, 1, 3, 3).float()
    augment = Augment(crop=0, flip=True)
    draws = augmentation.draw_views(4, augment, torch.Generator().manual_seed(1))
    found = feature_maps.view_of_maps(labels, augment, draws, 24, "nearest")
    expected = torch.where(draws["mirrored"][:, None, None, None], labels.flip(3), labels)
    assert torch.equal(found, expected)
    assert 0 < int(draws["mirrored"].sum()) < 4


def test_all_positions_get_the_nearest_of_the_clusters_that_a_sample_was_fitted_to(tmp_path: Path) -> None:
    student = {**STUDENT, "augment": {"crop": 2, "flip": True}}
    pair = toy_pair(teacher=MAPS, transfer={**DENSE, "whole": 4}, student=student, evals=[{"kind": "knn"}])
    check_pair(pair, data_loader())
    graph, store = build(pair, data_identity()), FileStore(tmp_path)
    LocalScheduler(store, execute, StageContext(), lambda event: None).obtain(list(graph.stages), "test")
    made = {name: store.find(key) for name, key in graph.keys.items() if isinstance(key, str)}
    rows = np.concatenate([np.load(path) for path in sorted(made["features"].directory.glob("features-*.npy"))])  # type: ignore[union-attr]
    rows = position_rows.of_maps(rows, GRID)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    centroids = np.load(made["clusters"].directory / "centroids.npy")  # type: ignore[union-attr]
    labels = np.load(made["pseudo_labels"].directory / "labels.npy")  # type: ignore[union-attr]
    assert labels.shape == (len(rows) // GRID**2, GRID**2)
    squared = ((rows[:, None] - centroids[None]) ** 2).sum(axis=2)
    chosen = squared[np.arange(len(rows)), labels.reshape(-1)]
    np.testing.assert_allclose(chosen, squared.min(axis=1), atol=1e-4)
    assert np.load(made["pseudo_labels_2"].directory / "labels.npy").shape == (len(labels),)  # type: ignore[union-attr]
    assert not (made["clusters"].directory / "positions").exists()  # type: ignore[union-attr]
    assert made["student"].metrics["top1"] > 1 / 6  # type: ignore[union-attr]
    assert len(np.unique(pseudo_labelling.most_frequent(labels))) > 1


def test_what_does_not_go_together_is_refused_in_the_plan() -> None:
    for changes, where in (
        ({"teacher": HOG}, "transfer.grid"),
        ({"transfer": {**DENSE, "whole": 10_000}}, "transfer.k"),
        ({"evals": [{"kind": "cluster_quality"}]}, "evals.0"),
    ):
        with pytest.raises(UserError) as refused:
            check_pair(toy_pair(**{"teacher": MAPS, "transfer": DENSE, **changes}), data_loader())
        assert refused.value.where == where
    assert small_pair(toy_pair(teacher=MAPS, transfer={**DENSE, "whole": 100}), 20).transfer.whole == 5  # type: ignore[attr-defined]
    assert small_pair(toy_pair(teacher=MAPS, transfer=DENSE), 20).transfer.whole is None  # type: ignore[attr-defined]

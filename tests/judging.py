"""Calls an evaluation in tests: its images have no pixels and only stand for arrays of features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ktray import plugins
from ktray.checkpoints import Attempt
from ktray.features.judged_network import JudgedNetwork
from ktray.images import Images
from ktray.spec import Pooling
from ktray.training import loop


def images(count: int, labels: NDArray[np.int64] | None = None, classes: tuple[str, ...] = ()) -> Images:
    """Images whose pixels must not be read: evaluations see only features."""

    def read(_: NDArray[np.int64]) -> NDArray[np.uint8]:
        raise AssertionError("an evaluation read pixels")

    presence = None if labels is None else np.where(labels[:, None] == np.arange(4), 1, -1).astype(np.int8)
    return Images(count=count, size=8, read=read, labels=labels, classes=classes, presence=presence)


def blobs(count: int, seed: int = 0, classes: int = 4, width: int = 12, spread: float = 2.0):
    """(features (N, D) float32, labels (N,)) of overlapping classes, with features of very different scales."""
    centres = np.random.default_rng(99).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    rows = (centres[labels] + spread * rng.normal(size=(count, width))) * 10.0 ** np.linspace(-2, 2, width) + 3
    return rows.astype(np.float32), labels.astype(np.int64)


def judge(
    kind: str, tmp_path: Path, train, judged, train_labels=None, judged_labels=None, pseudo_labels=None, device="cpu", **fields
):
    """The metrics of an evaluation whose features are the given arrays, of every layer."""
    module = plugins.module("evaluation", kind)
    of_train, of_judged = images(len(train), train_labels), images(len(judged), judged_labels)
    by_images = {id(of_train): train, id(of_judged): judged}
    more = {}
    if getattr(module, "READS_NETWORK", False):
        more["network"] = _network(lambda given, views: [by_images[id(given)]] * len(views), device)
        more["attempt"] = Attempt(None, 0, lambda step, write: None, lambda values: None)
    if getattr(module, "READS_SPLITS", False):
        more["images_of"] = {"train": of_train, "val": of_judged}.get
    return module.evaluate(
        module.Spec(**fields),
        features=lambda given: by_images[id(given)],
        train=of_train,
        judged=of_judged,
        pseudo_labels=pseudo_labels,
        out=tmp_path,
        device=device,
        **more,
    )


def _network(features, device) -> JudgedNetwork:
    """A small untrained AlexNet that is said to have these features."""
    backbone = plugins.parse("backbone", {"kind": "alexnet", "width": 0.125})
    return JudgedNetwork(
        backbone=backbone,
        layer=None,
        pool=Pooling(),
        normalize="ktray",
        precision="float32",
        device=device,
        max_batch_size=None,
        build=lambda: loop.untrained_backbone(backbone, 0).to(device).eval(),
        features=features,
    )

"""Names of pairs and stages, as a person reads them."""

from __future__ import annotations

from typing import Any

import pytest

from ktray.pipeline.naming import pair_name, stage_name
from tests.reports import pair


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "rotation-alexnet/conv4 k=5 -> resnet18"),
        ({"teacher": {"descriptor": {"kind": "hog", "cell": 4}}}, "hog k=5 -> resnet18"),
        ({"teacher": {"descriptor": {"kind": "random_network", "layer": "conv3"}}}, "random_network/conv3 k=5 -> resnet18"),
        ({"teacher": None, "transfer": {"kind": "none"}}, "none -> resnet18"),
        ({"teacher": None, "transfer": {"kind": "labels"}}, "labels -> resnet18"),
        ({"transfer": {"kind": "clusters", "k": [5, 20]}}, "rotation-alexnet/conv4 k=5+20 -> resnet18"),
        ({"transfer": {"kind": "soft_clusters", "k": 5}}, "rotation-alexnet/conv4 soft_clusters k=5 -> resnet18"),
        ({"transfer": {"kind": "regression"}}, "rotation-alexnet/conv4 regression -> resnet18"),
        ({"student": {"backbone": {"kind": "alexnet", "width": 0.25}}}, "rotation-alexnet/conv4 k=5 -> alexnet w0.25"),
        ({"student": {"backbone": {"kind": "alexnet", "form": "full"}}}, "rotation-alexnet/conv4 k=5 -> alexnet full"),
    ],
)
def test_a_pair_has_a_readable_name(changes: dict[str, Any], name: str) -> None:
    assert pair_name(pair(**changes)) == name


@pytest.mark.parametrize(
    ("stage", "spec", "name"),
    [
        ("images", {"kind": "cifar10", "size": 32}, "images cifar10"),
        (
            "teacher",
            {"pretext": {"kind": "rotation"}, "backbone": {"kind": "alexnet"}, "epoch": 4},
            "teacher rotation alexnet to epoch 4",
        ),
        ("teacher", {"checkpoint": "0123", "backbone": {"kind": "resnet", "depth": 50}}, "teacher resnet50"),
        ("features", {"descriptor": {"kind": "hog"}, "dtype": "float32"}, "features hog"),
        ("features", {"backbone": {"kind": "alexnet", "width": 0.5}, "layer": "conv3"}, "features alexnet w0.5/conv3"),
        ("clusters", {"k": 50, "l2": True}, "clusters k=50"),
        ("pseudo_labels", {"min_size": 2}, "pseudo_labels"),
        ("student", {"backbone": {"kind": "alexnet", "width": 0.25}, "epoch": 2}, "student alexnet w0.25 to epoch 2"),
        ("student", {"backbone": {"kind": "alexnet"}, "seed": 0, "epoch": 0}, "student alexnet"),
        ("evaluation", {"kind": "knn", "backbone": {"kind": "alexnet"}, "layer": None}, "evaluation knn"),
    ],
)
def test_a_stage_has_a_readable_name(stage: str, spec: dict[str, Any], name: str) -> None:
    assert stage_name(stage, spec) == name

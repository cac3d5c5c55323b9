"""Small pairs on procedural images, for tests that need the real stages in seconds."""

from __future__ import annotations

from typing import Any

from ktray.spec import PairSpec

DATA = {"kind": "synthetic", "count": 240, "size": 28}
STUDENT = {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": {"epochs": 3, "lr": 0.02, "batch_size": 32}}
HOG = {"descriptor": {"kind": "hog", "cell": 7}}
ROTATION = {
    "pretext": {"kind": "rotation"},
    "backbone": {"kind": "alexnet", "width": 0.125},
    "layer": "conv3",
    "schedule": {"epochs": 2, "lr": 0.02, "batch_size": 32},
}


def toy_spec(**changes: Any) -> dict[str, Any]:
    """A HOG pair with 5 clusters as plain data; `changes` replace top-level fields."""
    spec: dict[str, Any] = {
        "data": DATA,
        "teacher": HOG,
        "transfer": {"kind": "clusters", "k": 5, "iterations": 5},
        "student": STUDENT,
        "evals": [{"kind": "knn"}],
    }
    return {**spec, **changes}


def toy_pair(**changes: Any) -> PairSpec:
    return PairSpec.model_validate(toy_spec(**changes))

"""What is a pseudo-label worth? Every shipped teacher against a random student and the supervised ceiling.

Question: on the embedded Fashion-MNIST (6,000 images), how far does a small AlexNet get from pseudo-labels alone?
Command:  ktray run experiments/baselines.py
Cost:     see the record below.
Result:   not run yet.
"""

from __future__ import annotations

from typing import Any

from ktray.spec import PairSpec

SEEDS = (0, 1, 2)
ALEXNET = {"kind": "alexnet", "width": 0.25}
TRAINED: dict[str, dict[str, Any]] = {
    "rotation": {"pretext": {"kind": "rotation"}, "layer": "conv3"},
    "jigsaw_pp": {"pretext": {"kind": "jigsaw_pp"}, "layer": "conv4"},
}
DESCRIBED: dict[str, dict[str, Any]] = {
    "hog": {"kind": "hog", "cell": 7, "orientations": 9},
    "random_network": {"kind": "random_network", "backbone": ALEXNET, "layer": "conv3", "pool": {"grid": 2}},
}


def teachers() -> dict[str, dict[str, Any]]:
    """Name -> teacher; trained ones get the same backbone, schedule and seed."""
    schedule = {"epochs": 8, "lr": 0.05, "decay": 0.25}
    common = {"backbone": ALEXNET, "pool": {"grid": 2}, "schedule": schedule}
    trained = {name: {**teacher, **common} for name, teacher in TRAINED.items()}
    return {name: {"descriptor": descriptor} for name, descriptor in DESCRIBED.items()} | trained


def pair(seed: int, transfer: dict[str, Any], teacher: dict[str, Any] | None = None) -> PairSpec:
    """One pair on the embedded data, its student drawn with `seed`, judged on test."""
    spec = {
        "data": "fashion_mnist_mini",
        "teacher": teacher,
        "transfer": transfer,
        "student": {"backbone": ALEXNET, "schedule": {"epochs": 12, "lr": 0.05, "decay": 0.25}, "seed": seed},
        "evals": [{"kind": "linear_probe", "split": "test"}, {"kind": "knn", "split": "test"}],
    }
    return PairSpec.model_validate(spec)


def pairs() -> dict[str, PairSpec]:
    """Random student, every teacher through clusters, supervised ceiling; three student seeds each."""
    found: dict[str, PairSpec] = {}
    for seed in SEEDS:
        found[f"random student {seed}"] = pair(seed, {"kind": "none"})
        for name, teacher in teachers().items():
            found[f"{name} {seed}"] = pair(seed, {"kind": "clusters", "k": 50}, teacher)
        found[f"supervised {seed}"] = pair(seed, {"kind": "labels"})
    return found

"""A table of real pairs, so that samplers and early stopping can be compared in seconds: what would a search have found?

Question: what are all pairs of a small space worth on CIFAR-10, at every rung, and what does each of their stages cost?
Command:  KTRAY_DATA=/data ktray run experiments/pair_table.py --concurrent 24, on a GPU; then
          python -m experiments.tables.pair_table HOME experiments/tables/cifar10_pairs.parquet
Cost:     see the table's own columns of seconds.
Result:   `experiments/tables/cifar10_pairs.parquet`, one row per pair; `experiments/tables/README.md` says what it shows.

The space is the product of `FEATURES` (a teacher and one of its layers), `CLUSTERS` and `STUDENTS`. Each student is judged at
the epochs `RUNGS` by kNN, at the last of them by a linear probe, too, and every teacher's features are judged by kNN.
"""

from __future__ import annotations

from typing import Any

from ktray.spec import PairSpec

DATA = "cifar10"
CLUSTERS = (50, 200, 1000)
RUNGS = (1, 3, 9)
ALEXNET: dict[str, Any] = {"kind": "alexnet", "width": 0.5}
RESNET: dict[str, Any] = {"kind": "resnet", "depth": 18, "width": 0.5}
STUDENTS: dict[str, dict[str, Any]] = {
    "alexnet w0.25": {"kind": "alexnet", "width": 0.25},
    "alexnet w0.5": {"kind": "alexnet", "width": 0.5},
    "resnet18 w0.25": {"kind": "resnet", "depth": 18, "width": 0.25},
}
SCHEDULE: dict[str, Any] = {"lr": 0.1, "warmup": 1, "batch_size": 512, "precision": "bfloat16"}
TRAINED: dict[str, tuple[Any, dict[str, Any], int, tuple[str, ...]]] = {
    "rotation alexnet": ("rotation", ALEXNET, 10, ("conv2", "conv3", "conv4")),
    "rotation resnet18": ("rotation", RESNET, 10, ("layer2", "layer3")),
    "jigsaw_pp alexnet": ("jigsaw_pp", ALEXNET, 6, ("conv3", "conv4")),
    "context alexnet": ("context", ALEXNET, 6, ("conv3", "conv4")),
    "colorization alexnet": ("colorization", ALEXNET, 6, ("conv3", "conv4")),
    "simclr alexnet": ("simclr", ALEXNET, 10, ("conv4", "conv5")),
    "simclr resnet18": ("simclr", RESNET, 10, ("layer3", "layer4")),
    "byol resnet18": ("byol", RESNET, 10, ("layer3", "layer4")),
}
DESCRIBED: dict[str, dict[str, Any]] = {
    "hog 8": {"kind": "hog", "cell": 8},
    "hog 4": {"kind": "hog", "cell": 4},
    "bag_of_hog": {"kind": "bag_of_hog", "words": 256, "grid": 2},
    "colour_histogram": {"kind": "colour_histogram", "bins": 6, "grid": 2},
    "raw_pixels": {"kind": "raw_pixels", "side": 16},
    "random_network": {"kind": "random_network", "backbone": ALEXNET, "layer": "conv3", "pool": {"grid": 2}},
}
AGAIN: tuple[str, ...] = (
    "hog 4 | 1000 | alexnet w0.5",
    "hog 8 | 200 | alexnet w0.5",
    "hog 4 | 200 | alexnet w0.5",
    "hog 8 | 1000 | alexnet w0.5",
    "hog 8 | 50 | alexnet w0.5",
    "hog 4 | 50 | alexnet w0.5",
    "rotation resnet18 layer3 | 200 | alexnet w0.5",
    "rotation resnet18 layer3 | 1000 | alexnet w0.5",
    "bag_of_hog | 200 | alexnet w0.5",
    "rotation alexnet conv4 | 1000 | alexnet w0.5",
    "bag_of_hog | 50 | alexnet w0.5",
    "rotation alexnet conv4 | 200 | alexnet w0.5",
    "simclr alexnet conv5 | 200 | alexnet w0.5",
    "rotation resnet18 layer3 | 200 | resnet18 w0.25",
    "simclr alexnet conv5 | 1000 | alexnet w0.5",
    "hog 8 | 200 | resnet18 w0.25",
    "rotation alexnet conv4 | 50 | alexnet w0.5",
    "rotation alexnet conv3 | 200 | alexnet w0.5",
    "rotation resnet18 layer3 | 1000 | resnet18 w0.25",
    "rotation resnet18 layer3 | 50 | alexnet w0.5",
    "hog 8 | 200 | alexnet w0.25",
)
"""Names of the best tenth, which are trained with the student seeds 1 and 2 as well; from a first run of the table."""


def features() -> dict[str, dict[str, Any]]:
    """Name of a teacher and its layer -> teacher."""
    found: dict[str, dict[str, Any]] = {name: {"descriptor": descriptor} for name, descriptor in DESCRIBED.items()}
    for name, (pretext, backbone, epochs, layers) in TRAINED.items():
        training = {"pretext": pretext, "backbone": backbone, "schedule": {**SCHEDULE, "epochs": epochs}, "seed": 0}
        found |= {f"{name} {layer}": {**training, "layer": layer, "pool": {"grid": 2}} for layer in layers}
    return found


def pair(teacher: dict[str, Any], k: int, backbone: dict[str, Any], epochs: int, seed: int) -> PairSpec:
    """One pair, its student trained for `epochs` and judged on val."""
    evals: list[dict[str, Any]] = [{"kind": "knn"}]
    if epochs == RUNGS[-1]:
        evals += [{"kind": "linear_probe"}, {"kind": "knn", "name": "teacher_knn", "of": "teacher"}]
    spec = {
        "data": DATA,
        "teacher": teacher,
        "transfer": {"kind": "clusters", "k": k, "pca": 128},
        "student": {
            "backbone": backbone,
            "schedule": {**SCHEDULE, "epochs": epochs},
            "augment": {"crop": 4, "flip": True},
            "seed": seed,
        },
        "evals": evals,
    }
    return PairSpec.model_validate(spec)


def pairs() -> dict[str, PairSpec]:
    """``teacher layer | k | student | seed @ epoch`` -> pair."""
    found: dict[str, PairSpec] = {}
    for name, teacher in features().items():
        for k in CLUSTERS:
            for student, backbone in STUDENTS.items():
                place = f"{name} | {k} | {student}"
                for seed in (0, 1, 2) if place in AGAIN else (0,):
                    found |= {f"{place} | {seed} @ {epoch}": pair(teacher, k, backbone, epoch, seed) for epoch in RUNGS}
    return found

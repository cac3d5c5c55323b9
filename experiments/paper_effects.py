"""Do the paper's effects hold on CIFAR-10 at 32 px? Six statements, each with numbers, n, an interval and a verdict.

Question: of what the tables of Noroozi, Vinjimoor, Favaro, Pirsiavash (CVPR 2018) show on ImageNet, what holds for small
networks on CIFAR-10? `EFFECTS` says each statement as a paired difference of one metric between two cells.
Command:  KTRAY_DATA=/data ktray run experiments/paper_effects.py --concurrent 24, on a GPU; then
          python -m experiments.tables.paper_effects HOME experiments/tables/paper_effects.parquet
Cost:     about 15 minutes of two H100s (84 pairs, 10 trained teachers), in two stays.
Result:   differences in points of accuracy on test (10,000 images), mean and 95 % interval over n = 6 pairs of runs (2 teacher
seeds x 3 student seeds); 2 x NVIDIA H100 80GB, torch 2.11, bfloat16, commit f6645c3 with the one line of 1fdc7e8. The records
are `experiments/tables/paper_effects.parquet`; means of all cells and of single teachers: the second command with it alone.

    statement                                                            verdict     difference
    Passing a teacher on to its own architecture lifts its last layer    not held    -3.0 (-3.2 to -2.8)
    A deeper teacher helps with a hard task (SimCLR)                     held        +2.3 (+1.8 to +2.8)
    A deeper teacher helps with an easy task (rotation)                  held        +1.7 (+1.4 to +2.1)
    Clusters beat regression, all labels                                 undecided   -0.2 (-0.6 to +0.2)
    Clusters beat regression, 50 labels per class                        held        +1.4 (+0.8 to +2.0)
    HOG through clusters beats the rotation network itself               not held    -2.5 (-3.1 to -1.9)
    HOG through clusters beats rotation through clusters                 undecided   -0.3 (-0.9 to +0.3)
    k is nearly flat from 500 to 2000: within a point                    undecided   -0.8 (-1.3 to -0.4)
    k is nearly flat from 100 to 500: within a point                     held        -0.2 (-0.5 to +0.1)
    A teacher trained on other images (Fashion-MNIST) costs on CIFAR-10  held        +5.2 (+4.5 to +6.0)
    Clusters made of other images (Fashion-MNIST) cost on CIFAR-10       held        +0.9 (+0.4 to +1.4)
    A teacher trained on other images (CIFAR-10) costs on Fashion-MNIST  held        +0.6 (+0.4 to +0.9)

So at 32 px, after 20 epochs of the student, depth of the teacher, few labels and domain shift behave as in the paper. Two of
its effects do not: a rotation AlexNet's own last layer (76.8) is better than its student's (73.7), and that network itself is
better than a student of HOG, where Jigsaw++ was not. Regression ties with clusters on all labels; its students' last layers are
better (conv5 74.7 against 72.8).
All students lie between a random one (61.4 by conv4) and one trained on all labels (85.6).

Each cell is run with `TEACHER_SEEDS` x `STUDENT_SEEDS`; a student seed is the seed of clustering, initial weights and draws,
everything after the teacher. A pair and its rival share both seeds. All numbers are judged on test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ktray.spec import PairSpec

TEACHER_SEEDS = (0, 1)
STUDENT_SEEDS = (0, 1, 2)
CIFAR: dict[str, Any] = {"kind": "cifar10"}
FASHION: dict[str, Any] = {"kind": "fashion_mnist", "size": 32}
ALEXNET: dict[str, Any] = {"kind": "alexnet"}
RESNET: dict[str, Any] = {"kind": "resnet", "depth": 18}
SCHEDULE: dict[str, Any] = {"lr": 0.1, "warmup": 1, "decay": 0.3, "batch_size": 512, "precision": "bfloat16"}
STUDENT: dict[str, Any] = {"backbone": ALEXNET, "schedule": {**SCHEDULE, "epochs": 20}, "augment": {"crop": 4, "flip": True}}
CLUSTERS: dict[str, Any] = {"kind": "clusters", "k": 500, "pca": 128}
LAYERS = ("conv3", "conv4", "conv5")


def trained(pretext: str, backbone: dict[str, Any], layer: str, epochs: int) -> dict[str, Any]:
    """A teacher, its seed to be filled in."""
    return {
        "pretext": pretext,
        "backbone": backbone,
        "layer": layer,
        "pool": {"grid": 2},
        "schedule": {**SCHEDULE, "epochs": epochs},
    }


EASY, DEEP_EASY = trained("rotation", ALEXNET, "conv4", 30), trained("rotation", RESNET, "layer3", 20)
HARD, DEEP_HARD = trained("simclr", ALEXNET, "conv5", 20), trained("simclr", RESNET, "layer4", 20)
HOG: dict[str, Any] = {"descriptor": {"kind": "hog", "cell": 8}}
SHIFTED = {"pretext": FASHION, "cluster": CIFAR, "transfer": CIFAR, "target": CIFAR}
CLUSTERED_ELSEWHERE = {"pretext": CIFAR, "cluster": FASHION, "transfer": CIFAR, "target": CIFAR}
FROM_CIFAR = {"pretext": CIFAR, "cluster": FASHION, "transfer": FASHION, "target": FASHION}


@dataclass(frozen=True)
class Cell:
    """A pair without its seeds."""

    teacher: dict[str, Any] | None
    transfer: dict[str, Any]
    data: dict[str, Any]


CELLS: dict[str, Cell] = {
    "rotation alexnet": Cell(EASY, CLUSTERS, CIFAR),
    "rotation resnet18": Cell(DEEP_EASY, CLUSTERS, CIFAR),
    "simclr alexnet": Cell(HARD, CLUSTERS, CIFAR),
    "simclr resnet18": Cell(DEEP_HARD, CLUSTERS, CIFAR),
    "simclr resnet18, regression": Cell(DEEP_HARD, {"kind": "regression"}, CIFAR),
    "simclr resnet18, k=100": Cell(DEEP_HARD, {**CLUSTERS, "k": 100}, CIFAR),
    "simclr resnet18, k=2000": Cell(DEEP_HARD, {**CLUSTERS, "k": 2000}, CIFAR),
    "hog": Cell(HOG, CLUSTERS, CIFAR),
    "rotation alexnet, pretext on fashion": Cell(EASY, CLUSTERS, SHIFTED),
    "rotation alexnet, clusters of fashion": Cell(EASY, CLUSTERS, CLUSTERED_ELSEWHERE),
    "on fashion: rotation alexnet": Cell(EASY, CLUSTERS, FASHION),
    "on fashion: rotation alexnet, pretext on cifar": Cell(EASY, CLUSTERS, FROM_CIFAR),
    "random student": Cell(None, {"kind": "none"}, CIFAR),
    "supervised": Cell(None, {"kind": "labels"}, CIFAR),
}


@dataclass(frozen=True)
class Effect:
    """A statement: `metric` of `cell` minus `against` (of `rival`, by default the same metric of it), in points.

    Attributes:
        holds: where the difference lies if the statement is true: ``(low, high)`` in points, None for no bound.
    """

    statement: str
    cell: str
    metric: str
    rival: str
    against: str = ""
    holds: tuple[float | None, float | None] = (0.0, None)


EFFECTS: tuple[Effect, ...] = (
    Effect(
        "Passing a teacher on to its own architecture lifts its last layer",
        "rotation alexnet",
        "conv5/top1",
        "rotation alexnet",
        "teacher_conv5/top1",
    ),
    Effect("A deeper teacher helps with a hard task (SimCLR)", "simclr resnet18", "conv4/top1", "simclr alexnet"),
    Effect("A deeper teacher helps with an easy task (rotation)", "rotation resnet18", "conv4/top1", "rotation alexnet"),
    Effect("Clusters beat regression, all labels", "simclr resnet18", "conv4/top1", "simclr resnet18, regression"),
    Effect("Clusters beat regression, 50 labels per class", "simclr resnet18", "few/top1", "simclr resnet18, regression"),
    Effect(
        "HOG through clusters beats the rotation network itself", "hog", "conv4/top1", "rotation alexnet", "teacher_conv4/top1"
    ),
    Effect("HOG through clusters beats rotation through clusters", "hog", "conv4/top1", "rotation alexnet"),
    Effect(
        "k is nearly flat from 500 to 2000: within a point",
        "simclr resnet18, k=2000",
        "conv4/top1",
        "simclr resnet18",
        holds=(-1.0, 1.0),
    ),
    Effect(
        "k is nearly flat from 100 to 500: within a point",
        "simclr resnet18",
        "conv4/top1",
        "simclr resnet18, k=100",
        holds=(-1.0, 1.0),
    ),
    Effect(
        "A teacher trained on other images (Fashion-MNIST) costs on CIFAR-10",
        "rotation alexnet",
        "conv4/top1",
        "rotation alexnet, pretext on fashion",
    ),
    Effect(
        "Clusters made of other images (Fashion-MNIST) cost on CIFAR-10",
        "rotation alexnet",
        "conv4/top1",
        "rotation alexnet, clusters of fashion",
    ),
    Effect(
        "A teacher trained on other images (CIFAR-10) costs on Fashion-MNIST",
        "on fashion: rotation alexnet",
        "conv4/top1",
        "on fashion: rotation alexnet, pretext on cifar",
    ),
)


def evals(teacher: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Linear probes of the student's layers, one of them with few labels, kNN; of an AlexNet teacher's layers too."""
    pooled = {"split": "test", "pool": {"grid": 2}}
    found: list[dict[str, Any]] = [{"kind": "linear_probe", "name": layer, "layer": layer, **pooled} for layer in LAYERS]
    found += [{"kind": "linear_probe", "name": "few", "layer": "conv4", "per_class": 50, **pooled}]
    found += [{"kind": "knn", "split": "test"}]
    if teacher and teacher.get("backbone") == ALEXNET:
        found += [
            {"kind": "linear_probe", "name": f"teacher_{layer}", "of": "teacher", "layer": layer, **pooled} for layer in LAYERS
        ]
    return found


def pair(cell: Cell, teacher_seed: int, seed: int) -> PairSpec:
    """A cell with its seeds."""
    teacher = {**cell.teacher, "seed": teacher_seed} if cell.teacher and "pretext" in cell.teacher else cell.teacher
    seeded = {"seed": seed} if cell.transfer["kind"] == "clusters" else {}
    student = {**STUDENT, "seed": seed + len(STUDENT_SEEDS) * teacher_seed}
    spec = {
        "data": cell.data,
        "teacher": teacher,
        "transfer": {**cell.transfer, **seeded},
        "student": student,
        "evals": evals(cell.teacher),
    }
    return PairSpec.model_validate(spec)


def pairs() -> dict[str, PairSpec]:
    """``cell | teacher seed | student seed`` -> pair."""
    return {
        f"{name} | {teacher_seed} | {seed}": pair(cell, teacher_seed, seed)
        for name, cell in CELLS.items()
        for teacher_seed in TEACHER_SEEDS
        for seed in STUDENT_SEEDS
    }

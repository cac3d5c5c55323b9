"""What is searched under faults: a fixed list of pairs, and a space whose sampler and rungs decide."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from tests.searches import toy_space
from tests.toys import DATA, HOG, ROTATION

STUDY = "toy"
RATES = [0.01, 0.02, 0.05]
CLUSTERS = [5, 10]
LAYERS = ["conv3", "conv5"]
CLUSTER_IMAGES = 30_000  # images to cluster: to make them and their features takes seconds, in which idle workers help


def fixed(folder: Path, size: int) -> Path:
    """Every pair of a finite space, listed in `start_with`; nothing stops early, so each search has the same keys.

    Args:
        size: 1 for about a minute on two idle cores, 4 for about four.
    """
    teachers = [{"teacher": "rotation", "teacher.rotation.layer": layer} for layer in LAYERS]
    teachers += [{"teacher": "hog"}] if size > 1 else []
    rates = RATES if size > 1 else RATES[:2]
    starts = [
        {**teacher, "transfer.k": k, "student.schedule.lr": rate}
        for teacher, k, rate in itertools.product(teachers, CLUSTERS, rates)
    ]
    return toy_space(
        folder,
        budget={"trials": len(starts), "concurrent": 4},
        early_stop=None,
        start_with=starts,
        pair=_pair(size, one_of={"rotation": _rotation(size), **({"hog": HOG} if size > 1 else {})}, rates=rates),
    )


def drawn(folder: Path, size: int) -> Path:
    """What the sampler draws depends on which results it has seen, and that on the faults; rungs stop half of the students."""
    return toy_space(
        folder,
        budget={"trials": min(16, 4 + 4 * size), "concurrent": 4},
        early_stop={"metric": "knn/top1", "rungs": [2 * size, 4 * size], "reduction": 2},
        start_with=[],
        pair=_pair(size, one_of={"rotation": _rotation(size), "hog": HOG}, rates=RATES),
    )


SPACES = {"fixed": fixed, "drawn": drawn}


def _pair(size: int, one_of: dict[str, Any], rates: list[float]) -> dict[str, Any]:
    counts = {"pretext": 300 * size, "cluster": CLUSTER_IMAGES, "transfer": 300 * size, "target": 300 * size}
    return {
        "data": {role: {**DATA, "count": count} for role, count in counts.items()},
        "teacher": {"one_of": one_of},
        "transfer": {"kind": "clusters", "k": {"choice": CLUSTERS}, "iterations": 5},
        "student": {
            "backbone": {"kind": "alexnet", "width": 0.125},
            "schedule": {"epochs": 4 * size, "lr": {"choice": rates}, "batch_size": 32},
        },
        "evals": [{"kind": "knn"}],
    }


def _rotation(size: int) -> dict[str, Any]:
    return {**ROTATION, "layer": {"choice": LAYERS}, "schedule": {"epochs": 6 * size, "lr": 0.02, "batch_size": 32}}

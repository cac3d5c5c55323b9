"""Low-shot classification: the accuracy of a linear classifier that sees a few labels per class, over several draws of them.

One-against-all linear machines on features of length 1, all numbers of labels and all draws fitted together.

Source: Goyal, Mahajan, Gupta and Misra, "Scaling and Benchmarking Self-Supervised Visual Representation Learning" (2019),
section 6.2, whose code (VISSL) draws 1, 2, 4, 8, 16, 32, 64 and 96 per class five times. It reports the cost C that is best on
the judged images; here C is fixed, so that nothing is chosen on them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from ktray import fingerprint
from ktray.classifiers import linear_classifiers
from ktray.classifiers.linear_classifiers import Problem
from ktray.images import Images
from ktray.scoring import per_image
from ktray.spec import Count, EvaluationFields, Seed

REVISION = 2
TOOLS = (linear_classifiers,)
NEEDS_LABELS = True
DIRECTION: dict[str, Literal["max", "min"]] = {"top1": "max", "top1_std": "min"}


class Spec(EvaluationFields):
    """Linear machines that learn from few labels."""

    kind: Literal["low_shot"] = "low_shot"
    shots: Annotated[tuple[Count, ...], Field(min_length=1, max_length=50)] = Field(
        default=(1, 2, 4, 8, 16, 32, 64, 96), description="labels per class, all where a class has fewer; the last gives top1"
    )
    draws: int = Field(default=5, ge=2, le=100, description="how often the labels are drawn")
    cost: float = Field(default=1.0, gt=0, description="C of the machines")
    seed: Seed = 0


def directions(spec: Spec) -> dict[str, Literal["max", "min"]]:
    """The metrics of this spec: `top1`, `top1_std`, and both for each number of labels, such as `top1_4` and `top1_4_std`."""
    each = {f"top1_{shots}": "max" for shots in spec.shots} | {f"top1_{shots}_std": "min" for shots in spec.shots}
    return {**DIRECTION, **each}  # type: ignore[dict-item]


def evaluate(
    spec: Spec,
    *,
    features: Callable[[Images], NDArray[np.float32]],
    train: Images,
    judged: Images,
    pseudo_labels: NDArray[np.int64] | None,
    out: Path,
    device: str,
) -> dict[str, float]:
    """`top1_4` and so on in [0, 1], the mean over the draws, and `top1_4_std`, their standard deviation; `top1` is of the last.

    `low_shot.json` says how many labels each draw had, which is fewer than asked for where a class has fewer images.

    Raises:
        ValueError: labels are missing, `train` or `judged` is empty, or features are not finite.
    """
    if train.labels is None or judged.labels is None or not len(train) or not len(judged):
        raise ValueError("low-shot classification needs labelled training images and labelled images to judge")
    drawn = {(shots, draw): _draw(spec, train.labels, shots, draw) for shots in spec.shots for draw in range(spec.draws)}
    used = np.unique(np.concatenate([*drawn.values()]))
    rows = linear_classifiers.unit(linear_classifiers.on_device(features(train)[used], device))
    classes = np.unique(train.labels)
    targets = torch.from_numpy(np.where(train.labels[used][:, None] == classes, 1, -1).astype(np.int8)).to(device)
    sets = torch.from_numpy(np.stack([np.isin(used, each) for each in drawn.values()])).to(device)
    problems = [Problem(of, spec.cost, number) for number in range(len(drawn)) for of in range(len(classes))]
    machines = linear_classifiers.linear_machines(rows, targets, sets, problems)
    queries = linear_classifiers.unit(linear_classifiers.on_device(features(judged), device))
    right = {}
    for number, key in enumerate(drawn):
        scores = linear_classifiers.machine_scores(queries, machines[:, number * len(classes) : (number + 1) * len(classes)])
        right[key] = classes[scores.argmax(1).cpu().numpy()] == judged.labels
    columns, metrics = {}, {}
    for shots in spec.shots:
        of_draws = np.stack([right[shots, draw] for draw in range(spec.draws)])
        columns[f"top1_{shots}"] = of_draws.mean(0)
        metrics[f"top1_{shots}"] = float(of_draws.mean())
        metrics[f"top1_{shots}_std"] = float(of_draws.mean(1).std(ddof=1))
    columns["top1"] = columns[f"top1_{spec.shots[-1]}"]
    per_image.write(out, judged.names, columns)
    labels = {f"{shots} per class, draw {draw}": len(rows) for (shots, draw), rows in drawn.items()}
    (out / "low_shot.json").write_text(json.dumps({"labels": labels}, indent=1))
    return {"top1": metrics[f"top1_{spec.shots[-1]}"], "top1_std": metrics[f"top1_{spec.shots[-1]}_std"], **metrics}


def _draw(spec: Spec, labels: NDArray[np.int64], shots: int, draw: int) -> NDArray[np.int64]:
    """Rows of `shots` images per class. A draw of more includes those of fewer with the same number."""
    return linear_classifiers.subset_per_class(labels, shots, fingerprint.seed_of(spec.seed, "draw", draw))

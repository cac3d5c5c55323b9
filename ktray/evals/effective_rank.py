"""Effective rank (RankMe): how many dimensions the features effectively use. Needs no labels.

Collapsed features have rank 1; features spread evenly over all D dimensions have rank D. Use it to rank students of one
architecture; it is hardly comparable across feature widths.

Source: Garrido, Balestriero, Najman and LeCun, "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
Representations by Their Rank" (2023), equation 1 and section 3; Roy and Vetterli, "The Effective Rank" (2007), definition 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from ktray.images import Images
from ktray.spec import EvaluationFields

REVISION = 1
NEEDS_LABELS = False
DIRECTION: dict[str, Literal["max", "min"]] = {"rank": "max"}


class Spec(EvaluationFields):
    """The exponential of the entropy of the features' singular values."""

    kind: Literal["effective_rank"] = "effective_rank"
    rows: int = Field(default=25_600, ge=2, description="most images used, evenly spaced; the default is the paper's")


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
    """`rank` in [1, min(N, D)] of the features of `judged`, or of `train` if `judged` is empty; 0 if all features are 0.

    Raises:
        ValueError: features are not finite.
    """
    rows = features(judged if len(judged) else train)
    if len(rows) > spec.rows:
        rows = rows[np.linspace(0, len(rows) - 1, spec.rows).astype(np.int64)]
    return {"rank": effective_rank(rows, device)}


def effective_rank(rows: NDArray[np.float32], device: str = "cpu") -> float:
    """exp of the entropy of the singular values of features (N, D), normalised to sum to 1; not centred, as in the paper.

    The paper adds 1e-7 to every normalised value to define 0 log 0. Here that term is 0, which differs by less than 2e-6 each.

    Raises:
        ValueError: features are not finite.
    """
    if not np.isfinite(rows).all():
        raise ValueError(f"{int((~np.isfinite(rows).all(1)).sum())} of {len(rows)} features are not finite")
    # float64: in float32, the rounding noise of many empty dimensions would count as rank.
    values = torch.linalg.svdvals(torch.tensor(rows, dtype=torch.float64, device=device))
    total = values.sum()
    if not total > 0:
        return 0.0
    return float(torch.special.entr(values / total).sum().exp())

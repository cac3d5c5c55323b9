"""No training: the student keeps its random initial weights, as a lower bound for its evaluation. There is no teacher.

Source: the row "Random" in the tables of Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385.
"""

from __future__ import annotations

from typing import Literal

from ktray.strict import StrictSpec

REVISION = 1

NEEDS: dict[str, tuple[str, ...]] = {}


class Spec(StrictSpec):
    """No fields."""

    kind: Literal["none"] = "none"

"""The floor: the student stays as it was drawn, so that its evaluation shows what random weights are worth. No teacher.

Source: the row "Random" in the tables of Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385.
"""

from __future__ import annotations

from typing import Literal

from ktray.strict import StrictSpec

REVISION = 1

NEEDS: dict[str, tuple[str, ...]] = {}


class Spec(StrictSpec):
    """Nothing to choose."""

    kind: Literal["none"] = "none"

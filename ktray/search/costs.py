"""What stages will cost: seconds, judged by the records that artifacts keep."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from ktray.artifact import Stage

Records = Mapping[str, Mapping[str, Any]]


def kind(key: str) -> str:
    """The kind of stage that a key names: ``clusters`` of ``clusters-3f9a1c0b2d44``."""
    return key.rpartition("-")[0]


def estimate(stages: Iterable[Stage], records: Records) -> tuple[float, int, int]:
    """How long stages will run, one after the other, judged by the past.

    A stage whose own record is there takes what it took; any other the median of the recorded stages of its kind.

    Args:
        stages: each is counted once, however often it is needed.
        records: key -> record of past artifacts.

    Returns:
        Seconds; the number of stages in them; the number of stages of a kind without a past, which are left out.
    """
    past: dict[str, list[float]] = {}
    for key, record in records.items():
        past.setdefault(kind(key), []).append(float(record["seconds"]))
    medians = {name: statistics.median(values) for name, values in past.items()}
    total, known, unknown = 0.0, 0, 0
    for stage in {stage.key: stage for stage in stages}.values():
        own = records.get(stage.key)
        guess = float(own["seconds"]) if own else medians.get(stage.name)
        if guess is None:
            unknown += 1
        else:
            known, total = known + 1, total + guess
    return total, known, unknown

"""What trials cost, and what stages will cost: seconds, summed from the records that artifacts keep."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ktray.artifact import Stage

Records = Mapping[str, Mapping[str, Any]]


def seconds(records: Records) -> float:
    """Cost of a trial as if it had run alone: the recorded seconds of its distinct stages.

    Args:
        records: key -> record of every artifact that the trial's result rests on.
    """
    return float(sum(record["seconds"] for record in records.values()))


def marginal_seconds(records: Records, computed: Collection[str]) -> float:
    """What a trial added: the recorded seconds of the stages (keys in `computed`) that ran because of it."""
    return seconds({key: record for key, record in records.items() if key in computed})


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

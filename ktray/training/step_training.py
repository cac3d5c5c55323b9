"""Trainings that are counted in optimiser steps, as the protocols of detection, segmentation and fine-tuning are.

Batches may have any form, such as lists of images of different sizes. Every draw is a function of (seed, step), so a killed
training continues from a checkpoint and ends where the uninterrupted one does: bit for bit on a CPU, and on a GPU as far as
its kernels are deterministic, which is asked of them. `loop.fit_steps` takes the steps.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ktray.checkpoints import Attempt, Write
from ktray.fingerprint import seed_of
from ktray.scoring import per_image
from ktray.scoring.per_image import Columns

IDENTITY, REVISION = "step_training", 1

FINISHED = "finished.json"
"""File of a checkpoint with the metrics of the seeds that are finished. Beside it lie the results per image of each
(`_columns_of`) and the snapshot of the training in progress."""


@dataclass(frozen=True)
class Shuffled:
    """The rows of each batch: passes over all rows in changing orders; a batch may end one pass and begin the next.

    Attributes:
        rows: (N,) indices to draw from.
        size: rows of a batch.
        seed: of the orders.
    """

    rows: NDArray[np.int64]
    size: int
    seed: int
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False, compare=False)

    def of(self, step: int) -> NDArray[np.int64]:
        """The rows (size,) of a step, counted from 0."""
        places = np.arange(step * self.size, (step + 1) * self.size)
        passes, within = np.divmod(places, len(self.rows))
        return np.array([self._order(int(number))[place] for number, place in zip(passes, within, strict=True)], np.int64)

    def _order(self, number: int) -> NDArray[np.int64]:
        if number not in self._orders:
            while len(self._orders) > 1:  # a batch reads two passes at most, unless it is larger than one
                del self._orders[min(self._orders)]
            self._orders[number] = np.random.default_rng(seed_of(self.seed, "pass", number)).permutation(self.rows)
        return self._orders[number]


def _step_reports(attempt: Attempt, before: int, total: int) -> Callable[[int, dict[str, float]], None]:
    """A function (step, values) that reports them with the minutes left, estimated from the pace of this attempt.

    Args:
        before: steps of the trainings before this one, which `step` does not count.
        total: of all trainings of the stage.
    """
    began: list[float] = []
    first: list[int] = []

    def report(step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        if not began:
            began.append(now)
            first.append(step)
        counts = {"step": float(before + step), "of": float(total)}
        if step > first[0]:
            counts["minutes_left"] = round((now - began[0]) / (step - first[0]) * (total - before - step) / 60, 1)
        attempt.report({**counts, **values})

    return report


@dataclass(frozen=True)
class SeedRun:
    """One of several trainings that differ in their seed. `start` and `on_report` are for `loop.fit_steps`.

    Attributes:
        seed: of the training.
        is_last: whether it has the last seed, whose training always ends in the attempt whose folder is kept.
        start: the checkpoint to go on from; None to begin.
        on_report: tells the loss and the minutes left of all trainings, and saves a checkpoint if much would be lost otherwise.
    """

    seed: int
    is_last: bool
    start: Path | None
    on_report: Callable[[int, dict[str, float], Write], None]


@dataclass(frozen=True)
class SeedResult:
    """What the training of one seed is worth: metrics, and results of each judged image as `per_image.write` keeps them."""

    metrics: dict[str, float]
    columns: Columns


def over_seeds(seeds: Sequence[int], steps: int, attempt: Attempt, train: Callable[[SeedRun], SeedResult]) -> list[SeedResult]:
    """The results of one training per seed, going on where a killed attempt ended.

    Args:
        seeds: one training each, in this order.
        steps: of one training.
    """
    finished: list[SeedResult] = []
    start: Path | None = None
    if attempt.start is not None:
        metrics = json.loads((attempt.start / FINISHED).read_text())
        files = (attempt.start / _columns_of(index) for index in range(len(metrics)))
        finished = [SeedResult(each, per_image.read(path).columns) for each, path in zip(metrics, files, strict=True)]
        start = attempt.start if (attempt.start / "state.json").exists() else None
    for index, seed in enumerate(seeds):
        if index < len(finished):
            continue
        on_report = _reports(attempt, list(finished), index, steps, len(seeds))
        finished.append(train(SeedRun(seed, index + 1 == len(seeds), start, on_report)))
        start = None
        if index + 1 < len(seeds):
            _save(attempt, finished, (index + 1) * (steps + 1), 0, None)
    return finished


def _reports(
    attempt: Attempt, finished: list[SeedResult], index: int, steps: int, seeds: int
) -> Callable[[int, dict[str, float], Write], None]:
    """`SeedRun.on_report` of training `index`, before which `finished` ones have ended."""
    report = _step_reports(attempt, index * steps, seeds * steps)

    def on_report(step: int, means: dict[str, float], write: Write) -> None:
        report(step, {"loss": means["loss"]})
        if step < steps:
            _save(attempt, finished, index * (steps + 1), step, write)

    return on_report


def _columns_of(index: int) -> str:
    """File of a checkpoint with the results per image of finished seed `index`."""
    return f"finished-{index}.parquet"


def _save(attempt: Attempt, finished: list[SeedResult], before: int, step: int, write: Write | None) -> None:
    def fill(directory: Path) -> None:
        (directory / FINISHED).write_text(json.dumps([each.metrics for each in finished]))
        for index, each in enumerate(finished):
            per_image.write_table(directory / _columns_of(index), (), each.columns)
        if write is not None:
            write(directory)

    attempt.save(before + step, fill)


def seed_metrics(runs: Sequence[SeedResult]) -> dict[str, float]:
    """The mean of each metric over the seeds; with two or more also `NAME_std` and a 95 % interval, `NAME_low` to `NAME_high`.

    The interval is Student's: it holds if the results of further seeds are normal around the same mean.
    """
    names = list(runs[0].metrics)
    if len(runs) < 2:
        return {name: float(runs[0].metrics[name]) for name in names}
    spreads = {name: spread_of([run.metrics[name] for run in runs]) for name in names}
    found = {name: spread.mean for name, spread in spreads.items()}
    for name, spread in spreads.items():
        found |= {f"{name}_std": spread.deviation, f"{name}_low": spread.low, f"{name}_high": spread.high}
    return found


@dataclass(frozen=True)
class Spread:
    """Of the results of several seeds: mean, standard deviation of a sample, and 95 % interval of the mean by Student's t."""

    mean: float
    deviation: float
    low: float
    high: float


def spread_of(values: Sequence[float]) -> Spread:
    """The spread of two values or more."""
    from scipy.stats import t

    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, len(values) - 1)) / math.sqrt(len(values)) * deviation
    return Spread(mean, deviation, mean - half, mean + half)

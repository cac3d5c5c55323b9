"""Results per image of an evaluation, as a file beside its metrics, and what follows from them: how certain a metric is.

The images are a sample of those that a student will meet. The standard error of a metric says how much it would vary between
such samples; two students judged on the same images are compared image by image, which is far more certain than two separate
errors.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapters 6 and 13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = "per_image.parquet"
NAME = "name"
RESAMPLES = 2000
RESAMPLES_TO_RECOMPUTE = 200
"""Of a metric that is no mean over images, and is computed anew from each sample."""
CONFIDENCE = 0.95

Columns = Mapping[str, NDArray[Any]]
"""Name -> values of N images: (N,), (N, C), or of lists of any length, such as the detections of an image, (N,) objects."""
Recompute = Callable[[Columns, NDArray[np.int64]], dict[str, float]]
"""(columns, rows (n,) of images, repeated ones included) -> the metrics of these images alone."""


@dataclass(frozen=True)
class PerImage:
    """Results of N images.

    Attributes:
        names: (N,) of the images, in the order of the judged split.
        columns: a column (N,) of floats that is named as a metric holds a value per image, and the metric is their mean; NaN
            where an image does not count.
    """

    names: tuple[str, ...]
    columns: Columns


def write(out: Path, names: Sequence[str], columns: Columns) -> None:
    """Write the results of N images to `per_image.parquet` in `out`.

    Args:
        names: (N,) of the images, or empty if they have none: then their numbers.
        columns: as in `PerImage`.
    """
    write_table(out / FILE, names, columns)


def write_table(path: Path, names: Sequence[str], columns: Columns) -> None:
    """The same in a file of any name."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    count = len(next(iter(columns.values())))
    fields: dict[str, Any] = {NAME: arrow.array(list(names) or [str(index) for index in range(count)], arrow.string())}
    for name, values in columns.items():
        if values.dtype == object:
            ends = np.cumsum([0, *(len(each) for each in values)])
            fields[name] = arrow.LargeListArray.from_arrays(arrow.array(ends), arrow.array(np.concatenate(values)))
            continue
        flat = arrow.array(values.ravel())
        fields[name] = flat if values.ndim == 1 else arrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
    parquet.write_table(arrow.table(fields), path, compression="zstd")


def lists(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """A column of arrays (n,) of any length and one type; of N images at least one."""
    found = np.empty(len(values), object)
    found[:] = [*values]
    return found


def read(path: Path) -> PerImage:
    """What `write` wrote.

    Raises:
        ValueError: the file is no such table.
    """
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    if NAME not in table.column_names:
        raise ValueError(f"{path.name} has no column {NAME!r}")
    columns = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if hasattr(column, "offsets"):
            ends = column.offsets.to_numpy()
            columns[name] = lists(np.split(column.flatten().to_numpy(zero_copy_only=False), ends[1:-1] - ends[0]))
            continue
        width = getattr(column.type, "list_size", None)
        values = column if width is None else column.flatten()
        columns[name] = values.to_numpy(zero_copy_only=False).reshape((-1, width) if width else (-1,))
    names = columns.pop(NAME)
    return PerImage(tuple(names.tolist()), columns)


def metrics_of(found: PerImage, recompute: Recompute | None) -> dict[str, float]:
    """The metrics that follow from the results of all images."""
    if recompute is not None:
        return recompute(found.columns, np.arange(len(found.names)))
    return {name: float(np.nanmean(values)) for name, values in _values(found).items()}


def _values(found: PerImage) -> dict[str, NDArray[np.float64]]:
    """The columns with one number per image."""
    return {
        name: values.astype(np.float64)
        for name, values in found.columns.items()
        if values.ndim == 1 and values.dtype.kind == "f"
    }


def means_of(runs: Sequence[Columns]) -> Columns:
    """The columns of floats of several trainings, their means over the trainings."""
    return {name: np.mean([run[name] for run in runs], 0) for name, values in runs[0].items() if values.dtype.kind == "f"}


def numbered(runs: Sequence[Columns], shared: Columns | None = None) -> Columns:
    """The columns of several trainings, as ``scores@0``, ``scores@1``; `recomputed_over` gives each its own.

    Args:
        shared: columns that are the same for all, such as what is true.
    """
    each = {f"{name}@{index}": values for index, run in enumerate(runs) for name, values in run.items()}
    return {**(shared or {}), **each}


def recomputed_over(columns: Columns, rows: NDArray[np.int64], of_one: Recompute) -> dict[str, float]:
    """The means over trainings of the metrics that `of_one` computes of the columns of each (`numbered`)."""
    parts = {name: name.rpartition("@") for name in columns}
    runs = sorted({int(number) for before, _, number in parts.values() if before})
    found = []
    for run in runs:
        own = {before or name: columns[name] for name, (before, _, number) in parts.items() if not before or int(number) == run}
        found.append(of_one(own, rows))
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def standard_errors(found: PerImage, recompute: Recompute | None = None, seed: int = 0) -> dict[str, float]:
    """Metric -> its standard error over samples of images: that of a mean, else the spread over resampled images.

    A metric that fewer than two images determine has none.
    """
    if recompute is None:
        errors = {}
        for name, values in _values(found).items():
            counted = values[~np.isnan(values)]
            if len(counted) > 1:
                errors[name] = float(counted.std(ddof=1) / np.sqrt(len(counted)))
        return errors
    count, random = len(found.names), np.random.default_rng(seed)
    samples = [recompute(found.columns, random.integers(0, count, count)) for _ in range(RESAMPLES_TO_RECOMPUTE)]
    spread = {name: np.array([each[name] for each in samples]) for name in samples[0]}
    known = {name: values[~np.isnan(values)] for name, values in spread.items()}
    return {name: float(values.std(ddof=1)) for name, values in known.items() if len(values) > 1}


@dataclass(frozen=True)
class Difference:
    """The metric of one student minus that of another on the same images.

    Attributes:
        value: of the difference.
        low, high: the interval that holds the difference between them in 95 % of the resamples.
        images: how many both were judged on.
    """

    value: float
    low: float
    high: float
    images: int

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_differences(
    one: PerImage, other: PerImage, recompute: Recompute | None = None, seed: int = 0
) -> dict[str, Difference]:
    """Metric -> `one` minus `other`, with the interval of a paired bootstrap: both get the same resampled images.

    Raises:
        ValueError: they were not judged on the same images.
    """
    if sorted(one.names) != sorted(other.names):
        shared = len({*one.names} & {*other.names})
        raise ValueError(
            f"they were judged on different images: {len(one.names)} and {len(other.names)}, {shared} of them shared"
        )
    place = {name: index for index, name in enumerate(other.names)}
    order = np.array([place[name] for name in one.names])
    aligned = {name: values[order] for name, values in other.columns.items()}
    random, count = np.random.default_rng(seed), len(one.names)
    if recompute is None:
        ours, theirs = _values(one), _values(PerImage(one.names, aligned))
        return {name: _of_means(ours[name] - theirs[name], random) for name in ours if name in theirs}
    everything = np.arange(count)
    first, second = recompute(one.columns, everything), recompute(aligned, everything)
    drawn = [random.integers(0, count, count) for _ in range(RESAMPLES_TO_RECOMPUTE)]
    sampled = [(recompute(one.columns, rows), recompute(aligned, rows)) for rows in drawn]
    return {
        name: _interval(first[name] - second[name], np.array([a[name] - b[name] for a, b in sampled]), count)
        for name in first
        if name in second and not np.isnan(first[name] - second[name])
    }


def _of_means(differences: NDArray[np.float64], random: np.random.Generator) -> Difference:
    counted = differences[~np.isnan(differences)]
    if not len(counted):
        return Difference(float("nan"), float("nan"), float("nan"), 0)
    # Of each value only the number of images with it matters, which makes few draws of many.
    values, counts = np.unique(counted, return_counts=True)
    if len(values) > 1000:
        means = np.array([counted[random.integers(0, len(counted), len(counted))].mean() for _ in range(RESAMPLES)])
    else:
        means = random.multinomial(len(counted), counts / len(counted), RESAMPLES) @ values / len(counted)
    return _interval(float(counted.mean()), means, len(counted))


def _interval(value: float, samples: NDArray[np.float64], images: int) -> Difference:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.nanpercentile(samples, [tail, 100 - tail])
    return Difference(float(value), float(low), float(high), images)

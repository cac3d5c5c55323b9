"""Lay down the metrics of `experiments/paper_effects.py` as a parquet file, and say which of its statements hold.

python -m experiments.tables.paper_effects HOME OUT.parquet      collect from a home's store, then judge
python -m experiments.tables.paper_effects TABLE.parquet         judge a table again
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pandas
from scipy import stats

from experiments.paper_effects import EFFECTS, Effect, pairs
from ktray.pipeline import pair_graph, pair_metrics
from ktray.pipeline.identity import data_identity
from ktray.stores.file import FileStore

CONFIDENCE = 0.95


def collect(home: Path, out: Path) -> None:
    """Write one row per pair that is whole: cell, both seeds, its metrics on test, seconds alone, device and commit."""
    store, identity = FileStore(home / "store"), data_identity(home / "cache")
    rows: list[dict[str, Any]] = []
    for name, pair in pairs().items():
        stages = pair_graph.build(pair, identity)
        artifacts = pair_metrics.published_artifacts(stages, store)
        if artifacts is None:
            continue
        cell, teacher_seed, seed = name.split(" | ")
        record = artifacts[stages.keys["student"]].record
        rows.append(
            {"cell": cell, "teacher_seed": int(teacher_seed), "seed": int(seed)}
            | pair_metrics.metrics(stages, artifacts)
            | {"device": record["device"], "commit": record["commit"]}
        )
    pandas.DataFrame(rows).to_parquet(out, compression="zstd")
    print(f"{len(rows)} of {len(pairs())} pairs in {out}")


def differences(table: pandas.DataFrame, effect: Effect) -> pandas.Series[float]:
    """Paired differences in points by (teacher_seed, seed): metric of the cell minus that of its rival with these seeds."""
    keyed = table.set_index(["cell", "teacher_seed", "seed"]).sort_index()
    own, other = keyed.loc[effect.cell, effect.metric], keyed.loc[effect.rival, effect.against or effect.metric]
    return 100 * (own - other).dropna()


def interval(values: pandas.Series[float]) -> tuple[float, float]:
    """A 95 % t-interval of the mean.

    It takes students of one teacher as independent, which they are not quite: `judged` shows each teacher's mean beside it.
    """
    if len(values) < 2:
        return -math.inf, math.inf
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def verdict(low: float, high: float, holds: tuple[float | None, float | None]) -> str:
    """`held` if the whole interval lies where the statement says, `not held` if none of it does, else `undecided`."""
    floor, ceiling = (-math.inf if holds[0] is None else holds[0]), (math.inf if holds[1] is None else holds[1])
    if floor < low and high < ceiling:
        return "held"
    return "not held" if high <= floor or low >= ceiling else "undecided"


def judged(table: pandas.DataFrame) -> list[str]:
    """Two lines per statement: it and the verdict; difference in points, its interval, n, and the mean with each teacher."""
    lines = []
    for effect in EFFECTS:
        known = {effect.cell, effect.rival} <= set(table["cell"])
        values = differences(table, effect) if known else pandas.Series(dtype=float)
        if not len(values):
            lines.append(f"not run    {effect.statement}")
            continue
        low, high = interval(values)
        by_teacher = " and ".join(f"{mean:+.1f}" for mean in values.groupby("teacher_seed").mean())
        lines.append(f"{verdict(low, high, effect.holds):10} {effect.statement}:")
        lines.append(f"{'':10} {values.mean():+.1f} ({low:+.1f} to {high:+.1f}), n = {len(values)}; by teacher {by_teacher}")
    return lines


def main(arguments: list[str]) -> None:
    """Collect if a home is given, then print means per cell and the verdicts."""
    if len(arguments) > 1:
        collect(Path(arguments[0]), Path(arguments[1]))
    table = pandas.read_parquet(arguments[-1])
    columns = [name for name in table.columns if name.endswith("/top1") and not name.startswith(("teacher/", "student/"))]
    print((100 * table.groupby("cell", sort=False)[columns].mean()).round(1).to_string(na_rep=""))
    print("\n".join(judged(table)))


if __name__ == "__main__":
    main(sys.argv[1:])

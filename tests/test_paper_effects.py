"""What experiment, README and records say of the paper's effects is one thing."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
from scipy import stats

import experiments.paper_effects as experiment
from experiments.tables.paper_effects import differences, interval, judged, verdict

ROOT = Path(__file__).parents[1]
TABLE = pandas.read_parquet(ROOT / "experiments/tables/paper_effects.parquet")


def test_every_pair_of_the_experiment_is_in_the_table() -> None:
    said = {f"{row.cell} | {row.teacher_seed} | {row.seed}" for row in TABLE.itertuples()}
    assert said == set(experiment.pairs())


@pytest.mark.parametrize("line", range(len(experiment.EFFECTS)))
def test_docstring_and_page_say_what_the_records_say(line: int) -> None:
    first, second = judged(TABLE)[2 * line : 2 * line + 2]
    statement, found = first[11:].rstrip(":"), first[:11].strip()
    number = second.split(",")[0].strip()
    assert f"| {statement} | {found} | {number} |" in (ROOT / "docs/results.md").read_text(encoding="utf-8")
    spaced = r"\s+".join(map(re.escape, (statement, found, number)))
    assert re.search(spaced, str(experiment.__doc__))


def test_an_interval_is_scipys_of_a_mean() -> None:
    values = pandas.Series(np.random.default_rng(0).normal(1.0, 2.0, 6))
    low, high = stats.t.interval(0.95, 5, loc=values.mean(), scale=stats.sem(values))
    assert interval(values) == pytest.approx((low, high))
    assert interval(values[:1]) == (-math.inf, math.inf)


def test_runs_are_paired_by_both_seeds_and_unpaired_runs_are_left_out() -> None:
    effect = experiment.EFFECTS[1]
    whole = differences(TABLE, effect)
    fewer = TABLE[(TABLE["cell"] != effect.rival) | (TABLE["seed"] != 1)].sample(frac=1.0, random_state=0)
    left = differences(fewer, effect)
    assert len(whole) == 6
    assert left.to_dict() == {run: value for run, value in whole.items() if run[1] != 1}


@pytest.mark.parametrize(
    ("low", "high", "holds", "said"),
    [
        (0.1, 0.9, (0.0, None), "held"),
        (-0.1, 0.9, (0.0, None), "undecided"),
        (-0.9, -0.1, (0.0, None), "not held"),
        (-0.9, 0.9, (-1.0, 1.0), "held"),
        (1.1, 2.0, (-1.0, 1.0), "not held"),
        (0.5, 1.5, (-1.0, 1.0), "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, holds: tuple[float, float], said: str) -> None:
    assert verdict(low, high, holds) == said

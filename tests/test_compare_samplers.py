"""The comparison of samplers counts the costs that follow from the table of real pairs, computed here from the table alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas
import pytest

from experiments.compare_samplers import METHODS, area, cost_to_near, random_search, ratios, searched, space
from experiments.table_world import SCENARIOS, TABLE, world
from ktray.fingerprint import fingerprint
from ktray.search.budget import PrefixSuffixSeconds
from ktray.search.trial import Trial

ROWS = pandas.read_parquet(TABLE).query("seed == 0")
PARTS = ("teacher", "features", "clusters", "pseudo_labels")


@pytest.fixture(autouse=True)
def short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches of 24 pairs."""
    for name, method in METHODS.items():
        monkeypatch.setitem(METHODS, name, dataclasses.replace(method, trials=24))


def shares(search: pandas.DataFrame) -> tuple[float, float]:
    return float(search["shared"].iloc[-1]), float(search["distinct"].iloc[-1])


def test_sharing_costs_each_stage_once_and_no_sharing_costs_every_pair_in_full() -> None:
    search = searched(("as measured", "random", 0))
    regrets = 100 * (ROWS["linear_probe"].max() - ROWS["linear_probe"])
    own = ["s_student_9", "s_evaluation_9", "s_linear_probe"]
    whole = sum(ROWS.groupby(f"key_{part}")[f"s_{part}"].first().sum() for part in PARTS) + ROWS[own].to_numpy().sum()
    alone = ROWS[[f"s_{part}" for part in PARTS] + own].sum(axis=1)
    shared_share, alone_share = shares(search)
    assert len(search) == 24
    assert 24 * alone.min() < alone_share * whole < 24 * alone.max()
    assert shared_share < alone_share
    assert np.isclose(regrets.to_numpy()[:, None], search["regret"].to_numpy()).any(axis=0).all()
    assert (search["regret"].diff().dropna() <= 0).all()


def test_all_pairs_together_cost_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "random", dataclasses.replace(METHODS["random"], trials=len(ROWS)))
    search = searched(("as measured", "random", 1))
    alone = ROWS[[f"s_{part}" for part in PARTS] + ["s_student_9", "s_evaluation_9", "s_linear_probe"]].to_numpy().sum()
    once = sum(ROWS.groupby(f"key_{part}")[f"s_{part}"].first().sum() for part in PARTS)
    whole = once + ROWS[["s_student_9", "s_evaluation_9", "s_linear_probe"]].to_numpy().sum()
    assert len(search) == len(ROWS)
    assert shares(search) == (pytest.approx(1.0, rel=0.01), pytest.approx(alone / whole, rel=0.01))
    assert search["regret"].iloc[-1] == 0.0


def test_without_sharing_a_repeated_draw_costs_again() -> None:
    drawn, known = space(METHODS["random"], 2), world(space(METHODS["random"], 2), SCENARIOS["as measured"])
    draws, seen, paid = random_search(drawn, known), set[str](), 0.0
    while len(seen) < 24:
        trial = draws.next_trial(PrefixSuffixSeconds())
        assert isinstance(trial, Trial)
        draws.record_trial(trial)
        name = fingerprint(trial.pair)
        paid, seen = paid + known.cost_alone(name, 0, 9), seen | {name}
    search = searched(("as measured", "random", 2))
    assert search["alone"].iloc[-1] * known.whole == pytest.approx(paid)
    assert search["alone"].iloc[-1] > search["distinct"].iloc[-1]


def test_early_stopping_saves_cost_and_a_search_is_reproducible() -> None:
    again = [searched(("as measured", "balanced", 3)) for _ in range(2)]
    pandas.testing.assert_frame_equal(*again)
    assert shares(again[0])[0] < shares(searched(("as measured", "random", 3)))[0]


def test_shuffled_teachers_keep_their_costs_and_change_their_quality() -> None:
    plain, moved = (world(space(METHODS["random"], 5), SCENARIOS["as measured"], shuffled) for shuffled in (False, True))
    assert sorted(plain.values.values()) == sorted(moved.values.values())
    assert plain.values != moved.values
    assert plain.whole == moved.whole


def test_measures_of_a_search_are_those_of_its_curve() -> None:
    search = pandas.DataFrame({"shared": [0.04, 0.5], "alone": [0.2, 3.5], "regret": [3.0, 1.0]})
    assert cost_to_near(search, "shared") == 0.5
    assert cost_to_near(search[:1], "shared") == np.inf
    assert area(search, "shared") == pytest.approx((9 * 3.0 + 11 * 1.0) / 20)
    own, low, high = ratios([0.1, 0.1], [0.2, np.inf])
    assert own == pytest.approx((2 * 30) ** 0.5)
    assert low == pytest.approx(2.0)
    assert high == pytest.approx(30.0)

"""The world whose rungs mislead does so, and a search of it ends with what the world says."""

from __future__ import annotations

import pytest

import experiments.misleading_rungs as experiment


def test_the_layer_that_ends_best_is_behind_at_both_rungs() -> None:
    width, _, k = experiment.BEST
    best, other = experiment.MEASURED[experiment.BEST], experiment.MEASURED[width, "conv3", k]
    assert best.probe > other.probe
    assert best.two < other.two
    assert best.four < other.four


@pytest.mark.parametrize("method", ["balanced", "tpe"])
def test_a_search_ends_with_a_pair_of_this_world(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(experiment, "TRIALS", 12)
    monkeypatch.setattr(
        experiment.surrogate, "RUNG_CORRELATIONS", experiment.surrogate.RUNG_CORRELATIONS
    )  # set by the search, put back afterwards
    found = experiment.searched(method, 0)
    assert 0.7 < found.true <= experiment.MEASURED[experiment.BEST].probe
    assert abs(found.observed - found.true) < 5 * (experiment.SHARED + experiment.OWN)
    assert found.share * 12 == pytest.approx(round(found.share * 12))
    assert found == experiment.searched(method, 0)

"""What the searcher hands to Tune, and what it makes of what comes back; no Ray runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ktray.drivers.conductor import Conductor
from ktray.drivers.simulate import _Mute, _VirtualStore
from ktray.drivers.stopping import Stopping
from ktray.drivers.tune import StudySearcher
from ktray.drivers.waiting import RELEASED
from ktray.fingerprint import fingerprint
from ktray.search.study import Study
from tests.toy_space import toy_space


@pytest.fixture
def searcher(tmp_path: Path) -> StudySearcher:
    """A searcher with the first segments of a toy study."""
    space = toy_space(tmp_path)
    store: Any = _VirtualStore()
    mute: Any = _Mute()
    study = Study.open(tmp_path, space)
    conductor = Conductor(space, study, store, lambda spec: fingerprint(spec.model_dump()), mute, lambda *said: None)
    stopping = Stopping()
    stopping.orderly = True
    return StudySearcher(conductor, mute, stopping, conductor.first(2)[0])


def test_a_trial_whose_wait_lapsed_though_nobody_wished_to_stop_waits_again(searcher: StudySearcher) -> None:
    before = [searcher.suggest(name)["job"]["waiter"] for name in ("a", "b")]
    for _ in range(4):
        for name in ("a", "b"):
            searcher.on_trial_complete(name, {"cause": RELEASED, "computed": "[]"})
        assert [searcher.suggest(name)["job"]["waiter"] for name in ("a", "b")] == before
    assert not searcher.deaths
    assert not searcher.has_ended()


def test_a_trial_that_was_released_because_the_search_stops_is_not_handed_out_again(searcher: StudySearcher) -> None:
    searcher.suggest("a")
    searcher.stopping.wish()
    searcher.on_trial_complete("a", {"cause": RELEASED, "computed": "[]"})
    assert searcher.suggest("b") == searcher.FINISHED

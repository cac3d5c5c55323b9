"""What the searcher hands to Tune, and what it makes of what comes back; no Ray runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ktray.artifact import Artifact, Stage
from ktray.errors import SearchStopped
from ktray.fingerprint import fingerprint
from ktray.runs import search_run
from ktray.runs.coordinator import TrialCoordinator, TrialSegment
from ktray.runs.interruption import Interruption
from ktray.runs.simulation import _NoTracker, _VirtualStore
from ktray.runs.tune_search import StudySearcher, _Tick
from ktray.runs.tune_trial import CANCELLED
from ktray.search.history import read_study
from ktray.search.space import Space
from ktray.search.study import Study
from tests.searches import until
from tests.toy_space import PAIR, drive, toy_space


def _coordinator(space: Space, study: Study, store: Any = None) -> TrialCoordinator:
    """One with a store without files that logs and shows nothing."""
    store = _VirtualStore() if store is None else store
    tracker: Any = _NoTracker()
    return TrialCoordinator(space, study, store, lambda spec: fingerprint(spec.model_dump()), tracker, lambda *news: None)


def _publish(store: Any, stages: Iterable[Stage]) -> None:
    """Puts what stages would make into the store without files."""
    for stage in stages:
        record = {"seconds": 2.0, "seconds_alone": 2.0, "epoch": stage.spec.get("epoch", 0)}
        store.found[stage.key] = Artifact(stage.key, Path(), {"top1": 0.5}, record)


@pytest.fixture
def searcher(tmp_path: Path) -> StudySearcher:
    """A searcher with the first segments of a toy study."""
    space = toy_space(tmp_path)
    scheduler: Any = _NoTracker()
    coordinator = _coordinator(space, Study.open(tmp_path, space))
    interruption = Interruption()
    interruption.needs_cleanup = True
    return StudySearcher(coordinator, scheduler, interruption, coordinator.first_segments(2)[0])


def test_a_trial_whose_wait_was_cancelled_though_no_stop_was_requested_waits_again(searcher: StudySearcher) -> None:
    before = [searcher.suggest(name)["job"]["waiter"] for name in ("a", "b")]
    for _ in range(4):
        for name in ("a", "b"):
            searcher.on_trial_complete(name, {"cause": CANCELLED, "computed": "[]"})
        assert [searcher.suggest(name)["job"]["waiter"] for name in ("a", "b")] == before
    assert not searcher.deaths
    assert not searcher.has_ended()


def test_a_trial_whose_wait_was_cancelled_because_the_search_stops_does_not_run_again(searcher: StudySearcher) -> None:
    searcher.suggest("a")
    searcher.interruption.request()
    searcher.on_trial_complete("a", {"cause": CANCELLED, "computed": "[]"})
    assert searcher.suggest("b") == searcher.FINISHED


def test_what_a_trial_has_added_is_the_sum_over_sessions(tmp_path: Path) -> None:
    space = toy_space(tmp_path, early_stop={"metric": "knn/top1", "rungs": [1, 9], "reduction": 2}, budget={"trials": 1})
    sessions = 0
    while True:
        with Study.open(tmp_path, space) as study:
            coordinator = _coordinator(space, study)
            segment = coordinator.next()
            if isinstance(segment, str):
                break
            sessions += 1
            _publish(coordinator.store, segment.graph.stages)
            coordinator.settle(segment, [segment.graph.stages[-1].key])
    assert sessions == 2
    assert study.trials()[0].cost["marginal_seconds"] == 4.0
    assert study.trials()[0].metrics["cost/marginal_seconds"] == 4.0


def test_the_study_hears_from_tune_that_time_passes(searcher: StudySearcher, tmp_path: Path) -> None:
    study = searcher.coordinator.study
    study._elapsed._began -= 40
    _Tick(searcher).on_step_end(1, [])
    assert 40 <= read_study(tmp_path, "toy").elapsed < 60


def _rotation(epochs: Any) -> dict[str, Any]:
    branch = PAIR["teacher"]["one_of"]["rotation"]
    return {"teacher": {"one_of": {"rotation": {**branch, "layer": "conv3", "schedule": {"epochs": epochs}}}}}


def test_a_teacher_of_an_earlier_space_is_not_trained_again_to_cut_it_where_the_new_one_may(tmp_path: Path) -> None:
    store, start = _VirtualStore(), {"teacher": "rotation", "transfer.k": 5, "teacher.rotation.schedule.epochs": 4}
    earlier = toy_space(tmp_path, _rotation(4), start_with=[{"transfer.k": 5}])
    with Study.open(tmp_path, earlier, "earlier") as study:
        segment = _coordinator(earlier, study, store).next()
        assert isinstance(segment, TrialSegment)
        _publish(store, (stage for stage in segment.graph.stages if stage.name != "student"))
    space = toy_space(tmp_path, _rotation({"choice": [2, 4]}), start_with=[start])
    with Study.open(tmp_path, space, "changed") as study:
        coordinator = _coordinator(space, study, store)
        assert [stage.spec["epoch"] for stage in coordinator.planned_stages() if stage.name == "teacher"] == [4]
        segment = coordinator.next()
        assert isinstance(segment, TrialSegment)
        assert [stage.name for stage in segment.graph.stages if stage.key not in store.found] == ["student", "evaluation"]
        charged = study.attributed_costs(segment.trial.number)
        assert not charged["prefix"]
        assert {key.split("-")[0] for key in charged["suffix"]} == {"student", "evaluation"}


def test_segments_that_were_trained_ahead_are_charged_to_the_planned_draw_that_needed_them(tmp_path: Path) -> None:
    store = _VirtualStore()
    start = {"teacher": "rotation", "transfer.k": 5, "teacher.rotation.schedule.epochs": 4}
    space = toy_space(tmp_path, _rotation({"choice": [1, 2, 4]}), start_with=[start])
    with Study.open(tmp_path, space) as study:
        coordinator = _coordinator(space, study, store)
        planned = coordinator.planned_stages()
        _publish(store, planned)
        segment = coordinator.next()
        assert isinstance(segment, TrialSegment)
        assert {stage.key for stage in planned if stage.name == "teacher"} <= study.attributed_costs(segment.trial.number)[
            "prefix"
        ].keys()
        assert [stage.spec["epoch"] for stage in planned if stage.name == "teacher"] == [1, 2, 4]


def test_segments_that_lead_to_a_missing_snapshot_and_those_that_a_trial_reads_stay(tmp_path: Path) -> None:
    store = _VirtualStore()
    start = {"teacher": "rotation", "transfer.k": 5, "teacher.rotation.schedule.epochs": 4}
    space = toy_space(tmp_path, _rotation({"choice": [1, 2, 4]}), start_with=[start], budget={"trials": 1})
    with Study.open(tmp_path, space) as study:
        coordinator, trained = _coordinator(space, study, store), []
        while isinstance(segment := coordinator.next(), TrialSegment):
            trained.append([(s.name, s.spec["epoch"]) for s in segment.graph.stages if "epoch" in s.spec])
            _publish(store, segment.graph.stages)
            coordinator.settle(segment, [])
    assert trained[0] == [("teacher", 1), ("teacher", 2), ("teacher", 4), ("student", 1)]
    assert trained[1] == [("teacher", 4), ("student", 1), ("student", 3)]
    assert trained[2] == [("teacher", 4), ("student", 3), ("student", 9)]


def test_a_stage_that_all_draws_need_and_that_failed_stops_the_search_though_another_trial_runs(tmp_path: Path) -> None:
    space = toy_space(tmp_path, _rotation(4), budget={"trials": 30, "concurrent": 4})
    with Study.open(tmp_path, space) as study:
        coordinator = _coordinator(space, study)
        segments, _ = coordinator.first_segments(4)
        teacher = segments[0].graph.keys["teacher"]
        for segment in list(segments)[:3]:
            coordinator.fail(segment, "it cannot be trained", teacher)
        with pytest.raises(SearchStopped, match=r"10 trials failed one after the other; .* it cannot be trained"):
            coordinator.next()
        assert study.draw_count == 14


def test_a_failed_teacher_that_half_of_the_draws_need_lets_the_others_go_on(tmp_path: Path) -> None:
    space = toy_space(tmp_path, budget={"trials": 60, "concurrent": 16}, sampler="random")
    with Study.open(tmp_path, space) as study:
        coordinator = _coordinator(space, study)
        segments, _ = coordinator.first_segments(16)
        for segment in segments:
            if "teacher" in segment.graph.keys:
                coordinator.fail(segment, "it cannot be trained", segment.graph.keys["teacher"])
        while isinstance(coordinator.next(), TrialSegment):
            pass
        running = [trial for trial in study.trials() if trial.state == "running"]
        assert len(running) == 16
        assert sum(trial.state == "failed" for trial in study.trials()) > 10


def test_stages_of_reference_lines_that_are_asked_for_beside_the_trials_count_as_asked_for(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    class Scheduler:
        def obtain(self, stages: list[Stage], waiter: str, priority: int) -> None:
            asked.append([stage.key for stage in stages])

    with Study.open(tmp_path, toy_space(tmp_path, early_stop=None)) as study:
        drive(study)
        coordinator = _coordinator(study.space, study)
        assert study.ranked_trials()
        scheduler: Any = Scheduler()
        search_run._ReferencesAhead(coordinator, scheduler).request()
        until(lambda: len(asked) == 2, 20)
        assert coordinator.demanded >= {key for keys in asked for key in keys} != set()

"""What begins first: what most trials wait for, then what the longest work waits for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from test_scheduler_core import CoreHarness, assigned, stage

from ktray.artifact import Artifact, Stage
from ktray.cost_model.stage_costs import CostModel
from ktray.fingerprint import fingerprint
from ktray.pipeline.pair_graph import Graph
from ktray.runs.coordinator import TrialCoordinator, _DrawCosts
from ktray.runs.simulation import _NoTracker, _VirtualStore
from ktray.scheduler.requests import RequestTable
from ktray.search.budget import Spending
from ktray.search.study import Study
from tests.toy_space import toy_space

SECONDS = {"images": 5.0, "teacher": 60.0, "descriptor": 2.0, "features": 8.0, "student": 30.0, "quick": 1.0}


def request_table(present: set[str] | None = None) -> RequestTable:
    found = {key: Artifact(key, Path(key), {}, {}) for key in present or set()}
    return RequestTable(found.get, set(), [], lambda each: SECONDS.get(each.name, 1.0))


def ask(table: RequestTable, name: str, *stages: Stage, waiter: str | None = None, priority: int = 0) -> None:
    table.add_request(name, name if waiter is None else waiter, "driver", stages, priority, 0.0)


def order(table: RequestTable) -> list[str]:
    return [want.stage.name for want in table.ready_stages()]


def test_the_stage_that_the_longest_work_waits_for_begins_first() -> None:
    table = request_table()
    short, long = stage("quick"), stage("features")
    ask(table, "a", short)
    ask(table, "b", long, stage("student", long))
    assert order(table) == ["features", "quick"]
    ask(table, "c", stage("teacher"))
    assert order(table) == ["teacher", "features", "quick"]


def test_more_waiting_trials_go_before_a_longer_path_and_priority_before_both() -> None:
    table = request_table()
    ask(table, "a", stage("teacher"))
    ask(table, "b", stage("quick"))
    ask(table, "c", stage("quick"))
    assert order(table) == ["quick", "teacher"]
    ask(table, "d", stage("descriptor"), priority=1)
    assert order(table) == ["descriptor", "quick", "teacher"]


def test_a_trial_that_waits_counts_before_any_number_of_prefetches() -> None:
    table = request_table()
    for number in range(3):
        ask(table, f"p{number}", stage("teacher"), waiter="", priority=-1)
    ask(table, "a", stage("quick"))
    assert order(table) == ["quick", "teacher"]


def test_of_prefetched_stages_those_that_most_trials_will_need_go_first() -> None:
    table = request_table()
    ask(table, "p1", stage("teacher"), waiter="", priority=-1)
    for number in range(2):
        ask(table, f"q{number}", stage("quick"), waiter="", priority=-1)
    assert order(table) == ["quick", "teacher"]


def test_a_path_grows_with_readers_that_come_later_also_through_shorter_trainings() -> None:
    table, images = request_table(), stage("images")
    ask(table, "a", images)
    assert table.pending[images.key].critical_path_seconds == 5
    short = stage("teacher", images, number=1)
    long = stage("teacher", images, number=2, resume_from=(short,))
    ask(table, "b", images, long)
    assert table.pending[images.key].critical_path_seconds == 65
    ask(table, "c", images, short)
    assert table.pending[short.key].critical_path_seconds == 120
    assert table.pending[images.key].critical_path_seconds == 125
    assert table.pending_graph.pending_dependencies(long.key) == {images.key, short.key}


def random_stages(rng: random.Random) -> list[Stage]:
    made: list[Stage] = []
    for number in range(rng.randint(3, 12)):
        inputs = rng.sample(made, rng.randint(0, min(2, len(made))))
        starts = rng.sample(made, rng.randint(0, min(2, len(made))))
        made.append(stage(rng.choice(list(SECONDS)), *inputs, number=number, resume_from=tuple(starts)))
    return made


@pytest.mark.parametrize("seed", range(30))
def test_paths_and_dependencies_equal_those_of_a_search_through_all_pending_stages(seed: int) -> None:
    rng = random.Random(seed)
    made, table = random_stages(rng), request_table()
    for number in range(8):
        ask(table, f"r{number}", *rng.sample(made, rng.randint(1, len(made))))

    def before(each: Stage) -> set[str]:
        return {key for key in (*each.inputs.values(), *each.resume_from) if key in table.pending}

    def path(key: str) -> float:
        readers = [other for other, want in table.pending.items() if key in before(want.stage)]
        return SECONDS[table.pending[key].stage.name] + max(map(path, readers), default=0.0)

    for key, want in table.pending.items():
        assert table.pending_graph.pending_dependencies(key) == before(want.stage)
        assert want.critical_path_seconds == path(key)
    while ready := list(table.ready_stages()):
        chosen = rng.choice(ready)
        assert not before(chosen.stage)
        if rng.random() < 0.8:
            table.mark_published(Artifact(chosen.stage.key, Path(), {}, {"seconds": 1.0}), computed=True)
        else:
            table.fail_stage(chosen.stage.key, "failed", "no")
        assert all(table.pending_graph.pending_dependencies(key) == before(want.stage) for key, want in table.pending.items())
    assert not table.pending
    assert not table.pending_graph._dependents


def test_the_core_assigns_stages_in_that_order() -> None:
    harness = CoreHarness(0)
    harness.core.requests.expected_seconds = lambda each: SECONDS.get(each.name, 1.0)
    stages = [stage("quick"), stage("student"), stage("teacher")]
    harness.request("a", *stages)
    for number in range(3):
        harness.poll(f"worker-{number + 1}")
    assert assigned(harness.dispatch()) == [each.key for each in reversed(stages)]


def record(name: str, seconds: float, **spec: Any) -> Artifact:
    return Artifact(f"{name}-{fingerprint([name, seconds])[:12]}", Path(), {}, {"seconds_alone": seconds, "spec": spec})


def test_a_path_is_as_long_as_the_cost_model_expects_of_its_stages() -> None:
    costs = CostModel({each.key: each.record for each in (record("clusters", 6.0), record("teacher", 30.0, epoch=10))})
    table = RequestTable(lambda key: None, set(), [], costs.seconds)
    teacher = Stage("teacher", {"epoch": 40}, {})
    ask(table, "a", teacher, stage("clusters", teacher))
    assert table.pending[teacher.key].critical_path_seconds == pytest.approx(120 + 6, rel=0.02)


# ---- what a search will need for certain


ROTATION = {"teacher": "rotation", "teacher.rotation.layer": "conv3", "teacher.rotation.schedule.epochs": 2}


def certain(tmp_path: Path, *starts: dict[str, Any], trials: int = 9, **fields: Any) -> list[list[str]]:
    """Names of stages that are known before any draw, and after each planned one."""
    tmp_path.mkdir(exist_ok=True)
    space = toy_space(tmp_path, start_with=list(starts), budget={"trials": trials, "concurrent": 9}, **fields)
    store: Any = _VirtualStore()
    mute: Any = _NoTracker()
    identity = lambda spec: fingerprint(spec.model_dump())  # noqa: E731
    with Study.open(tmp_path, space) as study:
        coordinator = TrialCoordinator(space, study, store, identity, mute, lambda *said: None)
        known = [[each.name for each in coordinator.planned_stages()]]
        for _ in starts:
            coordinator.next()
            known.append([each.name for each in coordinator.planned_stages()])
    return known


def test_teachers_of_planned_draws_are_certain_until_those_are_drawn(tmp_path: Path) -> None:
    hog = {"teacher": "hog", "teacher.hog.descriptor.cell": 7}
    known = certain(tmp_path, ROTATION, hog)
    assert known == [["images", "teacher", "features", "features"], ["images", "features"], []]


def test_features_of_a_planned_draw_are_not_certain_before_its_teacher_is_judged(tmp_path: Path) -> None:
    evals = [{"kind": "knn"}, {"kind": "linear_probe"}, {"kind": "knn", "name": "teacher_knn", "of": "teacher"}]
    stop = {"metric": "knn/top1", "rungs": [3, 9], "reduction": 3, "teacher": {"metric": "teacher_knn/top1", "keep": 0.5}}
    known = certain(tmp_path, ROTATION, pair={"evals": evals}, early_stop=stop)
    assert known == [["images", "teacher", "evaluation"], []]


def test_a_teacher_that_the_sampler_completes_is_not_certain_nor_one_beyond_the_target(tmp_path: Path) -> None:
    open_layer = {name: value for name, value in ROTATION.items() if "layer" not in name}
    assert certain(tmp_path / "open", open_layer)[0] == []
    assert certain(tmp_path / "few", {**ROTATION, "transfer.k": 5}, {**ROTATION, "transfer.k": 10}, trials=1)[0] == [
        "images",
        "teacher",
        "features",
    ]


def test_what_was_made_ahead_is_charged_to_the_first_trial_that_needs_it_and_what_was_there_before_is_free() -> None:
    store: Any = _VirtualStore()
    there, ahead, other = stage("images"), stage("features"), stage("clusters")
    store.found[there.key] = record("images", 1.0)
    costs = _DrawCosts(CostModel(), store, Spending())
    costs.prefetch([there.key, ahead.key])
    store.found |= {each.key: record(each.name, 2.0) for each in (ahead, other)}
    charged = costs.expected_costs(Graph((there, ahead, other), {}))
    assert {key for part in charged.values() for key in part} == {ahead.key}

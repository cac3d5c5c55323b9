"""Layers of one teacher that are wanted at the same time are made by one forward pass, each under its own key."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_scheduler_core import CoreHarness, assigned, results, stage

from ktray.artifact import Stage
from ktray.pipeline import pair_metrics
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_graph import build
from ktray.pool import StageContext
from ktray.scheduler.core import MAX_FAMILY
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.scheduler.messages import AssignStage, FenceAttempt, SchedulerEvent
from ktray.scheduler.worker_registry import WorkerShape
from ktray.stages import features_stage
from ktray.stores.file import FileStore
from tests.toys import HOG, ROTATION, toy_pair


def layer(number: int, *inputs: Stage) -> Stage:
    return replace(stage("layer", *inputs, number=number), varying_fields=("number",))


def family(actions: list[Any]) -> list[str]:
    """Keys that the one worker which begins now makes together."""
    (assignment,) = [action for action in actions if isinstance(action, AssignStage)]
    return [assignment.stage.key, *(each.key for each in assignment.stage.computed_with)]


def begun(harness: CoreHarness, count: int) -> list[Stage]:
    """Layers that one worker makes now, each wanted by a trial of its own."""
    images, layers = stage("images"), []
    harness.request("images", images)
    for number in range(count):
        layers.append(layer(number, images))
        harness.request(f"trial {number}", images, layers[-1])
    harness.publish(images)
    return layers


# ---- which stages are a family


def features(**changes: Any) -> Stage:
    stages = build(toy_pair(**changes), lambda spec: "content").stages
    return next(each for each in stages if each.name == "features")


def test_layers_and_poolings_of_one_teacher_are_a_family_and_keep_their_own_keys() -> None:
    one = features(teacher=ROTATION)
    for change in ({"layer": "conv4"}, {"pool": {"kind": "max"}}):
        other = features(teacher={**ROTATION, **change})
        assert one.family == other.family
        assert one.key != other.key


def test_another_teacher_another_type_and_a_descriptor_are_no_part_of_it() -> None:
    families = [features(teacher=ROTATION).family, features(teacher={**ROTATION, "seed": 1}).family]
    families.append(features(teacher={**ROTATION, "dtype": "float16"}).family)
    assert len(set(families)) == 3
    assert features(teacher=HOG).family == ""


def test_what_is_beside_a_stage_changes_no_key() -> None:
    one, other = layer(1), layer(2)
    assert replace(one, computed_with=(other,)).key == one.key


# ---- the core


def test_a_family_that_waits_begins_on_one_worker_and_answers_each_trial() -> None:
    harness = CoreHarness(2)
    images = stage("images")
    harness.request("first", images)
    layers = [layer(number, images) for number in range(3)]
    for number, each in enumerate(layers):
        harness.request(f"trial {number}", images, each)
    actions = harness.publish(images)
    assert family(actions) == [each.key for each in layers]
    assert sorted(harness.core.running) == sorted(each.key for each in layers)
    assert sum(worker.attempt is not None for worker in harness.registry.workers.values()) == 1
    for number, each in enumerate(layers):
        assert results(harness.publish(each)) == {f"trial {number}": ["joined", "computed"]}
    assert all(worker.attempt is None for worker in harness.registry.workers.values())
    assert harness.core.computed == {"images": 1, "layer": 3}


def test_a_worker_is_busy_until_the_last_stage_of_its_family_is_reported() -> None:
    harness = CoreHarness(1)
    first, second = begun(harness, 2)
    run = harness.core.running[first.key]
    harness.store.add(first.key)
    harness.core.handle_succeeded_attempt(first.key, run.attempt, True, 1.0, harness.now)
    assert harness.registry.workers["worker-1"].attempt == run.attempt
    harness.publish(second)
    assert harness.registry.workers["worker-1"].attempt is None


def test_requests_while_a_family_runs_join_its_keys_and_other_members_run_separately() -> None:
    harness = CoreHarness(2)
    layers = begun(harness, 2)
    late = layer(7, stage("images"))
    assert assigned(harness.request("late", layers[1])) == []
    assert family(harness.request("later", late)) == [late.key]


def test_one_attempt_computes_only_so_many_stages_together() -> None:
    harness = CoreHarness(2)
    layers = begun(harness, MAX_FAMILY + 3)
    attempts = [harness.core.running[each.key].attempt for each in layers]
    assert sorted(attempts.count(attempt) for attempt in set(attempts)) == [3, MAX_FAMILY]


def test_a_failed_family_is_split_so_that_only_the_culprit_fails() -> None:
    harness = CoreHarness(1)
    layers = begun(harness, 3)
    actions = harness.fail(layers[0])
    assert results(actions) == {}
    assert family(actions) == [layers[0].key]
    assert results(harness.fail(layers[0])) == {"trial 0": "ValueError: no"}
    for each in layers[1:]:
        assert list(results(harness.publish(each)).values()) == [["joined", "computed"]]
    assert harness.core.computed["layer"] == 2


def test_a_full_disk_fails_a_family_at_once() -> None:
    harness = CoreHarness(1)
    layers = begun(harness, 2)
    run = harness.core.running[layers[0].key]
    harness.core.handle_failed_attempt(run.key, run.attempt, "disk full", "OSError: no space", "", harness.now)
    assert results(harness.dispatch()) == dict.fromkeys(["trial 0", "trial 1"], "OSError: no space")


def test_a_family_whose_input_is_missing_waits_for_it_and_begins_again_together() -> None:
    harness, images = CoreHarness(1), stage("images")
    layers = begun(harness, 2)
    harness.store.remove(images.key)
    assert assigned(harness.fail(layers[0], missing=images.key)) == [images.key]
    assert family(harness.publish(images)) == [each.key for each in layers]


def test_the_death_of_a_worker_fences_its_whole_family_and_the_rest_run_separately() -> None:
    harness = CoreHarness(2)
    layers = begun(harness, 3)
    run = harness.core.running[layers[0].key]
    harness.store.add(layers[1].key)  # published, and its worker died before it could tell
    harness.core.handle_lost_worker(run.worker, "worker died", "killed", harness.now)
    events = [action for action in harness.core.outbox if isinstance(action, SchedulerEvent) and action.event == "worker died"]
    assert [event.key for event in events] == [layers[0].key]
    actions = harness.dispatch()
    assert {action.key for action in actions if isinstance(action, FenceAttempt)} == {each.key for each in layers}
    assert family(actions) == [layers[0].key]
    revived = harness.registry.register("worker-1", WorkerShape(), "node")
    assert not harness.core.handle_heartbeat(revived, run.key, layers[0], run.attempt, {}, harness.now)


def test_a_restarted_broker_adopts_a_family_by_one_heartbeat() -> None:
    harness, one, two = CoreHarness(0), layer(1), layer(2)
    worker = harness.registry.register("worker-1", WorkerShape(), "node")
    harness.core.handle_heartbeat(worker, one.key, replace(one, computed_with=(two,)), "old", {"epoch": 1.0}, harness.now)
    harness.request("a", one)
    harness.request("b", two)
    assert {key: run.attempt for key, run in harness.core.running.items()} == {one.key: "old", two.key: "old"}
    assert harness.core.running[two.key].progress == {"epoch": 1.0}
    assert results(harness.publish(one)) == {"a": ["computed"]}
    assert results(harness.publish(two)) == {"b": ["computed"]}


# ---- the work itself


@pytest.fixture
def pairs(tmp_path: Path) -> Any:
    """Two layers of a trained teacher in a store that has all but the features: (store, stages)."""
    store = FileStore(tmp_path / "store")
    graphs = [build(toy_pair(teacher={**ROTATION, "layer": name}), data_identity()) for name in ("conv2", "conv4")]
    before = [each for each in graphs[0].stages if each.name in ("images", "teacher")]
    LocalScheduler(store, execute, StageContext(), lambda event: None).obtain(before, "test")
    return store, [next(each for each in graph.stages if each.key == graph.keys["features"]) for graph in graphs]


def test_a_family_publishes_the_bits_of_separate_runs_and_shares_their_cost(pairs: Any, tmp_path: Path) -> None:
    store, stages = pairs
    artifact, computed = execute(replace(stages[0], computed_with=(stages[1],)), store, "a1", StageContext())
    assert computed
    made = [store.find(each.key) for each in stages]
    assert made[0].directory == artifact.directory
    assert [each.record["together"] for each in made] == 2 * [sorted(each.key for each in stages)]
    assert made[0].record["seconds"] < made[1].record["seconds"], "conv2 is reached before conv4"
    spent = sum(each.record["seconds"] for each in made)
    assert made[1].record["seconds_alone"] == pytest.approx(spent, abs=0.002)
    assert not list((store.root / ".scratch").iterdir())
    for each in made:
        store.remove(each.key)
    for each, together in zip(stages, made, strict=True):
        alone, _ = execute(each, store, "a2", StageContext())
        assert alone.record["files"] == together.record["files"]
        assert alone.record["spec"] == together.record["spec"]
        assert alone.record["together"] == []


def test_of_a_family_only_what_the_store_lacks_is_made(pairs: Any) -> None:
    store, stages = pairs
    execute(stages[0], store, "a1", StageContext())
    _, computed = execute(replace(stages[0], computed_with=(stages[1],)), store, "a2", StageContext())
    assert not computed
    assert [store.find(each.key).record["attempt"] for each in stages] == ["a1", "a2"]
    assert store.find(stages[1].key).record["together"] == []


def test_a_fenced_family_publishes_nothing(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, stages = pairs
    make = features_stage.run_family

    def fenced(*arguments: Any) -> Any:
        made = make(*arguments)
        for each in stages:
            store.fence(each.key, "a1")
        return made

    monkeypatch.setattr(features_stage, "run_family", fenced)
    with pytest.raises(FileNotFoundError):
        execute(replace(stages[0], computed_with=(stages[1],)), store, "a1", StageContext())
    assert [store.find(each.key) for each in stages] == [None, None]


@pytest.mark.slow
def test_two_trials_on_two_layers_cost_one_pass_on_ray(start_scheduler: Any, tmp_path: Path) -> None:
    scheduler = start_scheduler(tmp_path / "store", work=execute)
    graphs = [build(toy_pair(teacher={**ROTATION, "layer": name}), data_identity()) for name in ("conv2", "conv4")]
    with ThreadPoolExecutor(2) as pool:
        ended = [pool.submit(scheduler.obtain, list(graph.stages), f"trial {number}") for number, graph in enumerate(graphs)]
        states = [{outcome["key"]: outcome["state"] for outcome in each.result()} for each in ended]
    store = FileStore(tmp_path / "store")
    for graph, state_of in zip(graphs, states, strict=True):
        artifact = store.find(graph.keys["features"])
        assert artifact is not None
        assert artifact.record["together"] == sorted(each.keys["features"] for each in graphs)
        assert state_of[artifact.key] == "computed"
        assert pair_metrics.published_artifacts(graph, store) is not None
    assert scheduler.status()["computed"]["features"] == 2

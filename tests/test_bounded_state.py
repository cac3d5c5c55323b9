"""A scheduler that lives for months forgets what is over, and what still comes in late about it is handled right."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any

from test_scheduler_core import CoreHarness, assigned, results, stage

from ktray.artifact import Artifact, Stage
from ktray.scheduler.core import SchedulerCore
from ktray.scheduler.recent_set import RecentSet
from ktray.scheduler.resources import ResourceRequest

REMEMBERED = 50
STAGES = 3000


def sizes(of: object) -> dict[str, int]:
    """Name -> entries of every collection that an object holds."""
    return {name: len(value) for name, value in vars(of).items() if isinstance(value, Sized) and not isinstance(value, str)}


def small_harness() -> CoreHarness:
    """A core that remembers little."""
    harness, attempts = CoreHarness(0), iter(range(10**6))
    harness.core = SchedulerCore(
        harness.find,
        lambda name: ResourceRequest(),
        harness.registry,
        lambda: f"a{next(attempts)}",
        15.0,
        remembered=REMEMBERED,
    )
    harness.poll("worker-1")
    return harness


def state(harness: CoreHarness) -> dict[str, int]:
    core = harness.core
    parts = {"core": core, "requests": core.requests, "pending graph": core.requests.pending_graph, "registry": core.registry}
    parts |= {
        "first_heartbeats": core.first_heartbeats,
        "scaling": core.scaling,
        "failures": core._failures,
        "exclusivity": core._exclusivity,
    }
    return {f"{part}.{name}": size for part, owner in parts.items() for name, size in sizes(owner).items()}


def test_what_is_remembered_stays_bounded_over_thousands_of_stages_deaths_and_failures() -> None:
    harness = small_harness()
    for number in range(STAGES):
        one = stage("one", number=number)
        (assigned, *_) = harness.request(
            f"r{number}", one, waiter="" if number % 3 == 0 else "trial", priority=-(number % 3 == 0)
        )
        run = harness.core.running[one.key]
        if number % 3 == 1:
            harness.core.handle_lost_worker(run.worker, "worker died", "killed", harness.now)
            harness.poll(f"worker-{number + 2}")
            harness.dispatch()
        if number % 5 == 0:
            harness.fail(one)
        elif number % 7 == 0:
            harness.core.requests.cancel_requests("driver")
            harness.core.handle_failed_attempt(
                one.key, harness.core.running[one.key].attempt, "out of memory", "no", "", harness.now
            )
            harness.poll(next(iter(harness.registry.workers)))
            harness.dispatch()
        else:
            harness.publish(one)
        assert isinstance(assigned.attempt, str)
        harness.store.clear()
    too_large = {name: size for name, size in state(harness).items() if size > 4 * REMEMBERED}
    assert too_large == {}


def test_late_reports_and_late_heartbeats_of_the_last_attempts_change_nothing() -> None:
    harness = small_harness()
    ended: list[tuple[Stage, Any]] = []
    for number in range(3 * REMEMBERED):
        one = stage("one", number=number)
        (assigned,) = harness.request(f"r{number}", one)
        harness.publish(one)
        ended.append((one, assigned))
    computed = harness.core.computed.total()
    worker = harness.registry.workers["worker-1"]
    for one, assigned in ended[-REMEMBERED:]:
        assert harness.core.handle_heartbeat(worker, one.key, one, assigned.attempt, {}, harness.now), (
            "a late heartbeat ends no worker"
        )
        harness.core.handle_succeeded_attempt(one.key, assigned.attempt, True, 1.0, harness.now)
    assert not harness.core.running
    assert harness.core.computed.total() == computed, "nothing is counted twice"


def test_a_fenced_attempt_is_refused_as_long_as_it_is_remembered_and_does_no_harm_after_that() -> None:
    harness = small_harness()
    one = stage("one")
    (assigned,) = harness.request("a", one)
    harness.core.handle_lost_worker(assigned.worker, "fenced", "silent", harness.now)
    harness.poll("worker-2")
    harness.dispatch()
    harness.publish(one)
    for number in range(1, 2 * REMEMBERED):
        each = stage("one", number=number)
        harness.request(f"r{number}", each)
        revived = harness.registry.register("worker-1", harness.registry.workers["worker-2"].shape, "node")
        if number == REMEMBERED // 2:
            assert not harness.core.handle_heartbeat(revived, one.key, one, assigned.attempt, {}, harness.now)
        del harness.registry.workers["worker-1"]
        harness.publish(each)
    revived = harness.registry.register("worker-1", harness.registry.workers["worker-2"].shape, "node")
    harness.core.handle_heartbeat(revived, one.key, one, assigned.attempt, {}, harness.now)
    assert not harness.core.handle_failed_attempt(
        one.key, assigned.attempt, "failed", "FileNotFoundError: fenced", "", harness.now
    )
    assert results(harness.request("late", one)) == {"late": ["reused"]}


def test_a_missing_input_of_a_stage_that_waits_is_never_forgotten() -> None:
    harness, images = small_harness(), stage("images")
    reader = stage("reader", images)
    harness.request("a", images)
    harness.publish(images)
    harness.request("b", reader)
    others = [stage("one", number=number) for number in range(5 * REMEMBERED)]
    harness.core.requests._remember_stages(others)
    harness.store.remove(images.key)
    assert assigned(harness.fail(reader, missing=images.key)) == [images.key]


def test_recent_keys_forget_the_oldest_and_keep_what_was_added_again() -> None:
    keys = RecentSet[str](2)
    for key in ("a", "b", "a", "c"):
        keys.add(key)
    assert list(keys) == ["a", "c"]
    keys.discard("a")
    assert ("a" in keys, len(keys)) == (False, 1)


def test_a_store_that_lost_an_old_artifact_is_asked_again() -> None:
    harness = small_harness()
    harness.core.requests.mark_published(Artifact("one-0", Path("one-0"), {}, {}), computed=True)
    for number in range(2 * REMEMBERED):
        harness.core.requests.mark_published(Artifact(f"two-{number}", Path(), {}, {}), computed=True)
    assert not harness.core.requests.is_in_store("one-0")

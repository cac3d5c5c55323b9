"""A scheduler that lives for months forgets what is over, and what still comes in late about it is handled right."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any

from test_ledger import House, answers, given, stage

from ktray.artifact import Artifact, Stage
from ktray.scheduler.core import SchedulerCore
from ktray.scheduler.recent_keys import RecentKeys
from ktray.scheduler.resources import ResourceRequest

REMEMBERED = 50
STAGES = 3000


def sizes(of: object) -> dict[str, int]:
    """Name -> entries of every collection that an object holds."""
    return {name: len(value) for name, value in vars(of).items() if isinstance(value, Sized) and not isinstance(value, str)}


def small_house() -> House:
    """A core that remembers little."""
    house, attempts = House(0), iter(range(10**6))
    house.core = SchedulerCore(
        house.find, lambda name: ResourceRequest(), house.registry, lambda: f"a{next(attempts)}", 15.0, remembered=REMEMBERED
    )
    house.arrive("worker-1")
    return house


def state(house: House) -> dict[str, int]:
    core = house.core
    parts = {"core": core, "requests": core.requests, "queue": core.requests.queue, "registry": core.registry}
    parts |= {"startup": core.startup, "scaling": core.scaling, "retries": core._retries, "exclusive": core._exclusive}
    return {f"{part}.{name}": size for part, owner in parts.items() for name, size in sizes(owner).items()}


def test_what_is_remembered_stays_bounded_over_thousands_of_stages_deaths_and_failures() -> None:
    house = small_house()
    for number in range(STAGES):
        one = stage("one", number=number)
        (assigned, *_) = house.want(f"r{number}", one, waiter="" if number % 3 == 0 else "trial", priority=-(number % 3 == 0))
        run = house.core.running[one.key]
        if number % 3 == 1:
            house.core.worker_lost(run.worker, "worker died", "killed", house.now)
            house.arrive(f"worker-{number + 2}")
            house.turn()
        if number % 5 == 0:
            house.fail(one)
        elif number % 7 == 0:
            house.core.requests.cancel("driver")
            house.core.attempt_failed(one.key, house.core.running[one.key].attempt, "out of memory", "no", "", house.now)
            house.arrive(next(iter(house.registry.workers)))
            house.turn()
        else:
            house.publish(one)
        assert isinstance(assigned.attempt, str)
        house.store.clear()
    too_large = {name: size for name, size in state(house).items() if size > 4 * REMEMBERED}
    assert too_large == {}


def test_late_reports_and_late_heartbeats_of_the_last_attempts_change_nothing() -> None:
    house = small_house()
    ended: list[tuple[Stage, Any]] = []
    for number in range(3 * REMEMBERED):
        one = stage("one", number=number)
        (assigned,) = house.want(f"r{number}", one)
        house.publish(one)
        ended.append((one, assigned))
    computed = house.core.computed.total()
    worker = house.registry.workers["worker-1"]
    for one, assigned in ended[-REMEMBERED:]:
        assert house.core.heartbeat(worker, one.key, one, assigned.attempt, {}, house.now), "a late heartbeat ends no worker"
        house.core.attempt_succeeded(one.key, assigned.attempt, True, 1.0, house.now)
    assert not house.core.running
    assert house.core.computed.total() == computed, "nothing is counted twice"


def test_a_fenced_attempt_is_refused_as_long_as_it_is_remembered_and_does_no_harm_after_that() -> None:
    house = small_house()
    one = stage("one")
    (assigned,) = house.want("a", one)
    house.core.worker_lost(assigned.worker, "fenced", "silent", house.now)
    house.arrive("worker-2")
    house.turn()
    house.publish(one)
    for number in range(1, 2 * REMEMBERED):
        each = stage("one", number=number)
        house.want(f"r{number}", each)
        revived = house.registry.register("worker-1", house.registry.workers["worker-2"].shape, "node")
        if number == REMEMBERED // 2:
            assert not house.core.heartbeat(revived, one.key, one, assigned.attempt, {}, house.now)
        del house.registry.workers["worker-1"]
        house.publish(each)
    revived = house.registry.register("worker-1", house.registry.workers["worker-2"].shape, "node")
    house.core.heartbeat(revived, one.key, one, assigned.attempt, {}, house.now)
    assert not house.core.attempt_failed(one.key, assigned.attempt, "failed", "FileNotFoundError: fenced", "", house.now)
    assert answers(house.want("late", one)) == {"late": ["reused"]}


def test_a_missing_input_of_a_stage_that_waits_is_never_forgotten() -> None:
    house, images = small_house(), stage("images")
    reader = stage("reader", images)
    house.want("a", images)
    house.publish(images)
    house.want("b", reader)
    others = [stage("one", number=number) for number in range(5 * REMEMBERED)]
    house.core.requests._remember(others)
    house.store.remove(images.key)
    assert given(house.fail(reader, missing=images.key)) == [images.key]


def test_recent_keys_forget_the_oldest_and_keep_what_was_added_again() -> None:
    keys = RecentKeys[str](2)
    for key in ("a", "b", "a", "c"):
        keys.add(key)
    assert list(keys) == ["a", "c"]
    keys.discard("a")
    assert ("a" in keys, len(keys)) == (False, 1)


def test_a_store_that_lost_an_old_artifact_is_asked_again() -> None:
    house = small_house()
    house.core.requests.publish(Artifact("one-0", Path("one-0"), {}, {}), computed=True)
    for number in range(2 * REMEMBERED):
        house.core.requests.publish(Artifact(f"two-{number}", Path(), {}, {}), computed=True)
    assert not house.core.requests.is_in_store("one-0")

"""A pool of Ray workers gives what `LocalPool` gives, bit by bit, whoever helps and whoever dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_work
from conftest import SchedulerFactory
from test_broker import callers, starts, until
from toy_work import block_sum, toy

from ktray.pool import LocalPool
from ktray.scheduler.client import SchedulerClient
from ktray.scheduler.worker import _RayPool
from ktray.stores.file import FileStore


class Spoilt(Exception):
    """An error with a constructor of its own."""

    def __init__(self, item: int) -> None:
        self.item = item
        super().__init__(f"item {item}")

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return Spoilt, (self.item,)


def spoilt_from_three(item: int, shared: Any) -> int:
    """Fails for every item from 3 on, for later ones sooner."""
    time.sleep(0.3 if item == 3 else 0.01)
    if item >= 3:
        raise Spoilt(item)
    return item


def twice_in_place(item: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Writes into its own item, as some tools do."""
    item *= 2
    return item + shared


class Helper:
    """What a worker does for a leader, as a plain actor."""

    def run_map_item(self, call: str, function_ref: list[Any], item: bytes) -> bytes | None:
        import ray
        from ray import cloudpickle

        from ktray.scheduler.worker import pickle_error

        function, shared = cloudpickle.loads(ray.get(function_ref[0]))
        try:
            return bytes(cloudpickle.dumps((True, function(cloudpickle.loads(item), shared))))
        except Exception as error:  # noqa: BLE001
            return pickle_error(error)

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture(scope="module")
def helpers(ray_home: Any) -> Any:
    import ray

    made = {f"helper-{number}": ray.remote(Helper).options(num_cpus=1).remote() for number in range(2)}
    ray.get([helper.pid.remote() for helper in made.values()])  # both have started
    yield made
    for helper in made.values():
        ray.kill(helper)


def local(items: int) -> np.ndarray:
    shared = {"scale": np.float64(0.1), "sleep": 0.0}
    return np.stack([total for total, _ in LocalPool().map(block_sum, list(range(items)), shared)])


def test_a_map_over_helpers_equals_one_process_bitwise(helpers: Any) -> None:
    pool = _RayPool(lambda: helpers)
    sums = pool.map(block_sum, list(range(40)), {"scale": np.float64(0.1), "sleep": 0.01})
    assert np.stack([total for total, _ in sums]).tobytes() == local(40).tobytes()
    assert len({pid for _, pid in sums}) == 3
    assert pool.worker_count == 3


def test_items_go_to_the_worker_that_computed_them_before(helpers: Any) -> None:
    pool = _RayPool(lambda: helpers)
    shared = {"scale": np.float64(0.1), "sleep": 0.02}
    calls = [[pid for _, pid in pool.map(block_sum, list(range(9)), shared)] for _ in range(4)]
    assert len(set(calls[0])) == 3
    assert calls[1:] == calls[:-1]


def test_a_map_without_helpers_or_items_works(helpers: Any) -> None:
    assert _RayPool(dict).map(spoilt_from_three, [0, 1]) == [0, 1]
    assert _RayPool(lambda: helpers).map(spoilt_from_three, []) == []


def test_the_error_of_the_first_bad_item_is_raised_as_it_was(helpers: Any) -> None:
    with pytest.raises(Spoilt) as caught:
        _RayPool(lambda: helpers).map(spoilt_from_three, list(range(50)))
    assert caught.value.item == 3


def test_items_and_results_may_be_written_to(helpers: Any) -> None:
    items = [np.full(200_000, float(number)) for number in range(6)]
    results = _RayPool(lambda: helpers).map(twice_in_place, items, np.ones(200_000))
    results[5] += 1
    assert [result[0] for result in results] == [1, 3, 5, 7, 9, 12]


def test_help_that_comes_late_is_taken(helpers: Any) -> None:
    began = time.monotonic()
    pool = _RayPool(lambda: helpers if time.monotonic() > began + 0.5 else {})
    sums = pool.map(block_sum, list(range(60)), {"scale": np.float64(0.1), "sleep": 0.03})
    assert len({pid for _, pid in sums}) == 3


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_items_of_a_dead_or_frozen_helper_are_done_by_others(ray_home: Any, how: signal.Signals) -> None:
    import ray

    made = {f"helper-{number}": ray.remote(Helper).options(num_cpus=1).remote() for number in range(2)}
    victim = ray.get(made["helper-0"].pid.remote())
    with callers(1) as pool:
        shared = {"scale": np.float64(0.1), "sleep": 0.05}
        future = pool.submit(_RayPool(lambda: made).map, block_sum, list(range(60)), shared)
        time.sleep(0.5)
        os.kill(victim, how)
        sums = future.result(timeout=30)
    assert np.stack([total for total, _ in sums]).tobytes() == local(60).tobytes()
    if how == signal.SIGSTOP:
        os.kill(victim, signal.SIGKILL)
    for helper in made.values():
        ray.kill(helper)


def test_a_stage_borrows_idle_workers_and_gives_them_back(scheduler: SchedulerClient, toy_store: Path) -> None:
    until(lambda: [each["state"] for each in scheduler.status()["workers"]] == ["idle", "idle"])
    stage = toy("clusters", {"map": 40, "sleep": 0.05})
    assert scheduler.obtain([stage], "trial")[0]["metrics"]["toy/processes"] == 2
    assert np.load(toy_store / stage.key / "sums.npy").tobytes() == local(40).tobytes()
    until(lambda: [each["state"] for each in scheduler.status()["workers"]] == ["idle", "idle"])


def test_a_stage_of_its_own_calls_a_helper_back(scheduler: SchedulerClient, tmp_path: Path) -> None:
    until(lambda: [each["state"] for each in scheduler.status()["workers"]] == ["idle", "idle"])
    split, urgent = toy("clusters", {"map": 100, "sleep": 0.05}), toy("student", {"steps": 1, "log": str(tmp_path / "log")})
    with callers(1) as pool:
        future = pool.submit(scheduler.obtain, [split], "trial 1")
        until(lambda: [run["helpers"] for run in scheduler.status()["running"] if run["helpers"]])
        scheduler.obtain([urgent], "trial 2")
        assert not future.done()
        assert future.result()[0]["metrics"]["toy/processes"] == 2


def test_a_killed_helper_costs_nothing_but_its_item(start_scheduler: SchedulerFactory, tmp_path: Path) -> None:
    scheduler = start_scheduler(tmp_path / "store", toy_work.work)
    stage = toy("clusters", {"map": 100, "sleep": 0.05, "log": str(tmp_path / "log")})
    with callers(1) as pool:
        future = pool.submit(scheduler.obtain, [stage], "trial")
        helping = until(lambda: [each["pid"] for each in scheduler.status()["workers"] if each["state"] == "helping"])
        time.sleep(0.5)
        os.kill(helping[0], signal.SIGKILL)
        assert future.result()[0]["state"] == "computed"
    assert len(starts(tmp_path / "log", stage)) == 1
    assert np.load(FileStore(tmp_path / "store").root / stage.key / "sums.npy").tobytes() == local(100).tobytes()

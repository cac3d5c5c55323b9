"""The scheduler on a real Ray: processes are killed and frozen, and nothing is lost or done twice."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from conftest import TOY_REQUESTS, SchedulerFactory
from toy_work import toy, work

from ktray.errors import SearchStopped, StageFailed, UserError
from ktray.scheduler.client import SchedulerClient, WaitCancelled, connect
from ktray.scheduler.fault_tolerance import ProcessId
from ktray.scheduler.ray_session import start
from ktray.scheduler.resources import RuntimeSettings
from ktray.stores.file import FileStore


@contextmanager
def callers(count: int) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(count) as pool:
        yield pool


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return found


def starts(log: Path, stage: Any) -> list[int]:
    """Process ids of the attempts at `stage`, in order."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split()[2]) for line in lines if line.startswith(stage.key + " ")]


def events_of(scheduler: SchedulerClient, *stages: Any) -> list[tuple[str, str]]:
    keys = {stage.key for stage in stages}
    return [(event["event"], event["key"]) for event in scheduler.events() if event["key"] in keys]


def at_step(scheduler: SchedulerClient, stage: Any, step: int) -> Any:
    running = {run["key"]: run for run in scheduler.status()["running"]}
    run = running.get(stage.key)
    return run if run and run["progress"].get("step", 0) >= step else None


def test_eight_callers_of_one_stage_cause_one_computation(scheduler: SchedulerClient, tmp_path: Path) -> None:
    stage = toy("slow", {"steps": 3, "log": str(tmp_path / "log")})
    with callers(8) as pool:
        outcomes = list(pool.map(lambda name: scheduler.obtain([stage], name)[0], [f"trial {number}" for number in range(8)]))
    assert sorted(outcome["state"] for outcome in outcomes) == ["computed"] + 7 * ["joined"]
    assert len(starts(tmp_path / "log", stage)) == 1
    assert scheduler.obtain([stage], "late")[0]["state"] == "reused"
    assert {outcome["metrics"]["toy/steps"] for outcome in outcomes} == {3.0}


def test_a_request_computes_inputs_before_those_that_read_them(scheduler: SchedulerClient, tmp_path: Path) -> None:
    images = toy("images")
    teacher = toy("teacher", {"steps": 1}, (images,))
    features = toy("features", {}, (images, teacher))
    outcomes = scheduler.obtain([images, teacher, features], "trial 1")
    assert [outcome["key"] for outcome in outcomes] == [images.key, teacher.key, features.key]
    started = [key for event, key in events_of(scheduler, images, teacher, features) if event == "started"]
    assert started == [images.key, teacher.key, features.key]


def test_a_longer_training_waits_for_the_shorter_one_that_it_continues(scheduler: SchedulerClient) -> None:
    short = toy("student", {"steps": 2})
    long = toy("student", {"steps": 4}, resume_from=(short,))
    with callers(2) as pool:
        first = pool.submit(scheduler.obtain, [short], "trial 1")
        until(lambda: at_step(scheduler, short, 0))
        pool.submit(scheduler.obtain, [long], "trial 2").result()
        first.result()
    events = events_of(scheduler, short, long)
    assert events.index(("published", short.key)) < events.index(("started", long.key))


def test_a_handle_travels_by_pickle(scheduler: SchedulerClient) -> None:
    copy = pickle.loads(pickle.dumps(scheduler))
    assert copy.obtain([toy("images")], "trial 1")[0]["state"] == "computed"


def test_a_failure_reaches_every_waiter_once_and_the_next_request_tries_again(
    scheduler: SchedulerClient, toy_store: Path, tmp_path: Path
) -> None:
    broken = toy("broken", {"steps": 2, "error": "12 features are NaN", "log": str(tmp_path / "log")})
    reader = toy("reader", {}, (broken,))
    with callers(3) as pool:
        futures = [pool.submit(scheduler.obtain, stages, "trial") for stages in ([broken], [broken, reader], [broken])]
        errors = [future.exception() for future in futures]
    assert all(isinstance(error, StageFailed) for error in errors)
    assert {str(error) for error in errors} == {f"{broken.key} failed: 12 features are NaN"}
    assert len(starts(tmp_path / "log", broken)) == 1
    failure = FileStore(toy_store).failure(broken.key)
    assert failure is not None
    assert "raise ValueError" in failure["traceback"]
    with pytest.raises(StageFailed):
        scheduler.obtain([broken], "again")
    assert len(starts(tmp_path / "log", broken)) == 2


def test_a_full_disk_is_told_from_a_failed_stage(scheduler: SchedulerClient) -> None:
    with pytest.raises(SearchStopped, match="disk is full"):
        scheduler.obtain([toy("broken", {"error": "disk full"})], "trial 1")


def test_a_damaged_input_is_computed_again_before_its_reader(scheduler: SchedulerClient, toy_store: Path) -> None:
    images = toy("images")
    scheduler.obtain([images], "trial 1")
    FileStore(toy_store).remove(images.key)
    reader = toy("reader", {}, (images,))
    assert scheduler.obtain([reader], "trial 2")[0]["state"] == "computed"
    assert FileStore(toy_store).find(images.key) is not None


def test_cancelling_ends_one_wait_and_disturbs_nobody_else(scheduler: SchedulerClient) -> None:
    stage = toy("slow", {"steps": 15})
    with callers(2) as pool:
        leaving, staying = pool.submit(scheduler.obtain, [stage], "trial 1"), pool.submit(scheduler.obtain, [stage], "trial 2")
        until(lambda: len(scheduler.status()["waiting"]) == 2)
        scheduler.cancel_requests("trial 1")
        with pytest.raises(WaitCancelled):
            leaving.result(timeout=1)
        assert not staying.done()
        assert staying.result()[0]["key"] == stage.key


def test_the_first_to_obtain_a_prefetched_stage_counts_as_its_cause(scheduler: SchedulerClient) -> None:
    stage = toy("images")
    scheduler.prefetch([stage])
    until(lambda: ("published", stage.key) in events_of(scheduler, stage))
    assert [scheduler.obtain([stage], "trial")[0]["state"] for _ in range(2)] == ["computed", "reused"]


def test_a_killed_worker_is_replaced_and_its_stage_goes_on_from_the_checkpoint(
    scheduler: SchedulerClient, tmp_path: Path
) -> None:
    stage = toy("teacher", {"steps": 12, "log": str(tmp_path / "log")})
    with callers(1) as pool:
        future = pool.submit(scheduler.obtain, [stage], "trial 1")
        until(lambda: at_step(scheduler, stage, 4))
        os.kill(starts(tmp_path / "log", stage)[0], signal.SIGKILL)
        assert future.result()[0]["state"] == "computed"
    assert len(starts(tmp_path / "log", stage)) == 2
    assert (tmp_path / "log").read_text().count("step 2\n") == 1, "the second attempt began anew"
    assert events_of(scheduler, stage) == [(event, stage.key) for event in ("started", "worker died", "started", "published")]
    until(lambda: len(scheduler.status()["workers"]) == 2)


def test_a_stage_that_kills_its_workers_fails_after_the_third(scheduler: SchedulerClient, tmp_path: Path) -> None:
    stage = toy("deadly", {"error": "die", "log": str(tmp_path / "log")})
    with pytest.raises(StageFailed, match=f"{stage.key} failed: WorkerDied: its worker died 3 times"):
        scheduler.obtain([stage], "trial 1")
    assert len(starts(tmp_path / "log", stage)) == 3


def test_a_killed_broker_comes_back_and_no_stage_runs_twice(scheduler: SchedulerClient, tmp_path: Path) -> None:
    log = tmp_path / "log"
    stages = [toy("slow", {"steps": 20, "log": str(log), "number": number}) for number in range(3)]
    with callers(6) as pool:
        futures = [pool.submit(scheduler.obtain, [stages[number % 3]], f"trial {number}") for number in range(6)]
        until(lambda: len(scheduler.status()["running"]) == 2)
        until(lambda: log.exists())
        os.kill(scheduler.status()["pid"], signal.SIGKILL)
        assert {future.result()[0]["key"] for future in futures} == {stage.key for stage in stages}
    assert [len(starts(log, stage)) for stage in stages] == [1, 1, 1]


def test_a_frozen_worker_is_fenced_and_killed_and_its_stage_runs_elsewhere(
    start_scheduler: SchedulerFactory, tmp_path: Path
) -> None:
    scheduler = start_scheduler(tmp_path / "store", dead_after=2.0, heartbeat_seconds=0.2)
    stage = toy("teacher", {"steps": 12, "log": str(tmp_path / "log")})
    with callers(1) as pool:
        future = pool.submit(scheduler.obtain, [stage], "trial 1")
        until(lambda: at_step(scheduler, stage, 4))
        frozen = starts(tmp_path / "log", stage)[0]
        os.kill(frozen, signal.SIGSTOP)
        assert future.result()[0]["state"] == "computed"
    assert not psutil.pid_exists(frozen) or psutil.Process(frozen).status() == psutil.STATUS_ZOMBIE
    assert events_of(scheduler, stage) == [(event, stage.key) for event in ("started", "fenced", "started", "published")]
    assert len(starts(tmp_path / "log", stage)) == 2
    assert not list((tmp_path / "store" / ".scratch").iterdir())


@pytest.mark.slow
def test_a_worker_that_is_frozen_while_its_broker_dies_is_fenced_by_the_next_one_and_ends_when_it_wakes(
    start_scheduler: SchedulerFactory, tmp_path: Path
) -> None:
    scheduler = start_scheduler(tmp_path / "store", dead_after=4.0, heartbeat_seconds=0.2)
    stage = toy("teacher", {"steps": 12, "log": str(tmp_path / "log")})
    with callers(1) as pool:
        future = pool.submit(scheduler.obtain, [stage], "trial 1")
        until(lambda: at_step(scheduler, stage, 4))
        frozen, broker = starts(tmp_path / "log", stage)[0], scheduler.status()["pid"]
        os.kill(frozen, signal.SIGSTOP)
        os.kill(broker, signal.SIGKILL)
        assert future.result()[0]["state"] == "computed"
    assert not [path for path in (tmp_path / "store" / ".scratch").iterdir() if path.name.startswith(stage.key)]
    os.kill(frozen, signal.SIGCONT)
    until(lambda: not psutil.pid_exists(frozen) or psutil.Process(frozen).status() == psutil.STATUS_ZOMBIE)
    assert len(starts(tmp_path / "log", stage)) == 2
    assert (tmp_path / "log").read_text().count("step 2\n") == 1, "the second attempt began anew"
    assert not list((tmp_path / "store" / ".scratch").iterdir())


def test_two_drivers_on_one_store_share_their_computations(
    ray_home: Any, scheduler: SchedulerClient, toy_store: Path, tmp_path: Path
) -> None:
    stage = toy("slow", {"steps": 8, "log": str(tmp_path / "log")})
    runtime = RuntimeSettings(cpus=2, stages=TOY_REQUESTS)
    other = connect(dataclasses.replace(ray_home, name="other", runtime=runtime, on_stop=[]), f"file://{toy_store}", work)
    assert other.namespace == scheduler.namespace
    with callers(2) as pool:
        first: Future[Any] = pool.submit(scheduler.obtain, [stage], "driver 1")
        second = pool.submit(other.obtain, [stage], "driver 2")
        assert {first.result()[0]["state"], second.result()[0]["state"]} == {"computed", "joined"}
    assert len(starts(tmp_path / "log", stage)) == 1


def test_a_driver_with_another_runtime_gets_a_scheduler_of_its_own(
    scheduler: SchedulerClient, start_scheduler: SchedulerFactory, toy_store: Path
) -> None:
    assert start_scheduler(toy_store, checkpoint_seconds=5.0).namespace != scheduler.namespace


def test_a_scheduler_whose_driver_has_ended_ends_itself(
    start_scheduler: SchedulerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    driver = ProcessId(ray.get_runtime_context().get_node_id(), ended.pid, psutil.Process(ended.pid).create_time())
    ended.wait()
    monkeypatch.setattr("ktray.scheduler.client.this_process", lambda: driver)
    scheduler = start_scheduler(tmp_path / "store", idle_exit_seconds=3.0)
    pids = [scheduler.status()["pid"], *until(lambda: [each["pid"] for each in scheduler.status()["workers"] if each["pid"]])]
    start_scheduler.cleanups[0]()  # stop its heartbeats
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_a_scheduler_whose_driver_stands_still_goes_on_for_it(
    start_scheduler: SchedulerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktray.scheduler.client.DRIVER_HEARTBEAT_SECONDS", 600.0)  # this process exists, and does not call
    scheduler = start_scheduler(tmp_path / "store", idle_exit_seconds=3.0)
    status = scheduler.status()
    time.sleep(7.0)
    assert scheduler.status()["pid"] == status["pid"]
    assert scheduler.obtain([toy("images", {"after": "a pause"})], "me")[0]["state"] == "computed"


def test_a_second_session_on_one_home_is_refused_with_the_pid(ray_home: Any) -> None:
    script = (
        "import sys, pathlib\nfrom ktray.scheduler.ray_session import RuntimeSettings, start\n"
        "from ktray.errors import UserError\n"
        "try:\n    start(pathlib.Path(sys.argv[1]), None, RuntimeSettings())\n"
        "except UserError as error:\n    print(error)\n"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", script, str(ray_home.home)], capture_output=True, text=True, cwd=root, check=True
    )
    assert result.stdout.strip() == (
        f"the home {ray_home.home} is in use by process {os.getpid()}. "
        "Wait for it, stop it, or choose another home with --home. To run several searches that share one Ray "
        "cluster and their stages, use `ray start --head`, and --address auto for each search."
    )


@pytest.mark.parametrize(
    ("address", "message"), [(None, "connected to Ray already"), ("127.0.0.1:1", "nothing answers at 127.0.0.1:1")]
)
def test_a_session_that_cannot_begin_leaves_the_one_that_runs_alone(
    scheduler: SchedulerClient, tmp_path: Path, address: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        start(tmp_path, address, RuntimeSettings())
    assert [outcome["state"] for outcome in scheduler.obtain([toy("after", {"address": str(address)})], "trial")] == [
        "computed"
    ]


def test_an_empty_stage_costs_little(scheduler: SchedulerClient) -> None:
    scheduler.obtain([toy("empty")], "first")
    times = []
    for number in range(20):
        began = time.perf_counter()
        scheduler.obtain([toy("empty", {"number": number})], "trial")
        times.append(time.perf_counter() - began)
    print(f"an empty stage costs {1000 * sorted(times)[10]:.1f} ms")
    assert sorted(times)[10] < 0.5


DRIVER = """
import os, sys
from pathlib import Path
from ktray.scheduler.client import connect
from ktray.scheduler.ray_session import RuntimeSettings, start, stop
from toy_work import toy, work
home = Path(sys.argv[1])
session = start(home, None, RuntimeSettings(cpus=1))
try:
    scheduler = connect(session, f"file://{home}/store", work)
    scheduler.obtain([toy("images", {"pid": os.getpid()})], "me")
    print("RUNNING", scheduler.status()["pid"], scheduler.status()["workers"][0]["pid"], session.temporary, flush=True)
    scheduler.obtain([toy("slow", {"steps": 300, "pid": os.getpid()})], "me")
except KeyboardInterrupt:
    stop(session)
    print("STOPPED", flush=True)
"""


def start_driver(home: Path) -> subprocess.Popen[str]:
    root = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root.parent), str(root)])}
    command = [sys.executable, "-c", DRIVER, str(home)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)


def ray_processes_of(folder: str) -> list[int]:
    """Processes of the Ray whose temporary folder this is."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(folder in part for part in process.info["cmdline"] or ()):
            found.append(process.pid)
    return found


def test_an_interrupt_of_the_terminal_leaves_no_process_and_no_noise(tmp_path: Path) -> None:
    driver = start_driver(tmp_path)
    assert driver.stdout is not None
    _, broker, worker, folder = driver.stdout.readline().split()
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=60)
    assert (out, err) == ("STOPPED\n", "")
    assert not any(psutil.pid_exists(int(pid)) for pid in (broker, worker))
    assert not ray_processes_of(folder)
    assert not Path(folder).exists()


@pytest.mark.slow
def test_a_killed_driver_leaves_no_process_and_its_home_can_be_used_again(tmp_path: Path) -> None:
    driver = start_driver(tmp_path)
    assert driver.stdout is not None
    _, broker, worker, folder = driver.stdout.readline().split()
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate(timeout=60)
    until(lambda: not any(psutil.pid_exists(int(pid)) for pid in (broker, worker)), 15)
    until(lambda: not ray_processes_of(folder), 15)
    again = start_driver(tmp_path)
    assert again.stdout is not None
    assert again.stdout.readline().startswith("RUNNING")
    assert not Path(folder).exists()
    os.killpg(again.pid, signal.SIGINT)
    again.communicate(timeout=60)

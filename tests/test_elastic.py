"""Nodes come and go: new ones are used, those that leave are survived, and each stage runs where its resources are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import ray
from test_scheduler_core import REQUESTS, CoreHarness, assigned, results, stage

from ktray.errors import SearchStopped
from ktray.scheduler import client
from ktray.scheduler.messages import AssignStage, FenceAttempt, StartWorker
from ktray.scheduler.placement import DispatchCapacity
from ktray.scheduler.resources import GPU_STAGES, STAGES, GpuShares, ResourceRequest, RuntimeSettings
from ktray.scheduler.worker_registry import NODE_RETURN_SECONDS, Node, WorkerRegistry, WorkerShape

CPU_ONLY, GPU_NODE = Node(4.0, 0.0, 100.0), Node(4.0, 1.0, 100.0)


def mixed() -> WorkerRegistry:
    return WorkerRegistry({"gpu": Node(8.0, 1.0), "cpu": Node(4.0)})


def requests_on(registry: WorkerRegistry) -> GpuShares:
    return GpuShares(RuntimeSettings().resources_for, lambda: any(node.gpus for node in registry.alive_and_departed_nodes()))


@pytest.mark.parametrize("name", STAGES)
def test_networks_run_on_gpu_nodes_and_the_rest_on_nodes_without_while_they_have_room(name: str) -> None:
    harness = CoreHarness(0)
    harness.registry.nodes = mixed().nodes
    harness.core.usual_resources_for = requests_on(harness.registry)
    (start, *_) = [action for action in harness.request("a", stage(name)) if isinstance(action, StartWorker)]
    assert start.worker.node == ("gpu" if name in GPU_STAGES else "cpu")
    assert start.worker.shape == (WorkerShape(0.0, 0.25) if name in GPU_STAGES else WorkerShape(1.0))


def test_a_gpu_node_decodes_where_no_other_has_room_and_an_idle_worker_elsewhere_is_preferred() -> None:
    registry = mixed()
    capacity = DispatchCapacity(registry, 0.0)
    for _ in range(4):
        assert capacity.place_worker(WorkerShape()).node == "cpu"  # type: ignore[union-attr]
    assert capacity.place_worker(WorkerShape()).node == "gpu"  # type: ignore[union-attr]
    registry.workers = dict(reversed(registry.workers.items()))
    for worker in registry.workers.values():
        worker.last_heartbeat, worker.polling = 0.0, True
    assert DispatchCapacity(registry, 0.0).take_available_worker(ResourceRequest()).node == "cpu"  # type: ignore[union-attr]


def test_workers_start_on_a_node_that_joins_and_its_gpu_is_used_from_then_on() -> None:
    harness = CoreHarness(2, Node(2.0, 0.0, 100.0))
    harness.core.usual_resources_for = requests_on(harness.registry)
    running = [stage("student", number=number) for number in range(2)]
    harness.request("a", *running)
    harness.request("b", stage("student", number=5), stage("pseudo_labels"))
    assert harness.dispatch() == []
    harness.registry.set_alive_nodes({**harness.registry.nodes, "new": GPU_NODE}, harness.now)
    started = [action.worker for action in harness.dispatch() if isinstance(action, StartWorker)]
    assert {worker.node for worker in started} == {"new"}
    assert WorkerShape(0.0, 0.25) in [worker.shape for worker in started]
    assert WorkerShape(1.0) in [worker.shape for worker in started]
    assert len(harness.core.running) == 2, "what runs on a CPU goes on there"


def test_workers_of_a_node_that_left_get_nothing_and_their_stages_start_elsewhere() -> None:
    harness, one = CoreHarness(1, CPU_ONLY), stage("one")
    harness.registry.nodes = {"node": CPU_ONLY, "other": CPU_ONLY}
    harness.request("a", one)
    harness.poll("worker-9")
    harness.registry.set_alive_nodes({"other": CPU_ONLY}, harness.now)
    assert assigned(harness.request("b", stage("two"))) == [], "the idle worker of the lost node is not asked"
    harness.core.handle_lost_worker("worker-1", "worker died", "its node died", harness.now)
    actions = harness.dispatch()
    assert [action.key for action in actions if isinstance(action, FenceAttempt)] == [one.key]
    started = [worker for worker in harness.registry.workers.values() if worker.node == "other"]
    for worker in started:
        worker.last_heartbeat, worker.polling = harness.now, True
    assert one.key in assigned(harness.dispatch())


def test_a_stage_whose_only_gpu_left_waits_for_its_return_and_then_is_refused_or_runs_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(REQUESTS, "student", ResourceRequest(gpus=1.0))
    harness = CoreHarness(0)
    harness.registry.nodes = {"node": CPU_ONLY, "gpu": GPU_NODE}
    shares = requests_on(harness.registry)
    harness.registry.set_alive_nodes({"node": CPU_ONLY}, harness.now)
    assert results(harness.request("a", stage("student"))) == {}
    assert shares("student").gpus == 0.25
    harness.registry.set_alive_nodes({"node": CPU_ONLY}, harness.now + NODE_RETURN_SECONDS - 1)
    assert harness.registry.could_ever_fit(ResourceRequest(gpus=1.0))
    harness.now += NODE_RETURN_SECONDS
    harness.registry.set_alive_nodes({"node": CPU_ONLY}, harness.now)
    assert results(harness.dispatch()) == {"a": "it needs 1 GPU, more than any node of the cluster has"}
    assert shares("student").gpus == 0.0


def test_a_gpu_that_comes_back_in_time_takes_what_waited() -> None:
    harness = CoreHarness(0)
    harness.registry.nodes = {"gpu": GPU_NODE}
    harness.registry.set_alive_nodes({}, harness.now)
    harness.request("a", stage("student"))
    harness.registry.set_alive_nodes({"gpu again": GPU_NODE}, harness.now + 100)
    (start,) = [action for action in harness.dispatch() if isinstance(action, StartWorker)]
    assert (start.worker.node, start.worker.shape) == ("gpu again", WorkerShape(0.0, 1.0))
    harness.poll(start.worker.name)
    assert [action.worker for action in harness.dispatch() if isinstance(action, AssignStage)] == [start.worker.name]


def test_a_driver_sends_heartbeats_after_calls_without_an_answer_until_the_scheduler_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "DRIVER_HEARTBEAT_SECONDS", 0.01)
    answers = iter(
        [None, ray.exceptions.RayError(), ray.exceptions.GetTimeoutError(), None, SearchStopped("the scheduler has ended")]
    )
    asked: list[object] = []

    class Scheduler:
        def driver_heartbeat(self, cancelled: threading.Event) -> None:
            asked.append(answer := next(answers))
            if answer is not None:
                raise answer

    thread = threading.Thread(target=client._keep_sending_driver_heartbeats, args=(Scheduler(), threading.Event()), daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert len(asked) == 5
    assert not thread.is_alive()


# ---- on Ray

CHANGING = """
import json, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
options = {"object_store_memory": 100_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**options, "num_cpus": 1, "include_dashboard": False})
from ktray.scheduler.client import connect
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.ray_session import RuntimeSettings, start, stop
from toy_work import toy, work
home = Path(sys.argv[1])
stages = {"student": ResourceRequest(gpus=0.25)}
session = start(home, cluster.address, RuntimeSettings(stages=stages, dead_after=10, heartbeat_seconds=0.2))
scheduler = connect(session, f"file://{home}/store", work)
report = {}

def until(condition, seconds):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, scheduler.status()
        time.sleep(0.2)
    return time.monotonic() - began

def where(key):
    return {run["key"]: run["node"] for run in scheduler.status()["running"]}.get(key)

def obtain(name, *stages):
    request = lambda: report.update({name: [outcome["state"] for outcome in scheduler.obtain(list(stages), name)]})
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    return thread

slow = [toy("pseudo_labels", {"steps": 300, "number": number}) for number in range(2)]
threads = [obtain(f"trial {number}", each) for number, each in enumerate(slow)]
until(lambda: len(scheduler.status()["running"]) == 1, 60)
joined = cluster.add_node(num_cpus=1, num_gpus=1, **options)
report["used_after"] = until(lambda: len({where(each.key) for each in slow} - {None}) == 2, 60)
student = toy("student", {"steps": 40})
threads.append(obtain("trial 2", student))
until(lambda: where(student.key), 60)
report["student_on_gpu_node"] = where(student.key) == joined.node_id
threads[-1].join()
cluster.remove_node(joined, allow_graceful=False)
for thread in threads:
    thread.join(120)
stop(session)
cluster.shutdown()
print(json.dumps(report))
"""


@pytest.mark.slow
def test_a_node_that_joins_is_used_within_a_minute_and_killed_loses_nothing(tmp_path: Path) -> None:
    root = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(root.parent), str(root)])
    done = subprocess.run([sys.executable, "-c", CHANGING, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"the new node was used after {report['used_after']:.1f} s")
    assert report["student_on_gpu_node"]
    assert [report[f"trial {number}"] for number in range(3)] == 3 * [["computed"]]

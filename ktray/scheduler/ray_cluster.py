"""Ray's nodes, actors and processes in the scheduler's terms."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ktray.scheduler.fault_tolerance import ProcessId
from ktray.scheduler.messages import OUT_OF_MEMORY, WORKER_DIED, LossKind
from ktray.scheduler.ray_liveness import is_process_alive
from ktray.scheduler.worker_registry import WORKER_PREFIX, Node

ANSWER_SECONDS = 20.0


def this_process() -> ProcessId:
    """The calling process."""
    return ProcessId(ray.get_runtime_context().get_node_id(), os.getpid(), psutil.Process().create_time())


def kill_process(pid: int, created: float | None = None) -> None:
    """Send SIGKILL, which also ends a stopped process; does nothing if the process has ended, or another one has its id."""
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        if created is None or is_process_alive(pid, created):
            os.kill(pid, signal.SIGKILL)


def kill_process_on_node(node: str, pid: int, created: float | None) -> None:
    """`kill_process` on a node; on a remote node it returns before that is done."""
    if node == ray.get_runtime_context().get_node_id():
        kill_process(pid, created)
        return
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    task: Any = ray.remote(kill_process)
    task.options(num_cpus=0, scheduling_strategy=strategy).remote(pid, created)


def is_process_alive_on_its_node(process: ProcessId) -> bool:
    """`is_process_alive` on the node of a process; False if that node is gone or does not answer."""
    if process.node == ray.get_runtime_context().get_node_id():
        return is_process_alive(process.pid, process.created)
    strategy = NodeAffinitySchedulingStrategy(process.node, soft=False)
    task: Any = ray.remote(is_process_alive)
    asked = task.options(num_cpus=0, scheduling_strategy=strategy, max_retries=0).remote(process.pid, process.created)
    try:
        return bool(ray.get(asked, timeout=ANSWER_SECONDS))
    except ray.exceptions.RayError:
        return False


def resources_of_alive_nodes() -> dict[str, Node]:
    """Node id -> resources of the nodes that are alive."""
    list_nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
    return {
        node["NodeID"]: Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0), resources.get("memory", float("inf")))
        for node in list_nodes()
        if node["Alive"] and (resources := node["Resources"]) is not None
    }


def worker_names(namespace: str) -> list[str]:
    """Names of the workers of a scheduler that Ray knows."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == namespace and actor["name"].startswith(WORKER_PREFIX)]


def kill_workers_of_scheduler(namespace: str) -> list[str]:
    """Kill the workers of a scheduler; returns their names."""
    names = worker_names(namespace)
    for name in names:
        with suppress(ValueError):
            ray.kill(ray.get_actor(name, namespace=namespace))
    return names


def classify_worker_loss(error: Exception) -> tuple[LossKind, str]:
    """The kind of a worker's loss and its cause in one line, from Ray's error about the actor."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return OUT_OF_MEMORY, "Ray killed it, because its node had hardly any memory left"
    detail = "Worker exit detail:"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    cause = next((line for line in lines if detail in line), lines[-1])
    return WORKER_DIED, cause.partition(detail)[2].strip()[:200] if detail in cause else cause[:300]

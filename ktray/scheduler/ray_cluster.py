"""What Ray says of its nodes and actors."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ktray.scheduler.config import WORKER
from ktray.scheduler.failure_kinds import DIED, OUT_OF_MEMORY
from ktray.scheduler.process_liveness import Process
from ktray.scheduler.worker_registry import Node


def this_process() -> Process:
    """The one that asks."""
    return Process(ray.get_runtime_context().get_node_id(), os.getpid(), psutil.Process().create_time())


def end_process(pid: int, born: float | None = None) -> None:
    """SIGKILL, which also ends a process that is stopped; nothing if it has ended and another one has its number."""
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        if born is None or psutil.Process(pid).create_time() == born:
            os.kill(pid, signal.SIGKILL)


def end_process_on(node: str, pid: int, born: float | None) -> None:
    """`end_process` on a node; returns before it is done there."""
    if node == ray.get_runtime_context().get_node_id():
        end_process(pid, born)
        return
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    task: Any = ray.remote(end_process)
    task.options(num_cpus=0, scheduling_strategy=place).remote(pid, born)


def nodes() -> dict[str, Node]:
    """Node id -> resources of the nodes that live."""
    return {
        node["NodeID"]: Node(held.get("CPU", 0.0), held.get("GPU", 0.0), held.get("memory", float("inf")))
        for node in ray.nodes()
        if node["Alive"] and (held := node["Resources"]) is not None
    }


def workers_of(namespace: str) -> list[str]:
    """Names of the workers of a scheduler that Ray knows."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [each["name"] for each in named if each["namespace"] == namespace and each["name"].startswith(WORKER)]


def end_workers(namespace: str) -> list[str]:
    """End the workers of a scheduler; their names."""
    names = workers_of(namespace)
    for name in names:
        with suppress(ValueError):
            ray.kill(ray.get_actor(name, namespace=namespace))
    return names


def death_of(error: Exception) -> tuple[str, str]:
    """What Ray's account of a worker's death makes of it: the event, and the one line that says something."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return OUT_OF_MEMORY, "Ray ended it, since its node had hardly any memory left"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = next((line for line in lines if "Worker exit detail:" in line), lines[-1])
    return DIED, said.partition("Worker exit detail:")[2].strip()[:200] if "Worker exit detail:" in said else said[:300]

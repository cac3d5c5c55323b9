"""Checks before anything expensive starts: free disk, nodes that can run every stage and see the store, equal versions."""

from __future__ import annotations

import platform
import shutil
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ktray.errors import PreflightFailed
from ktray.pipeline.worker_entry import prepare, run_stage
from ktray.scheduler import client, ray_cluster
from ktray.scheduler.resources import STAGES, RuntimeSettings
from ktray.scheduler.worker_registry import Node, WorkerRegistry
from ktray.stores import Store

if TYPE_CHECKING:
    from ktray.runs.profile import Profile
    from ktray.scheduler.client import SchedulerClient
    from ktray.scheduler.ray_session import RaySession

MIN_FREE_BYTES = 512 << 20
TIMEOUT_SECONDS = 60.0
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow", "timm")  # as records name them


def preflight(store: Store, runtime: RuntimeSettings | None = None) -> None:
    """Check the cluster that is connected and the store of this search.

    Args:
        runtime: resources per stage kind; None means the defaults.

    Raises:
        PreflightFailed: one paragraph with everything that is wrong.
    """
    runtime = runtime or RuntimeSettings()
    registry = WorkerRegistry(ray_cluster.resources_of_alive_nodes(), float("inf") if runtime.cpus is None else runtime.cpus)
    disk = _disk_problems(store.root)
    # On a full disk the probe file of the node check could not be written.
    problems = [*disk, *_resource_problems(runtime, registry), *([] if disk else _node_problems(store.root))]
    if problems:
        raise PreflightFailed(" ".join(problems))


def connect_after_preflight(session: RaySession, store: Store, profile: Profile | None = None) -> SchedulerClient:
    """Check the cluster and the store, then make a scheduler whose workers compute stages into this store.

    Args:
        profile: collects what the stages do.

    Raises:
        PreflightFailed: as for `preflight`.
    """
    preflight(store, session.runtime)
    return client.connect(session, store.url, profile.stage_function() if profile is not None else run_stage, prepare)


def _disk_problems(root: Path) -> list[str]:
    free = shutil.disk_usage(root).free
    if free >= MIN_FREE_BYTES:
        return []
    return [f"The store {root} has {free >> 20} MB left; make room for at least {MIN_FREE_BYTES >> 20} MB."]


def _resource_problems(runtime: RuntimeSettings, registry: WorkerRegistry) -> list[str]:
    """Stages that no node could ever run: their trials would wait for ever, or fail one after the other."""
    impossible = [stage for stage in STAGES if not registry.could_ever_fit(runtime.resources_for(stage))]
    if not impossible:
        return []
    best = max(registry.nodes.values(), key=lambda node: (node.gpus, node.cpus), default=Node(0))
    held = f"{best.cpus:g} CPU, {best.gpus:g} GPU and {best.memory / 2**30:.1f} GiB"
    return [f"No node can run {', '.join(impossible)} as the runtime file asks; the largest one has {held}. Ask for less."]


def _node_problems(root: Path) -> list[str]:
    """Every node must see a probe file in the store, and be able to write beside it."""
    if len(alive_nodes()) < 2:
        return []
    probe = root / f".probe-{uuid.uuid4().hex[:8]}"
    probe.write_text("ktray")
    try:
        return [problem for node, answer in _answers(probe).items() for problem in _answer_problems(node, answer, probe)]
    finally:
        for path in root.glob(f"{probe.name}*"):
            path.unlink(missing_ok=True)


def alive_nodes() -> set[str]:
    """IDs of the nodes that Ray takes to be alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _answers(probe: Path) -> dict[str, Mapping[str, str]]:
    """Node -> its answer, or ``{"error": ...}``.

    Ray lists a dead node for another 15 seconds or so. A node that does not answer is therefore asked again while it is listed,
    and is no problem once it is not: a search survives nodes that leave.
    """
    deadline, answers, unanswered = time.monotonic() + TIMEOUT_SECONDS, dict[str, Mapping[str, str]](), alive_nodes()
    while True:
        asked = {node: _ask(node, probe) for node in unanswered}
        answers |= {node: _answer(reference, max(1.0, deadline - time.monotonic())) for node, reference in asked.items()}
        alive = alive_nodes()
        answers = {node: answer for node, answer in answers.items() if "error" not in answer or node in alive}
        unanswered = {node for node, answer in answers.items() if "error" in answer}
        if not unanswered or time.monotonic() > deadline:
            return answers
        time.sleep(1.0)


def _ask(node: str, probe: Path) -> Any:
    on_node = NodeAffinitySchedulingStrategy(node, soft=False)
    return _PROBE_TASK.options(scheduling_strategy=on_node).remote(str(probe))


def _probe_store(probe: str) -> dict[str, str]:
    """Runs on a node: what it sees of the probe, whether it can write beside it, and its versions."""
    path = Path(probe)
    seen = path.read_text() if path.exists() else ""
    refused = ""
    if seen:
        try:
            path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}").write_text("ktray")
        except OSError as error:
            refused = str(error.strerror)
    return {"seen": seen, "refused": refused, "host": platform.node(), **_versions()}


_PROBE_TASK = ray.remote(num_cpus=0, max_retries=0)(_probe_store)  # created once: Ray ships every new one to the cluster


def _versions() -> dict[str, str]:
    """Versions that must be equal on all nodes, so that equal keys mean equal bytes."""
    import ktray

    found = {"Python": platform.python_version(), "ktray": ktray.__version__}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _answer(reference: Any, timeout: float) -> Mapping[str, str]:
    try:
        found: Mapping[str, str] = ray.get(reference, timeout=timeout)
    except (ray.exceptions.RayError, TimeoutError) as error:
        return {"error": " ".join(str(error).split())[:200]}
    return found


def _answer_problems(node: str, answer: Mapping[str, str], probe: Path) -> list[str]:
    if "error" in answer:
        return [f"The node {node[:8]} does not answer: {answer['error']}."]
    name = f"The node {answer['host']} ({node[:8]})"
    found = []
    if answer["seen"] != "ktray":
        found.append(f"{name} does not see the store {probe.parent}; put it on a file system that all nodes share (--store).")
    if answer["refused"]:
        found.append(f"{name} cannot write to the store {probe.parent}: {answer['refused']}.")
    here = _versions()
    for package in [name for name in here if answer.get(name, "none") != here[name]]:
        found.append(f"{name} has {package} {answer.get(package, 'none')}, and here it is {here[package]}; install the same.")
    return found

"""Look before anything expensive starts: room on the disk, nodes that can carry every stage and see the store, one Python."""

from __future__ import annotations

import platform
import shutil
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ktray.errors import PreflightFailed
from ktray.scheduler import ray_cluster
from ktray.scheduler.resources import STAGES, RuntimeSettings
from ktray.scheduler.workers import Node, WorkerRegistry
from ktray.stores import Store

LEAST_FREE = 512 << 20
PATIENCE = 60.0
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "faiss-cpu", "pillow", "timm")  # as records name them


def preflight(store: Store, runtime: RuntimeSettings | None = None) -> None:
    """Check the cluster that is connected and the store of this search.

    Args:
        runtime: what the stages need; None: what they need without a runtime file.

    Raises:
        PreflightFailed: one paragraph with everything that is wrong.
    """
    runtime = runtime or RuntimeSettings()
    registry = WorkerRegistry(ray_cluster.nodes(), float("inf") if runtime.cpus is None else runtime.cpus)
    full = _disk(store.root)
    # On a full disk no node could write what the others look for, nor could we.
    problems = [*full, *_needs(runtime, registry), *([] if full else _nodes(store.root))]
    if problems:
        raise PreflightFailed(" ".join(problems))


def _disk(root: Path) -> list[str]:
    free = shutil.disk_usage(root).free
    if free >= LEAST_FREE:
        return []
    return [f"The store {root} has {free >> 20} MB left; make room for at least {LEAST_FREE >> 20} MB."]


def _needs(runtime: RuntimeSettings, registry: WorkerRegistry) -> list[str]:
    """Stages that no node could ever run: they would wait for it, or fail one trial after the other."""
    poor = [stage for stage in STAGES if not registry.fits(runtime.request_of(stage))]
    if not poor:
        return []
    best = max(registry.nodes.values(), key=lambda node: (node.gpus, node.cpus), default=Node(0))
    held = f"{best.cpus:g} CPU, {best.gpus:g} GPU and {best.memory / 2**30:.1f} GiB"
    return [f"No node can run {', '.join(poor)} as the runtime file asks; the largest one has {held}. Ask for less."]


def _nodes(root: Path) -> list[str]:
    """Every node must read what we write to the store, and write where we read."""
    if len(_members()) < 2:
        return []
    probe = root / f".probe-{uuid.uuid4().hex[:8]}"
    probe.write_text("ktray")
    try:
        return [problem for node, answer in _answers(probe).items() for problem in _wrong(node, answer, probe)]
    finally:
        for path in root.glob(f"{probe.name}*"):
            path.unlink(missing_ok=True)


def _members() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _answers(probe: Path) -> dict[str, Mapping[str, str]]:
    """Node -> what it says, or the error with which it does not.

    A node that dies is a member for a quarter of a minute more. One that does not answer is therefore asked again for as long
    as it is a member, and is no problem once it is none: nodes that leave are survived later, too.
    """
    end, answers, mute = time.monotonic() + PATIENCE, dict[str, Mapping[str, str]](), _members()
    while True:
        asked = {node: _ask(node, probe) for node in mute}
        answers |= {node: _answer(reference, max(1.0, end - time.monotonic())) for node, reference in asked.items()}
        members = _members()
        answers = {node: answer for node, answer in answers.items() if "error" not in answer or node in members}
        mute = {node for node, answer in answers.items() if "error" in answer}
        if not mute or time.monotonic() > end:
            return answers
        time.sleep(1.0)


def _ask(node: str, probe: Path) -> Any:
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return _LOOK.options(scheduling_strategy=there).remote(str(probe))


def _look(probe: str) -> dict[str, str]:
    """On a node: what it sees of the probe, after leaving an answer beside it."""
    path = Path(probe)
    seen = path.read_text() if path.exists() else ""
    refused = ""
    if seen:
        try:
            path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}").write_text("ktray")
        except OSError as error:
            refused = str(error.strerror)
    return {"seen": seen, "refused": refused, "host": platform.node(), **_versions()}


_LOOK = ray.remote(num_cpus=0, max_retries=0)(_look)  # made once: Ray sends each one that is made to the cluster


def _versions() -> dict[str, str]:
    """What must be the same everywhere, for the same key to mean the same bytes."""
    import ktray

    found = {"Python": platform.python_version(), "ktray": ktray.__version__}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _answer(reference: Any, patience: float) -> Mapping[str, str]:
    try:
        found: Mapping[str, str] = ray.get(reference, timeout=patience)
    except (ray.exceptions.RayError, TimeoutError) as error:
        return {"error": " ".join(str(error).split())[:200]}
    return found


def _wrong(node: str, answer: Mapping[str, str], probe: Path) -> list[str]:
    if "error" in answer:
        return [f"The node {node[:8]} does not answer: {answer['error']}."]
    name = f"The node {answer['host']} ({node[:8]})"
    found = []
    if answer["seen"] != "ktray":
        found.append(f"{name} does not see the store {probe.parent}; put it on a file system that all nodes share (--store).")
    if answer["refused"]:
        found.append(f"{name} cannot write to the store {probe.parent}: {answer['refused']}.")
    here = _versions()
    for package in [each for each in here if answer.get(each, "none") != here[each]]:
        found.append(f"{name} has {package} {answer.get(package, 'none')}, and here it is {here[package]}; install the same.")
    return found

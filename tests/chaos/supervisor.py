"""One round: the same `ktray search` again and again until it is done, with faults all the while."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.cluster import ClusterProcess, start_nodes
from tests.chaos.faults import Fault, FaultInjector, session_processes, worker_nodes
from tests.chaos.spaces import STUDY
from tests.chaos.store_watcher import StoreWatcher
from tests.searches import CommandResult, Home, Running

RUNTIME = "checkpoint_seconds: 2\n"
MAX_ROUND_SECONDS = 1800.0  # seconds of one round
NODE_REPLACEMENT_SECONDS = 10.0  # seconds until a node that died is replaced
CLEANUP_SECONDS = 90.0  # agents of the nodes of a cluster take a minute to notice that their node is gone


@dataclass
class Round:
    """What happened in a round.

    Attributes:
        results: of the command, in order; code -9 for a driver that was killed.
        driver_pids: process ids of the commands.
        leftovers: processes, actors and folders that outlived the search.
    """

    home: Home
    faults: list[Fault] = field(default_factory=list)
    results: list[CommandResult] = field(default_factory=list)
    driver_pids: list[int] = field(default_factory=list)
    seconds: float = 0.0
    leftovers: list[str] = field(default_factory=list)
    watcher: StoreWatcher = field(default_factory=lambda: StoreWatcher(Path()))


def run_undisturbed(space: Path, home: Home) -> Round:
    """The same search without any fault."""
    return _supervise(space, home, random.Random(0), 0, 1.0, None, lambda text: None)


def run_with_faults(
    space: Path, home: Home, *, faults: int, mean: float, seed: int, cluster: bool, log: Callable[[str], None]
) -> Round:
    """Search with up to `faults` faults, `mean` seconds apart on average, on a Ray of its own or on a cluster."""
    rng = random.Random(seed)
    with ExitStack() as stack:
        nodes = stack.enter_context(_start_cluster()) if cluster else None
        return _supervise(space, home, rng, faults, mean, nodes, log)


def _supervise(
    space: Path,
    home: Home,
    rng: random.Random,
    faults: int,
    mean: float,
    cluster: ClusterProcess | None,
    log: Callable[[str], None],
) -> Round:
    outcome = Round(home)
    runtime = space.with_name("runtime.yaml")
    runtime.write_text(RUNTIME)
    arguments = ["search", space, "--json", "--runtime", runtime, *(["--address", cluster.address] if cluster else [])]
    with StoreWatcher(home.store) as watcher:
        outcome.watcher = watcher
        injector = FaultInjector(
            rng,
            lambda: {**session_processes(*outcome.driver_pids), **(cluster.processes() if cluster else {})},
            lambda: outcome.driver_pids[-1],
            home.path / "studies" / STUDY / "status.json",
            (lambda: worker_nodes(cluster.processes())) if cluster else None,
        )
        began = time.monotonic()
        while not outcome.results or outcome.results[-1].code in (-9, 5):
            assert time.monotonic() - began < MAX_ROUND_SECONDS, f"not done in {MAX_ROUND_SECONDS:g} s; see {home.path}"
            with home.start(*arguments, clean=False) as running:
                outcome.driver_pids.append(running.process.pid)
                _run_once(running, outcome, injector, faults, mean, cluster, log)
            if outcome.results[-1].code == -9 and not cluster:
                watcher.note_driver_death(time.time())
            log(f"the command ended with {outcome.results[-1].code}")
        outcome.seconds = time.monotonic() - began
        injector.wake(float("inf"))
        outcome.leftovers = _leftovers(outcome, cluster)
    return outcome


def _run_once(
    running: Running,
    outcome: Round,
    injector: FaultInjector,
    faults: int,
    mean: float,
    cluster: ClusterProcess | None,
    log: Callable[[str], None],
) -> None:
    due, repair = time.time() + injector.rng.expovariate(1 / mean), float("inf")
    while running.process.poll() is None:
        time.sleep(0.1)
        now = time.time()
        injector.wake(now)
        if cluster and now > repair:
            cluster.replace_missing()
            repair = float("inf")
        if len(outcome.faults) < faults and now > due:
            due = now + injector.rng.expovariate(1 / mean)
            fault = injector.inject()
            if fault is None:
                due = now + 0.5
                continue
            log(f"{len(outcome.faults) + 1:3} {fault}")
            outcome.faults.append(fault)
            repair = now + NODE_REPLACEMENT_SECONDS if fault.target == "node" else repair
            if fault.key and fault.seconds:
                outcome.watcher.freeze(fault.key, now)
    outcome.results.append(running.wait())


def _leftovers(outcome: Round, cluster: ClusterProcess | None) -> list[str]:
    """Processes, actors and folders that outlive the search, after the time that it takes them to notice."""
    end = time.monotonic() + CLEANUP_SECONDS
    while (left := _survivors(outcome, cluster)) and time.monotonic() < end:
        time.sleep(1.0)
    hidden = [path for name in (".scratch", ".fenced") for path in (outcome.home.store / name).glob("*")]
    pointer = outcome.home.path / "ray"
    folders = map(Path, pointer.read_text().splitlines()) if pointer.exists() else []
    return [*left, *map(str, hidden), *(str(folder) for folder in folders if folder.exists())]


def _survivors(outcome: Round, cluster: ClusterProcess | None) -> list[str]:
    if cluster is None:
        return list(session_processes(*outcome.driver_pids).values())
    actors = cluster.usage()
    ours = [line for line in cluster.processes().values() if line.startswith(("ray::Worker", "ray::Broker", "ray::ResourceTr"))]
    return [*ours, *([] if actors == "0 0.0" else [f"actors and CPUs: {actors}"])]


@contextmanager
def _start_cluster() -> Iterator[ClusterProcess]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with start_nodes({**plain, "RAY_AUTH_MODE": "disabled"}) as cluster:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        try:
            yield cluster
        finally:
            del os.environ["RAY_AUTH_MODE"]

"""One fault: which process it hits, and whether it kills it or freezes it for a while."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

WORKERS = {
    "worker in a stage": "stage",
    "helper": "helping",
    "idle worker": "idle",
}  # target -> its state in the scheduler's status
TARGETS = ("driver", "broker", *WORKERS, "trial")
MAX_FREEZE_SECONDS = 40.0
EARLY_HIT_PROBABILITY = 0.02  # for a search that is still starting, which takes long and has only its driver


@dataclass
class Fault:
    """What was done to which processes, and when.

    Attributes:
        seconds: how long it is frozen; 0 if it was killed.
        key: the stage that a worker ran; empty for one that only helped, since the stage goes on without it.
    """

    target: str
    pids: list[int]
    at: float
    seconds: float = 0.0
    key: str = ""

    def __str__(self) -> str:
        what = f"frozen for {self.seconds:.0f} s" if self.seconds else "killed"
        return f"{self.target} {what}" + (f" ({self.key})" if self.key else "")


@dataclass
class FaultInjector:
    """Chooses processes, and kills or freezes them.

    Args:
        processes: process id -> command line of the search's and its cluster's processes.
        driver: process id of the `ktray search` that runs.
        status: the file in which the search writes the state of its scheduler.
        nodes: process ids of each node that may be hit.
        targets: what else may be hit.
    """

    rng: random.Random
    processes: Callable[[], dict[int, str]]
    driver: Callable[[], int]
    status: Path
    nodes: Callable[[], list[list[int]]] | None = None
    targets: Sequence[str] = TARGETS
    frozen: list[tuple[float, int]] = field(default_factory=list)

    def inject(self) -> Fault | None:
        """Inject a fault; None if there is no process of the chosen kind."""
        if not self._scheduler() and self.rng.random() > EARLY_HIT_PROBABILITY:
            return None
        targets = [*self.targets, "node"] if self.nodes else [*self.targets]
        target = self.rng.choice(targets)
        pids, key = self._victims(target)
        if not pids:
            return None
        freeze = self.rng.random() < 0.5
        seconds = self.rng.uniform(1, 20) if target in ("driver", "broker") else self.rng.uniform(5, MAX_FREEZE_SECONDS)
        fault = Fault(target, pids, time.time(), seconds if freeze else 0.0, key)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP if freeze else signal.SIGKILL)
            if freeze:
                self.frozen.append((fault.at + seconds, pid))
        return fault

    def wake(self, before: float) -> None:
        """Wake the processes whose freeze has ended."""
        for until, pid in self.frozen[:]:
            if until <= before:
                self.frozen.remove((until, pid))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _victims(self, target: str) -> tuple[list[int], str]:
        if target == "driver":
            return [self.driver()], ""
        if target == "node":
            found = self.nodes() if self.nodes else []
            return (self.rng.choice(found), "") if found else ([], "")
        if target in ("broker", "trial"):
            return self._pick(ray_actors(self.processes(), "Broker" if target == "broker" else "ResourceTrainable")), ""
        wanted, scheduler = WORKERS[target], self._scheduler()
        alive = set(ray_actors(self.processes(), "Worker"))
        pids = [each["pid"] for each in scheduler.get("workers", ()) if each["state"] == wanted and each["pid"] in alive]
        chosen = self._pick(pids)
        names = {each["name"] for each in scheduler.get("workers", ()) if each["pid"] in chosen}
        keys = [run["key"] for run in scheduler.get("running", ()) if run["worker"] in names]
        return chosen, (keys or [""])[0]

    def _pick(self, pids: Iterable[int]) -> list[int]:
        listed = sorted(pids)
        return [self.rng.choice(listed)] if listed else []

    def _scheduler(self) -> dict[str, Any]:
        try:
            status = json.loads(self.status.read_text())
        except (OSError, ValueError):
            return {}
        found: dict[str, Any] = status["scheduler"] if status["pid"] == self.driver() else {}
        return found


def ray_actors(processes: dict[int, str], title: str) -> list[int]:
    """Ray's actors whose title begins with this."""
    return [pid for pid, line in processes.items() if line.startswith(f"ray::{title}")]


def session_processes(*leaders: int) -> dict[int, str]:
    """Process id -> command line of all that lives in the sessions of these processes, themselves excluded."""
    found = {}
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError, psutil.Error):
            ours = process.pid not in leaders and os.getsid(process.pid) in leaders
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline())
    return found


def worker_nodes(processes: dict[int, str]) -> list[list[int]]:
    """The processes of each node of a cluster but its head."""
    nodes = []
    for pid, line in processes.items():
        if "raylet/raylet" in line and "--head" not in line:
            with suppress(psutil.Error):
                nodes.append([pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))])
    return nodes

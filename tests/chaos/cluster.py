"""A cluster of three nodes on this machine, of which all but the head may die, freeze, and be replaced."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from tests.chaos.faults import session_family, worker_nodes

NODES = """
import sys
from ray.cluster_utils import Cluster
options = {"num_cpus": 1, "object_store_memory": 100_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
cluster.add_node(**options), cluster.add_node(**options)
cluster.wait_for_nodes()
print("ADDRESS", cluster.address, flush=True)
for line in sys.stdin:
    cluster.add_node(wait=False, **options)
cluster.shutdown()
"""
LEFT = """
import logging, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
held = ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0)
print(len(ray.util.list_named_actors(all_namespaces=True)), held)
"""


@dataclass
class Nodes:
    """The cluster of somebody else that a search runs on."""

    process: subprocess.Popen[str]
    address: str

    def family(self) -> dict[int, str]:
        return session_family(self.process.pid)

    def add(self) -> None:
        """Have another node join."""
        assert self.process.stdin
        self.process.stdin.write("add\n")
        self.process.stdin.flush()

    def complete(self, wanted: int = 2) -> None:
        """Have as many nodes join as are missing beside the head."""
        for _ in range(wanted - len(worker_nodes(self.family()))):
            self.add()

    def left(self) -> str:
        """Named actors that live and CPUs that are held, as Ray counts them: ``0 0.0`` for none."""
        command = [sys.executable, "-c", LEFT, self.address]
        return " ".join(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split())


@contextmanager
def nodes(environment: dict[str, str]) -> Iterator[Nodes]:
    """A cluster for the time of a `with`."""
    process = subprocess.Popen(
        [sys.executable, "-c", NODES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        assert process.stdout
        yield Nodes(process, process.stdout.readline().split()[1])
    finally:
        for pid in [process.pid, *session_family(process.pid)]:
            with suppress(psutil.Error):
                psutil.Process(pid).kill()
        process.wait(timeout=20)

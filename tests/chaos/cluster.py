"""A cluster of three nodes on this machine, of which all but the head may die, freeze, and be replaced."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from tests.chaos.faults import session_processes, worker_nodes

CLUSTER_SCRIPT = """
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
USAGE_SCRIPT = """
import logging, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
held = ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0)
print(len(ray.util.list_named_actors(all_namespaces=True)), held)
"""


@dataclass
class ClusterProcess:
    """A cluster that the search did not start."""

    process: subprocess.Popen[str]
    address: str

    def processes(self) -> dict[int, str]:
        return session_processes(self.process.pid)

    def add(self) -> None:
        """Have another node join."""
        assert self.process.stdin
        self.process.stdin.write("add\n")
        self.process.stdin.flush()

    def replace_missing(self, target: int = 2) -> None:
        """Replace the nodes that are missing besides the head."""
        for _ in range(target - len(worker_nodes(self.processes()))):
            self.add()

    def usage(self) -> str:
        """Living named actors and held CPUs, as Ray counts them: ``0 0.0`` for none."""
        command = [sys.executable, "-c", USAGE_SCRIPT, self.address]
        return " ".join(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split())


@contextmanager
def start_nodes(environment: dict[str, str]) -> Iterator[ClusterProcess]:
    """A cluster that ends with the `with` block."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER_SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        assert process.stdout
        yield ClusterProcess(process, process.stdout.readline().split()[1])
    finally:
        for pid in [process.pid, *session_processes(process.pid)]:
            with suppress(psutil.Error):
                psutil.Process(pid).kill()
        process.wait(timeout=20)

"""`ktray search --address` on clusters of somebody else: several nodes, several searches, and nothing left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.searches import Home, toy_space, until

pytestmark = pytest.mark.slow
SMALL = ("--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000")
THREE_NODES = """
import sys
from ray.cluster_utils import Cluster
options = {"num_cpus": 1, "object_store_memory": 100_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
cluster.add_node(**options), cluster.add_node(**options)
cluster.wait_for_nodes()
print("ADDRESS", cluster.address, flush=True)
sys.stdin.readline()
cluster.shutdown()
"""
LEFT = """
import logging, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
held = ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0)
print(len(ray.nodes()), len(ray.util.list_named_actors(all_namespaces=True)), held)
"""


@pytest.fixture(autouse=True)
def _plain_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's settings of other tests in this process are not those of these clusters."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Ends a process and all that it has started."""
    try:
        yield
    finally:
        for each in process_tree(process.pid):
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait(timeout=20)


def process_tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return []


@contextmanager
def three_nodes() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", THREE_NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with ended(process):
        assert process.stdin
        assert process.stdout
        yield process.stdout.readline().split()[1]
        process.stdin.close()  # it ends its nodes
        process.wait(timeout=60)


@contextmanager
def started_by_hand() -> Iterator[str]:
    with socket.socket() as probe, tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        ray = str(Path(sys.executable).parent / "ray")
        command = [ray, "start", "--head", f"--port={port}", f"--temp-dir={folder}", "--num-cpus=2", "--block", *SMALL]
        process = subprocess.Popen(
            [*command, "--node-ip-address=127.0.0.1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        with ended(process):
            assert process.stdout
            assert any("Ray runtime started" in line for line in process.stdout)
            yield f"127.0.0.1:{port}"


def left_on(address: str) -> list[str]:
    """Nodes, named actors and CPUs that are held, as Ray counts them."""
    done = subprocess.run([sys.executable, "-c", LEFT, address], capture_output=True, text=True, timeout=60)
    return done.stdout.split()


@pytest.mark.parametrize(("cluster", "nodes"), [(three_nodes, "3"), (started_by_hand, "1")])
def test_a_search_runs_unchanged_on_a_cluster_that_it_did_not_start(cluster: object, nodes: str, tmp_path: Path) -> None:
    space = toy_space(tmp_path, budget__trials=3)
    with cluster() as address:  # type: ignore[operator]
        done = Home(tmp_path / "home").run("search", space, "--address", address, "--json")
        assert done.code == 0, done.err
        trials = done.answer["trials"]
        assert trials["completed"] + trials["pruned"] == 3
        assert "has no token authentication" in done.err
        until(lambda: left_on(address) == [nodes, "0", "0.0"], 60)


def test_two_searches_at_once_share_the_stages_that_both_need(tmp_path: Path) -> None:
    spaces = [toy_space(tmp_path / name, study=name, budget__trials=3) for name in ("one", "two")]
    home = Home(tmp_path / "home")
    with three_nodes() as address:
        with home.start("search", spaces[0], "--address", address, "--json") as first:
            second = home.run("search", spaces[1], "--address", address, "--json")
            done = [first.wait(), second]
        assert [each.code for each in done] == [0, 0], done
        until(lambda: left_on(address) == ["3", "0", "0.0"], 60)
    seconds = [json.loads((home.store / key / "record.json").read_text())["seconds"] for key in home.artifacts()]
    paid = [trial.cost.get("marginal_seconds", 0.0) for name in ("one", "two") for trial in home.study(name).trials]
    assert sum(paid) <= sum(seconds) + 0.01, "no stage was computed for each of them"
    keys = [{key for trial in home.study(name).trials for key in trial.artifacts} for name in ("one", "two")]
    assert keys[0] & keys[1]


def test_a_search_that_stops_leaves_the_waits_of_another_alone(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    spaces = [toy_space(tmp_path / name, study=name, budget__trials=3) for name in ("one", "two")]
    with three_nodes() as address:
        one, two = (home.start("search", space, "--address", address, "--json") for space in spaces)
        with one as first, two as second:
            first.until(lambda: "running" in home.states("one") and home.of("images"))
            second.until(lambda: "running" in home.states("two"))
            first.signal(2)
            assert first.wait().code == 130
            done = second.wait()
        assert done.code == 0, done.err
        assert done.answer["trials"]["completed"] + done.answer["trials"]["pruned"] == 3

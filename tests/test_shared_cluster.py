"""`ktray search --address` on clusters that it did not start: several nodes, several searches, and nothing left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.chaos.verdict import without_costs
from tests.searches import Home, toy_space, until
from tests.toys import HOG, ROTATION

pytestmark = pytest.mark.slow
SMALL_NODE = ("--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000")
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
USAGE_SCRIPT = """
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
def terminated(process: subprocess.Popen[str]) -> Iterator[None]:
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
    with terminated(process):
        assert process.stdin
        assert process.stdout
        yield process.stdout.readline().split()[1]
        process.stdin.close()  # which ends its nodes
        process.wait(timeout=60)


@contextmanager
def started_by_hand() -> Iterator[str]:
    with socket.socket() as probe, tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        ray = str(Path(sys.executable).parent / "ray")
        command = [ray, "start", "--head", f"--port={port}", f"--temp-dir={folder}", "--num-cpus=2", "--block", *SMALL_NODE]
        process = subprocess.Popen(
            [*command, "--node-ip-address=127.0.0.1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        with terminated(process):
            assert process.stdout
            assert any("Ray runtime started" in line for line in process.stdout)
            yield f"127.0.0.1:{port}"


def ray_usage(address: str) -> list[str]:
    """Nodes, living named actors and held CPUs, as Ray counts them."""
    done = subprocess.run([sys.executable, "-c", USAGE_SCRIPT, address], capture_output=True, text=True, timeout=60)
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
        until(lambda: ray_usage(address) == [nodes, "0", "0.0"], 60)


def test_two_searches_at_once_share_the_stages_that_both_need(tmp_path: Path) -> None:
    """The fewest epochs that keep the first search busy until the second one has begun, and no rungs: all trials end alike."""
    teacher = {**ROTATION, "schedule": {"epochs": 40, "lr": 0.02, "batch_size": 32}, "layer": {"choice": ["conv3", "conv5"]}}
    changes = {"budget__trials": 3, "early_stop": None, "pair__teacher": {"one_of": {"hog": HOG, "rotation": teacher}}}
    spaces = {name: toy_space(tmp_path / name, study=name, **changes) for name in ("one", "two", "alone")}
    home, separate = Home(tmp_path / "home"), Home(tmp_path / "separate")
    with three_nodes() as address, AttemptCounter(home.store) as counter:
        one, two = (home.start("search", spaces[name], "--address", address, "--json") for name in ("one", "two"))
        with one as first, two as second:
            first.until(lambda: "running" in home.states("one") and "running" in home.states("two"))
            assert not home.keys("teacher"), "they are to need it at the same time"
            done = [first.wait(), second.wait()]
        assert [each.code for each in done] == [0, 0], done
        until(lambda: ray_usage(address) == ["3", "0", "0.0"], 60)
    assert set(counter.of_key.values()) == {1}
    assert counter.of_key.keys() <= set(home.artifacts()), "it may miss what takes no time, and sees all that does"
    assert "teacher" in {key.rpartition("-")[0] for key in counter.of_key}
    assert separate.run("search", spaces["alone"]).code == 0
    expected = completed_trials(separate, "alone")
    assert len(expected) == 3
    assert completed_trials(home, "one") == expected
    assert completed_trials(home, "two") == expected


def completed_trials(home: Home, study: str) -> list[tuple[str, dict[str, object], dict[str, object]]]:
    """Pair, keys and metrics of each completed trial, without what the machine decides."""
    trials = [trial for trial in home.study(study).trials if trial.state == "completed"]
    return sorted((json.dumps(trial.pair, sort_keys=True), dict(trial.keys), without_costs(trial.metrics)) for trial in trials)


class AttemptCounter:
    """A thread that counts the attempts at each key: a second computation is discarded and leaves no trace.

    It looks a hundred times a second: no stage is so short that its folder would not be seen.
    """

    def __init__(self, store: Path) -> None:
        self._scratch, self._seen, self._closing = store / ".scratch", set[str](), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AttemptCounter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closing.wait(0.01):
            with suppress(FileNotFoundError):
                self._seen.update(os.listdir(self._scratch))

    @property
    def of_key(self) -> dict[str, int]:
        return dict(Counter(name.rpartition(".")[0] for name in self._seen))


def test_a_search_that_stops_leaves_the_waits_of_another_alone(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    spaces = [toy_space(tmp_path / name, study=name, budget__trials=3) for name in ("one", "two")]
    with three_nodes() as address:
        one, two = (home.start("search", space, "--address", address, "--json") for space in spaces)
        with one as first, two as second:
            first.until(lambda: "running" in home.states("one") and home.keys("images"))
            second.until(lambda: "running" in home.states("two"))
            first.signal(2)
            assert first.wait().code == 130
            done = second.wait()
        assert done.code == 0, done.err
        assert done.answer["trials"]["completed"] + done.answer["trials"]["pruned"] == 3

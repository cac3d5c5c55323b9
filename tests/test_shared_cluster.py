"""`ktray search --address` on clusters of somebody else: several nodes, several searches, and nothing left behind."""

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

from tests.chaos.verdict import free
from tests.searches import Home, toy_space, until
from tests.toys import HOG, ROTATION

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
    """The fewest epochs that keep the first search busy until the second one has begun, and no rungs: all trials end alike."""
    teacher = {**ROTATION, "schedule": {"epochs": 40, "lr": 0.02, "batch_size": 32}, "layer": {"choice": ["conv3", "conv5"]}}
    changes = {"budget__trials": 3, "early_stop": None, "pair__teacher": {"one_of": {"hog": HOG, "rotation": teacher}}}
    spaces = {name: toy_space(tmp_path / name, study=name, **changes) for name in ("one", "two", "alone")}
    home, apart = Home(tmp_path / "home"), Home(tmp_path / "apart")
    with three_nodes() as address, Tries(home.store) as tries:
        one, two = (home.start("search", spaces[name], "--address", address, "--json") for name in ("one", "two"))
        with one as first, two as second:
            first.until(lambda: "running" in home.states("one") and "running" in home.states("two"))
            assert not home.of("teacher"), "they are to need it at the same time"
            done = [first.wait(), second.wait()]
        assert [each.code for each in done] == [0, 0], done
        until(lambda: left_on(address) == ["3", "0", "0.0"], 60)
    assert set(tries.of_key.values()) == {1}
    assert tries.of_key.keys() <= set(home.artifacts()), "it may miss what takes no time, and sees all that does"
    assert "teacher" in {key.rpartition("-")[0] for key in tries.of_key}
    assert apart.run("search", spaces["alone"]).code == 0
    expected = ended_alike(apart, "alone")
    assert len(expected) == 3
    assert ended_alike(home, "one") == expected
    assert ended_alike(home, "two") == expected


def ended_alike(home: Home, study: str) -> list[tuple[str, dict[str, object], dict[str, object]]]:
    """Pair, keys and metrics of each completed trial, without what the machine decides."""
    trials = [trial for trial in home.study(study).trials if trial.state == "completed"]
    return sorted((json.dumps(trial.pair, sort_keys=True), dict(trial.keys), free(trial.metrics)) for trial in trials)


class Tries:
    """A thread that counts under how many names each key was begun: a second computation is discarded and leaves no trace.

    It looks a hundred times a second: no stage is so short that its folder would not be seen.
    """

    def __init__(self, store: Path) -> None:
        self._scratch, self._seen, self._over = store / ".scratch", set[str](), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Tries:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.01):
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
            first.until(lambda: "running" in home.states("one") and home.of("images"))
            second.until(lambda: "running" in home.states("two"))
            first.signal(2)
            assert first.wait().code == 130
            done = second.wait()
        assert done.code == 0, done.err
        assert done.answer["trials"]["completed"] + done.answer["trials"]["pruned"] == 3

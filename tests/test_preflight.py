"""What would fail after hours is said before the first stage."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ktray.errors import PreflightFailed
from ktray.runs import preflight
from ktray.scheduler.resources import ResourceRequest, RuntimeSettings
from ktray.scheduler.worker_registry import Node, WorkerRegistry
from ktray.stores.file import FileStore

GOOD = {"seen": "ktray", "refused": "", "host": "n1", **preflight._versions()}


def test_a_healthy_place_passes_and_no_probe_is_left(ray_home, tmp_path):
    store = FileStore(tmp_path)
    preflight.preflight(store)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_with_its_number_and_exit_code_4(ray_home, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(PreflightFailed, match="MB left") as raised:
        preflight.preflight(FileStore(tmp_path))
    assert raised.value.exit_code == 4


def test_on_a_full_disk_no_node_is_asked_because_not_even_the_question_could_be_written(ray_home, tmp_path, monkeypatch):
    def full(root):
        raise OSError(errno.ENOSPC, "No space left on device", str(root))

    monkeypatch.setattr(preflight, "_node_problems", full)
    monkeypatch.setattr(preflight, "MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(PreflightFailed, match="MB left"):
        preflight.preflight(FileStore(tmp_path))


def test_a_node_answers_with_what_it_sees_and_leaves_a_file_beside_it(tmp_path):
    probe = tmp_path / ".probe-1"
    probe.write_text("ktray")
    assert preflight._probe_store(str(probe))["seen"] == "ktray"
    assert len(list(tmp_path.iterdir())) == 2
    assert preflight._probe_store(str(tmp_path / "absent"))["seen"] == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seen": ""}, "does not see the store"),
        ({"refused": "Read-only file system"}, "cannot write to the store /store: Read-only file system"),
        ({"ktray": "0.0.1"}, "has ktray 0.0.1, and here"),
        ({"Python": "3.9.1"}, "Python 3.9.1"),
        ({"torch": "1.0.0"}, "has torch 1.0.0, and here"),
        ({"error": "it is dead"}, "it is dead"),
    ],
)
def test_each_thing_that_is_wrong_with_a_node_is_said(changes, said):
    found = preflight._answer_problems("abcdef0123", {**GOOD, **changes}, Path("/store/.probe"))
    assert said in " ".join(found)
    assert preflight._answer_problems("abcdef0123", GOOD, Path("/store/.probe")) == []


def test_a_node_that_has_died_is_no_problem_and_one_that_only_stays_mute_is(tmp_path, monkeypatch):
    members = [{"dies", "slow", "mute", "well"}, {"slow", "mute", "well"}]
    answers = {"dies": [None], "slow": [None, GOOD], "mute": [None, None], "well": [GOOD]}
    clock = iter([0.0, 1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 3.0, preflight.TIMEOUT_SECONDS + 1])
    monkeypatch.setattr(preflight, "alive_nodes", lambda: members.pop(0) if len(members) > 1 else members[0])
    monkeypatch.setattr(preflight, "_ask", lambda node, probe: answers[node].pop(0))
    monkeypatch.setattr(preflight, "_answer", lambda answer, patience: answer or {"error": "it is dead"})
    monkeypatch.setattr(preflight, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    assert preflight._answers(tmp_path) == {"slow": GOOD, "well": GOOD, "mute": {"error": "it is dead"}}


KILLED = """
import sys, time
from pathlib import Path
import psutil, ray
from ray.cluster_utils import Cluster
from ktray.runs import preflight
from ktray.stores.file import FileStore
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
for node in nodes:
    for info in node.all_processes["raylet"]:
        psutil.Process(info.process.pid).kill()
print(len(preflight.alive_nodes()), flush=True)
preflight.preflight(FileStore(Path(sys.argv[1])))
print(len(preflight.alive_nodes()), flush=True)
"""


@pytest.mark.slow
def test_nodes_that_died_a_moment_ago_do_not_stop_a_search_that_begins(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    members = [line for line in done.stdout.splitlines() if line.isdigit()]  # Ray writes there, too
    assert members == ["3", "1"], "Ray still counted them when the preflight began"


@pytest.mark.parametrize(
    ("needs", "fits"),
    [
        (ResourceRequest(gpus=0.5), True),
        (ResourceRequest(gpus=2.0), False),
        (ResourceRequest(cpus=3.0), False),
        (ResourceRequest(memory_bytes=9 << 30), False),
    ],
)
def test_a_stage_that_no_node_could_ever_run_is_named_before_the_search_begins(needs, fits):
    registry = WorkerRegistry({"small": Node(2.0, memory=float(4 << 30)), "large": Node(2.0, 1.0, float(8 << 30))})
    found = preflight._resource_problems(RuntimeSettings(stages={"student": needs}), registry)
    said = "No node can run student as the runtime file asks; the largest one has 2 CPU, 1 GPU and 8.0 GiB. Ask for less."
    assert found == ([] if fits else [said])

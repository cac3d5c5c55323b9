"""`ktray launch job` from a laptop to a cluster of hosts that share nothing but a network and a folder."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

import ktray
from tests.network_hosts import Network, available, network
from tests.searches import Home, toy_space, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
BIN = Path(sys.executable).parent
NODE = ["--disable-usage-stats", "--object-store-memory=80000000", "--block"]


@pytest.fixture
def hosts(tmp_path: Path) -> object:
    if not available():
        pytest.skip("needs root, for network namespaces")
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KTRAY_", "MLFLOW_"))}
    paths = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(Path(ktray.__file__).parent.parent)}
    logs = tmp_path / "logs"
    logs.mkdir()
    with network(logs, {**kept, **paths, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}) as found:
        yield found


def start_head(hosts: Network) -> str:
    head = hosts.add("head")
    options = ["--head", "--port=6379", f"--node-ip-address={head}", f"--dashboard-host={head}", "--num-cpus=0", *NODE]
    _, log = hosts.start("head", ["ray", "start", *options])
    until(lambda: "Ray runtime started" in log.read_text(), 300)
    return head


def start_worker(hosts: Network, name: str, head: str) -> None:
    address = hosts.add(name)
    options = [f"--address={head}:6379", f"--node-ip-address={address}", "--num-cpus=1", *NODE]
    _, log = hosts.start(name, ["ray", "start", *options])
    until(lambda: "Ray runtime started" in log.read_text(), 300)


def test_a_search_launched_from_a_laptop_survives_a_cut_node_and_its_student_comes_back(hosts: Network, tmp_path: Path) -> None:
    shared, laptop = Home(tmp_path / "shared"), ["--home", str(tmp_path / "laptop")]
    space = toy_space(tmp_path / "spaces")
    head = start_head(hosts)
    for name in ("one", "two"):
        start_worker(hosts, name, head)
    hosts.add("laptop")
    launch = ["ktray", "launch", "job", str(space), "--address", f"http://{head}:8265", "--shared", str(shared.path), *laptop]
    assert "submitted as ktray-toy.1" in hosts.run("laptop", launch)
    logs, followed = hosts.start("laptop", ["ktray", "logs", "toy", *laptop])
    until(lambda: shared.keys("teacher") or logs.poll() is not None, 1200)
    hosts.cut("two")
    start_worker(hosts, "three", head)
    status = hosts.run("laptop", ["ktray", "status", "toy", *laptop])
    assert "toy: " in status
    assert logs.wait(1200) == 0, followed.read_text()
    text = followed.read_text()
    assert "SUCCEEDED" in text
    assert "of 6 trials" in text or "6 of 6" in text, text
    states = shared.states("toy")
    assert "failed" not in states
    student = tmp_path / "student"
    hosts.run("laptop", ["ktray", "export", "toy", str(student), *laptop])
    assert sum(weight.numel() for weight in ktray.load_student(student).parameters()) > 1000
    again = hosts.run("laptop", launch)  # the same command, of a study that is done
    assert "submitted as ktray-toy.2" in again


SRUN = 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"'  # on the one node of the job, without its own options


def test_the_batch_script_searches_on_a_node_with_the_real_symmetric_run(hosts: Network, tmp_path: Path) -> None:
    """Slurm's own programs are stubs; Ray and ktray are real. A requeued job finds the search done."""
    shared, home = Home(tmp_path / "shared"), ["--home", str(tmp_path / "login")]
    space, script = toy_space(tmp_path / "spaces"), tmp_path / "toy.sbatch"
    hosts.add("node")
    launch = ["ktray", "launch", "slurm", str(space), "--shared", str(shared.path), "--out", str(script), "--cpus", "2", *home]
    hosts.run("node", launch)
    for name, body in {"srun": SRUN, "scontrol": "echo node1"}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    given = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "47", "SLURM_CPUS_PER_TASK": "2"}
    hosts.environment |= {**given, "PATH": f"{tmp_path / 'bin'}:{hosts.environment['PATH']}"}
    text = hosts.run("node", ["bash", str(script)], timeout=1200)
    states = shared.states("toy")
    assert len(states) == 6, text
    assert not {"failed", "running", "interrupted"} & set(states), text
    made = shared.artifacts()
    hosts.run("node", ["bash", str(script)], timeout=600)
    assert shared.artifacts() == made


def test_auto_without_a_cluster_is_said_within_ten_seconds_of_the_start_of_the_search(tmp_path: Path) -> None:
    """In a process namespace, where no other Ray of this machine is seen."""
    if not available():
        pytest.skip("needs root, for process namespaces")
    command = [
        sys.executable,
        "-m",
        "ktray",
        "search",
        str(toy_space(tmp_path)),
        "--address",
        "auto",
        "--home",
        str(tmp_path / "h"),
    ]
    inside = 'mkdir -p /tmp/ray && mount -t tmpfs ray /tmp/ray && exec "$@"'
    words = ["unshare", "-mpf", "--mount-proc", "bash", "-c", inside, "host", *command]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(words, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 2
    assert "there is no cluster at auto: no Ray runs here" in done.stderr

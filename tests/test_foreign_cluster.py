"""A cluster that somebody else started: what is ours goes, what is theirs stays."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from test_broker import until

pytestmark = pytest.mark.slow

DRIVER = """
import sys, time
from pathlib import Path
from ktray.scheduler.client import connect
from ktray.scheduler.ray_session import RuntimeSettings, start, stop
from toy_work import toy, work
home, address, stay = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
session = start(home, address, RuntimeSettings(cpus=1, idle_exit_seconds=4))
print("WARNED", len(session.warnings), flush=True)
scheduler = connect(session, f"file://{home}/store", work)
state = scheduler.obtain([toy("slow", {"steps": 8})], "me")[0]["state"]
print("DONE", state, scheduler.status()["pid"], scheduler.status()["workers"][0]["pid"], flush=True)
time.sleep(stay)
stop(session)
print("STOPPED", flush=True)
"""


def environment(mode: str, folder: Path) -> dict[str, str]:
    root = Path(__file__).parent
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(root.parent), str(root)])
    return kept | {"PYTHONPATH": path, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": str(folder / "token")}


@pytest.fixture(params=["disabled", "token"])
def cluster(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, str]]]:
    folder = Path(tempfile.mkdtemp(prefix="ktray-", dir="/tmp"))
    (folder / "token").write_text(64 * "a")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray = str(Path(sys.executable).parent / "ray")
    options = [f"--port={port}", f"--temp-dir={folder}", "--num-cpus=2", "--include-dashboard=false", "--block"]
    node = ["--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    variables = environment(request.param, folder)
    head = subprocess.Popen(
        [ray, "start", "--head", *options, *node],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert head.stdout is not None
    lines = iter(head.stdout.readline, "")
    assert any("Ray runtime started" in line for line in lines)
    time.sleep(1)
    yield f"127.0.0.1:{port}", variables
    family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
    for process in family:
        if process.is_running():
            process.kill()
    head.wait(timeout=20)
    shutil.rmtree(folder, ignore_errors=True)


def driver(home: Path, cluster: tuple[str, dict[str, str]], stay: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, str(home), cluster[0], str(stay)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=cluster[1])


def test_our_actors_leave_a_foreign_cluster_with_the_last_driver(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    first, second = driver(tmp_path, cluster, 0), driver(tmp_path, cluster, 0)
    outputs = [process.communicate(timeout=120) for process in (first, second)]
    assert "".join(err for _, err in outputs) == ""
    lines = [out.splitlines() for out, _ in outputs]
    expected = "WARNED 1" if cluster[1]["RAY_AUTH_MODE"] == "disabled" else "WARNED 0"
    assert [each[0] for each in lines] == [expected, expected]
    assert [each[-1] for each in lines] == ["STOPPED", "STOPPED"]
    assert sum("DONE computed" in each[1] for each in lines) == 1
    pids = {int(pid) for each in lines for pid in each[1].split()[2:]}
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_a_killed_driver_takes_its_scheduler_along_after_a_while(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    process = driver(tmp_path, cluster, 60)
    assert process.stdout is not None
    process.stdout.readline()
    pids = [int(pid) for pid in process.stdout.readline().split()[2:]]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    assert all(psutil.pid_exists(pid) for pid in pids)
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 20)


SHIPS = """
import sys
from pathlib import Path
home, address, lab = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
sys.path.insert(0, str(lab))
from ktray import plugins
from ktray.scheduler.client import connect
from ktray.scheduler.ray_session import RuntimeSettings, start, stop
from ktray.pipeline import pair_graph
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.spec import PairSpec
from tests.toys import toy_spec
plugins.allow(["shipped_lab"])
spec = toy_spec(teacher={"descriptor": {"kind": "shipped_lab.corner"}})
stages = pair_graph.build(PairSpec.model_validate(spec), data_identity(home / "cache")).stages
session = start(home, address, RuntimeSettings(cpus=1, idle_exit_seconds=4))
(lab / "shipped_lab").rename(lab / "gone")
scheduler = connect(session, f"file://{home}/store", execute)
print(sorted({outcome["state"] for outcome in scheduler.obtain(list(stages), "me")}), flush=True)
stop(session)
"""


def test_a_plugin_from_outside_travels_to_the_nodes_of_a_cluster(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    lab = tmp_path / "lab"
    (lab / "shipped_lab").mkdir(parents=True)
    (lab / "shipped_lab" / "__init__.py").touch()
    source = Path(__file__).parent.parent / "ktray" / "descriptors" / "raw_pixels.py"
    text = source.read_text().replace(
        'Literal["raw_pixels"] = "raw_pixels"', 'Literal["shipped_lab.corner"] = "shipped_lab.corner"'
    )
    (lab / "shipped_lab" / "corner.py").write_text(text)
    command = [sys.executable, "-c", SHIPS, str(tmp_path / "home"), cluster[0], str(lab)]
    result = subprocess.run(command, capture_output=True, text=True, env=cluster[1], timeout=180, check=False)
    assert result.stdout == "['computed']\n", result.stderr

"""kill -9 of each part of Ray below a search, of the driver itself, and signals at three moments: nothing is lost or left."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.chaos.cluster import start_nodes
from tests.chaos.faults import session_processes
from tests.searches import CommandResult, Home, Running, toy_space, until
from tests.source import ROOT
from tests.test_search_faults import SLOW, assert_whole, trains
from tests.toys import HOG, toy_spec

GONE_SECONDS = 15.0  # for everything that a command started to be gone after its end
BUSY_SECONDS = 600.0  # for a search to come to its end on a busy machine
RAY_LINE = re.compile(r"^\[\d{4}-\d\d-\d\d .*\] \S+\.(cc|h):\d+", re.MULTILINE)  # as Ray's C++ code writes
ESSENTIAL = {"gcs": "gcs_server", "raylet": "raylet/raylet", "runtime-env": "RuntimeEnvAgent", "dashboard": "DashboardAgent"}
OTHERS = ("log_monitor.py", "monitor.py", "dashboard/dashboard.py")
TWO_TRIALS = {"budget": {"trials": 2, "concurrent": 2}, "start_with": []}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def space(tmp_path: Path) -> Path:
    """Its teacher takes long."""
    return toy_space(tmp_path, pair__teacher=SLOW["rotation"], **TWO_TRIALS)


def pid_of(running: Running, word: str) -> int:
    """The first process of a running search with this in its command line; waits until there is one."""
    found: int = running.until(lambda: [pid for pid, line in running.processes().items() if word in line])[0]
    return found


def assert_goes_on(home: Home, *command: object, trials: int = 2) -> None:
    """The same command ends with 0 and computes nothing again."""
    before = home.artifacts()
    again = home.run(*command, timeout=BUSY_SECONDS)
    assert again.code == 0, again.err
    assert_whole(home, trials)
    after = home.artifacts()
    assert {key: after[key] for key in before} == before


def assert_search_stopped(ended: CommandResult, part: str) -> None:
    """Exit code 5, and one sentence that names what of Ray is gone."""
    assert ended.code == 5, ended.err
    sentence = rf"ktray: (stopped early: )?Ray has ended: its .*{part}.* the same command goes on from here\.?"
    assert re.fullmatch(sentence, ended.err.splitlines()[-1]), ended.err
    assert "Traceback" not in ended.err
    assert not RAY_LINE.search(ended.err), ended.err


# ---- a part of Ray


@pytest.mark.parametrize("part", ESSENTIAL)
def test_a_search_whose_ray_loses_a_part_stops_soon_with_one_sentence_and_the_same_command_goes_on(
    part: str, home: Home, space: Path
) -> None:
    with home.start("search", space, clean=False) as running:
        running.until(lambda: trains(home))
        began = time.monotonic()
        os.kill(pid_of(running, ESSENTIAL[part]), signal.SIGKILL)
        ended = running.wait()
        assert time.monotonic() - began < 60, "it hangs"
        until(lambda: not running.processes(), GONE_SECONDS)
    assert_search_stopped(ended, "GCS" if part == "gcs" else "raylet")
    assert "trials" in ended.out, "the summary is printed all the same"
    assert_goes_on(home, "search", space)


def test_a_run_whose_ray_loses_its_gcs_stops_with_one_sentence(home: Home, tmp_path: Path) -> None:
    long = {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": {"epochs": 500, "lr": 0.01, "batch_size": 8}}
    pair = tmp_path / "pair.yaml"
    pair.write_text(yaml.safe_dump(toy_spec(teacher=HOG, student=long)))
    with home.start("run", pair, clean=False) as running:
        running.until(lambda: home.keys("pseudo_labels"))
        os.kill(pid_of(running, "gcs_server"), signal.SIGKILL)
        ended = running.wait()
        until(lambda: not running.processes(), GONE_SECONDS)
    assert_search_stopped(ended, "GCS")


def test_what_of_ray_a_search_can_do_without_costs_it_nothing(home: Home, space: Path) -> None:
    with home.start("search", space, clean=False) as running:
        running.until(lambda: trains(home))
        for word in OTHERS:
            os.kill(pid_of(running, word), signal.SIGKILL)
        ended = running.wait(BUSY_SECONDS)
        until(lambda: not running.processes(), GONE_SECONDS)
    assert ended.code == 0, ended.err
    assert_whole(home, 2)


def test_a_worker_node_whose_agent_is_killed_costs_a_search_on_a_cluster_nothing(
    home: Home, space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with start_nodes(dict(os.environ)) as cluster, home.start("search", space, "--address", cluster.address) as running:
        running.until(lambda: trains(home))
        head = next(pid for pid, line in cluster.processes().items() if "raylet/raylet" in line and "--head" in line)
        agents = [pid for pid, line in cluster.processes().items() if "RuntimeEnvAgent" in line and parent_of(pid) != head]
        os.kill(agents[0], signal.SIGKILL)
        ended = running.wait(BUSY_SECONDS)
    assert ended.code == 0, ended.err
    assert_whole(home, 2)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# ---- the driver


@pytest.mark.parametrize("moment", ["while Ray starts", "in a stage"])
def test_after_kill_9_of_the_driver_nothing_is_left_and_the_same_command_goes_on(moment: str, home: Home, space: Path) -> None:
    with home.start("search", space, clean=False) as running:
        MOMENTS[moment](running, home)
        running.process.kill()
        running.process.wait()
        until(lambda: not running.processes(), GONE_SECONDS)
        until(lambda: not any(Path(line).exists() for line in (home.path / "ray").read_text().split()), 5)
    status = home.run("status", "toy")
    if status.code == 0:  # else it was killed before the study began
        assert "running" not in status.out.splitlines()[0], status.out
        assert "no search of it runs now" in status.out
    assert_goes_on(home, "search", space)


# ---- signals at three moments

MOMENTS: dict[str, Callable[[Running, Home], object]] = {
    "while Ray starts": lambda running, home: pid_of(running, "gcs_server"),
    "in a stage": lambda running, home: running.until(lambda: trains(home)),
    "at the summary": lambda running, home: running.until((home.path / "studies" / "toy" / "references.json").exists),
}


def twice(running: Running) -> None:
    os.killpg(running.process.pid, signal.SIGINT)
    time.sleep(0.5)
    if running.process.poll() is None:
        os.killpg(running.process.pid, signal.SIGINT)


SIGNALS: dict[str, Callable[[Running], object]] = {
    "Ctrl-C": lambda running: os.killpg(running.process.pid, signal.SIGINT),
    "Ctrl-C twice": twice,
    "SIGTERM": lambda running: running.process.send_signal(signal.SIGTERM),
    "SIGTERM to all": lambda running: os.killpg(running.process.pid, signal.SIGTERM),  # as when a machine is shut down
    "SIGHUP": lambda running: running.process.send_signal(signal.SIGHUP),
    "SIGHUP to all": lambda running: os.killpg(running.process.pid, signal.SIGHUP),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("sent", SIGNALS)
def test_a_signal_ends_a_search_in_order_at_any_moment(sent: str, moment: str, home: Home, tmp_path: Path) -> None:
    at_summary = moment == "at the summary"
    space = toy_space(tmp_path, pair__teacher=HOG if at_summary else SLOW["rotation"], **TWO_TRIALS)
    with home.start("search", space, clean=False) as running:
        MOMENTS[moment](running, home)
        SIGNALS[sent](running)
        began = time.monotonic()
        ended = running.wait()
        assert time.monotonic() - began < 30, "it hangs"
        until(lambda: not running.processes(), GONE_SECONDS)
    assert "Traceback" not in ended.err, ended.err
    assert not RAY_LINE.search(ended.err), ended.err
    assert ended.code == 130 or (at_summary and ended.code == 0), ended.err  # 0 once the summary is printed
    assert ("resume with: ktray search" in ended.err) == (ended.code == 130), ended.err
    if at_summary and ended.code == 0:
        assert "2 of 2 trials" in ended.out
    assert "running" not in home.states()
    assert_goes_on(home, "search", space)


def test_a_search_whose_terminal_is_closed_ends_in_order_and_the_same_command_goes_on(home: Home, space: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "ktray", "search", str(space), "--home", str(home.path)])

    def trains_while_somebody_reads() -> bool:
        while select.select([terminal], [], [], 0)[0]:
            os.read(terminal, 65536)
        return trains(home)

    until(trains_while_somebody_reads)
    os.close(terminal)
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert time.monotonic() - began < 30, "it hangs"
    until(lambda: not session_processes(pid), GONE_SECONDS)
    assert set(home.states()) == {"interrupted"}
    assert_goes_on(home, "search", space)

"""The private names of Ray that ktray uses are there, are read where ktray relies on it, and are checked before use."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from packaging.requirements import Requirement
from ray import _raylet
from ray._private import ray_constants, services, utils, worker
from ray._private.node import Node

from ktray.errors import PreflightFailed
from ktray.scheduler import ray_session
from ktray.scheduler.orphan_cleanup import ray_processes


def test_the_installed_ray_is_one_that_pyproject_allows_and_pyproject_has_an_upper_bound() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    (pin,) = [wanted for wanted in map(Requirement, project["dependencies"]) if wanted.name == "ray"]
    assert ray.__version__ in pin.specifier
    assert any(bound.operator == "<" for bound in pin.specifier)


@pytest.mark.parametrize(
    ("module", "name", "reader"),
    [
        (ray_constants, "ENABLE_RAY_CLUSTER", services.get_node_ip_address),
        (utils, "set_sigterm_handler", worker.init),
        (worker, "print_to_stdstream", worker.listen_error_messages),
        (_raylet, "Config", None),
        (Node, "start_api_server", Node.start_head_processes),
        (Node, "start_monitor", Node.start_head_processes),
        (Node, "start_log_monitor", Node.start_ray_processes),
    ],
)
def test_ray_has_each_internal_and_reads_it_where_ktray_relies_on_it(module: Any, name: str, reader: Any) -> None:
    assert hasattr(module, name), f"Ray {ray.__version__} has no {module.__name__}.{name}: see ktray/scheduler/ray_session.py"
    if reader is not None:
        assert name in inspect.getsource(inspect.unwrap(reader)), f"Ray {ray.__version__} reads {name} elsewhere now"


def test_a_ray_without_an_internal_is_refused_with_the_name_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ray_constants, "ENABLE_RAY_CLUSTER")
    with pytest.raises(PreflightFailed, match=r"has no ray._private.ray_constants.ENABLE_RAY_CLUSTER"):
        ray_session.listen_on_loopback_only()


def test_the_processes_of_our_own_ray_and_its_workers_are_found_by_its_folder(ray_home: Any) -> None:
    node = worker._global_node
    started = {info.process.pid for group in node.all_processes.values() for info in group}  # type: ignore[union-attr]
    function: Any = ray.remote(lambda: os.getpid())
    started.add(ray.get(function.options(num_cpus=0).remote()))
    found = {process.pid for process in ray_processes(str(ray_home.temporary))}
    assert started <= found | {pid for pid in started if not psutil.pid_exists(pid)}
    assert os.getpid() not in found
    assert ray_processes("/tmp/ktray-of-nobody") == []


SIGNALLED = """
import os, signal, threading, time
import ray
from ktray.scheduler.ray_session import sigterm_handler_kept
arrived = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: arrived.set())
with sigterm_handler_kept():
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80_000_000)
    os.kill(os.getpid(), signal.SIGTERM)  # while Ray's own handler is there
    arrived.wait(2)
time.sleep(4)
print("alive", arrived.is_set(), signal.getitimer(signal.ITIMER_REAL)[0])
ray.shutdown()
"""


def test_a_sigterm_that_meets_ray_s_own_handler_does_not_abort_the_process_later() -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["alive True 0.0"]), done.stderr[-2000:]

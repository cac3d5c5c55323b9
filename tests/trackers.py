"""Tracking sessions, real MLflow servers, and what MLflow has stored."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktray.tracking import Tracker, default_uri, ui_server

ROOT = Path(__file__).parents[1]


def session(home: Path, study: str, uri: str = "", **options: Any) -> Tracker:
    tracker = Tracker(uri or default_uri(home), home, study, **options)
    tracker.start()
    return tracker


def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def runs_of(uri: str, study: str) -> dict[str, Any]:
    """Return name -> run. Two runs of one name fail the test."""
    experiment = client(uri).get_experiment_by_name(study)
    runs = client(uri).search_runs([experiment.experiment_id])
    names = [run.info.run_name for run in runs]
    assert len(set(names)) == len(names), names
    return dict(zip(names, runs, strict=True))


def history(uri: str, run: Any, metric: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client(uri).get_metric_history(run.info.run_id, metric))


def spool_of(home: Path, study: str) -> Path:
    return home / "studies" / study / "tracking"


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a process that runs `code`."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def wait_for_all_written(home: Path, study: str) -> None:
    wait_for(lambda: (spool_of(home, study) / "events.jsonl").stat().st_size == 0)


@contextmanager
def server(database: Path, port: int) -> Iterator[str]:
    """Run a real MLflow server, and kill it at the end with SIGKILL."""
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(database.parent / "artifacts")),
    ]
    process = subprocess.Popen(
        command,
        env={**os.environ, **ui_server.SERVER_SETTINGS},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"))
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False

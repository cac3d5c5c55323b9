"""MLflow's own pages on the right store: one light server on this machine, gone when its terminal says so."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from ktray.errors import UserError
from ktray.tracking.connection import checked, sqlite_path
from ktray.tracking.mlflow_names import without_password
from ktray.tracking.pages import view_page

# With job execution on, `mlflow server` is ten processes and 1.7 GB, some of which outlive it.
ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONWARNINGS": "ignore"}
GRACE = 5.0  # seconds between asking the server to end and ending it


def serve(uri: str, port: int) -> int:
    """Serves the MLflow UI of a sqlite tracker on 127.0.0.1 until Ctrl-C or SIGTERM; names the URL of any other tracker.

    Args:
        uri: such as `default_uri` gives.
        port: TCP port on the loopback interface.

    Returns:
        Exit code: 0 after Ctrl-C or SIGTERM, else the server's own.

    Raises:
        UserError: there is no such database yet, or the port is taken.
    """
    uri = checked(uri)
    database = sqlite_path(uri)
    if database is None:
        if urlsplit(uri).scheme not in ("http", "https"):
            raise UserError(f"{without_password(uri)} has no pages of ours", "--tracking", "Use its own server's URL.")
        print(f"this tracker has its own pages: {without_password(uri)}", file=sys.stderr)
        return 0
    if not database.exists():
        raise UserError(f"there are no runs in {database} yet", "ktray ui", "Start a search, or name another --tracking.")
    _check_free(port)
    with _ends_as_interrupt(), _server(_command(uri, database, port)) as server:
        try:
            if _answers(server, port):
                print(f"MLflow UI on http://127.0.0.1:{port} (Ctrl-C ends it)", file=sys.stderr)
                for study, page in _studies(f"http://127.0.0.1:{port}"):
                    print(f"  {study}: trials, best first, on {page}", file=sys.stderr)
            return server.wait()
        except KeyboardInterrupt:
            return 0


def _command(uri: str, database: Path, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", uri, "--registry-store-uri", uri),
        *("--default-artifact-root", (database.parent / "mlartifacts").as_uri(), "--no-serve-artifacts"),
        *("--host", "127.0.0.1", "--port", str(port), "--allowed-hosts", f"127.0.0.1:{port},localhost:{port}"),
        *("--workers", "1", "--uvicorn-opts", "--log-level warning"),
    ]


@contextmanager
def _server(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own, so that all it started ends with it."""
    environment = {**os.environ, **ENVIRONMENT}
    server = subprocess.Popen(
        command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno()
    )
    try:
        yield server
    finally:
        _end(server)


def _end(server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + GRACE
    _signal_group(server, signal.SIGTERM)
    while time.monotonic() < deadline and _signal_group(server, 0):
        server.poll()  # reaps the leader: a zombie would keep the group alive
        time.sleep(0.05)
    _signal_group(server, signal.SIGKILL)
    server.wait()


def _signal_group(server: subprocess.Popen[bytes], number: int) -> bool:
    """Whether any process of the server's group was there to get the signal."""
    try:
        os.killpg(server.pid, number)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def _ends_as_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal end the server as Ctrl-C does, instead of leaving it behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: dict[int, Any] = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"port {port} is taken ({error.strerror})", "ktray ui", "Name another with --port.") from error


def _studies(server: str) -> list[tuple[str, str]]:
    """Name and page of the latest studies; none if the server has other ideas about being asked."""
    question = {"filter": "tags.`ktray.study` LIKE '%'", "max_results": 5, "order_by": ["last_update_time DESC"]}
    request = urllib.request.Request(
        f"{server}/api/2.0/mlflow/experiments/search", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            found = json.load(reply).get("experiments", [])
        return [(each["name"], f"{server}/{view_page(each['experiment_id'])}") for each in found]
    except (OSError, ValueError, KeyError):
        return []


def _answers(server: subprocess.Popen[bytes], port: int) -> bool:
    """Waits until the server accepts connections; False if it ended first."""
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return True
    return False

"""`ktray ui`: MLflow's own web pages for a sqlite tracker, served on this machine until Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from ktray.errors import UserError
from ktray.output import print_err
from ktray.redaction import without_secrets
from ktray.tracking.artifact_locations import FOLDER, follow_home
from ktray.tracking.connection import sqlite_path, validated_uri
from ktray.tracking.ui_pages import DATABASE

# With job execution, `mlflow server` is ten processes with 1.7 GB, and some outlive it.
SERVER_SETTINGS = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PYTHONWARNINGS": "ignore",
}
STOP_SECONDS = 5.0  # between SIGTERM and SIGKILL


def serve(uri: str, port: int, allowed_hosts: Sequence[str] = ()) -> int:
    """Serve the MLflow UI of a sqlite tracker on 127.0.0.1 until Ctrl-C or SIGTERM. Of a server, print the URL.

    Args:
        uri: such as `default_uri` returns.
        port: TCP port on the loopback interface.
        allowed_hosts: names under which a proxy is reached, such as ``mlflow.example.org``; others than these and this machine
            are refused.

    Returns:
        Exit code: 0 after Ctrl-C or SIGTERM, otherwise that of the server.

    Raises:
        UserError: the database does not exist yet, or the port cannot be used.
    """
    uri = validated_uri(uri)
    database = sqlite_path(uri)
    if database is None:
        if urlsplit(uri).scheme not in ("http", "https"):
            raise UserError(
                f"{without_secrets(uri)} cannot be served by ktray", "--tracking", "Give the URL of its own server."
            )
        print_err(f"this tracker has its own pages: {without_secrets(uri)}")
        return 0
    if not database.exists():
        raise UserError(f"there are no runs in {database} yet", "ktray ui", "Start a search, or name another --tracking.")
    _check_free(port)
    try:
        follow_home(database, database.parent)
    except sqlite3.Error as error:
        print_err(f"ktray: images of a home that was moved may be missing: {database} cannot be changed ({error})")
    print_err(f"http://127.0.0.1:{port} will show {database}; Ctrl-C ends it")
    with _signals_interrupt(), _server(_command(uri, database, port, allowed_hosts), database) as server:
        try:
            if _wait_until_listening(server, port):
                print_err(f"MLflow UI on http://127.0.0.1:{port} (Ctrl-C ends it)")
                for study, page in _studies(f"http://127.0.0.1:{port}"):
                    print_err(f"  {study}: trials, best first, on {page}")
            return server.wait()
        except KeyboardInterrupt:
            return 0


def _command(uri: str, database: Path, port: int, allowed_hosts: Sequence[str]) -> list[str]:
    origins = [f"{scheme}://{host}" for host in allowed_hosts for scheme in ("http", "https")]
    hosts = [f"127.0.0.1:{port}", f"localhost:{port}", *allowed_hosts]
    return [
        *(sys.executable, "-m", "ktray.tracking.ui_pages", "server"),
        *("--backend-store-uri", uri, "--registry-store-uri", uri),
        *("--default-artifact-root", (database.parent / FOLDER).as_uri(), "--no-serve-artifacts"),
        *("--host", "127.0.0.1", "--port", str(port), "--allowed-hosts", ",".join(hosts)),
        *(("--cors-allowed-origins", ",".join(origins)) if origins else ()),
        *("--workers", "1", "--uvicorn-opts", "--log-level warning"),
    ]


@contextmanager
def _server(command: list[str], database: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server in its own process group, so that its children end with it."""
    environment = {**os.environ, **SERVER_SETTINGS, DATABASE: str(database)}
    server = subprocess.Popen(
        command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno()
    )
    try:
        yield server
    finally:
        _stop(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    _signal_group(server, signal.SIGTERM)
    while time.monotonic() < deadline and _signal_group(server, 0):
        server.poll()  # reap the leader: as a zombie it would keep the group alive
        time.sleep(0.05)
    _signal_group(server, signal.SIGKILL)
    server.wait()


def _signal_group(server: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal to the server's process group; return whether any process received it."""
    try:
        os.killpg(server.pid, number)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Make SIGTERM and a closed terminal stop the server as Ctrl-C does, so that it does not outlive this process."""

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
            problem = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise UserError(f"port {port} {problem}", "ktray ui", "Choose another with --port.") from error


def _studies(server: str) -> list[tuple[str, str]]:
    """Return name and page of the latest studies; nothing if the server does not answer as expected."""
    query = {"filter": "tags.`ktray.study` LIKE '%'", "max_results": 5, "order_by": ["last_update_time DESC"]}
    request = urllib.request.Request(
        f"{server}/api/2.0/mlflow/experiments/search", json.dumps(query).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            found = json.load(reply).get("experiments", [])
        return [(study["name"], f"{server}/#/experiments/{study['experiment_id']}") for study in found]
    except (OSError, ValueError, KeyError):
        return []


def _wait_until_listening(server: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the server accepts connections. Return False if it ended before that."""
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return True
    return False

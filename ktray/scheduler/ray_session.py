"""Ray begins and ends here: our own quiet one on this machine, or a cluster that somebody else started."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ktray.errors import PreflightFailed, UserError
from ktray.scheduler import stale_sessions
from ktray.scheduler.resources import RuntimeSettings
from ktray.scheduler.worker_environment import environment, plugin_places
from ktray.stores.locks import FileLock, lock_home

OBJECT_STORE_BYTES = 1 << 30
KNOCK_SECONDS = 5.0
KEPT_BYTES = 20_000
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


@dataclass
class RaySession:
    """A driver's connection to Ray.

    Attributes:
        home: where its lock, token and logs are.
        address: of the cluster; None if this session started Ray itself.
        log: file with what Ray says.
        warnings: sentences for the user.
        schedulers: `end` functions of what was founded in this session, called by `stop`.
        connected: whether this process's one connection to Ray is this session's, so that `stop` ends no other's.
    """

    home: Path
    address: str | None
    runtime: RuntimeSettings
    log: Path
    warnings: list[str] = field(default_factory=list)
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    schedulers: list[Callable[[], None]] = field(default_factory=list)
    lock: FileLock | None = None
    temporary: Path | None = None
    connected: bool = False


def start(home: Path, address: str | None, runtime: RuntimeSettings) -> RaySession:
    """Ray on this machine for this home, or a connection to the cluster at `address`.

    Ray's own messages go to a file, never to the terminal.

    Raises:
        UserError: another process uses this home, or this one is connected to Ray already, or there is no cluster at
            `address`, or it refuses our token.
        PreflightFailed: Ray does not start.
    """
    home = home.absolute()
    (home / "logs").mkdir(parents=True, exist_ok=True)
    lock = lock_home(home) if address is None else None
    session = RaySession(
        home, address, runtime, home / "logs" / f"ray-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log", lock=lock
    )
    try:
        os.environ.update(QUIET)
        _to_file(session.log)
        with _sigterm_stays_ours():
            if address is None:
                _start_own(session)
            else:
                _connect(session, address)
        _to_file(session.log)
        atexit.register(stop, session)
    except BaseException:
        stop(session)
        raise
    return session


def stop(session: RaySession) -> None:
    """End what this session started: all of its processes on our own Ray, our actors on a foreign cluster."""
    import ray

    for end in session.schedulers:
        end()
    session.schedulers.clear()
    processes: list[psutil.Process] = []
    if session.connected:
        atexit.unregister(stop)
        processes = _own_processes() if session.address is None else []
        ray.shutdown()
        session.connected = False
    _, alive = psutil.wait_procs(processes, timeout=3)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
    if session.temporary is not None:
        _keep_errors(session.temporary, session.log)
        shutil.rmtree(session.temporary, ignore_errors=True)
        stale_sessions.remove_all(session.home)
    if session.lock is not None:
        session.lock.release()


def _start_own(session: RaySession) -> None:
    import ray
    from ray._private import ray_constants

    _claim_connection(session)
    # Unix sockets live below this folder and their paths may have 107 bytes.
    root = Path("/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir())
    session.temporary = root / f"ktray-{secrets.token_hex(4)}"
    kept = [*stale_sessions.remove(session.home), session.temporary]
    (session.home / "ray").write_text("".join(f"{folder}\n" for folder in kept))  # before it is there: a kill may come now
    session.temporary.mkdir(mode=0o700)
    token = session.home / "token"
    if not token.exists():
        _write_private(token, secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    _use_token()
    # Ray's switch for laptops: it then listens on the loopback interface only.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False  # type: ignore[attr-defined]
    try:
        ray.init(
            address="local",
            num_cpus=session.runtime.cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _temp_dir=str(session.temporary),
            _node_ip_address="127.0.0.1",
            runtime_env={"env_vars": environment()},
            **_quiet(),
        )
    except (RuntimeError, OSError, TimeoutError) as error:
        raise PreflightFailed(f"Ray does not start: {' '.join(str(error).split())[:300]}. Its log is {session.log}") from error


def _connect(session: RaySession, address: str) -> None:
    import ray

    _refuse_unreachable(address)
    _claim_connection(session)
    if "RAY_AUTH_MODE" not in os.environ and ("RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ):
        _use_token()
    try:
        # Nodes have ktray installed, but not what the user wrote beside the space: Ray takes it there.
        shipped = {"py_modules": places} if (places := plugin_places()) else {}
        ray.init(address=address, runtime_env={"env_vars": environment(), **shipped}, **_quiet())
    except ray.exceptions.AuthenticationError:
        raise UserError(
            f"the cluster at {address} refuses our token", "--address", "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH."
        ) from None
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise UserError(
            f"there is no cluster at {address} ({' '.join(str(error).split())[:200]})",
            "--address",
            "Start one with `ray start --head`.",
        ) from None
    if not _has_token():
        session.warnings.append(
            f"The cluster at {address} has no token authentication: everybody who reaches it can run code there. "
            "Start it with RAY_AUTH_MODE=token."
        )


def _claim_connection(session: RaySession) -> None:
    """A process has one connection to Ray; whatever Ray starts from here on, also if it fails midway, `stop` ends."""
    import ray

    if ray.is_initialized():
        raise UserError(
            "this process is connected to Ray already, and a process has only one connection",
            instead="Call ray.shutdown() first, or search in a process of its own.",
        )
    session.connected = True


def _refuse_unreachable(address: str) -> None:
    """Ray itself would knock for minutes, and write on the terminal meanwhile."""
    if address.startswith("ray://"):
        raise UserError(
            f"{address} is Ray Client, which a search cannot use",
            "--address",
            "Give the HOST:PORT of the cluster, or auto on one of its machines.",
        )
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"nothing answers at {address} ({getattr(error, 'strerror', None) or error})",
            "--address",
            "Give the HOST:PORT that `ray start --head` printed.",
        ) from None


def _quiet() -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}


def _use_token() -> None:
    from ray._raylet import Config  # type: ignore[attr-defined]

    os.environ["RAY_AUTH_MODE"] = "token"
    Config.initialize("")  # Ray has read its settings when it was imported, and so do its own entry points


def _has_token() -> bool:
    from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]

    return bool(get_authentication_mode() == AuthenticationMode.TOKEN)


@contextmanager
def _sigterm_stays_ours() -> Iterator[None]:
    """Who handles SIGTERM goes on doing so: Ray would take it, in Python to exit wherever we are, in C++ to print a stack."""
    from ray._private import utils

    takes, handler = utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)
    ours = handler is not signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    if ours:
        utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = takes
        if ours:
            signal.signal(signal.SIGTERM, handler)


def _to_file(log: Path) -> None:
    """Send to a file what Ray says: its loggers, and the lines that it prints whatever `log_to_driver` is."""
    import ray._private.worker

    handler = logging.FileHandler(log, delay=True)
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk: its lines are not worth a traceback
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("ray", "ray.tune", "ray.train", "ray.air", "ray.data"):
        logger = logging.getLogger(name)
        for old in logger.handlers[:]:
            logger.removeHandler(old)
            old.close()
        logger.propagate = name != "ray"
    logging.getLogger("ray").addHandler(handler)

    def write(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        with suppress(OSError), open(log, "a") as file:
            file.writelines(f"({data.get('pid')}) {line}\n" for line in data.get("lines", ()))

    # Private, but the only place: messages about dead workers are printed by the driver itself.
    ray._private.worker.print_to_stdstream = write


def _own_processes() -> list[psutil.Process]:
    """Ray's processes that this process started, and all that these started."""
    import ray._private.worker

    node = ray._private.worker._global_node
    found: dict[int, psutil.Process] = {}
    groups: list[list[Any]] = list(node.all_processes.values()) if node else []
    for group in groups:
        for info in group:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(info.process.pid)
                found |= {each.pid: each for each in [process, *process.children(recursive=True)]}
    return list(found.values())


def _keep_errors(temporary: Path, log: Path) -> None:
    """Append to our log what workers wrote to stderr, such as the last words of one that crashed; the end of each."""
    for path in sorted(temporary.glob("session_2*/logs/worker-*.err")):
        with suppress(OSError), open(path, "rb") as file, open(log, "a") as kept:
            file.seek(max(0, path.stat().st_size - KEPT_BYTES))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if not line.startswith(":")]
            kept.writelines(f"({path.stem[:40]}) {line}\n" for line in lines)


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)

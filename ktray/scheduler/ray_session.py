"""Sessions on Ray: a Ray of our own on this machine, or a connection to a cluster that somebody else started.

Drivers with the same code and environment share a scheduler: see `code_and_environment_hash`.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import ktray
from ktray.errors import PreflightFailed, UserError
from ktray.fingerprint import fingerprint
from ktray.output import VisibleFormatter
from ktray.scheduler import orphan_cleanup
from ktray.scheduler.orphan_cleanup import end_ray_processes
from ktray.scheduler.ray_liveness import make_cluster_failure_check, make_own_ray_failure_check, watch
from ktray.scheduler.resources import RuntimeSettings
from ktray.stores.locks import FileLock, lock_home
from ktray.text import visible

OBJECT_STORE_BYTES = 1 << 30
CONNECT_SECONDS = 5.0
LEAVE_SECONDS = 10.0  # for the schedulers of a session to let it go
KEPT_LOG_BYTES = 20_000
SIGACTION_BYTES = 1024  # more than C's struct sigaction has anywhere
RAY_ENVIRONMENT = {
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
        log: file for Ray's messages.
        warnings: sentences for the user.
        on_stop: functions that `disconnect_schedulers` calls, such as those that disconnect this session from its schedulers.
        on_loss: called once, in a thread, if Ray ends on its own, with what has ended: ``its GCS (process 4711) is gone``.
        loss: that, or None while Ray runs.
        ends_process: whether this process ends with the session, by ``os._exit``.
        started: whether Ray runs, and not only some of its processes.
        called_off: set by whoever stops the session while `start_ray` runs in another thread, which then starts nothing more.
        connected: whether this session owns the process's one connection to Ray, so that `stop` closes no other's.
        cleanup: the process that ends what is left of our own Ray if this process is killed.
        end_watch: ends the thread that watches Ray.
        environment: what all processes of our own Ray inherit; None where somebody else has started it.
    """

    home: Path
    address: str | None
    runtime: RuntimeSettings
    log: Path
    warnings: list[str] = field(default_factory=list)
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    on_stop: list[Callable[[], None]] = field(default_factory=list)
    on_loss: Callable[[str], None] = lambda cause: None
    loss: str | None = None
    ends_process: bool = False
    lock: FileLock | None = None
    temporary: Path | None = None
    started: bool = False
    called_off: bool = False
    connected: bool = False
    cleanup: subprocess.Popen[bytes] | None = None
    end_watch: Callable[[], None] = lambda: None
    environment: dict[str, str] | None = None


def start(
    home: Path,
    address: str | None,
    runtime: RuntimeSettings,
    on_loss: Callable[[str], None] = lambda cause: None,
    ends_process: bool = False,
    lock: FileLock | None = None,
) -> RaySession:
    """Ray on this machine for this home, or a connection to the cluster at `address`; see `open_session` and `start_ray`."""
    session = open_session(home, address, runtime, on_loss, ends_process, lock)
    start_ray(session)
    return session


def open_session(
    home: Path,
    address: str | None,
    runtime: RuntimeSettings,
    on_loss: Callable[[str], None] = lambda cause: None,
    ends_process: bool = False,
    lock: FileLock | None = None,
) -> RaySession:
    """A session in which nothing runs yet.

    Args:
        on_loss: called once, in a thread, if Ray ends on its own, with what has ended.
        ends_process: whether this process ends with the session, by ``os._exit``. Then file descriptor 2 goes to the log, too,
            to which Ray's C++ code writes; ``sys.stderr`` must have another.
        lock: the home's, if the caller has it already; the session releases it.

    Raises:
        UserError: another process uses this home.
    """
    home = home.absolute()
    (home / "logs").mkdir(parents=True, exist_ok=True)
    lock = lock or (lock_home(home) if address is None else None)
    log = home / "logs" / f"ray-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    return RaySession(home, address, runtime, log, lock=lock, on_loss=on_loss, ends_process=ends_process)


def start_ray(session: RaySession) -> None:
    """Start Ray, or connect to the session's cluster. Ray's own messages go to a file, never to the terminal.

    The processes of our own Ray end with the thread that calls this.

    Raises:
        UserError: this process is connected to Ray already, or there is no cluster at the address, or it refuses our token.
        PreflightFailed: Ray does not start.
    """
    try:
        os.environ.update(RAY_ENVIRONMENT)
        _redirect_ray_messages(session.log)
        if session.ends_process:
            with open(session.log, "a") as file:
                os.dup2(file.fileno(), 2)
        with sigterm_handler_kept(), sighup_blocked(), signal_actions_kept():
            if session.address is None:
                _start_own_ray(session)
            else:
                _connect_to_cluster(session, session.address)
        _redirect_ray_messages(session.log)
        session.started = True
        atexit.register(stop, session)
    except BaseException:
        if not session.called_off:  # otherwise whoever has called it off stops it
            stop(session)
        raise


def disconnect_schedulers(session: RaySession) -> None:
    """Leave the schedulers of this session, which end with their last driver; takes some seconds at most."""
    ends, session.on_stop = session.on_stop[:], []

    def disconnect() -> None:
        for end in ends:
            with suppress(Exception):  # a scheduler that does not answer: it ends by itself, or with our own Ray
                end()

    if ends and session.loss is None:
        thread = threading.Thread(target=disconnect, daemon=True)
        thread.start()
        thread.join(timeout=LEAVE_SECONDS)


def stop(session: RaySession) -> None:
    """End what this session started: all processes of our own Ray, or our actors on somebody else's cluster.

    If this process ends now, its connection to Ray stays open, because closing it may end the process on the spot: a thread
    that still uses Ray finds that the connection is closed, and Ray exits.
    """
    disconnect_schedulers(session)
    session.end_watch()
    atexit.unregister(stop)
    if session.connected and not session.ends_process:
        _close_ray_connection(session)
    session.connected = False
    if session.temporary is not None:
        end_ray_processes(str(session.temporary), grace=0.0 if session.ends_process or session.loss else 3.0)
        _append_worker_stderr(session.temporary, session.log)
        shutil.rmtree(session.temporary, ignore_errors=True)
        _remove_folders_with_retries(session.home)
    if session.cleanup is not None:
        session.cleanup.kill()
        session.cleanup.communicate()
    if session.lock is not None:
        session.lock.release()


def _close_ray_connection(session: RaySession) -> None:
    """Close the connection to Ray, even to one that has ended."""
    import ray

    try:
        ray.shutdown()
    except Exception as error:  # noqa: BLE001 - whatever Ray raises while it ends, what it started is ended below
        with suppress(OSError), open(session.log, "a") as file:
            file.write(f"ray.shutdown() failed: {type(error).__name__}: {error}\n")


def _start_own_ray(session: RaySession) -> None:
    import ray

    _claim_connection(session)
    # Unix sockets live below this folder and their paths may have 107 bytes.
    root = Path("/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir())
    session.temporary = root / f"ktray-{secrets.token_hex(4)}"
    folders = [*remove_folders_of_killed_sessions(session.home), session.temporary]
    (session.home / "ray").write_text("".join(f"{folder}\n" for folder in folders))  # before it exists: a kill may come now
    session.temporary.mkdir(mode=0o700)
    session.cleanup = _start_cleanup_process(session.temporary)
    _watch_ray(session, make_own_ray_failure_check(lambda: session.started))
    token = session.home / "token"
    if not token.exists():
        _write_private_file(token, secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    _enable_token()
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's own processes read it: loopback only
    listen_on_loopback_only()
    if session.called_off:
        raise PreflightFailed("the start of Ray was called off")
    if threading.current_thread() is not threading.main_thread():
        logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # it warns that it sets no SIGTERM handler here
    session.environment = worker_environment()
    try:
        with only_needed_processes(), _environment_of(session.environment):
            ray.init(
                address="local",
                num_cpus=session.runtime.cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                _temp_dir=str(session.temporary),
                _node_ip_address="127.0.0.1",
                **_quiet_options(),
            )
    except PreflightFailed:
        raise
    except Exception as error:  # of whatever class: Ray raises a bare Exception where its raylet takes longer than 30 s
        raise PreflightFailed(f"Ray does not start: {' '.join(str(error).split())[:300]}. Its log is {session.log}") from error


@contextmanager
def _environment_of(variables: Mapping[str, str]) -> Iterator[None]:
    """Processes that start within it inherit these variables.

    All of Ray's processes do. A `runtime_env` would say the same to workers only, at a price: none of the processes that Ray
    has started ahead could be used, and each new one would import Ray twice.
    """
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def actor_runtime_env(session: RaySession) -> dict[str, Any] | None:
    """What the `runtime_env` of an actor must say, because it does not inherit it; None for nothing."""
    wanted = worker_environment()
    return None if session.environment == wanted else {"env_vars": wanted}


def _connect_to_cluster(session: RaySession, address: str) -> None:
    import ray

    if address == "auto":
        address = found_address()
    if address.startswith("ray://"):
        raise UserError(
            f"{address} is Ray Client, which a search cannot use",
            "--address",
            "Give the HOST:PORT of the cluster, or auto on one of its machines.",
        )
    require_reachable(address, "Give the HOST:PORT that `ray start --head` printed.")
    _claim_connection(session)
    use_token_of_user()
    try:
        # Nodes have ktray installed, but not the user's own plugins: Ray ships them.
        shipped = {"py_modules": paths} if (paths := plugin_paths()) else {}
        ray.init(address=address, runtime_env={"env_vars": worker_environment(), **shipped}, **_quiet_options())
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
    context = ray.get_runtime_context()
    _watch_ray(session, make_cluster_failure_check(context.gcs_address, context.get_node_id()))
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        session.warnings.append(
            f"The cluster at {address} has no token authentication: everybody who reaches it can run code there. "
            "Start it with RAY_AUTH_MODE=token."
        )


def _start_cleanup_process(temporary: Path) -> subprocess.Popen[bytes]:
    """The process that outlives this one if it is killed. Its process group is its own, so that Ctrl-C does not reach it."""
    process = subprocess.Popen(
        [sys.executable, "-P", orphan_cleanup.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    assert process.stdin is not None
    process.stdin.write(f"{temporary}\n".encode())
    process.stdin.flush()
    return process


def _watch_ray(session: RaySession, failure: Callable[[], str | None]) -> None:
    def record_loss(cause: str) -> None:
        session.loss = cause
        session.on_loss(cause)

    session.end_watch = watch(failure, record_loss)


def _claim_connection(session: RaySession) -> None:
    """Note that this session owns the process's one connection to Ray: `stop` ends what Ray starts from here on."""
    import ray

    if ray.is_initialized():
        raise UserError(
            "this process is connected to Ray already, and a process has only one connection",
            instead="Call ray.shutdown() first, or search in a process of its own.",
        )
    session.connected = True


def use_token_of_user() -> None:
    """Have Ray use the token that the environment names, where it does not say whether to use one."""
    if "RAY_AUTH_MODE" not in os.environ and ("RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ):
        _enable_token()


def require_reachable(address: str, instead: str) -> None:
    """Try a HOST:PORT first: Ray itself would retry for minutes and print to the terminal meanwhile.

    Raises:
        UserError: nothing answers there.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"nothing answers at {address} ({why})", "--address", instead) from None


def _quiet_options() -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}


def _enable_token() -> None:
    os.environ["RAY_AUTH_MODE"] = "token"
    reload_ray_config()


def _redirect_ray_messages(log: Path) -> None:
    """Redirect Ray's output to a file: its loggers, and the lines that it prints whatever `log_to_driver` says."""
    handler = logging.FileHandler(log, delay=True)
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk: lost log lines are not worth a traceback
    handler.setFormatter(VisibleFormatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("ray", "ray.tune", "ray.train", "ray.air", "ray.data"):
        logger = logging.getLogger(name)
        for old in logger.handlers[:]:
            logger.removeHandler(old)
            old.close()
        logger.propagate = name != "ray"
    logging.getLogger("ray").addHandler(handler)

    def write(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        with suppress(OSError), open(log, "a") as file:
            file.writelines(f"({data.get('pid')}) {visible(str(line))}\n" for line in data.get("lines", ()))

    redirect_driver_messages(write)


def _append_worker_stderr(temporary: Path, log: Path) -> None:
    """Append to our log the end of what each worker wrote to stderr, such as the reason why one crashed."""
    for path in sorted(temporary.glob("session_2*/logs/worker-*.err")):
        with suppress(OSError), open(path, "rb") as file, open(log, "a") as kept:
            file.seek(max(0, path.stat().st_size - KEPT_LOG_BYTES))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if not line.startswith(":")]
            kept.writelines(f"({path.stem[:40]}) {visible(line)}\n" for line in lines)


def _write_private_file(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


# ---- folders of sessions that were killed; HOME/ray lists where the Ray of this home kept its sockets and logs

REMOVAL_TRIES = 30  # a tenth of a second apart: Ray's processes write into their folder until they end


def remove_stale_folders(home: Path) -> None:
    """Remove what killed sessions left, unless a session uses this home; for commands that need no Ray."""
    if not (home / "ray").exists():
        return
    try:
        lock = lock_home(home)
    except UserError:
        return
    with lock:
        _remove_folders_with_retries(home)


def _remove_folders_with_retries(home: Path) -> None:
    """Retry `remove_folders_of_killed_sessions` for some seconds; the next session removes what is left even then."""
    for _ in range(REMOVAL_TRIES):
        if not remove_folders_of_killed_sessions(home):
            return
        time.sleep(0.1)


def remove_folders_of_killed_sessions(home: Path) -> list[Path]:
    """Remove the folders of sessions that were killed; under the home's lock, so nobody uses them.

    Returns:
        Those that are still there: Ray's processes outlive a killed driver by seconds, and write into them.
    """
    try:
        listed = [Path(line) for line in (home / "ray").read_text().splitlines()]
    except FileNotFoundError:
        return []
    ours = [folder for folder in listed if folder.exists() and _is_own_session_folder(folder)]
    for folder in ours:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder for folder in ours if folder.exists()]


def _is_own_session_folder(folder: Path) -> bool:
    """Whether we may have made this folder: whoever can write HOME/ray must not choose what we remove."""
    parents = {Path("/tmp"), Path(tempfile.gettempdir())}
    if not folder.name.startswith("ktray-") or folder.parent not in parents:
        return False
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


# ---- the private names of Ray that are set or called here, because nothing public does the same; pyproject.toml has the
# versions of Ray that this was tested with. Each function refuses a Ray that lacks the name: to set one that Ray no longer
# reads would silently do nothing.


def listen_on_loopback_only() -> None:
    """Have a Ray that this process starts listen on the loopback interface only.

    Ray's switch for that (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0) is read when Ray is imported, which may be long ago.
    """
    from ray._private import ray_constants

    _require_attribute(ray_constants, "ENABLE_RAY_CLUSTER")
    ray_constants.ENABLE_RAY_CLUSTER = False


def found_address() -> str:
    """The HOST:PORT of the Ray on this machine: that of RAY_ADDRESS, or of a process that runs here.

    Raises:
        UserError: there is none.
    """
    from ray._private import services

    _require_attribute(services, "canonicalize_bootstrap_address_or_die")
    try:
        return str(services.canonicalize_bootstrap_address_or_die("auto"))
    except (ConnectionError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            "there are several Rays on this machine" if "multiple" in said else "there is no cluster at auto: no Ray runs here",
            "--address",
            "Give the HOST:PORT of one." if "multiple" in said else "Start one with `ray start --head`, or give its HOST:PORT.",
        ) from None


def reload_ray_config() -> None:
    """Have Ray's C++ part read the environment again, as Ray's own entry points do after they have set a token."""
    from ray import _raylet

    _require_attribute(_raylet, "Config")
    _raylet.Config.initialize("")  # type: ignore[attr-defined]


def redirect_driver_messages(write: Callable[..., None]) -> None:
    """Have `write(data, ignore_prefix)` called for what Ray prints on the driver's terminal whatever `log_to_driver` says.

    These are messages about dead workers and nodes; ``data["lines"]`` holds the text.
    """
    from ray._private import worker

    _require_attribute(worker, "print_to_stdstream")
    worker.print_to_stdstream = write


@contextmanager
def sigterm_handler_kept() -> Iterator[None]:
    """Keep this process's own handler of SIGTERM while Ray starts.

    Ray would replace it, in Python by one that exits wherever the main thread is, in C++ by one that prints a stack and sets an
    alarm that aborts the process three seconds later, even if this one's own handler has come to hold meanwhile.
    """
    from ray._private import utils

    _require_attribute(utils, "set_sigterm_handler")
    original, handler = utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)
    has_handler = handler is not signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    alarm_was_set = signal.getitimer(signal.ITIMER_REAL)[0] > 0
    if has_handler:
        utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = original
        if has_handler:
            signal.signal(signal.SIGTERM, handler)
            if not alarm_was_set:
                signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def sighup_blocked() -> Iterator[None]:
    """Block SIGHUP in this thread: processes that it starts never get it, as Ray itself does it for SIGINT.

    A terminal that closes sends it to all of them, and a search could then no longer end in order.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def signal_actions_kept() -> Iterator[None]:
    """Keep what the signals that end a search do in this process, below Python, while Ray starts; in any thread.

    Ray's C++ part replaces the action of SIGTERM, and only the main thread could restore it through Python.
    """
    library = ctypes.CDLL(None)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: ctypes.create_string_buffer(SIGACTION_BYTES) for number in numbers}
    for number, action in before.items():
        library.sigaction(int(number), None, action)
    try:
        yield
    finally:
        for number, action in before.items():
            library.sigaction(int(number), action, None)


@contextmanager
def only_needed_processes() -> Iterator[None]:
    """Leave out processes of Ray's head that nobody here needs: the dashboard's, the autoscaler's, and the one that reads logs.

    Each imports much of Ray, `ray.init` waits for the dashboard even where ``include_dashboard`` is False, and together they
    hold some 150 MB. Logs are kept by `_append_worker_stderr`.
    """
    from ray._private.node import Node

    names = ("start_api_server", "start_monitor", "start_log_monitor")
    for name in names:
        _require_attribute(Node, name)
    originals = {name: getattr(Node, name) for name in names}

    def start_nothing(node: Any, **options: Any) -> None:
        node._webui_url = ""

    for name in names:
        setattr(Node, name, start_nothing)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(Node, name, original)


def _require_attribute(module: ModuleType | Any, name: str) -> None:
    if not hasattr(module, name):
        import ray

        raise PreflightFailed(
            f"Ray {ray.__version__} has no {module.__name__}.{name}, which ktray needs. "
            "Install the version of Ray that ktray's pyproject.toml names"
        )


def worker_environment() -> dict[str, str]:
    """Environment of the processes of a scheduler: where this package is, which plugins are allowed, one thread per library."""
    outside = [entry or os.getcwd() for entry in sys.path if not entry.startswith((sys.prefix, sys.base_prefix))]
    parent = str(Path(ktray.__file__).parent.parent)
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = dict.fromkeys(os.path.abspath(folder) for folder in [parent, *outside, *given] if folder)
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    plugins = {name: value for name, value in os.environ.items() if name == "KTRAY_ALLOW_PLUGINS"}
    return {"PYTHONPATH": os.pathsep.join(folders), **dict.fromkeys(threads, "1"), **plugins}


def plugin_paths() -> list[str]:
    """Folder or file of each allowed plugin package that is installed here, to be shipped to the nodes of a cluster."""
    found = []
    for name in filter(None, os.environ.get("KTRAY_ALLOW_PLUGINS", "").split(",")):
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            found += list(spec.submodule_search_locations)[:1]
        elif spec is not None and spec.origin:
            found.append(spec.origin)
    return found


def code_and_environment_hash() -> str:
    """Hash of the code and environment that this driver's workers would have, whatever the order of folders and plugins."""
    given = worker_environment()
    lists = {"PYTHONPATH": os.pathsep, "KTRAY_ALLOW_PLUGINS": ","}
    entries = {name: sorted(filter(None, value.split(lists.get(name)))) for name, value in given.items()}
    return fingerprint([entries, _source_hash(("ktray", *entries.get("KTRAY_ALLOW_PLUGINS", ())))])


@cache
def _source_hash(packages: tuple[str, ...]) -> str:
    """Hash of these packages as they are when the driver first asks: drivers of two versions never share a broker."""
    digest = hashlib.sha256()
    for package in packages:
        for name, path in _source_files(package):
            digest.update(f"{package}/{name}".encode() + path.read_bytes())
    return digest.hexdigest()


def _source_files(package: str) -> Iterator[tuple[str, Path]]:
    """Relative name and path of a package's Python files, found without importing it."""
    spec = find_spec(package)
    if spec is None:
        return
    if spec.submodule_search_locations is None:
        yield "", Path(str(spec.origin))
    for folder in map(Path, spec.submodule_search_locations or ()):
        yield from ((str(path.relative_to(folder)), path) for path in sorted(folder.rglob("*.py")))

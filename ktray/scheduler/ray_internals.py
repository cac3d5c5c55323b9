"""The four private names of Ray that ktray uses, because nothing public does the same; tested with the Ray of pyproject.toml.

Each has one function here, which refuses a Ray that lacks the name: to set a name that Ray no longer reads would do nothing,
and say nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ktray.errors import PreflightFailed


def listen_on_loopback_only() -> None:
    """Have a Ray that this process starts listen on the loopback interface only.

    Ray's switch for that (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0) is read when Ray is imported, which may be long ago.
    """
    from ray._private import ray_constants

    _require(ray_constants, "ENABLE_RAY_CLUSTER")
    ray_constants.ENABLE_RAY_CLUSTER = False


def reload_settings() -> None:
    """Have Ray's C++ part read the environment again, as Ray's own entry points do after they have set a token."""
    from ray import _raylet

    _require(_raylet, "Config")
    _raylet.Config.initialize("")  # type: ignore[attr-defined]


def redirect_messages(write: Callable[..., None]) -> None:
    """Have `write(data, ignore_prefix)` called for what Ray prints on the driver's terminal whatever `log_to_driver` says.

    These are messages about dead workers and nodes; ``data["lines"]`` holds the text.
    """
    from ray._private import worker

    _require(worker, "print_to_stdstream")
    worker.print_to_stdstream = write


@contextmanager
def sigterm_handler_kept() -> Iterator[None]:
    """Keep this process's own handler of SIGTERM while Ray starts.

    Ray would replace it, in Python by one that exits wherever the main thread is, in C++ by one that prints a stack.
    """
    from ray._private import utils

    _require(utils, "set_sigterm_handler")
    original, handler = utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)
    has_handler = handler is not signal.SIG_DFL and threading.current_thread() is threading.main_thread()
    if has_handler:
        utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = original
        if has_handler:
            signal.signal(signal.SIGTERM, handler)


def _require(module: ModuleType | Any, name: str) -> None:
    if not hasattr(module, name):
        import ray

        raise PreflightFailed(
            f"Ray {ray.__version__} has no {module.__name__}.{name}, which ktray needs. "
            "Install the version of Ray that ktray's pyproject.toml names"
        )

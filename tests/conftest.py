"""One Ray for all tests that need one."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ktray.scheduler.resources import ResourceRequest, RuntimeSettings
from tests.child import Child

TOY_REQUESTS = {"images": ResourceRequest(helpers=3), "clusters": ResourceRequest(helpers=3)}


def pytest_configure() -> None:
    """Let tests and processes that they start react to Ctrl-C and SIGHUP, even if a background job or nohup ignores these."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """A process for hostile input, with a home of its own."""
    found = Child(tmp_path_factory.mktemp("home"))
    yield found
    found.end()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch with one thread, as in a stage."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ray_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A session on a Ray of its own, with room for several small schedulers (`ktray.scheduler.ray_session.RaySession`)."""
    from ktray.scheduler.ray_session import start, stop

    session = start(tmp_path_factory.mktemp("home"), None, RuntimeSettings(cpus=16))
    yield session
    stop(session)


class SchedulerFactory:
    """Starts schedulers, and ends them."""

    def __init__(self, session: Any) -> None:
        self.session, self.cleanups = session, []  # type: ignore[var-annotated]

    def __call__(self, store: Path, work: Callable[..., Any] | None = None, **settings: Any) -> Any:
        """A scheduler with two workers on this store, for the toy work by default; `settings` are fields of RuntimeSettings."""
        import toy_work

        from ktray.scheduler.client import connect

        runtime = RuntimeSettings(**{"cpus": 2, "stages": TOY_REQUESTS, **settings})
        session = dataclasses.replace(self.session, runtime=runtime, on_stop=self.cleanups)
        scheduler = connect(session, f"file://{store}", work or toy_work.work)
        self.cleanups.append(scheduler.shut_down_for_all_drivers)
        return scheduler

    def end(self) -> None:
        for end in self.cleanups:
            end()


@pytest.fixture
def start_scheduler(ray_home: Any) -> Iterator[SchedulerFactory]:
    """Starts schedulers that end with the test."""
    factory = SchedulerFactory(ray_home)
    yield factory
    factory.end()


@pytest.fixture(scope="session")
def toy_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `scheduler` publishes."""
    return tmp_path_factory.mktemp("toys") / "store"


@pytest.fixture(scope="session")
def scheduler(ray_home: Any, toy_store: Path) -> Iterator[Any]:
    """A scheduler of two workers for the toy work, shared by all tests."""
    factory = SchedulerFactory(ray_home)
    yield factory(toy_store)
    factory.end()

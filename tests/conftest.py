"""One Ray for all tests that need one."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ktray.crew.needs import Needs, Runtime

TOY_NEEDS = {"images": Needs(helpers=3), "clusters": Needs(helpers=3)}


def pytest_configure() -> None:
    """Processes that tests start hear Ctrl-C, even if pytest itself is a shell's background job, which is born deaf to it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
    """A session on a Ray of its own, with room for several small crews (`ktray.crew.runtime.Session`)."""
    from ktray.crew.runtime import start, stop

    session = start(tmp_path_factory.mktemp("home"), None, Runtime(cpus=16))
    yield session
    stop(session)


class Founder:
    """Founds crews and ends them."""

    def __init__(self, session: Any) -> None:
        self.session, self.ends = session, []  # type: ignore[var-annotated]

    def __call__(self, store: Path, work: Callable[..., Any] | None = None, **settings: Any) -> Any:
        """A crew of two workers on this store, for the toy work or another one; `settings` are fields of Runtime."""
        import toy_work

        from ktray.crew.client import connect

        runtime = Runtime(**{"cpus": 2, "stages": TOY_NEEDS, **settings})
        session = dataclasses.replace(self.session, runtime=runtime, crews=self.ends)
        crew = connect(session, f"file://{store}", work or toy_work.work)
        self.ends.append(crew.end)
        return crew

    def end(self) -> None:
        for end in self.ends:
            end()


@pytest.fixture
def found_crew(ray_home: Any) -> Iterator[Founder]:
    """Founds crews that end with the test."""
    founder = Founder(ray_home)
    yield founder
    founder.end()


@pytest.fixture(scope="session")
def toy_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `crew` publishes."""
    return tmp_path_factory.mktemp("toys") / "store"


@pytest.fixture(scope="session")
def crew(ray_home: Any, toy_store: Path) -> Iterator[Any]:
    """A crew of two workers for the toy work, shared by all tests."""
    founder = Founder(ray_home)
    yield founder(toy_store)
    founder.end()

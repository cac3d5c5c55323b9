"""One Ray for all tests that need one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ktray.crew.needs import Needs, Runtime

TOY_NEEDS = {"images": Needs(helpers=3), "clusters": Needs(helpers=3)}


@pytest.fixture(scope="session")
def ray_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A session on a Ray of its own, with room for several small crews (`ktray.crew.runtime.Session`)."""
    from ktray.crew.runtime import start, stop

    session = start(tmp_path_factory.mktemp("home"), None, Runtime(cpus=16))
    yield session
    stop(session)


@pytest.fixture
def found_crew(ray_home: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Founds crews of two workers on ``tmp_path/store``, for the toy work or another one, and ends them after the test."""
    import toy_work

    from ktray.crew.client import connect

    ends: list[Callable[[], None]] = []

    def found(work: Callable[..., Any] = toy_work.work, store: Path | None = None, **settings: Any) -> Any:
        runtime = Runtime(**{"cpus": 2, "stages": TOY_NEEDS, **settings})
        session = dataclasses.replace(ray_home, runtime=runtime, crews=ends)
        crew = connect(session, f"file://{store or tmp_path / 'store'}", work)
        ends.append(crew.end)
        return crew

    yield found
    for end in ends:
        end()


@pytest.fixture
def crew(found_crew: Callable[..., Any]) -> Any:
    """A crew of two workers for the toy work."""
    return found_crew()

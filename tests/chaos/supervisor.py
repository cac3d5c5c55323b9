"""One round: the same `ktray search` again and again until it is done, with faults all the while."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.cluster import Nodes, nodes
from tests.chaos.faults import Fault, Faults, session_family, worker_nodes
from tests.chaos.spaces import STUDY
from tests.chaos.watching import Watching
from tests.searches import Ended, Home, Running

RUNTIME = "checkpoint_seconds: 2\n"
LONGEST = 1800.0  # seconds of one round
REPAIR = 10.0  # seconds until a node that died is replaced
TIDY = 90.0  # two agents of Ray's own take a minute to notice that they are alone


@dataclass
class Round:
    """What happened in a round.

    Attributes:
        ends: exit codes of the command, in order; -9 for a driver that was killed.
        leaders: process ids of the commands.
        left: what still lived after the end.
    """

    home: Home
    faults: list[Fault] = field(default_factory=list)
    ends: list[Ended] = field(default_factory=list)
    leaders: list[int] = field(default_factory=list)
    seconds: float = 0.0
    left: list[str] = field(default_factory=list)
    watching: Watching = field(default_factory=lambda: Watching(Path()))


def calm(space: Path, home: Home) -> Round:
    """The same search without any fault."""
    return _supervise(space, home, random.Random(0), 0, 1.0, None, lambda text: None)


def disturbed(
    space: Path, home: Home, *, faults: int, mean: float, seed: int, cluster: bool, say: Callable[[str], None]
) -> Round:
    """Search with up to `faults` faults, `mean` seconds apart on average, on a Ray of its own or on a cluster."""
    rng = random.Random(seed)
    with ExitStack() as stack:
        place = stack.enter_context(_cluster()) if cluster else None
        return _supervise(space, home, rng, faults, mean, place, say)


def _supervise(
    space: Path,
    home: Home,
    rng: random.Random,
    faults: int,
    mean: float,
    place: Nodes | None,
    say: Callable[[str], None],
) -> Round:
    outcome = Round(home)
    runtime = space.with_name("runtime.yaml")
    runtime.write_text(RUNTIME)
    arguments = ["search", space, "--json", "--runtime", runtime, *(["--address", place.address] if place else [])]
    with Watching(home.store) as watching:
        outcome.watching = watching
        hits = Faults(
            rng,
            lambda: {**session_family(*outcome.leaders), **(place.family() if place else {})},
            lambda: outcome.leaders[-1],
            home.path / "studies" / STUDY / "status.json",
            (lambda: worker_nodes(place.family())) if place else None,
        )
        began = time.monotonic()
        while not outcome.ends or outcome.ends[-1].code in (-9, 5):
            assert time.monotonic() - began < LONGEST, f"not done in {LONGEST:g} s; see {home.path}"
            with home.start(*arguments, clean=False) as running:
                outcome.leaders.append(running.process.pid)
                _until_it_ends(running, outcome, hits, faults, mean, place, say)
            if outcome.ends[-1].code == -9 and not place:
                watching.orphan(time.time())
            say(f"the command ended with {outcome.ends[-1].code}")
        outcome.seconds = time.monotonic() - began
        hits.thaw(float("inf"))
        outcome.left = _left(outcome, place)
    return outcome


def _until_it_ends(
    running: Running, outcome: Round, hits: Faults, faults: int, mean: float, place: Nodes | None, say: Callable[[str], None]
) -> None:
    due, repair = time.time() + hits.rng.expovariate(1 / mean), float("inf")
    while running.process.poll() is None:
        time.sleep(0.1)
        now = time.time()
        hits.thaw(now)
        if place and now > repair:
            place.complete()
            repair = float("inf")
        if len(outcome.faults) < faults and now > due:
            due = now + hits.rng.expovariate(1 / mean)
            fault = hits.strike()
            if fault is None:
                due = now + 0.5
                continue
            say(f"{len(outcome.faults) + 1:3} {fault}")
            outcome.faults.append(fault)
            repair = now + REPAIR if fault.target == "node" else repair
            if fault.key and fault.seconds:
                outcome.watching.freeze(fault.key, now)
    outcome.ends.append(running.wait())


def _left(outcome: Round, place: Nodes | None) -> list[str]:
    """Processes, actors and folders that outlive the search, after the time that it takes them to notice."""
    end = time.monotonic() + TIDY
    while (left := _lives_on(outcome, place)) and time.monotonic() < end:
        time.sleep(1.0)
    hidden = [path for place in (".scratch", ".fenced") for path in (outcome.home.store / place).glob("*")]
    pointer = outcome.home.path / "ray"
    folders = map(Path, pointer.read_text().splitlines()) if pointer.exists() else []
    return [*left, *map(str, hidden), *(str(folder) for folder in folders if folder.exists())]


def _lives_on(outcome: Round, place: Nodes | None) -> list[str]:
    if place is None:
        return list(session_family(*outcome.leaders).values())
    actors = place.left()
    ours = [line for line in place.family().values() if line.startswith(("ray::Worker", "ray::Broker", "ray::ResourceTr"))]
    return [*ours, *([] if actors == "0 0.0" else [f"actors and CPUs: {actors}"])]


@contextmanager
def _cluster() -> Iterator[Nodes]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with nodes({**plain, "RAY_AUTH_MODE": "disabled"}) as place:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        try:
            yield place
        finally:
            del os.environ["RAY_AUTH_MODE"]

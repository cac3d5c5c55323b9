"""The order of ready stages when thousands are pending: it equals a plain sort of everything that is pending."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from ktray.artifact import Artifact, Stage
from ktray.scheduler.requests import RequestTable


def stages(chance: random.Random) -> list[Stage]:
    """Stages that read one or two earlier ones, some of which could start from a third."""
    made: list[Stage] = []
    for number in range(60):
        read = chance.sample(made, min(len(made), chance.randrange(3)))
        starts = tuple(each.key for each in chance.sample(made, min(len(made), chance.randrange(2))))
        inputs = {f"role{index}": each.key for index, each in enumerate(read)}
        made.append(Stage(chance.choice(["teacher", "student"]), {"number": number}, {}, inputs, starts))
    return made


def looked_up(table: RequestTable, running: set[str]) -> list[str]:
    """The order, from the definition alone."""
    ready = [
        want
        for key, want in table.pending.items()
        if key not in running and not {*want.stage.resume_from, *want.stage.inputs.values()} & table.pending.keys()
    ]

    def rank(want: Any) -> tuple[float, float, float, int]:
        requests = [table.open[request_id] for request_id in want.requests]
        trials = [each for each in requests if each.waiter] or requests
        return -max([each.priority for each in requests], default=0), -len(trials), -want.critical_path_seconds, want.order

    return [want.stage.key for want in sorted(ready, key=rank)]


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_ready_stages_equals_a_sort_of_all_that_are_pending_after_any_history(seed: int) -> None:
    chance = random.Random(seed)
    made, store, running = stages(chance), set[str](), set[str]()
    outbox: list[Any] = []

    def find(key: str) -> Artifact | None:
        return Artifact(key, Path(key), {}, {}) if key in store else None

    table, longest = RequestTable(find, running, outbox, lambda stage: {"teacher": 60.0, "student": 30.0}[stage.name]), 0
    for number in range(300):
        what = chance.random()
        line = [want.stage.key for want in table.ready_stages()]
        assert line == looked_up(table, running)
        assert sum(table.pending_graph.ready_counts.values()) == len(line)
        longest = max(longest, len(line))
        if what < 0.3:
            wanted = chance.sample(made, 4)
            table.add_request(f"r{number}", chance.choice(["", "w"]), f"s{number % 5}", wanted, chance.randrange(3), 0.0)
        elif what < 0.55 and line:
            running.add(line[0])
            table.pending_graph.mark_running(line[0])
        elif what < 0.6:
            table.cancel_requests(f"s{chance.randrange(5)}")
        elif running:
            key = chance.choice(sorted(running))
            running.discard(key)
            table.pending_graph.mark_stopped(key)
            if what < 0.9:
                store.add(key)
                table.mark_published(Artifact(key, Path(key), {}, {}), True)
            elif what < 0.95:
                table.fail_stage(key, "failed", "no")
            else:
                table.drop_if_unrequested(key)  # its worker died
        if chance.random() < 0.05 and store:
            store.discard(lost := chance.choice(sorted(store)))
            table._in_store.discard(lost)
    assert longest > 5

"""The table of real pairs as a world that a search can be simulated in: what each stage takes there and measures."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas

from experiments.pair_table import RUNGS, STUDENTS, features
from ktray.artifact import Stage
from ktray.fingerprint import fingerprint
from ktray.pipeline import pair_graph
from ktray.search.space import Space

TABLE = Path(__file__).parent / "tables" / "cifar10_pairs.parquet"
LAST = RUNGS[-1]
MEASURED = [*(f"knn_{epoch}" for epoch in RUNGS), "linear_probe"]
Price = Callable[[str, float], float]
"""(stage, measured seconds of it whole) -> seconds."""
PRICES: dict[str, Price] = {
    "as measured": lambda stage, seconds: seconds,
    "teachers x 20": lambda stage, seconds: 20 * seconds if stage == "teacher" else seconds,
    "all the same": lambda stage, seconds: 1.0,
}


@dataclass(frozen=True)
class Known:
    """What the table says of one stage.

    Attributes:
        seconds: of the whole stage, at these prices.
        epochs: that its seconds are for, if it is a snapshot of a student; else 0.
    """

    seconds: float
    epochs: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass
class World:
    """Every stage of the table at one sort of prices, by its key.

    Attributes:
        whole: seconds of everything that all pairs need, each stage once, without rungs.
        rungs: key of the evaluation that ends a segment -> (identity of its pair, epoch).
        pairs: identity of a pair -> its stages at its last epoch.
        values: identity of a pair -> linear probe.
    """

    stages: dict[str, Known] = field(default_factory=dict)
    whole: float = 0.0
    rungs: dict[str, tuple[str, int]] = field(default_factory=dict)
    pairs: dict[str, list[Known]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)

    def seconds(self, stage: Stage, epochs: int) -> float:
        """What a stage takes; nothing for images, which the table does not know."""
        known = self.stages.get(stage.key, Known(0.0))
        return known.seconds * epochs / known.epochs if known.epochs else known.seconds

    def metrics(self, stage: Stage) -> Mapping[str, float]:
        """What a stage measured."""
        return self.stages.get(stage.key, Known(0.0)).metrics

    def bill(self, pair: str, before: int, epoch: int) -> float:
        """Seconds that a pair pays alone from one rung to another; all that comes before the student with its first segment."""
        paid = 0.0
        for known in self.pairs[pair]:
            if known.epochs:
                paid += known.seconds * (epoch - before) / known.epochs
            elif not known.metrics:
                paid += known.seconds if before == 0 else 0.0
            elif "linear" not in known.metrics or epoch == LAST:
                paid += known.seconds
        return paid


def world(searched: Space, price: Price, shuffled: bool = False) -> World:
    """All stages of all pairs of a space, looked up in the table.

    Args:
        shuffled: each teacher's students measure what those of another one did, by the seed of the space; costs stay.
    """
    table = pandas.read_parquet(TABLE)
    table = table[table["seed"] == 0].set_index(["teacher", "k", "student"]).sort_index()
    teachers = {fingerprint(spec): name for name, spec in features().items()}
    students = {fingerprint(spec): name for name, spec in STUDENTS.items()}
    names = list(features())
    others = random.Random(searched.seed).sample(names, len(names)) if shuffled else names
    instead = dict(zip(names, others, strict=True))
    found, once = World(), {}  # type: ignore[var-annotated]
    for draw in searched.draws():
        plain, pair = searched.plain(draw), searched.pair(draw)
        teacher, student = teachers[fingerprint(plain["teacher"])], students[fingerprint(plain["student"]["backbone"])]
        k = plain["transfer"]["k"]
        row = table.loc[(teacher, k, student)].copy()
        row[MEASURED] = table.loc[(instead[teacher], k, student), MEASURED]
        name = fingerprint(pair.model_dump(mode="json"))
        found.values[name] = float(row["linear_probe"])
        for epoch in RUNGS:
            stages = pair_graph.build(pair, lambda spec: fingerprint(spec.model_dump()), epoch=epoch)
            known = {stage.key: _known(stage, stages, row, epoch, price) for stage in stages.stages}
            found.stages |= known
            ends = "linear_probe" if epoch == LAST else "knn"
            found.rungs[stages.keys["evaluation"][ends]] = name, epoch
        found.pairs[name] = list(known.values())
        once |= known
    found.whole = sum(known.seconds for known in once.values())
    return found


def _known(stage: Stage, stages: pair_graph.Graph, row: Any, epoch: int, price: Price) -> Known:
    if stage.name == "images":
        return Known(0.0)
    if stage.name == "student":
        return Known(price("student", row[f"s_student_{LAST}"]) * epoch / LAST, epoch)
    if stage.name != "evaluation":
        return Known(price(stage.name, row[f"s_{stage.name}"]))
    if stage.key == stages.keys["evaluation"]["linear_probe"]:
        return Known(price("evaluation", row["s_linear_probe"]), metrics={"top1": row["linear_probe"], "linear": 1.0})
    return Known(price("evaluation", row[f"s_evaluation_{epoch}"]), metrics={"top1": row[f"knn_{epoch}"]})

"""The table of real pairs as a simulated world: the seconds and metrics of each stage of each pair."""

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
CostScale = Callable[[str, float], float]
"""(kind of stage, measured seconds of the whole stage) -> seconds in the simulation."""
SCENARIOS: dict[str, CostScale] = {
    "as measured": lambda stage, seconds: seconds,
    "teachers x 20": lambda stage, seconds: 20 * seconds if stage == "teacher" else seconds,
    "all the same": lambda stage, seconds: 1.0,
}


@dataclass(frozen=True)
class StageRow:
    """The seconds and metrics of one stage.

    Attributes:
        seconds: of the whole stage.
        epochs: number of epochs that the seconds are for, if it is a snapshot of a student; else 0.
    """

    seconds: float
    epochs: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass
class World:
    """Every stage of the table in one scenario for costs, by its key.

    Attributes:
        whole: seconds of all stages of all pairs, each stage once, without rungs.
        rungs: key of the evaluation that ends a segment -> (identity of its pair, epoch).
        pairs: identity of a pair -> its stages at its last epoch.
        values: identity of a pair -> linear probe.
    """

    stages: dict[str, StageRow] = field(default_factory=dict)
    whole: float = 0.0
    rungs: dict[str, tuple[str, int]] = field(default_factory=dict)
    pairs: dict[str, list[StageRow]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)

    def seconds(self, stage: Stage, epochs: int) -> float:
        """Seconds of a stage; 0 for images, which are not in the table."""
        known = self.stages.get(stage.key, StageRow(0.0))
        return known.seconds * epochs / known.epochs if known.epochs else known.seconds

    def metrics(self, stage: Stage) -> Mapping[str, float]:
        """Metrics of a stage."""
        return self.stages.get(stage.key, StageRow(0.0)).metrics

    def cost_alone(self, pair: str, before: int, epoch: int) -> float:
        """Seconds of a pair from one rung to another without sharing; the first segment includes its prefix."""
        cost = 0.0
        for known in self.pairs[pair]:
            if known.epochs:
                cost += known.seconds * (epoch - before) / known.epochs
            elif not known.metrics:
                cost += known.seconds if before == 0 else 0.0
            elif "linear" not in known.metrics or epoch == LAST:
                cost += known.seconds
        return cost


def world(searched: Space, cost_scale: CostScale, shuffled: bool = False) -> World:
    """All stages of all pairs of a space, looked up in the table.

    Args:
        shuffled: each teacher gets the students' metrics of another one, chosen by the seed of the space; costs stay.
    """
    table = pandas.read_parquet(TABLE)
    table = table[table["seed"] == 0].set_index(["teacher", "k", "student"]).sort_index()
    teachers = {fingerprint(spec): name for name, spec in features().items()}
    students = {fingerprint(spec): name for name, spec in STUDENTS.items()}
    names = list(features())
    others = random.Random(searched.seed).sample(names, len(names)) if shuffled else names
    instead = dict(zip(names, others, strict=True))
    found, once = World(), {}  # type: ignore[var-annotated]
    for draw in searched.all_draws():
        plain, pair = searched.plain_pair(draw), searched.pair(draw)
        teacher, student = teachers[fingerprint(plain["teacher"])], students[fingerprint(plain["student"]["backbone"])]
        k = plain["transfer"]["k"]
        row = table.loc[(teacher, k, student)].copy()
        row[MEASURED] = table.loc[(instead[teacher], k, student), MEASURED]
        name = fingerprint(pair.model_dump(mode="json"))
        found.values[name] = float(row["linear_probe"])
        for epoch in RUNGS:
            stages = pair_graph.build(pair, lambda spec: fingerprint(spec.model_dump()), epoch=epoch)
            known = {stage.key: _known(stage, stages, row, epoch, cost_scale) for stage in stages.stages}
            found.stages |= known
            ends = "linear_probe" if epoch == LAST else "knn"
            found.rungs[stages.keys["evaluation"][ends]] = name, epoch
        found.pairs[name] = list(known.values())
        once |= known
    found.whole = sum(known.seconds for known in once.values())
    return found


def _known(stage: Stage, stages: pair_graph.Graph, row: Any, epoch: int, cost_scale: CostScale) -> StageRow:
    if stage.name == "images":
        return StageRow(0.0)
    if stage.name == "student":
        return StageRow(cost_scale("student", row[f"s_student_{LAST}"]) * epoch / LAST, epoch)
    if stage.name != "evaluation":
        return StageRow(cost_scale(stage.name, row[f"s_{stage.name}"]))
    if stage.key == stages.keys["evaluation"]["linear_probe"]:
        return StageRow(cost_scale("evaluation", row["s_linear_probe"]), metrics={"top1": row["linear_probe"], "linear": 1.0})
    return StageRow(cost_scale("evaluation", row[f"s_evaluation_{epoch}"]), metrics={"top1": row[f"knn_{epoch}"]})

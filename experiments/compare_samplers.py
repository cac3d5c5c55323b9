"""Which way of spending finds a good pair for the least money? Searches over 207 real pairs, on a virtual clock.

Question: what do sharing, balanced spending and rungs save on `experiments/tables/cifar10_pairs.parquet`?
Command:  python experiments/compare_samplers.py run OUT.parquet, then: python experiments/compare_samplers.py say OUT.parquet
Cost:     20 minutes of two cores.
Result:   n = 50 paired seeds, commit 1fdc7e8; the samplers are unchanged since. "Near" is the median cost, in % of what
the whole table costs, until the best completed pair is within 1.0 point of the best of all (in brackets: how many seeds got
there); "dearer" is the geometric mean of that cost over balanced spending's, with a 95 % bootstrap interval, both censored at
three tables.

                     as measured                      teachers x 20                     all the same
    method           near       area  dearer          near        area  dearer          near       area  dearer
    balanced         11 (94 %)  0.66                  16 (100 %)  1.77                  15 (96 %)  0.96
    tpe              12 (88 %)  0.82  1.4 (0.9-2.2)   52 (88 %)   3.80  3.3 (2.5-4.5)   20 (88 %)  1.30  1.4 (0.9-2.1)
    gain per cost    14 (82 %)  0.95  1.8 (1.1-2.8)   53 (84 %)   3.74  3.5 (2.7-4.7)   23 (88 %)  1.36  1.5 (1.0-2.3)
    random, rungs    12 (98 %)  0.84  1.1 (0.8-1.6)   52 (98 %)   4.33  3.1 (2.5-3.9)   19 (98 %)  1.43  1.2 (0.9-1.6)
    tpe, alone       20 (88 %)  1.12  2.1 (1.4-3.4)   132 (88 %)  5.43  7.3 (5.2-10.2)  25 (88 %)  1.52  1.7 (1.2-2.6)
    random, alone    19 (100%)  1.00  1.4 (0.8-2.3)   90 (100 %)  4.27  3.6 (2.1-5.8)   19 (100%)  0.98  0.9 (0.6-1.3)

Nothing was tuned on this table, so all seeds are held out; of the second 25 alone, balanced against tpe: 2.01 (0.90 to 4.35),
4.33 (2.67 to 7.22), 2.43 (1.39 to 4.35). So balanced spending is three times cheaper than TPE where teachers are dear, and not
dearer where they are not. Random search that shares nothing is hard to beat on a space of 207 pairs of which four are near the
best: it trains everything to the end and misses none, while kNN at a rung may stop a good pair; 1.4 to 3.6 times is all that
was saved there, and nothing where all stages cost the same.

Every search is ktray's own (space, study, sampler, rungs 1, 3 and 9 by kNN, sharing) with one worker; a stage takes what it
took on the H100 and measures what it measured there. `PRICES` says three sorts of prices: as measured, where students cost more
than teachers; teachers twenty times as dear; every whole stage the same. "Alone" is the same search with every stage paid for
by each trial that needs it. Regret is the best linear probe of the table less that of the best pair
completed so far, in points.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from experiments.pair_table import CLUSTERS, RUNGS, SCHEDULE, STUDENTS, features
from ktray.artifact import Stage
from ktray.drivers.simulate import Site, Timeline, VirtualClock, simulate
from ktray.fingerprint import fingerprint
from ktray.pipeline import graph
from ktray.search import listed
from ktray.search.check import checked
from ktray.search.draws import Draws, Source
from ktray.search.sampler import SHOWN, Quote, Sampler, Spend
from ktray.search.space import Space
from ktray.search.study import Study
from ktray.search.tree import Params

TABLE = Path(__file__).parent / "tables" / "cifar10_pairs.parquet"
SEEDS = range(50)
BUDGETS = np.arange(0.05, 1.001, 0.05)  # shares of what the whole table costs
NEAR = 1.0  # points
CAP = 3.0  # a search that is not near by so many costs of the table counts as that
LAST = RUNGS[-1]
MEASURED = [*(f"knn_{epoch}" for epoch in RUNGS), "linear_probe"]
Price = Callable[[str, float], float]
"""(stage, measured seconds of it whole) -> seconds."""
PRICES: dict[str, Price] = {
    "as measured": lambda stage, seconds: seconds,
    "teachers x 20": lambda stage, seconds: 20 * seconds if stage == "teacher" else seconds,
    "all the same": lambda stage, seconds: 1.0,
}
SHUFFLED = ", shuffled"
SORTS = (*PRICES, *(f"{name}{SHUFFLED}" for name in list(PRICES)[:2]))


class PerCost(Sampler):
    """The literature's way: of all draws that the sampler compares the one that promises most for each second it would add."""

    def _affordable(self, draws: Sequence[Params], spent: Spend, quote: Quote) -> Params:
        ranked, unknown = self.evidence.ranked(SHOWN)
        if not ranked:
            return draws[0]
        gains = self._surrogate.gain([each.params for each in ranked], [each.params for each in unknown], draws)
        prices = np.array([sum(quote(draw) or Spend()) for draw in draws])
        return draws[int(np.argmax(gains / np.maximum(prices, 1e-3)))]


def per_cost(space: Space) -> Source:
    """Draws by `PerCost`."""
    draws = Draws(space)
    draws.sampler = PerCost(space)
    return draws


@dataclass(frozen=True)
class Method:
    """How a search draws, and whether it stops students early."""

    sampler: str
    rungs: bool = True
    draws: Callable[[Space], Source] | None = None
    trials: int = 120


METHODS = {
    "balanced": Method("balanced"),
    "balanced, whole": Method("balanced", rungs=False),
    "tpe": Method("tpe"),
    "gain per cost": Method("balanced", draws=per_cost),
    "random, rungs": Method("random", draws=listed.chance),
    "random": Method("random", rungs=False, draws=listed.chance, trials=207),
}
"""Name -> method; the last one is plain random search."""


def space(method: Method, seed: int) -> Space:
    """The space whose pairs the table holds."""
    branches: dict[str, dict[str, Any]] = {}
    for name, teacher in features().items():
        trained = "layer" in teacher
        branch = "_".join(name.split()[:-1]) if trained else name.replace(" ", "_")
        layers = branches.get(branch, {}).get("layer", {"choice": []})["choice"]
        branches[branch] = {**teacher, "layer": {"choice": [*layers, teacher["layer"]]}} if trained else teacher
    content = {
        "study": "compared",
        "seed": seed,
        "objectives": [{"metric": "linear_probe/top1"}],
        "budget": {"trials": method.trials, "concurrent": 1},
        "early_stop": {"metric": "knn/top1", "rungs": list(RUNGS), "reduction": 3} if method.rungs else None,
        "sampler": method.sampler,
        "pair": {
            "data": "cifar10",
            "teacher": {"one_of": branches},
            "transfer": {"kind": "clusters", "k": {"choice": list(CLUSTERS)}, "pca": 128},
            "student": {
                "backbone": {"one_of": {name.replace(" ", "_").replace(".", ""): each for name, each in STUDENTS.items()}},
                "schedule": {**SCHEDULE, "epochs": LAST},
                "augment": {"crop": 4, "flip": True},
            },
            "evals": [{"kind": "knn"}, {"kind": "linear_probe"}],
        },
    }
    return checked(Space.of(content, "compare_samplers.py"))


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
            stages = graph.build(pair, lambda spec: fingerprint(spec.model_dump()), epoch=epoch)
            known = {stage.key: _known(stage, stages, row, epoch, price) for stage in stages.stages}
            found.stages |= known
            ends = "linear_probe" if epoch == LAST else "knn"
            found.rungs[stages.keys["evaluation"][ends]] = name, epoch
        found.pairs[name] = list(known.values())
        once |= known
    found.whole = sum(known.seconds for known in once.values())
    return found


def _known(stage: Stage, stages: graph.Graph, row: Any, epoch: int, price: Price) -> Known:
    if stage.name == "images":
        return Known(0.0)
    if stage.name == "student":
        return Known(price("student", row[f"s_student_{LAST}"]) * epoch / LAST, epoch)
    if stage.name != "evaluation":
        return Known(price(stage.name, row[f"s_{stage.name}"]))
    if stage.key == stages.keys["evaluation"]["linear_probe"]:
        return Known(price("evaluation", row["s_linear_probe"]), metrics={"top1": row["linear_probe"], "linear": 1.0})
    return Known(price("evaluation", row[f"s_evaluation_{epoch}"]), metrics={"top1": row[f"knn_{epoch}"]})


def incumbents(timeline: Timeline, known: World) -> pandas.DataFrame:
    """After each completed pair: what was spent with sharing and alone, as shares of the whole table, and regret in points."""
    best, alone, reached = max(known.values.values()), 0.0, {}  # type: ignore[var-annotated]
    top, rows = -math.inf, []
    for time, key in timeline.computed:
        if key not in known.rungs:
            continue
        pair, epoch = known.rungs[key]
        alone += known.bill(pair, reached.get(pair, 0), epoch)
        reached[pair] = epoch
        if epoch == LAST:
            top = max(top, known.values[pair])
            rows.append((time / known.whole, alone / known.whole, 100 * (best - top)))
    return pandas.DataFrame(rows, columns=["shared", "alone", "regret"])


def searched(task: tuple[str, str, int]) -> pandas.DataFrame:
    """One search: (sort of prices, method, seed)."""
    sort, name, seed = task
    drawn, shuffled = space(METHODS[name], seed), sort.endswith(SHUFFLED)
    known = _world(sort.removesuffix(SHUFFLED), METHODS[name].rungs, seed if shuffled else None)
    clock, draws = VirtualClock(), METHODS[name].draws
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as home:
        study = Study.open(Path(home), drawn, clock=clock, draws=draws(drawn) if draws else None)
        timeline = simulate(drawn, study, clock, known.seconds, known.metrics, Site(1))
    return incumbents(timeline, known).assign(prices=sort, method=name, seed=seed)


@functools.lru_cache(20)
def _world(prices: str, rungs: bool, shuffled: int | None) -> World:
    """The world that a process searched last; its keys hang on the rungs."""
    like = next(method for method in METHODS.values() if method.rungs == rungs)
    return world(space(like, shuffled or 0), PRICES[prices], shuffled is not None)


def run(out: Path, processes: int, sorts: Sequence[str]) -> None:
    """All searches of these sorts of prices; the others of the file stay."""
    tasks = [(sort, name, seed) for sort in sorts for seed in SEEDS for name in METHODS]
    with ProcessPoolExecutor(processes) as workers:
        found = list(workers.map(searched, tasks, chunksize=len(METHODS)))
    if out.exists():
        before = pandas.read_parquet(out)
        found.append(before[~before["prices"].isin(sorts)])
    pandas.concat(found).to_parquet(out, compression="zstd")


COMPARED = {
    "balanced, whole": ("balanced, whole", "shared"),
    "tpe": ("tpe", "shared"),
    "gain per cost": ("gain per cost", "shared"),
    "random, rungs": ("random, rungs", "shared"),
    "random": ("random", "shared"),
    "tpe, alone": ("tpe", "alone"),
    "random, alone": ("random", "alone"),
}
"""Rival of balanced spending -> (method, how its stages are paid for)."""


def cost_to_near(search: pandas.DataFrame, paid: str) -> float:
    """Share of the table's cost after which a search is within `NEAR` of the best; infinite if it never is."""
    near = search.loc[search["regret"] <= NEAR, paid]
    return float(near.min()) if len(near) else math.inf


def area(search: pandas.DataFrame, paid: str) -> float:
    """Mean regret in points over `BUDGETS`; before the first completed pair it is that of chance, the table's mean."""
    steps = [search.loc[search[paid] <= budget, "regret"].min() for budget in BUDGETS]
    values = pandas.read_parquet(TABLE).query("seed == 0")["linear_probe"]
    return float(np.mean([100 * (values.max() - values.mean()) if math.isnan(step) else step for step in steps]))


def ratios(own: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean over paired seeds of other / own, with a 95 % bootstrap interval; both are censored at `CAP`."""
    logs = np.log(np.minimum(other, CAP)) - np.log(np.minimum(own, CAP))
    draws = np.random.default_rng(0).choice(logs, (10_000, len(logs))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return math.exp(logs.mean()), math.exp(low), math.exp(high)


def say(table: pandas.DataFrame) -> None:
    """Per sort of prices and rival: cost to within a point, how often it got there, area, and how much dearer it is."""
    for prices in table["prices"].unique():
        print(f"\n{prices}: n = {table['seed'].nunique()} paired seeds")
        found = {name: measured(table, prices, *how) for name, how in {"balanced": ("balanced", "shared"), **COMPARED}.items()}
        for name, (costs, areas) in found.items():
            there = np.isfinite(costs).mean()
            text = (
                f"  {name:15} near after {np.median(costs):6.1%} of the table ({there:.0%} of seeds); area {np.mean(areas):.2f}"
            )
            if name in COMPARED:
                text += "; {:.2f}x as dear ({:.2f} to {:.2f})".format(*ratios(found["balanced"][0], costs))
            print(text)


def measured(table: pandas.DataFrame, prices: str, method: str, paid: str) -> tuple[list[float], list[float]]:
    """Cost to near and area of each seed."""
    searches = [each for _, each in table[(table["prices"] == prices) & (table["method"] == method)].groupby("seed")]
    return [cost_to_near(each, paid) for each in searches], [area(each, paid) for each in searches]


def main() -> None:
    """Run or judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "say"])
    parser.add_argument("table", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--prices", choices=SORTS, nargs="+", default=SORTS)
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.table, arguments.processes, arguments.prices)
    found = pandas.read_parquet(arguments.table)
    say(found)
    print("\nthe second half of the seeds, which nothing was ever tuned on:")
    say(found[found["seed"] >= 25])


if __name__ == "__main__":
    main()

"""Which search finds a good pair at the lowest cost? Simulated searches over 207 real pairs, on a virtual clock.

Question: what do sharing, the sampler and rungs save on `experiments/tables/cifar10_pairs.parquet`?
Command:  python -m experiments.compare_samplers run OUT.parquet; python -m experiments.compare_samplers summarise OUT.parquet
Cost:     9 minutes of 16 cores, an hour of two.
Result:   n = 50 paired seeds, commit a9bfb36; all of it is in `experiments/tables/README.md`. "Near" is the median cost, in %
of the cost of the whole table, until the best completed pair is within 1.0 point of the best of all; "ratio" is the geometric
mean of that cost relative to the balanced sampler's, with a 95 % bootstrap interval.

                     as measured             teachers x 20            all the same
    method           near   ratio            near   ratio             near   ratio
    balanced           2                       1                        3
    balanced, whole    5    2.6 (2.0-3.6)      5    2.4 (1.6-3.5)       4    1.1 (0.9-1.4)
    balanced, 1 3 9    7    3.7 (2.8-4.8)      5    3.5 (2.4-5.2)       8    2.6 (1.9-3.6)
    gain per cost      3    1.6 (1.3-2.0)      5    2.1 (1.4-3.1)       5    1.5 (1.2-1.9)
    tpe                8    4.2 (3.3-5.5)     39    18 (12-27)         11    3.3 (2.5-4.4)
    tpe, alone        18    9.5 (6.4-14)      94    42 (26-67)         21    6.5 (4.4-9.6)
    random, alone     20    8.5 (5.8-12)      92    34 (18-61)         20    4.8 (3.4-6.7)

Every search is ktray's own (space, study, sampler, sharing, and a rung after 1 of 9 epochs, where kNN chooses the best third)
with one worker; each stage takes as long as on the H100 and gives the metrics recorded there. There are three scenarios for
costs (`SCENARIOS`): as measured, where students cost more than teachers; teachers twenty times as expensive; every whole stage
equally expensive. "Whole" trains all students to their end, "1 3 9" has a second rung. "Alone" shares nothing, so every draw
costs all of its stages, even if it equals an earlier draw; "distinct" is the same without repeated pairs. Regret is the best
linear probe of the table minus that of the best pair completed so far, in points, and area is its mean over budgets of 5 to
100 % of the table. No parameter was tuned on the 50 seeds; with 300 fresh ones (`--seeds 5000 5300`) random alone costs 5.8
(4.9-6.7) times as much if all stages are equally expensive.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from experiments.pair_table import CLUSTERS, RUNGS, SCHEDULE, STUDENTS, features
from experiments.table_world import LAST, SCENARIOS, TABLE, World, world
from ktray.fingerprint import canonical, fingerprint, seed_of
from ktray.runs.simulation import SimulatedCluster, Timeline, VirtualClock, simulate
from ktray.search.budget import CostEstimate, PrefixSuffixSeconds
from ktray.search.draws import DrawSource, SampledDraws, fixed_draw_source, random_search_source
from ktray.search.sampler import MAX_OBSERVATIONS, Sampler, random_draw
from ktray.search.space import Space
from ktray.search.space_check import check_and_fill_modes
from ktray.search.space_tree import Params
from ktray.search.study import Study

SEEDS = (0, 50)  # first (included) and last (excluded)
BUDGETS = np.arange(0.05, 1.001, 0.05)  # shares of the cost of the whole table
NEAR = 1.0  # points
CAP = 3.0  # times the cost of the table, at which the cost of searches that do not come near is censored
SHUFFLED = ", shuffled"
SCENARIO_NAMES = (*SCENARIOS, *(f"{name}{SHUFFLED}" for name in list(SCENARIOS)[:2]))


class PerCost(Sampler):
    """The method of the literature: the candidate with the largest expected improvement per second of its cost."""

    def _pick_balanced_draw(
        self, draws: Sequence[Params], spent: PrefixSuffixSeconds, cost_estimate: CostEstimate, affordable: float
    ) -> Params:
        ranked, pending = self.observations.ranked_and_pending(MAX_OBSERVATIONS)
        if not ranked:
            return draws[0]
        improvement = self.expected_improvement(ranked, pending, draws)
        costs = np.array([sum(cost_estimate(draw) or PrefixSuffixSeconds()) for draw in draws])
        return draws[int(np.argmax(improvement / np.maximum(costs, 1e-3)))]


def per_cost(space: Space, known: World) -> DrawSource:
    """Draws by `PerCost`."""
    draws = SampledDraws(space)
    draws.sampler = PerCost(space)
    return draws


def random_search(space: Space, known: World) -> DrawSource:
    """Independent random draws."""
    return random_search_source(space)


def known_students(space: Space, known: World) -> DrawSource:
    """The best k and student of every layer, which the table reveals, in random order of the layers: a reference, no bound."""
    best: dict[str, tuple[float, Params]] = {}
    for draw in space.all_draws():
        value = known.values[fingerprint(space.pair(draw).model_dump(mode="json"))]
        best[_features(draw)] = max(best.get(_features(draw), (0.0, draw)), (value, draw), key=lambda each: each[0])
    order: dict[str, Params] = {}
    for number in itertools.count():
        if len(order) == len(best):
            return fixed_draw_source(space, list(order.values()))
        layer = _features(random_draw(space, seed_of(space.seed, "told", number)))  # the seed of the recorded results
        order[layer] = best[layer][1]


def _features(draw: Mapping[str, Any]) -> str:
    return canonical({name: value for name, value in draw.items() if name.startswith("teacher")})


@dataclass(frozen=True)
class Method:
    """How a search draws, and whether it stops students early."""

    sampler: str
    rungs: tuple[int, ...] = (1, LAST)
    draws: Callable[[Space, World], DrawSource] | None = None
    trials: int = 120


METHODS = {
    "balanced": Method("balanced"),
    "balanced, whole": Method("balanced", rungs=()),
    "balanced, 1 3 9": Method("balanced", rungs=RUNGS),
    "tpe": Method("tpe"),
    "gain per cost": Method("balanced", draws=per_cost),
    "random, rungs": Method("random", draws=random_search),
    "random": Method("random", rungs=(), draws=random_search, trials=207),
    "known students": Method("random", rungs=(), draws=known_students, trials=207),
}
"""Name -> method."""


def space(method: Method, seed: int) -> Space:
    """The space of all pairs in the table."""
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
        "early_stop": {"metric": "knn/top1", "rungs": list(method.rungs), "reduction": 3} if method.rungs else None,
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
    return check_and_fill_modes(Space.from_content(content, "compare_samplers.py"))


def incumbents(timeline: Timeline, known: World) -> pandas.DataFrame:
    """After each completed pair: cost with and without sharing, as shares of the whole table's, and regret in points."""
    best, distinct, again, reached = max(known.values.values()), 0.0, 0.0, {}  # type: ignore[var-annotated]
    drawn = deque((fingerprint(trial.pair), trial.duplicate_of is not None) for trial in timeline.trials)
    top, rows = -math.inf, []
    for time, key in timeline.computed:
        if key not in known.rungs:
            continue
        pair, epoch = known.rungs[key]
        while pair not in reached:  # duplicates drawn before it cost their pair again, up to the epoch that it has reached
            name, repeats = drawn.popleft()
            if repeats:
                again += known.cost_alone(name, 0, reached[name])
            else:
                reached[name] = 0
        distinct += known.cost_alone(pair, reached[pair], epoch)
        reached[pair] = epoch
        if epoch == LAST:
            top = max(top, known.values[pair])
            rows.append((time / known.whole, (distinct + again) / known.whole, distinct / known.whole, 100 * (best - top)))
    return pandas.DataFrame(rows, columns=["shared", "alone", "distinct", "regret"])


def searched(task: tuple[str, str, int]) -> pandas.DataFrame:
    """One search: (scenario, method, seed)."""
    scenario, name, seed = task
    drawn, shuffled = space(METHODS[name], seed), scenario.endswith(SHUFFLED)
    known = _world(scenario.removesuffix(SHUFFLED), METHODS[name].rungs, seed if shuffled else None)
    clock, draws = VirtualClock(), METHODS[name].draws
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as home:
        study = Study.open(Path(home), drawn, clock=clock, draws=draws(drawn, known) if draws else None)
        timeline = simulate(drawn, study, clock, known.seconds, known.metrics, SimulatedCluster(1))
    return incumbents(timeline, known).assign(scenario=scenario, method=name, seed=seed)


@functools.lru_cache(20)
def _world(scenario: str, rungs: tuple[int, ...], shuffled: int | None) -> World:
    """The world of a scenario, cached; its keys depend on the rungs.

    Args:
        shuffled: seed of the shuffle; None: not shuffled.
    """
    like = next(method for method in METHODS.values() if method.rungs == rungs)
    return world(space(like, shuffled or 0), SCENARIOS[scenario], shuffled is not None)


def run(out: Path, processes: int, scenarios: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> None:
    """Runs all searches with these methods in these scenarios; other rows of the file are kept."""
    tasks = [(scenario, name, seed) for scenario in scenarios for seed in seeds for name in methods]
    with ProcessPoolExecutor(processes) as workers:
        found = list(workers.map(searched, tasks, chunksize=len(methods)))
    if out.exists():
        before = pandas.read_parquet(out)
        again = before["scenario"].isin(scenarios) & before["method"].isin(methods) & before["seed"].isin(seeds)
        found.append(before[~again])
    pandas.concat(found).to_parquet(out, compression="zstd")


COMPARED = {
    "balanced, whole": ("balanced, whole", "shared"),
    "balanced, 1 3 9": ("balanced, 1 3 9", "shared"),
    "tpe": ("tpe", "shared"),
    "gain per cost": ("gain per cost", "shared"),
    "random, rungs": ("random, rungs", "shared"),
    "random": ("random", "shared"),
    "tpe, alone": ("tpe", "alone"),
    "random, alone": ("random", "alone"),
    "random, distinct": ("random", "distinct"),
    "known students": ("known students", "shared"),
}
"""Name of what is compared with the balanced sampler -> (method, column of its cost)."""


def cost_to_near(search: pandas.DataFrame, paid: str) -> float:
    """Share of the table's cost after which a search is within `NEAR` of the best; infinite if it never gets there."""
    near = search.loc[search["regret"] <= NEAR, paid]
    return float(near.min()) if len(near) else math.inf


def area(search: pandas.DataFrame, paid: str) -> float:
    """Mean regret in points over `BUDGETS`; before the first completed pair, the regret of the table's mean."""
    steps = [search.loc[search[paid] <= budget, "regret"].min() for budget in BUDGETS]
    values = pandas.read_parquet(TABLE).query("seed == 0")["linear_probe"]
    return float(np.mean([100 * (values.max() - values.mean()) if math.isnan(step) else step for step in steps]))


def ratios(own: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean over paired seeds of other / own, with a 95 % bootstrap interval; both are censored at `CAP`."""
    logs = np.log(np.minimum(other, CAP)) - np.log(np.minimum(own, CAP))
    draws = np.random.default_rng(0).choice(logs, (10_000, len(logs))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return math.exp(logs.mean()), math.exp(low), math.exp(high)


def summarise(table: pandas.DataFrame) -> None:
    """Prints per scenario and method: cost to within a point, share of searches that got there, area, cost ratio."""
    for scenario in table["scenario"].unique():
        print(f"\n{scenario}: n = {table['seed'].nunique()} paired seeds")
        compared = {"balanced": ("balanced", "shared"), **COMPARED}
        found = {name: measured(table, scenario, *how) for name, how in compared.items()}
        for name, (costs, areas) in found.items():
            if not costs:
                continue  # this method was not run
            near, reached = np.median(costs), np.isfinite(costs).mean()
            text = f"  {name:16} near after {near:6.1%} of the table ({reached:.0%} of seeds); area {np.mean(areas):.2f}"
            if name in COMPARED:
                text += "; {:.2f} times the cost ({:.2f} to {:.2f})".format(*ratios(found["balanced"][0], costs))
            print(text)


def measured(table: pandas.DataFrame, scenario: str, method: str, paid: str) -> tuple[list[float], list[float]]:
    """Cost to near and area of each seed."""
    searches = [each for _, each in table[(table["scenario"] == scenario) & (table["method"] == method)].groupby("seed")]
    return [cost_to_near(each, paid) for each in searches], [area(each, paid) for each in searches]


def main() -> None:
    """Runs searches, or summarises those in a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "summarise"])
    parser.add_argument("table", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--scenarios", choices=SCENARIO_NAMES, nargs="+", default=SCENARIO_NAMES)
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs=2, default=SEEDS, metavar=("FROM", "TO"))
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.table, arguments.processes, arguments.scenarios, arguments.methods, range(*arguments.seeds))
    found = pandas.read_parquet(arguments.table)
    summarise(found)
    print("\nthe second half of the seeds:")
    summarise(found[found["seed"] >= found["seed"].median()])


if __name__ == "__main__":
    main()

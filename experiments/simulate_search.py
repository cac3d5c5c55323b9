"""How well does a search share and schedule stages, and how long do its decisions take? On a virtual clock, up to 1,000 GPUs.

Question: for five models of stage costs, how close is a search to the ideal of computing each distinct stage once, how close is
its makespan to the larger of critical path and work / GPUs, how long does a decision take, and what do worker failures cost?
Command:  python -m experiments.simulate_search lists --pairs 256, or: lists --pairs 10000 --gpus 1000, or: search
Result:   fixed lists of 256 pairs, commit b44fbf7, 2 busy cores of an EPYC Milan, n = 1. Every list shares at least 0.9998 of
the ideal. Makespan is given relative to max(critical path, work / GPUs) and, in brackets, to a bound that also takes into
account that students wait for teachers: no order of stages ends earlier.

    model                              naive / ideal   8 GPUs        64 GPUs       1,000 GPUs
    teacher given, student 8 h         1.02            1.00 (1.00)   1.04 (1.04)   1.00 (1.00)
    teacher 20 h, student 8 h          3.27            1.02 (1.00)   1.56 (1.02)   1.00 (1.00)
    teacher 20 h, student 1 h          14.03           1.10 (1.00)   1.12 (1.01)   1.00 (1.00)
    CPU: features 20 min, student 10   2.99            1.02 (1.01)   1.36 (1.05)   1.00 (1.00)
    CPU: the same, teacher 60 min      6.79            1.05 (1.01)   1.17 (1.03)   1.00 (1.00)

So two of fifteen are above 1.3 of the simple bound, since everything waits for a few teachers, and none is above 1.05 of the
other bound. Placement had the true seconds of stages there. Now it uses the cost model, which learns them: lists of 64 and 256
pairs on 8 and 64 GPUs (n = 20) end at 1.013 times the other bound on average, before at 1.011, at most at 1.05 in both.

10,000 pairs on 1,000 GPUs, commit a09e2dd, one Xeon core, n = 1: 73 to 78 s of the driver for a list; it shares at least 0.9998
of the ideal; makespan over the simple bound 1.10, 1.35, 1.43, 1.31 and 1.67, over the other one at most 1.10: nearly all GPUs
wait while six teachers train. Of the last tenth of the decisions (mean, in brackets the 99th percentile) a draw took 3.8 to 4.5
ms (6.3), a dispatch 0.7 (1.8), a settlement 1.0 (1.5). A search of 10,000 trials by the balanced sampler with rungs, 2,000 at
once, took 148 s at 960b177 on a core of the Milan: a draw 4.3 ms (8.3), a dispatch 0.6 (1.0), a settlement 1.0 (1.5).
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktray.artifact import Stage
from ktray.fingerprint import seed_of
from ktray.runs.simulation import SimulatedCluster, Timeline, VirtualClock, simulate
from ktray.search.draws import fixed_draw_source
from ktray.search.space import Space
from ktray.search.space_check import check_and_fill_modes
from ktray.search.study import Study

HOUR = 3600.0
TEACHERS, LAYERS, KS, WIDTHS, SEEDS = range(6), ("conv3", "conv4", "conv5"), (50, 100, 200, 400), (0.25, 0.5, 1.0, 1.5, 2.0), 30
EPOCHS = {"teacher": 20, "student": 40}
PACE = dict(zip(WIDTHS, (0.5, 0.75, 1.0, 1.25, 1.5), strict=True))  # of students by width; the mean is 1


@dataclass(frozen=True)
class Costs:
    """Hours of a whole stage: a teacher, a feature extraction, the smallest and the largest k-means, an average student."""

    teacher: float
    features: float
    clusters: tuple[float, float]
    student: float

    def clustering(self, k: int) -> float:
        low, high = self.clusters
        return low + (high - low) * (k - KS[0]) / (KS[-1] - KS[0])

    def seconds(self, stage: Stage, epochs: int) -> float:
        if stage.name in EPOCHS:
            whole = self.teacher if stage.name == "teacher" else self.student * PACE[stage.spec["backbone"]["width"]]
            return whole * HOUR * epochs / EPOCHS[stage.name]
        if stage.name == "clusters":
            return self.clustering(stage.spec["k"]) * HOUR
        return self.features * HOUR if stage.name == "features" else 0.0


MODELS = {
    "teacher given, student 8 h": Costs(0.0, 0.1, (0.02, 0.1), 8.0),
    "teacher 20 h, student 8 h": Costs(20.0, 0.1, (0.02, 0.1), 8.0),
    "teacher 20 h, student 1 h": Costs(20.0, 0.1, (0.02, 0.1), 1.0),
    "CPU: features 20 min, student 10": Costs(0.0, 1 / 3, (1 / 30, 1 / 3), 1 / 6),
    "CPU: the same, teacher 60 min": Costs(1.0, 1 / 3, (1 / 30, 1 / 3), 1 / 6),
}
Params = Mapping[str, Any]


def space(trials: int, concurrent: int, early_stop: bool = False) -> Space:
    """6 teachers x 3 layers x 4 cluster counts x 5 students x 30 seeds."""
    alexnet = {"kind": "alexnet", "width": 0.25}
    schedule = {"kind": "warmup_stable", "decay": 0.0, "lr": 0.05}
    content = {
        "study": "simulated",
        "objectives": [{"metric": "knn/top1"}],
        "budget": {"trials": trials, "concurrent": concurrent},
        "early_stop": {"metric": "knn/top1", "rungs": [5, 13, 40], "reduction": 3} if early_stop else None,
        "pair": {
            "data": "fashion_mnist_mini",
            "teacher": {
                "pretext": {"kind": "rotation"},
                "backbone": alexnet,
                "layer": {"choice": list(LAYERS)},
                "schedule": {**schedule, "epochs": EPOCHS["teacher"]},
                "seed": {"choice": list(TEACHERS)},
            },
            "transfer": {"kind": "clusters", "k": {"choice": list(KS)}},
            "student": {
                "backbone": {"kind": "alexnet", "width": {"choice": list(WIDTHS)}},
                "schedule": {**schedule, "epochs": EPOCHS["student"]},
                "seed": {"choice": list(range(SEEDS))},
            },
            "evals": [{"kind": "knn"}],
        },
    }
    return check_and_fill_modes(Space.from_content(content, "simulate_search.py"))


def pairs_of(count: int, seed: int = 0) -> list[Params]:
    """Distinct pairs in random order; further student seeds are used only when the pairs of one seed do not suffice."""
    generator = random.Random(seed)
    names = ("teacher.seed", "teacher.layer", "transfer.k", "student.backbone.width", "student.seed")
    found: list[Params] = []
    for number in range(SEEDS):
        points = [(t, layer, k, w, number) for t in TEACHERS for layer in LAYERS for k in KS for w in WIDTHS]
        generator.shuffle(points)
        found += [dict(zip(names, point, strict=True)) for point in points]
    chosen = found[:count]
    generator.shuffle(chosen)
    return chosen


@dataclass(frozen=True)
class Ideal:
    """The cost of a list of pairs in seconds, computed without ktray.

    Attributes:
        naive: every pair on its own, without sharing.
        shared: every distinct stage once, features of all layers of a teacher in one pass.
        path: the longest chain of stages.
        bound: no order of stages on `gpus` ends earlier: a level of stages begins when the first chain reaches it.
    """

    naive: float
    shared: float
    path: float
    bound: float

    @classmethod
    def of(cls, entries: Sequence[Params], costs: Costs, gpus: int) -> Ideal:
        levels: list[dict[tuple[Any, ...], float]] = [{}, {}, {}, {}]
        heads: list[list[float]] = [[], [], [], []]
        naive = path = 0.0
        for entry in entries:
            t, layer, k, width, seed = entry.values()
            chain = (costs.teacher, costs.features, costs.clustering(k), costs.student * PACE[width])
            names = ((t,), (t,), (t, layer, k), (t, layer, k, width, seed))  # one pass extracts all layers of a teacher
            for level, (name, cost) in enumerate(zip(names, chain, strict=True)):
                levels[level][name] = cost
                heads[level].append(sum(chain[:level]))
            naive, path = naive + sum(chain), max(path, sum(chain))
        work = [sum(level.values()) for level in levels]
        bound = max(path, *(min(heads[n]) + sum(work[n:]) / gpus for n in range(4)))
        return cls(naive * HOUR, sum(work) * HOUR, path * HOUR, bound * HOUR)


def metrics(stage: Stage) -> Mapping[str, float]:
    """Reproducible pseudo-random metrics of a stage."""
    return {"top1": seed_of(stage.key) % 10_000 / 10_000} if stage.name == "evaluation" else {}


def deaths(share: float) -> Any:
    """A function that makes this share of the stages fail once, at a random point of their work."""

    def dies(key: str, attempts: int) -> float | None:
        drawn = seed_of(key, "death") / 2**63
        return drawn / share if attempts == 0 and drawn < share else None

    return dies


def run(
    costs: Costs, cluster: SimulatedCluster, trials: int, entries: Sequence[Params] | None, live: int = 0
) -> tuple[Timeline, float]:
    """Simulates a list of pairs without early stopping, or a search with it; also returns the CPU seconds of this process.

    Args:
        live: trials at a time; 0: all, but at most 2,000.
    """
    searched = space(trials, live or min(trials, 2000), early_stop=entries is None)
    draws = None if entries is None else fixed_draw_source(searched, entries)
    clock, began = VirtualClock(), time.process_time()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # the study is a file that is synced a dozen times a trial
    with tempfile.TemporaryDirectory(dir=memory) as home:
        study = Study.open(Path(home), searched, clock=clock, draws=draws)
        timeline = simulate(searched, study, clock, costs.seconds, metrics, cluster)
    return timeline, time.process_time() - began


def decisions(timeline: Timeline) -> str:
    """Mean and 99th percentile in ms of the last tenth of the decisions of each kind."""
    texts = []
    for what, took in timeline.decisions.items():
        last = sorted(took[-max(1, len(took) // 10) :])
        texts.append(f"{what} {1e3 * sum(last) / len(last):.2f} ({1e3 * last[int(0.99 * len(last))]:.2f})")
    return ", ".join(texts)


def of_lists(counts: Sequence[int], machines: Sequence[int], names: Sequence[str], live: int = 0) -> None:
    """Prints sharing and makespan of fixed lists."""
    print(
        "model | pairs | GPUs | naive/ideal | of the ideal | makespan h | / max(path, work/GPUs) | / bound | s | decisions ms"
    )
    for name in names:
        for count in counts:
            entries = pairs_of(count)
            for gpus in machines:
                ideal = Ideal.of(entries, MODELS[name], gpus)
                timeline, spent = run(
                    MODELS[name], SimulatedCluster(gpus, startup_seconds=10, overhead_seconds=0.05), count, entries, live
                )
                assert sum(trial.state == "completed" for trial in timeline.trials) == count
                target = max(ideal.path, ideal.shared / gpus)
                print(
                    f"{name} | {count} | {gpus} | {ideal.naive / ideal.shared:.2f} | {ideal.shared / timeline.busy:.4f} | "
                    f"{timeline.makespan / HOUR:.1f} | {timeline.makespan / target:.2f} | {timeline.makespan / ideal.bound:.2f}"
                    f" | {spent:.0f} | {decisions(timeline)}",
                    flush=True,
                )


def of_failures(count: int, gpus: int, name: str) -> None:
    """Prints the cost of stages that fail once, for the same list."""
    entries = pairs_of(count)
    print("deaths | checkpoints | work | lost | makespan h")
    for share, every in ((0.0, float("inf")), (0.05, 600.0), (0.2, 600.0), (0.05, float("inf")), (0.2, float("inf"))):
        cluster = SimulatedCluster(gpus, 8, 10.0, 0.05, deaths(share) if share else SimulatedCluster(1).dies, every)
        timeline, _ = run(MODELS[name], cluster, count, entries)
        assert sum(trial.state == "completed" for trial in timeline.trials) == count
        print(
            f"{share:.0%} | {every:g} s | {timeline.busy / HOUR:.0f} h | {timeline.lost / timeline.busy:.1%} | "
            f"{timeline.makespan / HOUR:.1f}",
            flush=True,
        )


def of_searches(trials: int, gpus: int, name: str) -> None:
    """Prints the result of a whole search in a space of 10,800 pairs, with sampler and rungs."""
    timeline, spent = run(MODELS[name], SimulatedCluster(gpus, startup_seconds=10, overhead_seconds=0.05), trials, None)
    states = [trial.state for trial in timeline.trials]
    counts = {state: states.count(state) for state in sorted(set(states))}
    print(
        f"{name} | {gpus} GPUs | {counts} | {timeline.busy / HOUR:.0f} h | makespan {timeline.makespan / HOUR:.1f} h | "
        f"{spent:.0f} s | {decisions(timeline)}",
        flush=True,
    )


def main() -> None:
    """Prints the requested tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["lists", "many", "failures", "search"])
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 1000])
    parser.add_argument("--models", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--live", type=int, default=0, help="trials at once; 0: all of a list up to 2,000")
    arguments = parser.parse_args()
    names = [list(MODELS)[number] for number in arguments.models]
    if arguments.what == "lists":
        of_lists(arguments.pairs, arguments.gpus, names, arguments.live)
    for name in names if arguments.what == "failures" else ():
        of_failures(arguments.pairs[0], arguments.gpus[0], name)
    for name in names if arguments.what == "search" else ():
        of_searches(arguments.pairs[0], arguments.gpus[0], name)


if __name__ == "__main__":
    main()

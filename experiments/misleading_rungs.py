"""Does a search find the best layer if early rungs prefer another one? Simulated with the results of real students.

Question: kNN after 2 and 4 epochs stops more students of the layer with the best final linear probe. Which methods find it?
Command:  python -m experiments.misleading_rungs --seeds 40
Cost:     two minutes of two cores.
Result:   n = 40 seeds, commit a9bfb36; the best combination has 0.820, one standard error in brackets:

    method                     true              best combination found    its share of all draws
    balanced                   0.8190 (0.0003)   100 %                     64 %
    balanced, rungs believed   0.8120 (0.0017)    62 %                     33 %
    tpe                        0.8190 (0.0004)    98 %                     28 %
    random                     0.8150 (0.0011)    85 %                      8 %

The space is `bench/teachers.yaml`: two widths and two layers of rotation teachers, three k, a learning rate. `MEASURED` are
means over 144 students that `bench/naive_tune.py search` trained in two runs (commits ad38c35 and 41a370b); values without any
student, which are seven of the twelve probes, are interpolated from neighbours. Each trial adds noise of the size observed
between students. "True" is the result of a pair without noise; "rungs believed" is a surrogate that treats scores at rungs like
final ones.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from ktray.artifact import Stage
from ktray.fingerprint import fingerprint
from ktray.pipeline import pair_graph
from ktray.runs.simulation import SimulatedCluster, VirtualClock, simulate
from ktray.search import surrogate
from ktray.search.space import Space
from ktray.search.space_check import check_and_fill_modes
from ktray.search.study import Study
from ktray.search.trial import Trial

SPACE = Path(__file__).parent / "bench" / "teachers.yaml"
TRIALS = 72
SECONDS = {"teacher": 20.0, "features": 0.3, "clusters": 0.1, "pseudo_labels": 0.9, "student": 1.1, "evaluation": 0.6}
BEST_RATE, FALL = 0.17, 0.055  # the best learning rate; the loss of accuracy at the far end of its range
SHARED, OWN = 0.006, 0.007  # standard deviations of the noise that all evaluations of a student share, and of each


class Scores(NamedTuple):
    """kNN after 2, 4 and 8 epochs, and the linear probe."""

    two: float
    four: float
    eight: float
    probe: float


Combination = tuple[float, str, int]
"""(width of the teacher, layer, k)."""
MEASURED: dict[Combination, Scores] = {
    (0.125, "conv3", 20): Scores(0.755, 0.750, 0.780, 0.775),
    (0.125, "conv3", 50): Scores(0.755, 0.766, 0.780, 0.787),
    (0.125, "conv3", 100): Scores(0.748, 0.750, 0.784, 0.787),
    (0.125, "conv4", 20): Scores(0.754, 0.752, 0.789, 0.785),
    (0.125, "conv4", 50): Scores(0.751, 0.770, 0.789, 0.802),
    (0.125, "conv4", 100): Scores(0.743, 0.776, 0.793, 0.804),
    (0.25, "conv3", 20): Scores(0.738, 0.745, 0.780, 0.775),
    (0.25, "conv3", 50): Scores(0.759, 0.763, 0.780, 0.788),
    (0.25, "conv3", 100): Scores(0.762, 0.776, 0.784, 0.798),
    (0.25, "conv4", 20): Scores(0.745, 0.755, 0.789, 0.790),
    (0.25, "conv4", 50): Scores(0.747, 0.762, 0.789, 0.806),
    (0.25, "conv4", 100): Scores(0.758, 0.770, 0.793, 0.820),
}
BEST = max(MEASURED, key=lambda each: MEASURED[each].probe)
METHODS = {
    "balanced": ("balanced", surrogate.RUNG_CORRELATIONS),
    "balanced, rungs believed": ("balanced", (1.0,)),
    "tpe": ("tpe", surrogate.RUNG_CORRELATIONS),
    "random": ("random", surrogate.RUNG_CORRELATIONS),
}
"""Name -> (sampler, candidates for the surrogate's correlation between neighbouring rungs)."""


def combination(trial: Trial) -> Combination:
    """The combination of a trial."""
    drawn = trial.params
    return drawn["teacher.backbone.width"], drawn["teacher.layer"], drawn["transfer.k"]


def expected(trial: Trial) -> Scores:
    """The scores of a trial without noise."""
    lost = FALL * (math.log(BEST_RATE / trial.params["student.schedule.lr"]) / math.log(BEST_RATE / 0.01)) ** 2
    means = MEASURED[combination(trial)]
    return Scores(*(each - 1.5 * lost for each in means[:3]), means.probe - lost)


class World:
    """The metrics of every evaluation of a study's trials, by the key of its stage."""

    def __init__(self, space: Space, study: Study) -> None:
        self._space, self._study = space, study
        self._seen = 0
        self._known: dict[str, float] = {}

    def metrics(self, stage: Stage) -> Mapping[str, float]:
        """Metrics of a stage that a trial of the study needs."""
        if stage.name != "evaluation":
            return {}
        for trial in self._study.trials()[self._seen :]:
            self._learn(trial)
            self._seen += 1
        return {"top1": self._known[stage.key]}

    def _learn(self, trial: Trial) -> None:
        generator, means = random.Random(f"{self._space.seed} {fingerprint(trial.pair)}"), expected(trial)
        shared, pair = generator.gauss(0, 1), self._space.pair(trial.params)
        for epoch, mean in zip((2, 4, 8), means[:3], strict=True):
            keys = pair_graph.build(pair, _identity, epoch=epoch).keys["evaluation"]
            self._known[keys["knn"]] = mean + SHARED * shared + OWN * generator.gauss(0, 1)
            if epoch == 8:
                self._known[keys["linear_probe"]] = means.probe + SHARED / 2 * shared + OWN * generator.gauss(0, 1)


def _identity(data: Any) -> str:
    return fingerprint(data.model_dump())


class Found(NamedTuple):
    """Result of a search: score of its best pair without and with noise, whether it is `BEST`, share of draws of `BEST`."""

    true: float
    observed: float
    hit: float
    share: float


def searched(method: str, seed: int) -> Found:
    """One search on a virtual clock."""
    sampler, surrogate.RUNG_CORRELATIONS = METHODS[method]
    content = yaml.safe_load(SPACE.read_text()) | {"seed": seed, "sampler": sampler}
    space = check_and_fill_modes(Space.from_content({**content, "budget": {"trials": TRIALS, "concurrent": 2}}, SPACE.name))
    clock = VirtualClock()
    with tempfile.TemporaryDirectory() as home:
        study = Study.open(Path(home), space, clock=clock)
        simulate(space, study, clock, _seconds, World(space, study).metrics, SimulatedCluster(2))
        trials = study.trials()
    best = max((each for each in trials if each.state == "completed"), key=lambda each: each.objectives["linear_probe/top1"])
    share = np.mean([combination(each) == BEST for each in trials])
    return Found(expected(best).probe, best.objectives["linear_probe/top1"], combination(best) == BEST, float(share))


def _seconds(stage: Stage, epochs: int) -> float:
    return SECONDS.get(stage.name, 0.0) * (max(1, epochs) if stage.name == "student" else 1)


def main() -> None:
    """Runs every method with the same seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    print(f"n = {given.seeds} seeds; best of all: {BEST}, {MEASURED[BEST].probe:.3f}")
    for method in METHODS:
        with ProcessPoolExecutor(given.processes) as workers:
            found = np.array(list(workers.map(functools.partial(searched, method), range(given.seeds), chunksize=4)), float)
        true, observed, hit, share = found.mean(0)
        error = found[:, 0].std() / math.sqrt(given.seeds)
        print(f"{method:26} true {true:.4f} (standard error {error:.4f}), observed {observed:.4f};", end=" ")
        print(f"best combination found by {hit:.0%}, {share:.0%} of all draws", flush=True)


if __name__ == "__main__":
    main()

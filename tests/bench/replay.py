"""`python -m tests.bench.replay`: a study whose every stage is in the store, from its first draw to its leaderboard.

Nothing is computed, Ray is never started: what is measured is what a trial costs the driver. The artifacts are made up, with
records of the usual size.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as parquet

from ktray import tracking
from ktray.artifact import Stage
from ktray.checksums import seal
from ktray.pipeline import pair_graph
from ktray.runs import search_run
from ktray.runs.interruption import Interruption
from ktray.runs.settings import Settings
from ktray.runs.spec_files import load_space
from ktray.search.space import Space
from ktray.search.study import Study
from ktray.search.trial import Trial
from ktray.stores.file import FileStore
from tests.searches import toy_space
from tests.toys import HOG, ROTATION

TIMES = 10


@dataclass(frozen=True)
class Costs:
    """What trials of which everything is in the store cost the driver.

    Attributes:
        ms_per_trial: of the whole search, by the clock; `cpu_ms_per_trial` of all threads of this process.
        driver_kB_per_trial: by which its memory grew after the first fifth of the trials.
        journal_kB_per_trial: size of the study's file.
    """

    trials: int
    seconds: float
    ms_per_trial: float
    cpu_ms_per_trial: float
    ms_per_trial_by_tenth: tuple[float, ...]
    driver_kB_per_trial: float
    journal_kB_per_trial: float
    reason: str


class Screen:
    """Counts, and looks at the clock and at the memory of this process every so many trials."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.ended: set[int] = set()
        self.rows: list[tuple[int, float, float]] = []
        self.process, self.began = psutil.Process(), time.perf_counter()

    def begin(self, study: Study) -> None:
        self.began = time.perf_counter()
        self.look()

    def trial(self, event: str, trial: Trial, text: str) -> None:
        self.ended.add(trial.number)
        if len(self.ended) % self.every == 0 and len(self.ended) > self.rows[-1][0]:
            self.look()

    def look(self) -> None:
        gc.collect()
        self.rows.append((len(self.ended), time.perf_counter() - self.began, self.memory()))

    def memory(self) -> int:
        """Bytes: what Python holds if it is traced, which chance does not move; else all that the process alone holds."""
        return tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else self.process.memory_full_info().uss

    def work(self, events: list[dict[str, Any]], status: Mapping[str, Any]) -> None:
        raise AssertionError("nothing is to be computed")

    def say(self, text: str) -> None:
        print(text)


def space_of(folder: Path, trials: int, stop_early: bool, sampler: str) -> Space:
    """Many more draws than are wanted, so that few of them repeat."""
    path = toy_space(
        folder,
        budget={"trials": trials, "concurrent": 8},
        sampler=sampler,
        early_stop={"metric": "knn/top1", "rungs": [1, 2, 4], "reduction": 2} if stop_early else None,
        start_with=[],
        pair__teacher={"one_of": {"hog": HOG, "rotation": {**ROTATION, "layer": {"choice": ["conv3", "conv5"]}}}},
        pair__transfer={"kind": "clusters", "k": {"choice": [5, 6, 7, 8, 9, 10, 11, 12]}, "iterations": 5},
        pair__student__schedule={"epochs": 4, "lr": {"log_float": [0.01, 0.3]}, "batch_size": 32},
    )
    return load_space(path, [])


@contextmanager
def made_up(store: FileStore, history: Path) -> Iterator[list[float]]:
    """Whatever a graph asks for is there; how many seconds that took is in the list."""
    took, build = [0.0], pair_graph.build
    known: set[str] = {path.name for path in store.root.iterdir()}

    def building(*arguments: Any, **named: Any) -> pair_graph.Graph:
        graph = build(*arguments, **named)
        began = time.perf_counter()
        for stage in graph.stages:
            if stage.key not in known:
                known.add(stage.key)
                publish(store, stage, history)
        took[0] += time.perf_counter() - began
        return graph

    pair_graph.build = building  # type: ignore[assignment]
    try:
        yield took
    finally:
        pair_graph.build = build


def publish(store: FileStore, stage: Stage, history: Path) -> None:
    """An artifact with a record of the usual size; its metrics follow from its key."""
    scratch = store.root / stage.key
    scratch.mkdir()
    number = int(stage.key[-8:], 16) / 2**32
    names = {"evaluation": ("top1",), "student": ("top1", "loss", "epoch", "parameters"), "images": ("count", "unreadable")}
    unreadable = {"unreadable": 0.0} if stage.name == "images" else {}
    record = {
        **{"key": stage.key, "sha256": stage.sha256, "stage": stage.name, "spec": dict(stage.spec)},
        **{"revisions": dict(stage.revisions), "inputs": dict(stage.inputs), "attempt": "a", "started_from": None},
        **{"metrics": {**dict.fromkeys(names.get(stage.name, ("value",)), number), **unreadable}},
        **{"seconds": 1.0, "seconds_alone": 1.0, "peak_bytes": 1 << 28, "device": "cpu", "workers": 1, "commit": None},
        **{"published": "2020-01-01T00:00:00+00:00"},
    }
    if stage.name in ("student", "teacher"):
        (scratch / "history.parquet").hardlink_to(history)
    seal(scratch, record)


def wake_mlflow(folder: Path) -> None:
    """What MLflow's code takes once, whenever its thread gets to it, is no growth."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.absolute()}/warm.db")
    client.log_metric(client.create_run(client.create_experiment("warm")).info.run_id, "warm", 1.0)


def replay(folder: Path, trials: int, *, stop_early: bool = False, sampler: str = "balanced", tracked: bool = True) -> Costs:
    """Make up the store in `folder`, run the study, and say what it cost.

    Args:
        stop_early: with rungs: up to three legs per trial.
        tracked: False: by a tracker that is down.
    """
    home = folder / "home"
    space = space_of(folder, trials, stop_early, sampler)
    store = FileStore(home / "store")
    history = folder / "history.parquet"
    parquet.write_table(pa.table({"epoch": [1.0, 2.0, 3.0, 4.0], "loss": [1.0] * 4, "top1": [0.5] * 4}), history)
    screen = Screen(every=max(1, trials // TIMES))
    tracker = tracking.Tracker(tracking.default_uri(home) if tracked else "http://127.0.0.1:9", home, "toy")
    settings = Settings(home, f"file://{store.root}")
    wake_mlflow(folder)
    with made_up(store, history) as took:
        began, cpu = time.perf_counter(), time.process_time()
        outcome = search_run.search_study(space, search_run.SearchOptions("toy"), settings, tracker, Interruption(), screen)
        seconds = time.perf_counter() - began - took[0]
        cpu = time.process_time() - cpu - took[0]
    screen.look()
    journal = (home / "studies/toy/journal.log").stat().st_size
    settled = screen.rows[2:-1]  # what is taken once is taken by then
    (early, _, memory), (late, _, later) = settled[0], settled[-1]
    return Costs(
        trials=trials,
        seconds=round(seconds, 1),
        ms_per_trial=round(1000 * seconds / trials, 1),
        cpu_ms_per_trial=round(1000 * cpu / trials, 1),
        ms_per_trial_by_tenth=tuple(
            round(1000 * (b[1] - a[1]) / max(1, b[0] - a[0]), 1) for a, b in zip(screen.rows, screen.rows[1:], strict=False)
        ),
        driver_kB_per_trial=round((later - memory) / 1000 / (late - early), 2),
        journal_kB_per_trial=round(journal / 1000 / trials, 2),
        reason=outcome.reason,
    )


def main() -> None:
    """Replay, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--stop-early", action="store_true", help="with rungs: up to three legs per trial")
    parser.add_argument("--random", action="store_true", help="draw at random: what all but the sampler costs")
    parser.add_argument("--untracked", action="store_true", help="a tracker that is down: what all but MLflow's thread costs")
    parser.add_argument("--folder", type=Path, default=None, help="keep everything here")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="replay-"))
    sampler, tracked = "random" if options.random else "balanced", not options.untracked
    found = replay(folder, options.trials, stop_early=options.stop_early, sampler=sampler, tracked=tracked)
    print(json.dumps(asdict(found), indent=1))


if __name__ == "__main__":
    main()

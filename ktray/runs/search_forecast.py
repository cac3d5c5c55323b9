"""How long a search over some images takes on this machine, measured on a few of them, before anything of it is computed.

A few images go through every stage of one pair per branch, in this process, and the seconds are scaled to full size as
`cost_model/dry_run_forecast.py` does. Shared stages count once, students stop at rungs as often as in a search, and as many
stages run at once as the machine has cores, or GPUs. The time is that of a machine with nothing else to do.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ktray.artifact import Stage
from ktray.cost_model.dry_run_forecast import Forecast, FullSizeStages, forecast
from ktray.pipeline import pair_graph
from ktray.pipeline.pair_check import Load
from ktray.pipeline.pair_graph import Identity
from ktray.runs.dry_run import dry_run_stages
from ktray.runs.machine import Machine
from ktray.search.space import Space
from ktray.stores import Store, open_store

_STARTING_SECONDS = {False: 20.0, True: 45.0}  # with a GPU? -> until workers run, and from the last trial to the end
_RELATIVE_ERROR = 1.6  # either way; a guess, because the measurement is of one small batch
PROMOTED_TOO_MANY = 1.25  # trials are promoted while others are still to come, so more than 1 / reduction of them
LOCAL_STORE = "file://"


@dataclass(frozen=True)
class MeasuredStages:
    """What one pair of each branch took in small.

    Attributes:
        store: with the records; it lives as long as the folder that the caller keeps.
        small: name of a draw -> its stages in small.
        share: of the measured time in which this process had a core; less than 1 where other work kept it waiting.
    """

    store: Store
    small: Mapping[str, list[Stage]]
    share: float


@dataclass(frozen=True)
class SearchForecast:
    """What a search will take.

    Attributes:
        seconds, low, high: of wall time, and the ends of the range to expect.
        bytes: of artifacts on disk.
    """

    seconds: float
    low: float
    high: float
    bytes: int


def measure(space: Space, identity: Identity, folder: Path, device: str, say: Callable[[str], None]) -> MeasuredStages:
    """Run one pair per branch in small, in this process.

    Args:
        folder: existing, for what is written; it may be removed once forecasts are made.
        say: called with the name of each draw before it runs.

    Raises:
        StageFailed: a stage raised.
    """
    import torch

    from ktray.pipeline.execute import execute
    from ktray.pool import StageContext
    from ktray.scheduler.local_scheduler import LocalScheduler

    store = open_store(f"{LOCAL_STORE}{tempfile.mkdtemp(dir=folder)}")
    small = {label: dry_run_stages(space.pair(params), identity) for label, params in space.branch_draws()}
    scheduler = LocalScheduler(store, execute, StageContext(device=device), lambda event: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a worker of a search has one core
    began, busy = time.monotonic(), time.process_time()
    try:
        for label, stages in small.items():
            say(label)
            scheduler.obtain(stages, label)
    finally:
        torch.set_num_threads(threads)
    share = (time.process_time() - busy) / (time.monotonic() - began)
    return MeasuredStages(store, small, 1.0 if device != "cpu" else min(1.0, share))


def forecast_search(
    space: Space, measured: MeasuredStages, expected: Mapping[str, float], identity: Identity, load: Load, machine: Machine
) -> SearchForecast:
    """What the search will take.

    Args:
        space: the measured one, or one that differs in schedules, k and budget.
        expected: stage -> how many artifacts of it the search is expected to need, were every student trained to its end.
    """
    pairs = {label: space.pair(params) for label, params in space.branch_draws()}
    stages = {label: pair_graph.build(pair, identity).stages for label, pair in pairs.items()}
    images = _image_counts(space, identity, load)
    found = forecast(measured.small, FullSizeStages(stages, images, expected), measured.store, measured.store)
    work = _with_rungs(found, space) * measured.share
    return SearchForecast(*wall_seconds(work, space, machine.cores, len(machine.gpus)), found.bytes)


def wall_seconds(work: float, space: Space, cores: int, gpus: int = 0) -> tuple[float, float, float]:
    """Seconds of wall time of a search whose stages take `work` seconds in all, and the ends of the range to expect.

    As many stages run at once as there are GPUs, or without any cores, but not more than the space's budget lets.
    """
    seconds = _STARTING_SECONDS[bool(gpus)] + work / max(1, min(gpus or cores, space.budget.concurrent))
    return seconds, seconds / _RELATIVE_ERROR, seconds * _RELATIVE_ERROR


def _image_counts(space: Space, identity: Identity, load: Load) -> dict[str, tuple[int, int]]:
    from ktray.images import split_rows
    from ktray.spec import DataRoles
    from ktray.stages.images_stage import stage_of

    found = {}
    for _, params in space.branch_draws():
        pair = space.pair(params)
        for spec in (getattr(pair.data, role) for role in DataRoles.model_fields):
            counts = {split: len(rows) for split, (_, rows) in split_rows(load(spec), spec.split).items()}
            found[stage_of(spec, identity(spec)).key] = (counts["train"], sum(counts.values()))
    return found


def _with_rungs(found: Forecast, space: Space) -> float:
    """Seconds of all stages one after the other, with students and evaluations as far as early stopping lets them come."""
    total = 0.0
    shares = shares_of_training(space)
    for stage, row in found.stages.items():
        total += row["expected"] * row["whole_seconds"] * shares.get(stage, 1.0)
    return total


def shares_of_training(space: Space) -> dict[str, float]:
    """Stage -> the share of a full training, or of the evaluations of one, that a trial takes on average."""
    stop = space.early_stop
    if stop is None or not stop.rungs:
        return {}
    last = max(pair.student.schedule.epochs for _, params in space.branch_draws() for pair in (space.pair(params),))
    reached, before, trained, judged = 1.0, 0, 0.0, 0.0
    for rung in sorted({min(rung, last) for rung in stop.rungs} | {last}):
        trained += reached * (rung - before) / last
        judged += reached * (1.0 if rung == last else 0.5)
        before, reached = rung, min(1.0, reached * PROMOTED_TOO_MANY / stop.reduction)
    return {"student": trained, "evaluation": judged}

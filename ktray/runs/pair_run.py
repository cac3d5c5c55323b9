"""Run one pair, or all pairs of an experiment: in this process, or on Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ktray.errors import StageFailed
from ktray.runs.interruption import Interruption, restore_signal_handlers, run_concurrently, run_until_ended
from ktray.runs.settings import Settings

if TYPE_CHECKING:
    from ktray.artifact import Stage
    from ktray.pipeline.pair_graph import Graph
    from ktray.pool import StageContext
    from ktray.runs.early_start import EarlyStart
    from ktray.runs.profile import Profile
    from ktray.scheduler.client import SchedulerClient
    from ktray.spec import PairSpec


MAX_ATTEMPTS = 3  # at a pair one of whose artifacts another pair finds damaged right after it was there


@dataclass(frozen=True)
class PairResult:
    """What a pair is worth, and what it took.

    Attributes:
        keys: stage -> key, and under ``evaluation`` name -> key.
        computed, reused: stage -> number of artifacts.
        seconds: of waiting, until all of it was there.
    """

    name: str
    keys: Mapping[str, Any]
    metrics: dict[str, float]
    computed: dict[str, int]
    reused: dict[str, int]
    seconds: float

    def as_data(self) -> dict[str, Any]:
        """Its stable machine-readable form."""
        return asdict(self)


class _Obtains(Protocol):
    def obtain(self, stages: list[Stage], waiter: str, priority: int = 0) -> list[dict[str, Any]]:
        """Every stage published, in order."""


def run_here(
    pairs: Mapping[str, PairSpec], settings: Settings, profile: Profile | None = None
) -> list[PairResult | StageFailed]:
    """What each pair is worth, or the failure that ended it; computed in this process.

    Args:
        profile: collects what happens.
    """
    from ktray.pipeline.worker_entry import run_stage
    from ktray.scheduler.local_scheduler import LocalScheduler

    context = local_context(settings)

    def show(event: Mapping[str, Any]) -> None:
        if profile is not None:
            gpu_ids = ["0"] if context.device != "cpu" else []
            here = {
                "name": "here",
                "node": "",
                "pid": os.getpid(),
                "cpus": 1.0,
                "gpus": float(len(gpu_ids)),
                "gpu_ids": gpu_ids,
            }
            profile.observe([{"worker": "here", "time": time.time(), **event}], {"workers": [here]})
        if event["event"] == "published":
            settings.print_info(f"  {event['key']}  {event['seconds']:.1f} s")

    function = profile.stage_function() if profile is not None else run_stage
    scheduler = LocalScheduler(settings.open_store(), function, context, show)
    return [_run_pair(name, graph, scheduler, settings) for name, graph in _graphs(pairs, settings).items()]


def run_on_ray(
    pairs: Mapping[str, PairSpec],
    address: str | None,
    concurrent: int,
    settings: Settings,
    interruption: Interruption | None = None,
    early: EarlyStart | None = None,
    profile: Profile | None = None,
) -> list[PairResult | StageFailed]:
    """The same on Ray, `concurrent` pairs at a time.

    Args:
        address: of a running cluster; None starts Ray on this machine.
        early: a Ray that is starting already.
        profile: collects what happens.

    Raises:
        KeyboardInterrupt: a stop was requested; nothing runs any more.
        PreflightFailed: Ray does not start, or its nodes do not see the store.
        SearchStopped: Ray has ended on its own.
    """
    from ktray.scheduler.messages import DAMAGED

    graphs = _graphs(pairs, settings)
    interruption = interruption or Interruption()
    interruption.needs_cleanup = True
    with _scheduler(address, settings, interruption, early, profile) as scheduler:
        past = run_until_ended(lambda: scheduler.events(0), interruption)  # those of earlier drivers of a shared cluster
        results = run_concurrently(
            scheduler,
            graphs,
            lambda name: _run_pair(name, graphs[name], scheduler, settings),
            _waiter,
            concurrent,
            interruption,
        )
        events = scheduler.events(past[-1]["n"] if past else 0)
        if profile is not None:
            profile.observe(events, scheduler.status())
        for event in events:
            if event["event"] == DAMAGED:
                settings.print_info(f"ktray: {event['cause']}")
        return results


@contextmanager
def _scheduler(
    address: str | None, settings: Settings, interruption: Interruption, early: EarlyStart | None, profile: Profile | None
) -> Iterator[SchedulerClient]:
    """The scheduler of this run; its Ray ends with this block. The arguments are those of `run_on_ray`."""
    from ktray.runs.preflight import connect_after_preflight
    from ktray.scheduler import ray_session, resources

    def connect() -> SchedulerClient:
        return connect_after_preflight(session, settings.open_store(), profile)

    scheduler: SchedulerClient | None = None
    if early is not None:
        session, scheduler = early.result()
    else:
        runtime = resources.load_runtime_settings(settings.runtime)
        session = ray_session.start(settings.home, address, runtime, interruption.lose, interruption.ends_process)
    try:
        restore_signal_handlers()
        for warning in session.warnings:
            settings.print_info(f"ktray: {warning}")
        settings.print_info(f"ktray: Ray's own messages go to {session.log}")
        scheduler = scheduler or run_until_ended(connect, interruption)
        if profile is not None:
            profile.mark("Ray up")
        yield scheduler
    finally:
        if early is not None:
            early.end()
        else:
            ray_session.stop(session)
        restore_signal_handlers()


def local_context(settings: Settings) -> StageContext:
    """What stages may use in this process: its GPU if there is one, and the limits of the runtime file."""
    import torch

    from ktray.pool import StageContext
    from ktray.scheduler.resources import load_runtime_settings

    limits = load_runtime_settings(settings.runtime)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return StageContext(device=device, checkpoint_seconds=limits.checkpoint_seconds, memmap_bytes=limits.memmap_bytes)


def _waiter(name: str) -> str:
    return f"run {name}"


def _graphs(pairs: Mapping[str, PairSpec], settings: Settings) -> dict[str, Graph]:
    """What each pair needs. The data are hashed here, in the main thread, where Ctrl-C takes effect at once."""
    from ktray.pipeline import pair_graph
    from ktray.pipeline.identity import data_identity

    identity = data_identity(settings.cache)
    return {name: pair_graph.build(pair, identity) for name, pair in pairs.items()}


def _run_pair(name: str, graph: Graph, scheduler: _Obtains, settings: Settings) -> PairResult | StageFailed:
    """One pair's result, or the failure that ended it."""
    from ktray.pipeline import pair_metrics

    began = time.perf_counter()
    artifacts, computed, store = None, set[str](), settings.open_store()
    for _ in range(MAX_ATTEMPTS):
        try:
            outcomes = scheduler.obtain(list(graph.stages), _waiter(name))
        except StageFailed as failure:
            return failure
        computed |= {outcome["key"] for outcome in outcomes if outcome["state"] == "computed"}
        artifacts = pair_metrics.published_artifacts(graph, store)
        if artifacts is not None:
            break  # otherwise a stage of another pair has just found one of them damaged
    if artifacts is None:
        return StageFailed(name, "an artifact vanished while the pair ran")
    reused = {stage.key for stage in graph.stages} - computed
    return PairResult(
        name=name,
        keys=graph.keys,
        metrics=pair_metrics.metrics(graph, artifacts),
        computed=pair_metrics.count_by_stage(computed),
        reused=pair_metrics.count_by_stage(reused),
        seconds=round(time.perf_counter() - began, 3),
    )

"""Run one pair, or all pairs of an experiment, and print what each is worth."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktray.cli.settings import Settings, count, settings

if TYPE_CHECKING:
    from ktray.pipeline.pair_graph import Graph
    from ktray.pool import StageContext
    from ktray.runs.interruption import Interruption
    from ktray.spec import PairSpec

HELP = "run a pair or an experiment"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("source", type=Path, metavar="PAIR|EXPERIMENT", help="a pair (.yaml) or an experiment (.py)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE", help="change the spec")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only these pairs of an experiment")
    parser.add_argument("--local", action="store_true", help="in this process, without Ray")
    parser.add_argument("--address", default=None, help="a running Ray cluster, such as auto")
    parser.add_argument("--concurrent", type=count, default=4, metavar="C", help="pairs at the same time (on Ray)")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: the source, an argument or the data are wrong, or `--only` names no pair of it.
        PreflightFailed: Ray does not start, or its nodes do not see the store.
        StoppedEarly: the disk is full, or the scheduler has ended; the same command goes on.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the same command goes on.
    """
    from ktray.cli.plan import check_pairs
    from ktray.cli.search import stop_on_signals
    from ktray.cli.spec_files import chosen, load_pairs
    from ktray.errors import StageFailed
    from ktray.pipeline.pair_check import data_loader
    from ktray.pipeline.pair_metrics import left_out
    from ktray.runs.interruption import Interruption

    options = settings(args)
    pairs = chosen(load_pairs(args.source, args.overrides), args.only)
    check_pairs(pairs, data_loader(), args.source)
    stopping = Interruption()
    with stop_on_signals(stopping, options):
        if args.local:
            results = run_here(pairs, options)
        else:
            results = run_on_ray(pairs, args.address, args.concurrent, options, stopping)
    good = [result for result in results if not isinstance(result, StageFailed)]
    options.answer(good, _table(good) if good else "no pair came to its end")
    for line in left_out((key for result in good for key in _keys(result)), options.open_store()):
        options.tell(f"ktray: {line}")
    for result in results:
        if isinstance(result, StageFailed):
            options.blame(f"ktray: {result}")
    return 0 if len(good) == len(results) else StageFailed.exit_code


def run_here(pairs: Mapping[str, PairSpec], options: Settings) -> list[Any]:
    """What each pair is worth, or the StageFailed that ended it; computed in this process."""
    from ktray.pipeline.execute import execute
    from ktray.scheduler.local_scheduler import LocalScheduler

    store = options.open_store()

    def tell(event: Mapping[str, Any]) -> None:
        if event["event"] == "published":
            options.tell(f"  {event['key']}  {event['seconds']:.1f} s")

    scheduler = LocalScheduler(store, execute, context_here(options), tell)
    return [_run_pair(name, graph, scheduler, options) for name, graph in _graphs(pairs, options).items()]


def run_on_ray(
    pairs: Mapping[str, PairSpec], address: str | None, concurrent: int, options: Settings, stopping: Interruption | None = None
) -> list[Any]:
    """The same on Ray, `concurrent` pairs at a time; None as `address` starts one on this machine.

    Raises:
        KeyboardInterrupt: `stopping` was wished; nothing of it runs any more.
        PreflightFailed: Ray does not start, or its nodes do not see the store.
    """
    from ktray.pipeline.execute import execute
    from ktray.runs.interruption import Interruption, hear_again, together
    from ktray.runs.preflight import preflight
    from ktray.scheduler import client, ray_session, resources

    graphs = _graphs(pairs, options)
    stopping = stopping or Interruption()
    stopping.orderly = True
    given = resources.load_runtime(options.runtime)
    session = ray_session.start(options.home, address, given)
    hear_again()
    for warning in session.warnings:
        options.tell(f"ktray: {warning}")
    options.tell(f"ktray: Ray's own messages go to {session.log}")
    try:
        preflight(options.open_store(), given)
        scheduler = client.connect(session, options.store_url, execute)
        return together(
            scheduler, graphs, lambda name: _run_pair(name, graphs[name], scheduler, options), _waiter, concurrent, stopping
        )
    finally:
        ray_session.stop(session)
        hear_again()


def _waiter(name: str) -> str:
    return f"run {name}"


def _graphs(pairs: Mapping[str, PairSpec], options: Settings) -> dict[str, Graph]:
    """What each pair needs; the data are hashed here, where Ctrl-C is heard at once."""
    from ktray.pipeline import pair_graph
    from ktray.pipeline.identity import data_identity

    identity = data_identity(options.cache)
    return {name: pair_graph.build(pair, identity) for name, pair in pairs.items()}


def context_here(options: Settings) -> StageContext:
    """What stages may use in this process: its GPU if there is one, and the limits of the runtime file."""
    import torch

    from ktray.pool import StageContext
    from ktray.scheduler.resources import load_runtime

    limits = load_runtime(options.runtime)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return StageContext(device=device, checkpoint_seconds=limits.checkpoint_seconds, memmap_bytes=limits.memmap_bytes)


def _run_pair(name: str, graph: Graph, scheduler: Any, options: Settings) -> Any:
    """One pair's result, or the StageFailed that ended it."""
    from ktray.errors import StageFailed
    from ktray.pipeline import pair_metrics

    began = time.perf_counter()
    try:
        outcomes = scheduler.obtain(list(graph.stages), _waiter(name))
    except StageFailed as failure:
        return failure
    artifacts = pair_metrics.finished(graph, options.open_store())
    if artifacts is None:
        return StageFailed(name, "an artifact vanished while the pair ran")
    computed = [outcome["key"] for outcome in outcomes if outcome["state"] == "computed"]
    reused = [outcome["key"] for outcome in outcomes if outcome["state"] != "computed"]
    return {
        "name": name,
        "keys": graph.keys,
        "metrics": pair_metrics.metrics(graph, artifacts),
        "computed": pair_metrics.count_by_stage(computed),
        "reused": pair_metrics.count_by_stage(reused),
        "seconds": round(time.perf_counter() - began, 3),
    }


def _keys(result: Mapping[str, Any]) -> list[str]:
    keys = result["keys"]
    return [*(key for key in keys.values() if isinstance(key, str)), *keys.get("evaluation", {}).values()]


def _table(results: list[dict[str, Any]]) -> str:
    from ktray.cli.text_table import table

    shown = sorted({name for result in results for name in result["metrics"] if _is_judgement(name, result)})
    rows = [
        [result["name"], *(_number(result["metrics"].get(name)) for name in shown), f"{result['seconds']:.1f}"]
        for result in results
    ]
    return table(["pair", *shown, "seconds"], rows)


def _is_judgement(name: str, result: Mapping[str, Any]) -> bool:
    return name.split("/")[0] in result["keys"].get("evaluation", {})


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"

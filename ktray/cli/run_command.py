"""Run one pair, or all pairs of an experiment, and print what each is worth."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ktray.cli.terminal import (
    add_profile_arguments,
    exit_at_once,
    path_argument,
    positive_int,
    print_result,
    profile_of,
    settings_of,
    write_profile,
)

if TYPE_CHECKING:
    from ktray.runs.pair_run import PairResult

HELP = "run a pair or an experiment"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("source", type=path_argument, metavar="PAIR|EXPERIMENT", help="a pair (.yaml) or an experiment (.py)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE", help="change the spec")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only these pairs of an experiment")
    parser.add_argument("--local", action="store_true", help="in this process, without Ray")
    parser.add_argument("--address", default=None, help="a running Ray cluster, such as auto")
    add_profile_arguments(parser)
    parser.add_argument("--concurrent", type=positive_int, default=4, metavar="C", help="pairs at the same time (on Ray)")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: the source, an argument or the data are wrong, or `--only` names no pair of it.
        PreflightFailed: Ray does not start, or its nodes do not see the store.
        SearchStopped: the disk is full, or Ray or the scheduler has ended; the same command goes on.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP; the same command goes on.
    """
    from ktray.errors import StageFailed, UserError
    from ktray.runs.early_start import early_start
    from ktray.runs.interruption import Interruption, stop_on_signals

    if args.local and args.address is not None:
        raise UserError("--local runs without Ray, and --address names a cluster of it", instead="Leave one of them out.")
    settings = settings_of(args)
    if args.tracking:
        settings.print_info("ktray: --tracking is not used: run logs nothing to MLflow, a search does")
    interruption = Interruption((lambda: exit_at_once(interruption, args)) if args.is_program else None)
    profile, on_own_ray = profile_of(args, settings), not args.local and args.address is None
    with (
        stop_on_signals(interruption, settings.print_info),
        early_start(settings, interruption, on_own_ray, profile) as early,
    ):
        from ktray.pipeline.pair_check import data_loader  # seconds, in which Ray already starts
        from ktray.pipeline.pair_metrics import unreadable_images
        from ktray.runs.cache import artifact_keys
        from ktray.runs.pair_run import run_here, run_on_ray
        from ktray.runs.plan import check_pairs
        from ktray.runs.spec_files import load_pairs, select_pairs

        pairs = select_pairs(load_pairs(args.source, args.overrides), args.only)
        for sentence in check_pairs(pairs, data_loader(), args.source):
            settings.print_info(f"ktray: {sentence}")
        if profile is not None:
            profile.mark("pairs checked")
        if args.local:
            results = run_here(pairs, settings, profile)
        else:
            results = run_on_ray(pairs, args.address, args.concurrent, settings, interruption, early, profile)
    good = [result for result in results if not isinstance(result, StageFailed)]
    print_result(args, [result.as_data() for result in good], _table(good) if good else "no pair came to its end")
    for line in unreadable_images((key for result in good for key in artifact_keys(result.keys)), settings.open_store()):
        settings.print_info(f"ktray: {line}")
    if profile is not None:
        profile.mark("table")
        write_profile(profile, settings)
    for result in results:
        if isinstance(result, StageFailed):
            settings.print_error(f"ktray: {result}")
    return 0 if len(good) == len(results) else StageFailed.exit_code


def _table(results: Sequence[PairResult]) -> str:
    from ktray.cli.terminal import table

    shown = sorted({name for result in results for name in result.metrics if _is_of_evaluation(name, result)})
    rows = [
        [result.name, *(_number(result.metrics.get(name)) for name in shown), f"{result.seconds:.1f}"] for result in results
    ]
    return table(["pair", *shown, "seconds"], rows)


def _is_of_evaluation(metric: str, result: PairResult) -> bool:
    return metric.split("/")[0] in result.keys.get("evaluation", {})


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"

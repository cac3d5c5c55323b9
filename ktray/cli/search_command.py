"""Search a space for its best pair. The same command goes on where it ended, whatever ended it."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from ktray.cli.terminal import (
    INTERRUPTED,
    add_profile_arguments,
    exit_at_once,
    path_argument,
    positive_int,
    print_result,
    profile_of,
    settings_of,
    write_profile,
)
from ktray.redaction import without_secrets
from ktray.text import counted

if TYPE_CHECKING:
    from ktray.runs.search_run import SearchOutcome
    from ktray.runs.settings import Settings
    from ktray.search.history import StudySnapshot

HELP = "search a space; the same command resumes"
SHOWN = 10  # of the best trials, once it has ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("space", type=path_argument, metavar="SPACE", help="a search space (.yaml)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE", help="change the space")
    parser.add_argument("--name", default=None, help="the study's name; the same name resumes (default: the space's)")
    parser.add_argument("--trials", default=None, metavar="50|+50", help="target, or how many more once it is met")
    parser.add_argument(
        "--concurrent", type=positive_int, default=None, metavar="C", help="trials at the same time, 64 at most"
    )
    parser.add_argument("--warm-start", default=None, metavar="STUDY", help="learn from another study of this home first")
    parser.add_argument("--retry", action="store_true", help="draw the pairs of failed trials again, as new trials")
    parser.add_argument("--address", default=None, help="a running Ray cluster, such as auto")
    add_profile_arguments(parser)
    parser.add_argument("--share-images", action="store_true", help="send cluster sheets to a remote tracker too")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: the space, an argument or the data are wrong.
        PreflightFailed: Ray, the store or the disk cannot carry the search.
    """
    from ktray.runs.early_start import early_start, surely_computes
    from ktray.runs.interruption import Interruption, stop_on_signals

    settings, codes = settings_of(args), list[int]()
    interruption = Interruption((lambda: exit_at_once(interruption, args, codes)) if args.is_program else None)
    profile = profile_of(args, settings)
    alone = args.address is None and args.warm_start is None and not args.retry
    computes = alone and surely_computes(args.space, args.overrides, args.name, args.trials, settings)
    with (
        stop_on_signals(interruption, settings.print_info),
        early_start(settings, interruption, computes, profile) as early,
    ):
        from ktray.runs.search_run import SearchOptions, search  # seconds, in which a signal must already be heard
        from ktray.runs.spec_files import load_space

        options = SearchOptions(
            args.name, args.trials, args.concurrent, args.warm_start, args.address, args.share_images, args.retry, profile
        )
        space = load_space(args.space, args.overrides)

        def report(outcome: SearchOutcome) -> None:
            codes.append(_finish(outcome, args, settings))

        search(space, str(args.space), options, settings, interruption, report, early)
        write_profile(profile, settings)
    return codes[0]


def _finish(outcome: SearchOutcome, args: argparse.Namespace, settings: Settings) -> int:
    from ktray.cli.leaderboard import leaderboard, still_failed
    from ktray.errors import SearchStopped, StageFailed
    from ktray.pipeline.pair_metrics import unreadable_images
    from ktray.runs.search_run import unwritten_events
    from ktray.runs.uncertainty import level_with_best
    from ktray.search.history import read_study
    from ktray.search.ranking import ranked

    study = read_study(settings.home, outcome.study)
    answer = _answer(outcome, study, settings)
    for line in unreadable_images(outcome.published | outcome.reused, settings.open_store()):
        settings.print_info(f"ktray: {line}")
    home = f" --home {shlex.quote(str(args.home))}" if args.home else ""
    failed = still_failed(study.trials)
    gap = unwritten_events(outcome, settings)
    footer = _footer(answer, outcome, home, args.command if failed else "", bool(gap), settings)
    best = ranked(study.trials, study.objectives)[:SHOWN]
    level = level_with_best(best, study.objectives[0][0], settings.open_store())
    print_result(args, answer, f"\n{leaderboard(study, settings.home, SHOWN, best, level)}\n{footer}")
    if gap:
        settings.print_info(f"ktray: {gap}")
    if outcome.stopped:
        why = str(outcome.stopped).rstrip(".")
        again = "" if why.endswith("goes on from here") else " Nothing is lost; the same command goes on from here."
        settings.print_error(f"ktray: stopped early: {why}.{again}")
        return SearchStopped.exit_code
    if outcome.interrupted:
        settings.print_error(f"ktray: interrupted; resume with: {args.command}")
        return INTERRUPTED
    return StageFailed.exit_code if failed else 0


def _answer(outcome: SearchOutcome, study: StudySnapshot, settings: Settings) -> dict[str, Any]:
    from ktray.cli.leaderboard import count_states
    from ktray.pipeline.pair_metrics import count_by_stage
    from ktray.runs.best_trials import trial_as_data
    from ktray.search import ranking

    counts = count_states(study.trials)
    ranked = ranking.ranked(study.trials, study.objectives)
    return {
        "study": outcome.study,
        "trials": {state: counts[state] for state in ("completed", "pruned", "failed", "duplicate")},
        "stages": {
            "computed": count_by_stage(outcome.published),
            "reused": count_by_stage(outcome.reused),
        },
        "best": trial_as_data(ranked[0]) if ranked else None,
        "seconds": round(outcome.seconds, 1),
        "home": str(settings.home),
        "tracking_uri": without_secrets(settings.tracking_uri),
        "events_waiting": outcome.unwritten.waiting,
    }


def _footer(
    answer: dict[str, Any], outcome: SearchOutcome, home: str, again: str, mlflow_lags: bool, settings: Settings
) -> str:
    from ktray.pipeline.references import has_test_split

    computed, reused = (sum(answer["stages"][part].values()) for part in ("computed", "reused"))
    hints = {f"ktray ui{home}": f"{'what has arrived' if mlflow_lags else 'every trial'} in MLflow ({answer['tracking_uri']})"}
    if answer["best"]:
        hints[f"ktray report {outcome.study}{home}"] = "one HTML file"
        if has_test_split(answer["best"]["keys"], settings.open_store()):
            hints[f"ktray best {outcome.study} --test{home}"] = "judge the winners on the test split"
        hints[f"ktray export {outcome.study} student/{home}"] = "the best student"
    else:
        hints[f"ktray show {outcome.study}{home}"] = "what became of each trial"
    if again:
        hints[f"{again.replace(' --retry', '')} --retry"] = "draw what failed again, once the cause is gone"
    width = max(map(len, hints))
    return "\n".join(
        [
            f"{outcome.reason or 'not finished'}; {counted(computed, 'stage')} computed, "
            f"{reused:,} reused, {answer['seconds']:.0f} s.",
            *(f"{command:{width}}  {text}" for command, text in hints.items()),
        ]
    )

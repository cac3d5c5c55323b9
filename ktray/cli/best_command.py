"""The best pairs of a study; with --test judge the best one once on the test split."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ktray.cli.terminal import answered_elsewhere, positive_int, print_result, settings_of

if TYPE_CHECKING:
    from ktray.runs.uncertainty import OverSeeds

HELP = "the best pairs, judged on test if asked"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("name", metavar="NAME", help="the study")
    parser.add_argument("--top", type=positive_int, default=None, help="so many pairs (default: 10; with --test the best one)")
    parser.add_argument("--pareto", action="store_true", help="only pairs that no other beats in every objective")
    parser.add_argument("--per", choices=["teacher", "student"], help="the best pair of each teacher or student")
    parser.add_argument("--test", action="store_true", help="judge the winner on the test split, and keep the result")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: there is no such study.
        StageFailed: with --test: an evaluation, or what it needs again, failed.
    """
    from ktray.cli.leaderboard import leaderboard
    from ktray.runs.best_trials import (
        best_as_data,
        best_trials,
        default_top,
        judge_on_test,
        results_on_test,
        sentences_on_test,
    )
    from ktray.runs.uncertainty import level_with_best, over_seeds
    from ktray.search.history import read_study
    from ktray.search.journal import study_folder

    settings = settings_of(args)
    code = answered_elsewhere(args, settings, args.name)
    if code is not None:
        return code
    study, top = read_study(settings.home, args.name), default_top(args.top, args.test)
    trials = best_trials(study, args.pareto, args.per)[:top]
    metric = study.objectives[0][0]
    level = level_with_best(trials, metric, settings.open_store())
    answers = best_as_data(trials, level)
    text = leaderboard(study, settings.home, top, trials, level)
    for spread in over_seeds(study.trials, metric):
        text += f"\n{_over_seeds(spread, metric)}"
    if args.test:
        for answer, metrics in zip(answers, judge_on_test(trials, args.name, settings), strict=True):
            answer["test"] = metrics
        text += f"\n\n{_test_table(answers)}"
    sentences = sentences_on_test(
        results_on_test(study_folder(settings.home, args.name)), [metric for metric, _ in study.objectives]
    )
    if sentences:
        text = "\n".join(["on test, with one standard error over its images:", *(f"  {each}" for each in sentences), "", text])
    print_result(args, answers, text)
    return 0


def _over_seeds(spread: OverSeeds, metric: str) -> str:
    trials = ", ".join(map(str, spread.trials))
    interval = f"95 % interval {spread.low:.4f} to {spread.high:.4f}"
    what = f"trials {trials} are one pair under {len(spread.trials)} seeds"
    return f"{what}: {metric} {spread.mean:.4f}, sd {spread.deviation:.4f}, {interval}"


def _test_table(answers: list[dict[str, Any]]) -> str:
    from ktray.cli.terminal import table

    metrics = sorted({metric for answer in answers for metric in answer["test"]})
    rows = [
        [str(answer["trial"]), *(f"{answer['test'].get(metric, float('nan')):.4g}" for metric in metrics)] for answer in answers
    ]
    return "on test:\n" + table(["trial", *metrics], rows)

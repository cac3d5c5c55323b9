"""The best pairs of a study; with --test judge the best one once on the test split."""

from __future__ import annotations

import argparse
from typing import Any

from ktray.cli.terminal import positive_int, print_result, settings_of

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
    from ktray.runs.best_trials import best_trials, default_top, judge_on_test, trial_as_data
    from ktray.search.history import read_study

    settings = settings_of(args)
    study, top = read_study(settings.home, args.name), default_top(args.top, args.test)
    trials = best_trials(study, args.pareto, args.per)[:top]
    answers = [trial_as_data(trial) for trial in trials]
    text = leaderboard(study, settings.home, top, trials)
    if args.test:
        for answer, metrics in zip(answers, judge_on_test(trials, args.name, settings), strict=True):
            answer["test"] = metrics
        text += f"\n\n{_test_table(answers)}"
    print_result(args, answers, text)
    return 0


def _test_table(answers: list[dict[str, Any]]) -> str:
    from ktray.cli.terminal import table

    metrics = sorted({metric for answer in answers for metric in answer["test"]})
    rows = [
        [str(answer["trial"]), *(f"{answer['test'].get(metric, float('nan')):.4g}" for metric in metrics)] for answer in answers
    ]
    return "on test:\n" + table(["trial", *metrics], rows)

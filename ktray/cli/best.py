"""The best pairs of a study; with --test judge the best one once on the test split."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ktray.cli.settings import Settings, count, settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ktray.search.history import History
    from ktray.search.trial import Trial

Per = Literal["teacher", "student"]

HELP = "the best pairs, judged on test if asked"
FILE = "test.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("name", metavar="NAME", help="the study")
    parser.add_argument("--top", type=count, default=None, help="so many pairs (default: 10; with --test the best one)")
    parser.add_argument("--pareto", action="store_true", help="only pairs that no other beats in every objective")
    parser.add_argument("--per", choices=["teacher", "student"], help="the best pair of each teacher or student")
    parser.add_argument("--test", action="store_true", help="judge the winner on the test split, and keep the result")


def shown(top: int | None, test: bool) -> int:
    """How many pairs; on test one, unless more are asked for: each further one makes the split worth less."""
    return top or (1 if test else 10)


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: there is no such study.
        StageFailed: with --test: an evaluation, or what it needs again, failed.
    """
    from ktray.cli.leaderboard import leaderboard
    from ktray.search.history import read

    options = settings(args)
    study, count = read(options.home, args.name), shown(args.top, args.test)
    trials = winners(study, args.pareto, args.per)[:count]
    answers = judged(trials, args.name, options, args.test)
    text = leaderboard(study, options.home, count, trials)
    options.answer(answers, f"{text}\n\n{_test_table(answers)}" if args.test else text)
    return 0


def winners(study: History, pareto: bool, per: Per | None) -> list[Trial]:
    """Completed trials, best first.

    Args:
        pareto: only those that no other beats in every objective.
        per: only the best one of each teacher or student.
    """
    from ktray.pipeline import naming
    from ktray.search import ranking

    trials = (ranking.front if pareto else ranking.ranked)(study.trials, study.objectives)
    if per is None:
        return trials
    name_of = {"teacher": naming.teacher_name, "student": naming.student_name}[per]
    first = list({name_of(trial.pair): trial for trial in reversed(trials)}.values())
    return [trial for trial in ranking.ranked(study.trials, study.objectives) if trial in first]


def judged(trials: Sequence[Trial], name: str, options: Settings, test: bool) -> list[dict[str, Any]]:
    """The answers about these trials of the study `name`; with `test` each is judged on that split, which is kept.

    Raises:
        StageFailed: an evaluation, or what it needs again, failed.
    """
    from ktray.cli.leaderboard import study_folder, trial_answer

    answers = [trial_answer(trial) for trial in trials]
    if test:
        for answer, trial in zip(answers, trials, strict=True):
            answer["test"] = _judge_on_test(trial, name, options)
        _keep(study_folder(options.home, name) / FILE, answers)
    return answers


def _keep(path: Path, answers: list[dict[str, Any]]) -> None:
    """Note what the test split said of these trials, and when it was first asked: each look at it makes it worth less."""
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        known = {}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for answer in answers:
        trial = str(answer["trial"])
        first = known.get(trial, {})
        known[trial] = first if first.get("metrics") == answer["test"] else {"metrics": answer["test"], "when": now}
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(known, indent=1, sort_keys=True), encoding="utf-8")
    fresh.replace(path)


def _judge_on_test(trial: Any, name: str, options: Settings) -> dict[str, float]:
    """Metrics on the test split; the evaluations are artifacts, so a winner is judged once and for all."""
    from ktray.cli.run import context_here
    from ktray.pipeline import pair_graph, pair_metrics
    from ktray.pipeline.execute import execute
    from ktray.pipeline.identity import data_identity
    from ktray.pipeline.pair_check import check_pair, data_loader
    from ktray.pipeline.references import on_test
    from ktray.scheduler.local_scheduler import LocalScheduler

    pair = on_test(trial.pair)
    check_pair(pair, data_loader())
    graph = pair_graph.build(pair, data_identity(options.cache))
    store = options.open_store()
    LocalScheduler(store, execute, context_here(options), lambda event: None).obtain(list(graph.stages), f"test {name}")
    artifacts = pair_metrics.finished(graph, store)
    assert artifacts is not None
    judged = pair_metrics.metrics(graph, artifacts)
    names = {f"{evaluation}/" for evaluation in graph.keys.get("evaluation", {})}
    return {metric: value for metric, value in judged.items() if any(metric.startswith(prefix) for prefix in names)}


def _test_table(answers: list[dict[str, Any]]) -> str:
    from ktray.cli.text_table import table

    metrics = sorted({metric for answer in answers for metric in answer["test"]})
    rows = [
        [str(answer["trial"]), *(f"{answer['test'].get(metric, float('nan')):.4g}" for metric in metrics)] for answer in answers
    ]
    return "on test:\n" + table(["trial", *metrics], rows)

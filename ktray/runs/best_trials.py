"""The best trials of a study as data, and what they are worth on the test split."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ktray.checksums import read_json, write_json
from ktray.runs.settings import Settings
from ktray.search import journal
from ktray.search.history import StudySnapshot
from ktray.search.trial import Trial

Per = Literal["teacher", "student"]
FILE = "test.json"
log = logging.getLogger("ktray")


def trial_as_data(trial: Trial) -> dict[str, Any]:
    """The stable machine-readable form of a trial; stages that the pair lacks are absent from `keys`."""
    return {
        "trial": trial.number,
        "params": dict(trial.params),
        "metrics": dict(trial.metrics),
        "objectives": dict(trial.objectives),
        "keys": dict(trial.keys),
        "cost": dict(trial.cost),
    }


def default_top(top: int | None, test: bool) -> int:
    """How many trials; on test one, unless more are asked for: each further one makes the split worth less."""
    return top or (1 if test else 10)


def best_trials(study: StudySnapshot, pareto: bool, per: Per | None) -> list[Trial]:
    """Completed trials, best first.

    Args:
        pareto: only those that no other beats in every objective.
        per: only the best one of each teacher or student.
    """
    from ktray.pipeline import naming
    from ktray.search import ranking

    trials = (ranking.pareto_front if pareto else ranking.ranked)(study.trials, study.objectives)
    if per is None:
        return trials
    name_of = {"teacher": naming.teacher_name, "student": naming.student_name}[per]
    first = list({name_of(trial.pair): trial for trial in reversed(trials)}.values())
    return [trial for trial in ranking.ranked(study.trials, study.objectives) if trial in first]


def judge_on_test(trials: Sequence[Trial], study: str, settings: Settings) -> list[dict[str, float]]:
    """Metrics of each trial on the test split, which are also kept with the study.

    Raises:
        StageFailed: an evaluation, or what it needs again, failed.
    """
    judged = [_judge_on_test(trial, study, settings) for trial in trials]
    keep_test_metrics(
        journal.study_folder(settings.home, study) / FILE,
        {trial.number: metrics for trial, metrics in zip(trials, judged, strict=True)},
    )
    return judged


def _judge_on_test(trial: Trial, study: str, settings: Settings) -> dict[str, float]:
    """Metrics on the test split. The evaluations are artifacts, so each winner is judged only once."""
    from ktray.pipeline import pair_graph, pair_metrics
    from ktray.pipeline.execute import execute
    from ktray.pipeline.identity import data_identity
    from ktray.pipeline.pair_check import check_pair, data_loader
    from ktray.pipeline.references import with_test_split
    from ktray.runs.pair_run import local_context
    from ktray.scheduler.local_scheduler import LocalScheduler

    pair = with_test_split(trial.pair)
    check_pair(pair, data_loader())
    graph = pair_graph.build(pair, data_identity(settings.cache))
    store = settings.open_store()
    scheduler = LocalScheduler(store, execute, local_context(settings), lambda event: None)
    scheduler.obtain(list(graph.stages), f"test {study}")
    artifacts = pair_metrics.published_artifacts(graph, store)
    assert artifacts is not None
    metrics = pair_metrics.metrics(graph, artifacts)
    evaluations = tuple(f"{evaluation}/" for evaluation in graph.keys.get("evaluation", {}))
    return {metric: value for metric, value in metrics.items() if metric.startswith(evaluations)}


def keep_test_metrics(path: Path, judged: dict[int, dict[str, float]]) -> None:
    """Note what the test split said of these trials, and when it was first asked: each look at it makes it worth less."""
    try:
        known = read_json(path)
    except FileNotFoundError:
        known = {}
    except ValueError:
        log.warning("%s was damaged: when the test split was first asked about earlier trials is not known any more", path)
        known = {}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for number, metrics in judged.items():
        first = known.get(str(number), {})
        known[str(number)] = first if first.get("metrics") == metrics else {"metrics": metrics, "when": now}
    write_json(path, known)

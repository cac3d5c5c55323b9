"""The best trials of a study as data, and what they are worth on the test split."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
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


def best_as_data(trials: Sequence[Trial], level: Set[int]) -> list[dict[str, Any]]:
    """The form of ``ktray best NAME --json``, without results on test.

    Args:
        trials: as from `best_trials`.
        level: numbers of the trials that cannot be told apart from the best, as from `uncertainty.level_with_best`.
    """
    return [{**trial_as_data(trial), "level_with_best": trial.number in level} for trial in trials]


def judge_on_test(trials: Sequence[Trial], study: str, settings: Settings) -> list[dict[str, float]]:
    """Metrics of each trial on the test split, which are also kept with the study.

    Raises:
        StageFailed: an evaluation, or what it needs again, failed.
    """
    from ktray.tracking.held_out_metrics import log_test_metrics

    judged = [_judge_on_test(trial.pair, study, settings) for trial in trials]
    found: dict[str, tuple[dict[str, float], dict[str, float]]] = {
        str(trial.number): result for trial, result in zip(trials, judged, strict=True)
    }
    if trials:
        found |= _references_on_test(trials[0], study, settings)
    folder = journal.study_folder(settings.home, study)
    keep_test_metrics(
        folder / FILE,
        {name: metrics for name, (metrics, _) in found.items()},
        {name: errors for name, (_, errors) in found.items()},
    )
    log_test_metrics(settings.tracking_uri, settings.home, study, results_on_test(folder))
    return [metrics for metrics, _ in judged]


def results_on_test(folder: Path) -> dict[str, dict[str, Any]]:
    """What the test split said: number of a trial, or name of a reference -> `metrics`, standard `errors` and `when`.

    Args:
        folder: of the study.
    """
    try:
        found: dict[str, dict[str, Any]] = read_json(folder / FILE)
    except (FileNotFoundError, ValueError):  # never asked, or damaged, which the next `--test` says
        return {}
    return found


def sentences_on_test(results: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> list[str]:
    """A sentence for each trial and reference that was judged on test, such as ``trial 3: knn/top1 0.6500 ± 0.0151``.

    Args:
        metrics: those to name; ± is one standard error over the test images, where it is known.
    """
    found = []
    for name, result in results.items():
        values = [_with_error(metric, result) for metric in metrics if metric in result["metrics"]]
        if values:
            found.append(f"{f'trial {name}' if name.isdigit() else name}: {', '.join(values)}")
    return found


def _with_error(metric: str, result: Mapping[str, Any]) -> str:
    error = result.get("errors", {}).get(metric)
    return f"{metric} {result['metrics'][metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _references_on_test(trial: Trial, study: str, settings: Settings) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """The random student and the supervised ceiling of a trial's student, those that a search has trained."""
    from ktray.pipeline import pair_graph, references
    from ktray.pipeline.identity import data_identity
    from ktray.pipeline.pair_check import data_loader
    from ktray.spec import PairSpec

    store, found = settings.open_store(), {}
    data = data_loader()(PairSpec.model_validate(dict(trial.pair)).data.transfer)
    for name, pair in references.reference_pairs(trial.pair, data).items():
        graph = pair_graph.build(pair, data_identity(settings.cache))
        if pair.evals and store.find(graph.keys["student"]) is not None:
            found[name] = _judge_on_test(pair.model_dump(), study, settings)
    return found


def _judge_on_test(pair: Mapping[str, Any], study: str, settings: Settings) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics on the test split and their standard errors. Evaluations are artifacts, so each pair is judged only once."""
    from ktray.pipeline import pair_graph, pair_metrics
    from ktray.pipeline.execute import execute
    from ktray.pipeline.identity import data_identity
    from ktray.pipeline.pair_check import check_pair, data_loader
    from ktray.pipeline.references import with_test_split
    from ktray.runs.pair_run import local_context
    from ktray.runs.uncertainty import standard_errors
    from ktray.scheduler.local_scheduler import LocalScheduler

    judged = with_test_split(pair)
    check_pair(judged, data_loader())
    graph = pair_graph.build(judged, data_identity(settings.cache))
    store = settings.open_store()
    scheduler = LocalScheduler(store, execute, local_context(settings), lambda event: None)
    scheduler.obtain(list(graph.stages), f"test {study}")
    artifacts = pair_metrics.published_artifacts(graph, store)
    assert artifacts is not None
    metrics = pair_metrics.metrics(graph, artifacts)
    evaluations = tuple(f"{evaluation}/" for evaluation in graph.keys.get("evaluation", {}))
    own = {metric: value for metric, value in metrics.items() if metric.startswith(evaluations)}
    return own, standard_errors(graph.keys, store)


def keep_test_metrics(
    path: Path,
    judged: Mapping[str, Mapping[str, float]],
    errors: Mapping[str, Mapping[str, float]],
) -> None:
    """Note what the test split said, and when it was first asked: each look at it makes it worth less.

    Args:
        judged: number of a trial, or name of a reference -> metrics.
        errors: the same -> their standard errors.
    """
    try:
        known = read_json(path)
    except FileNotFoundError:
        known = {}
    except ValueError:
        log.warning("%s was damaged: when the test split was first asked about earlier trials is not known any more", path)
        known = {}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for name, metrics in judged.items():
        first = known.get(name, {})
        when = first["when"] if first.get("metrics") == metrics else now
        known[name] = {"metrics": dict(metrics), "errors": dict(errors.get(name, {})), "when": when}
    write_json(path, known)

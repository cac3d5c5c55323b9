"""What a search logs to the tracker: its trials, the stages that were computed, and the summary.

A trial's run links to the runs of its stages. A stage has a run only in the study whose search computed it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Any, Literal

from ktray.artifact import Artifact
from ktray.fingerprint import flat
from ktray.pipeline import pair_metrics
from ktray.pipeline.naming import pair_name, stage_name
from ktray.runs.best_trials import sentences_on_test
from ktray.search import ranking
from ktray.search.space import Space
from ktray.search.trial import Trial
from ktray.stores import Store, intact_file_or_none
from ktray.tracking import StageRun, Tracker
from ktray.tracking.mlflow_names import markdown_text, shown_value

PARAM_COLUMNS = 12  # in the table of trials; MLflow shows further params on request
TABLE_ROWS = 1000  # of the table on the run of the search
CLUSTER_SHEET = "images/clusters.png"  # of the stage pseudo_labels
DESCRIPTION = (
    "[All trials, best first](view) by {objectives}. Runs with the tag `ktray.role = 'stage'` are stages, each computed once."
)
_STATUS: dict[str, Literal["FAILED", "KILLED"]] = {"failed": "FAILED", "running": "KILLED"}  # all others: FINISHED


class TrialLogger:
    """Logs the trials of a study and their results. Decides nothing about them.

    Args:
        tracker: started before anything is logged.
        space: its objectives and parameters become columns of MLflow's table of trials.
    """

    def __init__(self, tracker: Tracker, space: Space) -> None:
        self.tracker, self.space = tracker, space
        self._reused: dict[int, str] = {}  # trial -> names of reused stages, until its run is ended

    def describe_study(self) -> None:
        """Describe the study before its first trial, so that MLflow's pages open on the table of trials."""
        objectives, early_stop = self.space.objectives, self.space.early_stop
        rung_metric = [early_stop.metric] if early_stop and early_stop.metric not in dict(objectives) else []
        text = DESCRIPTION.format(objectives=" and ".join(markdown_text(metric) for metric, _ in objectives))
        columns = _param_names(self.space)[:PARAM_COLUMNS]
        self.tracker.describe_study(list(objectives), [*rung_metric, "cost/seconds"], columns, text)

    def begin_trial(self, trial: Trial, keys: Mapping[str, Any]) -> None:
        """Log that a trial runs, from its beginning or from the rung where it was paused, with the stages `keys`."""
        tags = {"ktray.state": "running", **_stage_tags(keys)}
        note = _trial_note(trial, "running", keys)
        self.tracker.begin_trial(trial.number, pair_name(trial.pair), dict(trial.params), tags, note)

    def note_reused_stages(self, trial: Trial, stages: Mapping[str, str], computed: set[str]) -> None:
        """Remember which stages of a trial were in the store before it, for the tag that `end_trial` writes.

        Args:
            stages: key -> name of the stage.
            computed: keys that the trial caused to be computed.
        """
        if trial.last_rung_and_score is None:  # at later rungs its own stages are in the store as well
            self._reused[trial.number] = ", ".join(name for key, name in stages.items() if key not in computed)

    def log_scores(self, trial: Trial) -> None:
        """Log the scores at all rungs that a trial has reached; at epoch 0 its teacher was judged."""
        early_stop = self.space.early_stop
        judged = {**({} if trial.teacher_score is None else {0: trial.teacher_score}), **trial.scores}
        if early_stop is None:
            return
        for epoch, score in judged.items():
            self.tracker.log_metrics(trial.number, {early_stop.metric_at(epoch): shown_value(score)}, epoch)

    def complete_trial(self, trial: Trial, keys: Mapping[str, Any], metrics: Mapping[str, float], epoch: int) -> None:
        """Log the metrics of a completed trial. Those of evaluations get its last epoch as step; objectives have no step."""
        evaluations = keys.get("evaluation", {})
        evaluated = {name: value for name, value in metrics.items() if name.split("/")[0] in evaluations}
        self.tracker.log_metrics(trial.number, {name: shown_value(value) for name, value in evaluated.items()}, epoch)
        plain = {name: value for name, value in metrics.items() if name not in evaluated and not _is_on_curve(name)}
        plain |= {name: round(value, 3) for name, value in plain.items() if name.startswith("cost/")}
        goals = {f"objective/{name}": shown_value(value) for name, value in trial.objectives.items()}
        self.end_trial(trial, keys, {**plain, **goals})

    def end_trial(self, trial: Trial, keys: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Log that a trial no longer runs: it was paused or finished, or the search leaves it to a later session.

        Args:
            metrics: without a step.
        """
        state = "interrupted" if trial.state == "running" else trial.state
        tags = {"ktray.state": state, "ktray.result": _result(trial, self.space), **_stage_tags(keys)}
        tags |= {"ktray.cause": trial.cause or "", "ktray.reused": self._reused.pop(trial.number, "")}
        note = _trial_note(trial, state, keys, tags["ktray.result"])
        tags = {name: text for name, text in tags.items() if text}
        self.tracker.end_trial(trial.number, _STATUS.get(trial.state, "FINISHED"), tags, dict(metrics), note)

    def log_unrun_draw(self, trial: Trial) -> None:
        """Log a draw that ended before it could run, because it is a duplicate or no valid pair."""
        name = pair_name(trial.pair) if trial.state == "duplicate" else "no valid pair"
        self.tracker.begin_trial(trial.number, name, dict(trial.params), {})
        self.end_trial(trial, {}, {})

    def log_summary(
        self,
        trials: list[Trial],
        references: Mapping[str, Mapping[str, Any]],
        level: Collection[int] = (),
        test: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Log the best trials and the reference lines on the run of the search.

        Args:
            level: numbers of the trials that cannot be told apart from the best.
            test: what the test split said (`best_trials.results_on_test`).
        """
        ranked, metric = ranking.ranked(trials, self.space.objectives), self.space.objectives[0][0]
        values = {f"reference/{name}/{metric}": line["metrics"].get(metric) for name, line in references.items()}
        metrics = {name: float(value) for name, value in values.items() if value is not None}
        lines = [f"- {name.split('/')[1]}: {markdown_text(metric)} {value:.4f}" for name, value in metrics.items()]
        best = [
            f"{place}. [{trial.number:04d} {markdown_text(pair_name(trial.pair))}](trial/{trial.number}): "
            f"{markdown_text(_result(trial, self.space))}{' (level with the best)' if trial.number in level else ''}"
            for place, trial in enumerate(ranked[:5], start=1)
        ]
        if ranked:
            metrics[f"best/{metric}"] = ranked[0].objectives[metric]
        on_test = [
            f"- {markdown_text(each)}" for each in sentences_on_test(test or {}, [name for name, _ in self.space.objectives])
        ]
        if on_test:
            lines += ["", "On the test split", "", *on_test]
        for name, result in (test or {}).items():
            metrics |= {f"test/{name}/{each}": value for each, value in result["metrics"].items()}
            metrics |= {f"test_error/{name}/{each}": value for each, value in result.get("errors", {}).items()}
        text = "\n".join(
            [
                "**Best pairs** ([all trials](view), [plots](search/result.html), [table](search/leaderboard.json))\n",
                *best,
                "",
                "To compare with\n",
                *lines,
            ]
        )
        self._log_references(references, test or {})
        if ranked:
            self._attach_result(trials, ranked, references, test or {})
        self.tracker.log_summary(text if ranked else "No trial was completed yet ([all trials](view)).", metrics)

    def _log_references(self, references: Mapping[str, Mapping[str, Any]], test: Mapping[str, Mapping[str, Any]]) -> None:
        for name, line in references.items():
            goals = {each: line["metrics"][each] for each, _ in self.space.objectives if each in line["metrics"]}
            own = {f"objective/{each}": shown_value(value) for each, value in goals.items()}
            own |= {each: shown_value(value) for each, value in line["metrics"].items() if each not in own}
            own |= {f"test/{each}": shown_value(value) for each, value in test.get(name, {}).get("metrics", {}).items()}
            keys = line.get("keys", {})
            self.tracker.log_reference(name, own, {"ktray.state": "reference", **_stage_tags(keys)}, _links_to_stages(keys))

    def _attach_result(
        self,
        trials: list[Trial],
        ranked: list[Trial],
        references: Mapping[str, Mapping[str, Any]],
        test: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Put the plots and the table of the best trials on the run of the search; neither shows an image of the data."""
        from ktray.report.notebook import summary

        early_stop = self.space.content.get("early_stop")
        plots = summary("The result", self.space.objectives, trials, references, early_stop, test)
        goals = [metric for metric, _ in self.space.objectives]
        columns = ["trial", "teacher", "transfer", "student", *goals, "seconds", *_param_names(self.space)]
        rows = [
            [
                *(trial.number, *ranking.component_names(trial)),
                *(shown_value(trial.objectives[metric]) for metric in goals),
                *(round(trial.cost.get("seconds", 0.0), 1), *(trial.params.get(name) for name in _param_names(self.space))),
            ]
            for trial in ranked[:TABLE_ROWS]
        ]
        page = f'<!doctype html><meta charset="utf-8"><body style="font: 14px system-ui, sans-serif">{plots}</body>'
        table = json.dumps({"columns": columns, "data": rows})
        self.tracker.attach({"result.html": page, "leaderboard.json": table}, ["leaderboard.json"])


def log_stage(tracker: Tracker, artifact: Artifact) -> None:
    """Log a stage that was computed as a run of its own, with its curve and its images."""
    record = artifact.record
    spec, stage = record["spec"], record["stage"]
    # top1 alone would mix evaluations. A stage does not know the `name` that a space gives to one and that its trials use.
    prefix = spec["kind"] if stage == "evaluation" else stage
    metrics = {f"{prefix}/{name}": value for name, value in artifact.metrics.items()}
    metrics |= {f"cost/{name}": record[name] for name in ("seconds", "peak_bytes")}
    ended = _published_at(artifact)
    tracker.log_stage(
        StageRun(
            key=artifact.key,
            name=f"{stage_name(stage, spec)} {artifact.key[-12:][:6]}",
            metrics=metrics,
            tags={"ktray.stage": stage, "ktray.device": record["device"], "ktray.commit": record["commit"] or "not a checkout"},
            curve=pair_metrics.prefixed_curve(artifact, prefix),
            images=[path for path in sorted(artifact.directory.glob("*.png")) if intact_file_or_none(artifact, path.name)],
            params=flat(spec),
            note=_stage_note(artifact),
            span=(ended - record["seconds"], ended),
        )
    )


def log_missed_stages(tracker: Tracker, store: Store, keys: Iterable[str], since: float) -> None:
    """Log artifacts that were published but not logged, because the search was killed in between.

    Args:
        keys: of the artifacts that the trials of the study use.
        since: when the study began, in seconds since 1970. Older artifacts were computed for another study.
    """
    for key in keys:
        artifact = None if tracker.has_stage(key) else store.find(key)
        if artifact is not None and _published_at(artifact) >= int(since):
            log_stage(tracker, artifact)


def _result(trial: Trial, space: Space) -> str:
    """Return the result of a trial so far in one line; empty if there is none."""
    if trial.state == "duplicate":
        return f"the same pair as trial {trial.duplicate_of}"
    if trial.cause:
        return trial.cause
    if trial.objectives:
        return ", ".join(f"{name} {value:.4f}" for name, value in trial.objectives.items())
    if trial.last_rung_and_score and space.early_stop:
        epoch, score = trial.last_rung_and_score
        where = f"at epoch {epoch}" if epoch else "of its teacher"
        return f"{space.early_stop.metric_at(epoch)} {score:.4f} {where}"
    return ""


def _param_names(space: Space) -> list[str]:
    """Return the names of a space's parameters; those that only some branches have come last."""
    draws = [params for _, params in space.boundary_draws()]
    names = dict.fromkeys(name for params in draws for name in params)
    return sorted(names, key=lambda name: not all(name in params for params in draws))


def _trial_note(trial: Trial, state: str, keys: Mapping[str, Any], text: str = "") -> str:
    links = [_links_to_stages(keys)] if keys else []
    if "pseudo_labels" in keys:
        links.append(f"[sheet of the clusters](stage/{keys['pseudo_labels']}/{CLUSTER_SHEET})")
    if trial.duplicate_of is not None:
        links.append(f"[trial {trial.duplicate_of}](trial/{trial.duplicate_of})")
    return "\n\n".join(filter(None, [f"**{state}** {markdown_text(text)}".rstrip(), " · ".join(links)]))


def _links_to_stages(keys: Mapping[str, Any]) -> str:
    return " · ".join(f"[{markdown_text(name)}](stage/{key})" for name, key in _flat_keys(keys).items())


def _stage_note(artifact: Artifact) -> str:
    inputs = [f"[{role}](stage/{key})" for role, key in artifact.record["inputs"].items()]
    earlier = artifact.record["started_from"]
    inputs += [f"[an earlier epoch](stage/{earlier})"] if earlier else []
    return "\n\n".join([f"Artifact `{artifact.key}`", *([f"Reads {' · '.join(inputs)}"] if inputs else [])])


def _stage_tags(keys: Mapping[str, Any]) -> dict[str, str]:
    return {f"ktray.stage.{name}": key for name, key in _flat_keys(keys).items()}


def _flat_keys(keys: Mapping[str, Any]) -> dict[str, str]:
    """Return name of a stage or of an evaluation -> key."""
    return {stage: key for stage, key in keys.items() if isinstance(key, str)} | dict(keys.get("evaluation", {}))


def _published_at(artifact: Artifact) -> float:
    return datetime.fromisoformat(artifact.record["published"]).timestamp()


def _is_on_curve(metric: str) -> bool:
    """Return whether a metric of the last epoch is also the end of the student's curve, or is none on its own (epoch, lr)."""
    stage, _, name = metric.partition("/")
    return name in ("epoch", "lr") or (stage == "student" and name != "parameters")

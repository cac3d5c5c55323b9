"""What the tracker is told of a study's trials: what each is, what came of it, and which stages it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ktray.pipeline.naming import pair_name
from ktray.search import ranking
from ktray.search.space import Space
from ktray.search.trial import Trial
from ktray.tracking import Tracker

COLUMNS = 12  # params in the table of trials; a wide space has its others a click away
SHEET = "images/clusters.png"  # of the stage pseudo_labels
_STATUS: dict[str, Literal["FAILED", "KILLED"]] = {"failed": "FAILED", "running": "KILLED"}
ABOUT = "[All trials, best first](view) by {goals}. Runs with the tag `ktray.role = 'stage'` are stages, each computed once."


class TrialLogger:
    """Keeps the tracker informed; knows the study's words, not its decisions.

    Args:
        tracker: started before anything is told.
        space: its objectives and parameters become the columns of the table of trials.
    """

    def __init__(self, tracker: Tracker, space: Space) -> None:
        self.tracker, self.space = tracker, space
        self._reused: dict[int, str] = {}

    def open(self) -> None:
        """What the study is about, before its first trial: MLflow's pages then open on its trials."""
        space, early = self.space, self.space.early_stop
        wanted = [early.metric] if early and early.metric not in dict(space.objectives) else []
        about = ABOUT.format(goals=" and ".join(metric for metric, _ in space.objectives))
        self.tracker.describe_study(list(space.objectives), [*wanted, "cost/seconds"], _params(space)[:COLUMNS], about)

    def begin(self, trial: Trial, keys: Mapping[str, Any]) -> None:
        """A trial runs, from its beginning or from the rung where it paused, on the stages `keys`."""
        tags = {"ktray.state": "running", **_stage_tags(keys)}
        self.tracker.begin_trial(trial.number, pair_name(trial.pair), dict(trial.params), tags, _note(trial, "running", keys))

    def reused(self, trial: Trial, prefixes: Mapping[str, str], computed: set[str]) -> None:
        """Which of the stages that a trial began with were there before it.

        Args:
            prefixes: key -> name of the stage.
            computed: keys that the trial caused to be computed.
        """
        if trial.furthest is None:  # at later rungs what it computed itself is there before, too
            self._reused[trial.number] = ", ".join(name for key, name in prefixes.items() if key not in computed)

    def judged(self, trial: Trial, keys: Mapping[str, Any], metrics: Mapping[str, float], epoch: int) -> None:
        """Metrics of a trial at its last epoch: what was judged has that epoch as its step, objectives and stages have none."""
        curves = {name: value for name, value in metrics.items() if name.split("/")[0] in keys.get("evaluation", {})}
        self.tracker.log_metrics(trial.number, curves, epoch)
        plain = {name: value for name, value in metrics.items() if name not in curves and not _on_a_curve(name)}
        plain |= {name: round(value, 3) for name, value in plain.items() if name.startswith("cost/")}
        self.ended(trial, keys, {**plain, **{f"objective/{name}": value for name, value in trial.objectives.items()}})

    def ended(self, trial: Trial, keys: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """A trial runs no more: it paused, was settled, or the search leaves it for another session.

        Args:
            metrics: without a step.
        """
        state = "interrupted" if trial.state == "running" else trial.state
        tags = {"ktray.state": state, "ktray.result": result(trial, self.space), **_stage_tags(keys)}
        tags |= {"ktray.cause": trial.cause or "", "ktray.reused": self._reused.pop(trial.number, "")}
        note = _note(trial, state, keys, tags["ktray.result"])
        tags = {name: text for name, text in tags.items() if text}
        self.tracker.end_trial(trial.number, _STATUS.get(trial.state, "FINISHED"), tags, dict(metrics), note)

    def refused(self, trial: Trial) -> None:
        """A draw that was settled before it could run: a duplicate, or no valid pair."""
        name = pair_name(trial.pair) if trial.state == "duplicate" else "no valid pair"
        self.tracker.begin_trial(trial.number, name, dict(trial.params), {})
        self.ended(trial, {}, {})

    def summary(self, trials: list[Trial], references: Mapping[str, Mapping[str, Any]]) -> None:
        """What came of the search, on its own run: the best trials, and the reference lines."""
        ranked, metric = ranking.ranked(trials, self.space.objectives), self.space.objectives[0].metric
        values = {f"reference/{name}/{metric}": line["metrics"].get(metric) for name, line in references.items()}
        found = {name: float(value) for name, value in values.items() if value is not None}
        lines = [f"- {name.split('/')[1]}: {metric} {value:.4f}" for name, value in found.items()]
        best = [
            f"{place}. [{trial.number:04d} {pair_name(trial.pair)}](trial/{trial.number}): {result(trial, self.space)}"
            for place, trial in enumerate(ranked[:5], start=1)
        ]
        if ranked:
            found[f"best/{metric}"] = ranked[0].objectives[metric]
        text = "\n".join(["**Best pairs** ([all trials](view))\n", *best, "", "To compare with\n", *lines])
        self.tracker.log_summary(text if ranked else "No trial was completed yet ([all trials](view)).", found)


def result(trial: Trial, space: Space) -> str:
    """What came of a trial, in one line; empty if nothing yet."""
    if trial.state == "duplicate":
        return f"the same pair as trial {trial.duplicate_of}"
    if trial.cause:
        return trial.cause
    if trial.objectives:
        return ", ".join(f"{name} {value:.4f}" for name, value in trial.objectives.items())
    if trial.furthest and space.early_stop:
        epoch, score = trial.furthest
        where = f"at epoch {epoch}" if epoch else "of its teacher"
        return f"{space.early_stop.judged_by(epoch)} {score:.4f} {where}"
    return ""


def _params(space: Space) -> list[str]:
    """Names of a space's parameters, those of single branches last."""
    corners = [corner for _, corner in space.boundary_draws()]
    names = dict.fromkeys(name for corner in corners for name in corner)
    return sorted(names, key=lambda name: not all(name in corner for corner in corners))


def _note(trial: Trial, state: str, keys: Mapping[str, Any], text: str = "") -> str:
    links = [f"[{name}](stage/{key})" for name, key in _flat(keys).items()]
    if "pseudo_labels" in keys:
        links.append(f"[sheet of the clusters](stage/{keys['pseudo_labels']}/{SHEET})")
    if trial.duplicate_of is not None:
        links.append(f"[trial {trial.duplicate_of}](trial/{trial.duplicate_of})")
    return "\n\n".join(filter(None, [f"**{state}** {text}".rstrip(), " · ".join(links)]))


def _stage_tags(keys: Mapping[str, Any]) -> dict[str, str]:
    return {f"ktray.stage.{name}": key for name, key in _flat(keys).items()}


def _flat(keys: Mapping[str, Any]) -> dict[str, str]:
    """Name of a stage or of an evaluation -> key."""
    return {stage: key for stage, key in keys.items() if isinstance(key, str)} | dict(keys.get("evaluation", {}))


def _on_a_curve(metric: str) -> bool:
    """Whether a metric of the last epoch is already there as the end of the student's curve, or says nothing alone."""
    stage, _, name = metric.partition("/")
    return name in ("epoch", "lr") or (stage == "student" and name != "parameters")

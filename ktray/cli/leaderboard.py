"""What a study has found so far, as a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ktray.cli.terminal import table
from ktray.fingerprint import fingerprint
from ktray.pipeline import references
from ktray.search import journal, ranking
from ktray.search.history import StudySnapshot
from ktray.search.ranking import component_names, distinguishing_params
from ktray.search.trial import STATES, Trial
from ktray.text import counted

NOT_TOLD_APART = "cannot be told apart from the best by the images that both were judged on (paired bootstrap, 95 %)"


def leaderboard(
    study: StudySnapshot, home: Path, top: int, trials: Sequence[Trial] | None = None, level: Collection[int] = ()
) -> str:
    """The best completed trials, with the reference lines where they belong.

    Args:
        trials: what to show instead of the `top` best.
        level: numbers of those that cannot be told apart from the best; they are marked.
    """
    objectives = study.objectives
    shown = list(trials if trials is not None else ranking.ranked(study.trials, objectives)[:top])
    apart = distinguishing_params(shown)
    lines = [_row(trial, objectives, [apart[trial.number]] if apart else [], trial.number in level) for trial in shown]
    marks = [
        _reference_row(name, line, objectives) for name, line in references.read(journal.study_folder(home, study.name)).items()
    ]
    sign = -1 if objectives[0][1] == "max" else 1
    body = [cells for _, cells in sorted([*lines, *marks], key=lambda line: sign * line[0])]
    head = ["trial", "teacher", "transfer", "student", *(metric for metric, _ in objectives), "seconds", "added"]
    head += ["differs in"] if apart else []
    body = [cells + [""] * (len(head) - len(cells)) for cells in body]
    note = f"\n~ {NOT_TOLD_APART}" if any(trial.number in level for trial in shown) else ""
    return f"{table(head, body)}{note}\n{tally(study)}" if shown else f"no completed trial yet\n{tally(study)}"


def tally(study: StudySnapshot) -> str:
    """``12 of 14 trials: 5 completed, 7 pruned``."""
    counts = count_states(study.trials)
    parts = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    drawn = sum(count for state, count in counts.items() if state != "duplicate")
    return f"{drawn} of {counted(study.target, 'trial')}: {parts or 'none'}"


def count_states(trials: Sequence[Trial]) -> dict[str, int]:
    """State -> number of trials, in the order in which a reader asks."""
    return {state: sum(trial.state == state for trial in trials) for state in STATES}


def still_failed(trials: Sequence[Trial]) -> bool:
    """Whether a pair failed in the last trial that drew it."""
    last = {fingerprint(trial.pair): trial.state for trial in trials if trial.state != "duplicate"}
    return "failed" in last.values()


def _row(trial: Trial, objectives: Sequence[tuple[str, str]], more: list[str], level: bool) -> tuple[float, list[str]]:
    values = [trial.objectives[metric] for metric, _ in objectives]
    cells = [f"{trial.number} ~" if level else str(trial.number), *component_names(trial)]
    cost = [f"{trial.cost.get('seconds', 0):.1f}", f"{trial.cost.get('marginal_seconds', 0):.1f}"]
    return values[0], [*cells, *(f"{value:.4g}" for value in values), *cost, *more]


def _reference_row(name: str, line: Mapping[str, Any], objectives: Sequence[tuple[str, str]]) -> tuple[float, list[str]]:
    metrics = line["metrics"]
    values = [metrics.get(metric) for metric, _ in objectives]
    shown = ["" if value is None else f"{value:.4g}" for value in values]
    place = values[0] if values[0] is not None else 0.0
    return place, ["-", f"({name})", "", "", *shown, f"{metrics.get('cost/seconds', 0):.1f}", ""]

"""One study as one HTML file: no script, no network, and nothing in it about the machine that it was made on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ktray.stores import Store

if TYPE_CHECKING:
    from ktray.search.trial import Trial

HERE = Path(__file__).parent


def render(
    study: str,
    question: str,
    objectives: Sequence[tuple[str, str]],
    trials: Sequence[Trial],
    references: Mapping[str, Mapping[str, Any]],
    store: Store,
    labels_used: Mapping[str, int],
) -> str:
    """The report as HTML; a section without data is left out.

    All text is escaped; absolute paths are cut to their last part, IP addresses and this machine's name are replaced.

    Args:
        question: what the study asks, one sentence; may be empty.
        objectives: (metric, ``max`` or ``min``), the first one ranks.
        references: ``{"random student": {"metrics": {...}, "keys": {...}}, "supervised ceiling": ...}``.
        store: where the artifacts of the trials are; those it lost are left out.
        labels_used: split -> number of labels that the selection read.

    Raises:
        ValueError: there is no objective.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    if not objectives:
        raise ValueError("a report needs at least one objective to rank trials by")
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    content = _content(objectives, trials, references, store, labels_used)
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html").render(study=study, question=question, style=style, **content)


def _content(
    objectives: Sequence[tuple[str, str]],
    trials: Sequence[Trial],
    references: Mapping[str, Mapping[str, Any]],
    store: Store,
    labels_used: Mapping[str, int],
) -> dict[str, Any]:
    from ktray.report import best_pair, learning_curves, tables
    from ktray.report.headline import headline
    from ktray.report.stage_reuse import finder, reuse
    from ktray.search.ranking import ranked

    find = finder(store)
    best = next(iter(ranked(trials, objectives)), None)
    return {
        "headline": headline(trials, objectives, references, labels_used),
        "leaderboard": tables.leaderboard(trials, objectives, references),
        "pruned": sum(trial.state == "pruned" for trial in trials),
        "heat": tables.heat_table(trials, objectives),
        "metric": objectives[0][0],
        "scatter": learning_curves.objectives_plot(trials, objectives, references),
        "curves": learning_curves.learning_curves(trials, objectives, find),
        "sheet": best_pair.sheet(best, find) if best else None,
        "statistics": best_pair.statistics(best, find) if best else None,
        "reuse": reuse(trials, find),
        "failures": tables.failures(trials),
        "reproduction": best_pair.reproduction(best, find) if best else None,
    }

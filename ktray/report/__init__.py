"""The report of a study: one HTML file with no scripts, no network access and no trace of the machine that made it.

Start here: `render` fills ``page.html``, and `_content` names the function behind each section: `headline.py`, `tables.py`,
`figures.py` (drawn as SVG), `best_pair.py` and `stage_reuse.py`. They return plain data and write values with
`formatting.py`. The subpackage imports `search` (trials and their ranking) and what is below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ktray.stores import Store
from ktray.text import visible

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
    certainty: Mapping[str, Any] | None = None,
) -> str:
    """Return the report as HTML. Sections without data are left out.

    All text is escaped, and control characters are made visible. Absolute paths are cut to their last part; IP addresses and
    the name of this machine are replaced.

    Args:
        question: what the study asks, in one sentence; may be empty.
        objectives: (metric, ``max`` or ``min``); trials are ranked by the first.
        references: ``{"random student": {"metrics": {...}, "keys": {...}}, "supervised ceiling": ...}``.
        store: where the artifacts of the trials are; missing ones are left out.
        labels_used: split -> number of labels that were used to select the best pair.
        certainty: ``test``: sentences about what the test split said, shown first; ``level``: numbers of the trials that
            cannot be told apart from the best; ``seeds``: fields of each `OverSeeds`, a pair under several seeds.

    Raises:
        ValueError: there is no objective.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    if not objectives:
        raise ValueError("a report needs at least one objective to rank trials by")
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,  # Markup, which is a str, is the report's own
        trim_blocks=True,
        lstrip_blocks=True,
    )
    content = _content(objectives, trials, references, store, labels_used, certainty or {})
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html").render(study=study, question=question, style=style, **content)


def _content(
    objectives: Sequence[tuple[str, str]],
    trials: Sequence[Trial],
    references: Mapping[str, Mapping[str, Any]],
    store: Store,
    labels_used: Mapping[str, int],
    certainty: Mapping[str, Any],
) -> dict[str, Any]:
    from ktray.report import best_pair, figures, tables
    from ktray.report.headline import headline
    from ktray.report.stage_reuse import cached_find, reuse_table
    from ktray.search.ranking import ranked

    find = cached_find(store)
    best = next(iter(ranked(trials, objectives)), None)
    return {
        "headline": headline(trials, objectives, references, labels_used),
        "test": certainty.get("test", []),
        "seeds": tables.seeds_table(certainty.get("seeds", []), objectives[0][0]),
        "leaderboard": tables.leaderboard(trials, objectives, references, certainty.get("level", ())),
        "pruned": sum(trial.state == "pruned" for trial in trials),
        "heat": tables.heat_table(trials, objectives),
        "metric": objectives[0][0],
        "scatter": figures.objectives_plot(trials, objectives, references),
        "curves": figures.learning_curves(trials, objectives, find),
        "sheet": best_pair.cluster_sheet(best, find) if best else None,
        "statistics": best_pair.cluster_statistics(best, find) if best else None,
        "judged": best_pair.evaluation_plots(best, find) if best else [],
        "reuse": reuse_table(trials, find),
        "failures": tables.failures(trials),
        "reproduction": best_pair.reproduction(best, find) if best else None,
    }

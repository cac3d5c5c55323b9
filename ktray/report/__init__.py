"""The report of a study: one HTML file that needs no network and bears no trace of the machine that made it.

Start here: `render` fills ``page.html``, and `_content` names the function behind each section: `headline.py`, `tables.py`,
`trial_tables.py`, `figures.py` and `parameter_plots.py` (drawn as SVG), `best_pair.py`, `stage_reuse.py` and
`worker_timeline.py`. They return plain data and write values with `formatting.py`. The page is complete without its one script,
``page.js``, which sorts, filters and highlights; the page's policy allows no other. The subpackage imports `search` (trials and
their ranking) and what is below it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ktray.stores import Store
from ktray.text import visible

if TYPE_CHECKING:
    from ktray.search.trial import Trial

HERE = Path(__file__).parent
_NOT_ASCII = re.compile(r"[^ -~\n]+")  # where a character may be that turns the direction of text, wherever it came from


def render(
    study: str,
    question: str,
    objectives: Sequence[tuple[str, str]],
    trials: Sequence[Trial],
    references: Mapping[str, Mapping[str, Any]],
    store: Store,
    labels_used: Mapping[str, int],
    certainty: Mapping[str, Any] | None = None,
    early_stop: Mapping[str, Any] | None = None,
    runs: Sequence[Mapping[str, Any]] = (),
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
        certainty: ``test``: what the test split said, as from `best_trials.results_on_test`; ``level``: numbers of the trials
            that cannot be told apart from the best; ``seeds``: fields of each `OverSeeds`, a pair under several seeds;
            ``has_test``: whether the data have a test split.
        early_stop: the field of the space's file.
        runs: what workers ran, as `worker_timeline.workers_timeline` reads it.

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
        trim_blocks=True,
        lstrip_blocks=True,
    )
    content = _content(study, objectives, trials, references, store, labels_used, certainty or {}, early_stop, runs)
    style, script = (Markup((HERE / name).read_text(encoding="utf-8")) for name in ("style.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template("page.html")
    page = template.render(study=study, question=question, style=style, script=script, digest=digest, **content)
    return _NOT_ASCII.sub(lambda found: visible(found[0]), page)


def _content(
    study: str,
    objectives: Sequence[tuple[str, str]],
    trials: Sequence[Trial],
    references: Mapping[str, Mapping[str, Any]],
    store: Store,
    labels_used: Mapping[str, int],
    certainty: Mapping[str, Any],
    early_stop: Mapping[str, Any] | None,
    runs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    from ktray.report import best_pair, figures, parameter_plots, tables, trial_tables, worker_timeline
    from ktray.report.headline import headline, next_steps
    from ktray.report.stage_reuse import cached_find, reuse_table
    from ktray.search.ranking import ranked

    find = cached_find(store)
    best = next(iter(ranked(trials, objectives)), None)
    first = headline(trials, objectives, references, labels_used, certainty.get("test"))
    has_test = certainty.get("has_test", True) and first.get("split") != "test"
    return {
        "headline": first,
        "steps": next_steps(study, best, len(trials), bool(first.get("test")), has_test),
        "pairs": trial_tables.pairs_table(trials, objectives, early_stop),
        "history": figures.history_plot(trials, objectives, references),
        "effects": parameter_plots.effects_plot(trials, objectives, early_stop),
        "parallel": parameter_plots.parallel_coordinates(trials, objectives),
        "all_trials": trial_tables.trials_table(trials, objectives, early_stop),
        "specs": trial_tables.specs(trials, best or next(iter(trials), None)),
        "workers": worker_timeline.workers_timeline(runs, {key for trial in trials for key in trial.artifact_keys}),
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

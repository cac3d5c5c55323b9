"""Write the HTML report of a study, and the summary of it that a notebook shows."""

from __future__ import annotations

from pathlib import Path

from ktray.errors import UserError
from ktray.runs.settings import Settings


def write_report(study: str, settings: Settings, path: Path) -> Path:
    """One self-contained HTML file about a study; its path.

    Raises:
        UserError: there is no such study, or the file cannot be written.
    """
    from ktray.pipeline import references
    from ktray.pipeline.references import has_test_split, labels_used
    from ktray.report import render
    from ktray.report.tables import LEADERBOARD_ROWS
    from ktray.runs.best_trials import results_on_test
    from ktray.runs.uncertainty import level_with_best, over_seeds
    from ktray.runs.worker_log import read_runs
    from ktray.search import journal, ranking
    from ktray.search.history import read_study

    history, store = read_study(settings.home, study), settings.open_store()
    used = labels_used([trial.keys for trial in history.trials if trial.state == "completed"], store)
    folder = journal.study_folder(settings.home, study)
    lines = references.read(folder)
    metric = history.objectives[0][0]
    shown = ranking.ranked(history.trials, history.objectives)[:LEADERBOARD_ROWS]
    certainty = {
        "test": results_on_test(folder),
        "has_test": not shown or has_test_split(shown[0].keys, store),
        "level": sorted(level_with_best(shown, metric, store)),
        "seeds": [vars(spread) for spread in over_seeds(history.trials, metric)],
    }
    early_stop = history.content.get("early_stop")
    runs = read_runs(folder)
    page = render(study, "", history.objectives, history.trials, lines, store, used, certainty, early_stop, runs)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", instead="Name another file with -o.") from error
    return path


def summary_for_notebook(study: str, settings: Settings) -> str:
    """A study in a notebook, as HTML: its result, its leaderboard and its plots.

    Raises:
        UserError: there is no such study.
    """
    from ktray.pipeline import references
    from ktray.report.notebook import summary
    from ktray.runs.best_trials import results_on_test
    from ktray.search import journal
    from ktray.search.history import read_study

    history, folder = read_study(settings.home, study), journal.study_folder(settings.home, study)
    early_stop, test = history.content.get("early_stop"), results_on_test(folder)
    return summary(study, history.objectives, history.trials, references.read(folder), early_stop, test)

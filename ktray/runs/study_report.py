"""Write the HTML report of a study."""

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
    from ktray.pipeline.references import labels_used
    from ktray.report import render
    from ktray.report.tables import LEADERBOARD_ROWS
    from ktray.runs.best_trials import results_on_test, sentences_on_test
    from ktray.runs.uncertainty import level_with_best, over_seeds
    from ktray.search import journal, ranking
    from ktray.search.history import read_study

    history, store = read_study(settings.home, study), settings.open_store()
    used = labels_used([trial.keys for trial in history.trials if trial.state == "completed"], store)
    lines = references.read(journal.study_folder(settings.home, study))
    metric = history.objectives[0][0]
    shown = ranking.ranked(history.trials, history.objectives)[:LEADERBOARD_ROWS]
    certainty = {
        "test": sentences_on_test(
            results_on_test(journal.study_folder(settings.home, study)), [name for name, _ in history.objectives]
        ),
        "level": sorted(level_with_best(shown, metric, store)),
        "seeds": [vars(spread) for spread in over_seeds(history.trials, metric)],
    }
    page = render(study, "", history.objectives, history.trials, lines, store, used, certainty)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", instead="Name another file with -o.") from error
    return path

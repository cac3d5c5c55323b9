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
    from ktray.search import journal
    from ktray.search.history import read_study

    history, store = read_study(settings.home, study), settings.open_store()
    used = labels_used([trial.keys for trial in history.trials if trial.state == "completed"], store)
    lines = references.read(journal.study_folder(settings.home, study))
    page = render(study, "", history.objectives, history.trials, lines, store, used)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", instead="Name another file with -o.") from error
    return path

"""Write one self-contained HTML file about a study."""

from __future__ import annotations

import argparse
from pathlib import Path

from ktray.cli.settings import settings
from ktray.stores import Store

HELP = "one self-contained HTML file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("name", metavar="NAME", help="the study")
    parser.add_argument("-o", "--output", type=Path, default=None, metavar="FILE", help="default: NAME.html")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code."""
    options = settings(args)
    path = write_report(args.name, options.home, options.open_store(), args.output or Path(f"{args.name}.html"))
    options.answer({"file": str(path), "bytes": path.stat().st_size}, f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def write_report(name: str, home: Path, store: Store, path: Path) -> Path:
    """The report of a study as a file.

    Raises:
        UserError: there is no such study, or the file cannot be written.
    """
    from ktray.cli.leaderboard import study_folder
    from ktray.errors import UserError
    from ktray.pipeline.references import labels_used
    from ktray.report import render
    from ktray.runs import reference_lines
    from ktray.search.history import read

    study = read(home, name)
    used = labels_used([trial.keys for trial in study.trials if trial.state == "completed"], store)
    lines = reference_lines.read(study_folder(home, name))
    goals = [(goal.metric, goal.mode) for goal in study.objectives]
    page = render(name, "", goals, study.trials, lines, store, used)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", instead="Name another file with -o.") from error
    return path

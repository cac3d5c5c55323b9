"""Write one self-contained HTML file about a study."""

from __future__ import annotations

import argparse
from pathlib import Path

from ktray.cli.settings import settings

HELP = "one self-contained HTML file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("name", metavar="NAME", help="the study")
    parser.add_argument("-o", "--output", type=Path, default=None, metavar="FILE", help="default: NAME.html")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from ktray.cli.leaderboard import study_folder
    from ktray.drivers import references
    from ktray.errors import UserError
    from ktray.pipeline.check import data_loader
    from ktray.pipeline.references import labels_used
    from ktray.report import render
    from ktray.search.study import read

    options = settings(args)
    study = read(options.home, args.name)
    used = labels_used(study.trials[0].pair, data_loader()) if study.trials else {}
    lines = references.read(study_folder(options.home, args.name))
    goals = [(goal.metric, goal.mode) for goal in study.objectives]
    page = render(args.name, "", goals, study.trials, lines, options.open_store(), used)
    path = args.output or Path(f"{args.name}.html")
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", instead="Name another file with -o.") from error
    options.answer({"file": str(path), "bytes": path.stat().st_size}, f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0

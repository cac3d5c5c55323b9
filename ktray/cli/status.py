"""What a study's trials are doing, and how far it is."""

from __future__ import annotations

import argparse

from ktray.cli.settings import settings

HELP = "what each trial waits for, how far the search is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("name", metavar="NAME", help="the study")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from ktray.runs.study_status import status

    options = settings(args)
    answer, text = status(options.home, args.name, options.open_store())
    options.answer(answer, text)
    return 0

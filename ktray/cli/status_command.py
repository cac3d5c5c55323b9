"""What a study's trials are doing, and how far it is."""

from __future__ import annotations

import argparse

from ktray.cli.terminal import answered_elsewhere, print_result, settings_of

HELP = "what each trial waits for, how far the search is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("name", metavar="NAME", help="the study")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: there is no such study.
    """
    from ktray.runs.study_status import status

    settings = settings_of(args)
    code = answered_elsewhere(args, settings, args.name)
    if code is not None:
        return code
    answer, text = status(settings.home, args.name, settings.open_store())
    print_result(args, answer, text)
    return 0

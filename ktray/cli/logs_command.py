"""What a search that was launched elsewhere has printed, and what it prints from now on until it ends."""

from __future__ import annotations

import argparse

from ktray.cli.terminal import settings_of
from ktray.output import print_err, write_out

HELP = "follow a search that was launched elsewhere"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("name", metavar="NAME", help="the study")
    parser.add_argument("--no-follow", action="store_true", help="only what it has printed so far")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code: 0 if the search ended well or still runs, else 3.

    Raises:
        UserError: no such search was launched from this home, or it cannot be found any more.
        PreflightFailed: the place where it runs does not answer.
    """
    from ktray.errors import StageFailed
    from ktray.runs.launch import require_note
    from ktray.runs.launch_following import follow_log, state

    settings = settings_of(args)
    note = require_note(settings.home, args.name)
    went_well = follow_log(note, write_out, not args.no_follow)
    if settings.verbosity:
        print_err(f"ktray: {state(note)}")
    return 0 if went_well else StageFailed.exit_code

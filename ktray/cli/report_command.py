"""Write one self-contained HTML file about a study."""

from __future__ import annotations

import argparse
from pathlib import Path

from ktray.cli.terminal import path_argument, print_result, settings_of

HELP = "one self-contained HTML file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("name", metavar="NAME", help="the study")
    parser.add_argument("-o", "--output", type=path_argument, default=None, metavar="FILE", help="default: NAME.html")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: there is no such study, or the file cannot be written.
    """
    from ktray.runs.study_report import write_report

    path = write_report(args.name, settings_of(args), args.output or Path(f"{args.name}.html"))
    size = path.stat().st_size
    print_result(args, {"file": str(path), "bytes": size}, f"wrote {path} ({size / 1e6:.1f} MB)")
    return 0

"""Compare two students on the same images: differences with intervals, and a sheet of images that only one gets right."""

from __future__ import annotations

import argparse
from pathlib import Path

from ktray.cli.terminal import path_argument, print_result, settings_of

HELP = "two students on the same images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("one", metavar="NAME[/TRIAL]", help="a study's best pair, or one of its trials")
    parser.add_argument("other", metavar="NAME[/TRIAL]", help="what to compare it with")
    parser.add_argument(
        "--test", action="store_true", help="on the test split, where both were judged (ktray best NAME --test)"
    )
    parser.add_argument(
        "-o", "--output", type=path_argument, default=None, metavar="FILE", help="sheet of images (default: compare.png)"
    )


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: there is no such study or trial, or both were not judged on the same images.
    """
    from ktray.cli.terminal import table
    from ktray.runs.comparison import compare

    sheet = args.output or Path("compare.png")
    found = compare(args.one, args.other, args.test, settings_of(args), sheet)
    rows = [
        [
            *(
                metric,
                f"{one:.4f}",
                f"{other:.4f}",
                f"{difference.value:+.4f}",
                f"{difference.low:+.4f} to {difference.high:+.4f}",
            ),
            "told apart" if difference.told_apart else "not told apart",
        ]
        for metric, (one, other, difference) in found.metrics.items()
    ]
    head = ["metric", args.one, args.other, "difference", "95 % interval", ""]
    text = f"{table(head, rows)}\n{found.images} images, paired bootstrap"
    if found.sheet is not None:
        text += f"; {found.only_one} of them only the first gets right, {found.only_other} only the second: {found.sheet}"
    print_result(args, found.as_data(), text)
    return 0

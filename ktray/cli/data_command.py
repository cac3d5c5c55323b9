"""Look at a data set before using it, or decode it into the store."""

from __future__ import annotations

import argparse
from typing import Any

from ktray.cli.terminal import print_result, settings_of

HELP = "check or import a data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("action", choices=["check", "import"])
    parser.add_argument("data", metavar="DATA", help="such as fashion_mnist_mini, folder:/photos or parquet:/p?label=label")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: there is no such data set, or it cannot be read.
    """
    from ktray.runs.data_check import describe_splits, import_images, parse_data

    settings = settings_of(args)
    spec = parse_data(args.data)
    splits = describe_splits(spec)
    answer: dict[str, Any] = {"kind": spec.kind, "size": spec.size, "splits": splits}
    lines = [f"{name}: {split['images']} images, {_labels(split)}" for name, split in splits.items()]
    if "val" not in splits:
        lines.append(f"val: {spec.split.val:.0%} of train, drawn with seed {spec.split.seed}")
    if args.action == "import":
        answer["images"] = import_images(spec, settings)
        lines.append(f"decoded: {answer['images']['count']:.0f} images, {answer['images']['unreadable']:.0f} unreadable")
    print_result(args, answer, "\n".join(lines))
    return 0


def _labels(split: dict[str, Any]) -> str:
    return f"{split['classes']} classes" if split["labelled"] else "no labels"

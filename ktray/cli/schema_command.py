"""Print the JSON schema of a space, pair or runtime file, with which editors complete and check it."""

from __future__ import annotations

import argparse
import json

from ktray.cli.terminal import print_result

HELP = "the JSON schema of a file, for editors"
FILES = ("space", "pair", "runtime")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("file", choices=FILES)


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from ktray.search.file_schema import SCHEMAS

    schema = SCHEMAS[args.file]()
    print_result(args, schema, json.dumps(schema, indent=1))
    return 0

"""What every verb shares: argument types, settings from flags and environment, and how a result is printed."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from typing import Any

from ktray.runs.settings import Settings, make_settings

INTERRUPTED = 130  # exit code after Ctrl-C


def positive_int(text: str) -> int:
    """An argument that counts something.

    Raises:
        argparse.ArgumentTypeError: it is no whole number from 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def settings_of(args: argparse.Namespace) -> Settings:
    """Settings from flags and environment; creates the home and sets up logging.

    Raises:
        UserError: the home cannot be created or written.
    """
    settings = make_settings(
        args.home,
        store=args.store,
        tracking=args.tracking or os.environ.get("MLFLOW_TRACKING_URI"),
        runtime=args.runtime,
        allow_plugins=args.allow_plugins,
        verbosity=0 if args.quiet else 1 + args.verbose,
    )
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="ktray: %(message)s")
    logging.getLogger("ktray").setLevel(logging.INFO if args.verbose else logging.WARNING)
    return settings


def print_result(args: argparse.Namespace, value: Any, text: str) -> None:
    """The result on stdout: `value` as JSON with --json, else `text`."""
    print(json.dumps(value, indent=1, allow_nan=False) if args.json else text, flush=True)

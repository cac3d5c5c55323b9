"""Open the MLflow UI on this home's runs."""

from __future__ import annotations

import argparse

from ktray.cli.terminal import settings_of

HELP = "MLflow UI on the right store"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("--port", type=int, default=5000)


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from ktray import tracking

    settings = settings_of(args)
    settings.print_info(f"ktray: http://127.0.0.1:{args.port} shows {settings.tracking_uri}; Ctrl-C ends it")
    return tracking.serve(settings.tracking_uri, args.port)

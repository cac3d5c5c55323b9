"""Open the MLflow UI on this home's runs."""

from __future__ import annotations

import argparse

from ktray.cli.settings import settings

HELP = "MLflow UI on the right store"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("--port", type=int, default=5000)


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from ktray import tracking

    options = settings(args)
    uri = options.tracking or tracking.default_uri(options.home)
    options.tell(f"ktray: http://127.0.0.1:{args.port} shows {uri}; Ctrl-C ends it")
    return tracking.serve(uri, args.port)

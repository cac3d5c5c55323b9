"""Open the MLflow UI on this home's runs."""

from __future__ import annotations

import argparse
import re

from ktray.cli.terminal import settings_of
from ktray.text import shown

HELP = "MLflow UI on the right store"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("--port", type=_port, default=5000, help="from 1 to 65535 (default: 5000)")

    parser.add_argument(
        "--allowed-hosts",
        type=_hosts,
        default=(),
        metavar="HOST,...",
        help="names of a proxy in front, such as mlflow.example.org",
    )


def _hosts(text: str) -> tuple[str, ...]:
    hosts = tuple(filter(None, (part.strip() for part in text.split(","))))
    for host in hosts:
        if not re.fullmatch(r"\*?[A-Za-z0-9.-]+(:\d{1,5})?", host):
            raise argparse.ArgumentTypeError(f"{shown(host)} is no name of a host: such as mlflow.example.org or 10.0.0.5:8443")
    return hosts


def _port(text: str) -> int:
    if not text.isdecimal() or len(text) > 5 or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no port: a whole number from 1 to 65535")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: this tracker or this port cannot be served.
    """
    from ktray import tracking

    settings = settings_of(args)
    return tracking.serve(settings.tracking_uri, args.port, args.allowed_hosts)

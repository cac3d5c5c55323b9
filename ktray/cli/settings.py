"""Where this command keeps its things and how it talks; flags, environment and defaults in one place. Never hashed."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktray import plugins
from ktray.errors import UserError
from ktray.stores import Store, open_store


@dataclass(frozen=True)
class Settings:
    """The home and the ways of talking of one command.

    Attributes:
        home: absolute; holds `store/`, `studies/`, `mlflow.db`, `logs/`, `cache/`.
        store_url: where artifacts live.
        tracking: MLflow URI, or None for the home's own database.
        talks: 0 errors only, 1 normal, 2 everything.
    """

    home: Path
    store_url: str
    tracking: str | None
    runtime: Path | None
    json: bool
    talks: int

    def open_store(self) -> Store:
        return open_store(self.store_url)

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    def blame(self, text: str) -> None:
        """What went wrong is said with --quiet, too."""
        print(text, file=sys.stderr, flush=True)

    def tell(self, text: str) -> None:
        """Talk goes to stderr; stdout is data."""
        if self.talks:
            print(text, file=sys.stderr, flush=True)

    def answer(self, value: Any, text: str) -> None:
        """The result on stdout: as JSON with --json, else as text."""
        print(json.dumps(value, indent=1, allow_nan=False) if self.json else text, flush=True)


def count(text: str) -> int:
    """An argument that counts something.

    Raises:
        argparse.ArgumentTypeError: it is no whole number from 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def counted(number: object, name: str) -> int:
    """The same for an argument of a Python call.

    Raises:
        UserError: it is no whole number from 1.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UserError(f"{name}={number!r} is no whole number from 1")
    return number


def open_home(home: str | Path | None) -> Path:
    """The absolute path of a home, created if missing; None means KTRAY_HOME, or `./.ktray`.

    Raises:
        UserError: it cannot be created.
    """
    place = Path(home or os.environ.get("KTRAY_HOME") or ".ktray").expanduser().absolute()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "a file is in its place" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise UserError(f"the home {place} cannot be created: {why}", instead="Choose another with --home.") from error
    return place


def settings(args: argparse.Namespace) -> Settings:
    """Read flags and environment; creates the home.

    Raises:
        UserError: the home cannot be created or written.
    """
    plugins.allow(args.allow_plugins)
    home = open_home(args.home)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="ktray: %(message)s")
    logging.getLogger("ktray").setLevel(logging.INFO if args.verbose else logging.WARNING)
    return Settings(
        home=home,
        store_url=args.store or f"file://{home / 'store'}",
        tracking=args.tracking or os.environ.get("MLFLOW_TRACKING_URI"),
        runtime=args.runtime,
        json=args.json,
        talks=0 if args.quiet else 1 + args.verbose,
    )

"""Where a command or a call keeps its files and how much it prints. Never hashed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ktray.errors import UserError
from ktray.local_path import expanded, local_path
from ktray.output import print_err
from ktray.stores import Store, open_store, require_file_url
from ktray.text import shown


@dataclass(frozen=True)
class Settings:
    """Locations and verbosity of one command or call.

    Attributes:
        home: absolute; holds `store/`, `studies/`, `mlflow.db`, `logs/`, `cache/`.
        store_url: where artifacts live.
        tracking: MLflow URI, or None for the home's own database.
        runtime: file with resources per stage kind, or None.
        verbosity: 0 errors only, 1 normal, 2 everything.
    """

    home: Path
    store_url: str
    tracking: str | None = None
    runtime: Path | None = None
    verbosity: int = 1

    def open_store(self) -> Store:
        return open_store(self.store_url)

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    @property
    def tracking_uri(self) -> str:
        """The MLflow URI in effect."""
        from ktray import tracking

        return self.tracking or tracking.default_uri(self.home)

    def print_error(self, text: str) -> None:
        """Print to stderr, whatever the verbosity."""
        print_err(text)

    def print_info(self, text: str) -> None:
        """Print to stderr unless only errors are wanted; stdout is for results."""
        if self.verbosity:
            print_err(text)


def make_settings(
    home: str | Path | None,
    *,
    store: str | None = None,
    tracking: str | None = None,
    runtime: str | Path | None = None,
    allow_plugins: list[str] | None = None,
    verbosity: int = 1,
) -> Settings:
    """Fill in the defaults and create the home.

    Args:
        home: None means KTRAY_HOME, or `./.ktray`.
        store: URL; None means the home's own store.
        allow_plugins: packages whose kinds may load; they stay allowed in this process.

    Raises:
        UserError: the home cannot be created, a path is a URL, or begins with ``~`` and there is no such home folder; or the
            runtime file is not one.
    """
    from ktray import plugins, redaction  # it loads pydantic, which `ktray --help` does not need

    plugins.allow(allow_plugins or [])
    redaction.remember(tracking or "")
    runtime_file, url = local_path(runtime, "--runtime") if runtime else None, _with_home_folder(store or "")
    require_file_url(url)
    if runtime_file is not None:
        from ktray.scheduler.resources import load_runtime_settings

        load_runtime_settings(runtime_file)  # refused before anything is made, by every command that is given it
    folder = open_home(home)
    return Settings(folder, url or f"file://{folder / 'store'}", tracking, runtime_file, verbosity)


def _with_home_folder(store: str) -> str:
    """The URL of a store with `~` at the beginning of its path replaced by that home folder."""
    scheme, separator, path = store.rpartition("://")
    return f"{scheme}{separator}{expanded(path, '--store')}" if path.startswith(("~", "./~")) else store


def open_home(home: str | Path | None) -> Path:
    """The absolute path of a home, created if missing; None means KTRAY_HOME, or `./.ktray`.

    Raises:
        UserError: it cannot be created, is a URL, or begins with ``~`` and there is no such home folder.
    """
    folder = local_path(home or os.environ.get("KTRAY_HOME") or ".ktray", "--home" if home else "KTRAY_HOME").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "a file is in its place" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise UserError(f"the home {folder} cannot be created: {why}", instead="Choose another with --home.") from error
    return folder


def require_positive(number: object, name: str) -> int:
    """A whole number from 1, given as the argument `name` of a Python call.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UserError(f"{name}={shown(number)} is no whole number from 1")
    return number

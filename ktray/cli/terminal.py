"""What every verb shares: argument types, settings from flags and environment, text tables, and how a result is printed."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ktray.errors import UserError
from ktray.local_path import local_path
from ktray.output import log_to_stderr, print_at_once, print_out
from ktray.runs.settings import Settings, make_settings
from ktray.text import shown, visible_name

if TYPE_CHECKING:
    from ktray.runs.interruption import Interruption
    from ktray.runs.profile import Profile

INTERRUPTED = 130  # exit code after Ctrl-C
_PLACES = ("--home", "--store", "--tracking", "--runtime", "--allow-plugins")
MAX_DIGITS = 9  # of an argument that counts something


def path_argument(text: str) -> Path:
    """An argument that is a path.

    Raises:
        UserError: it is empty or a URL, or begins with ``~`` and there is no such home folder. Nothing has been made by then.
    """
    if not text:
        raise UserError("an argument that is a path is empty", instead="Give a path, or leave the option out.")
    return local_path(text, "")


def positive_int(text: str) -> int:
    """An argument that counts something.

    Raises:
        argparse.ArgumentTypeError: it is no whole number from 1.
    """
    if not text.isdecimal() or len(text) > MAX_DIGITS or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is no whole number from 1{' to 999,999,999' if text.isdecimal() else ''}"
        )
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
    log_to_stderr(logging.INFO if args.verbose else logging.WARNING)
    return settings


def answered_elsewhere(args: argparse.Namespace, settings: Settings, study: str) -> int | None:
    """The exit code of a reading verb about a study that was launched elsewhere, which is asked there and its answer printed.

    None if the study is in this home, or was not launched from it: then the verb answers itself.

    Raises:
        UserError, PreflightFailed: the place where it runs cannot be asked.
    """
    if not (settings.home / "launched" / f"{study}.json").exists() or (settings.home / "studies" / study).is_dir():
        return None
    from ktray.runs.launch import require_note
    from ktray.runs.launch_following import answer_in_place, state

    note = require_note(settings.home, study)
    if not args.json:
        settings.print_info(f"ktray: {state(note)}")
    ok, text = answer_in_place(note, words_without_places(args.command))
    print_out(text.strip("\n"))
    return 0 if ok else UserError.exit_code


def words_without_places(command: str) -> list[str]:
    """The words of a command without `ktray` and without the options that say where things are on this machine."""
    words, kept = shlex.split(command)[1:], list[str]()
    while words:
        word = words.pop(0)
        if word in _PLACES:
            words[:1] = []
        elif not word.startswith(tuple(f"{place}=" for place in _PLACES)):
            kept.append(word)
    return kept


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    """`--profile` and `--timeline`, for `profile_of`."""
    parser.add_argument(
        "--profile", action="store_true", help="write a timeline of workers and GPUs, and traces of some stages"
    )
    parser.add_argument("--timeline", action="store_true", help="write the timeline alone, which slows nothing down")


def profile_of(args: argparse.Namespace, settings: Settings) -> Profile | None:
    """The profile that the arguments ask for.

    Raises:
        UserError: its folder cannot be made.
    """
    if not (args.profile or args.timeline):
        return None
    import time

    import psutil

    from ktray.runs.profile import open_profile

    began = psutil.Process().create_time() if args.is_program else time.time()
    return open_profile(settings, args.command, began, with_traces=args.profile)


def write_profile(profile: Profile | None, settings: Settings) -> None:
    """Write its files, and say where they are."""
    if profile is not None:
        settings.print_info(f"ktray: the timeline is {profile.write()}")


def exit_at_once(interruption: Interruption, args: argparse.Namespace, codes: Sequence[int] = ()) -> NoReturn:
    """Leave as kill -9 would: nothing that was published is lost, and the processes of our own Ray are ended by another one.

    Args:
        codes: the exit code, if the result is printed already.
    """
    code, text = INTERRUPTED, f"ktray: interrupted; resume with: {args.command}\n"
    if interruption.loss is not None and not interruption.is_requested():
        code, text = interruption.loss.exit_code, f"ktray: {interruption.loss}\n"
    if codes:
        code, text = codes[0], ""
    print_at_once(text)
    os._exit(code)


@contextmanager
def counting_on_stderr(settings: Settings, what: str) -> Iterator[Callable[[int, int], None]]:
    """A function (done, of) that shows a count on one line of a terminal; without a terminal it shows nothing."""
    if settings.verbosity == 0 or not sys.stderr.isatty():
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(f"{what} "), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        yield lambda done, of: progress.update(task, completed=done, total=of)


def print_result(args: argparse.Namespace, value: Any, text: str) -> None:
    """The result on stdout: `value` as JSON with --json, else `text`."""
    print_out(json.dumps(value, indent=1, allow_nan=False).replace("\x7f", "\\u007f") if args.json else text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], gap: str = "  ") -> str:
    """Rows under a head, every column as wide as its widest cell, each row one line; numbers right, words left."""
    cells = [[visible_name(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        parts = [
            text.rjust(width) if number else text.ljust(width) for text, width, number in zip(row, widths, numeric, strict=True)
        ]
        return gap.join(parts).rstrip()

    return "\n".join([line(cells[0]), line(["-" * width for width in widths]), *map(line, cells[1:])])


def _is_number(text: str) -> bool:
    try:
        float(text.rstrip("%") or "0")
    except ValueError:
        return False
    return True

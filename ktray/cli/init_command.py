"""Write a first space: for a folder of images of your own, or a copy of one that comes with ktray."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ktray.cli.terminal import counting_on_stderr, path_argument, positive_int, print_result, settings_of
from ktray.errors import UserError
from ktray.text import counted, visible_name

if TYPE_CHECKING:
    from ktray.runs.first_space import FirstSpace
    from ktray.runs.recognition import RecognisedData

HELP = "look at your images and write a space for them"
_LIST = ""  # --example without a name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("data", metavar="FOLDER", nargs="?", help="of images or parquet files; or KIND:PATH, as in data check")
    parser.add_argument("--minutes", type=positive_int, default=30, help="time for the search on this machine (30)")
    parser.add_argument("--out", type=path_argument, default=None, metavar="FILE", help="what to write (default: NAME.yaml)")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument(
        "--example", nargs="?", const=_LIST, default=None, metavar="NAME", help="write a shipped space; without NAME list them"
    )


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: there are no images, the file exists, or there is no such example.
    """
    if args.example is not None and args.data is not None:
        raise UserError("--example writes a space that comes with ktray, and needs no folder", instead="Leave one of them out.")
    if args.example is not None:
        return _list_examples(args) if args.example == _LIST else _write_example(args)
    if args.data is None:
        raise UserError("ktray init needs a folder", instead="Give the folder of your images, or --example.")
    return _write_space(args)


def _list_examples(args: argparse.Namespace) -> int:
    from ktray.runs.shipped_spaces import shipped_spaces

    found = {name: each.what for name, each in shipped_spaces().items()}
    width = max(map(len, found), default=0)
    lines = [f"{name:{width}}  {what}" for name, what in found.items()]
    print_result(args, found, "\n".join([*lines, "", "ktray init --example NAME writes NAME.yaml"]))
    return 0


def _write_example(args: argparse.Namespace) -> int:
    from ktray.runs.shipped_spaces import shipped_space

    example = shipped_space(args.example)
    path = _written(args, Path(f"{example.name}.yaml"), example.text)
    print_result(args, {"file": str(path)}, f"wrote {path}: {example.what}\nnext: ktray search {shlex.quote(str(path))}")
    return 0


def _write_space(args: argparse.Namespace) -> int:
    from ktray.runs.recognition import recognise

    data = recognise(args.data)
    place = Path(str(getattr(data.spec, "path", data.spec.kind)))
    from ktray.runs.space_draft import study_name

    name = study_name(place)
    _refuse_existing(args, path := args.out or Path(f"{name}.yaml"))
    settings = settings_of(args)
    settings.print_info(f"ktray: {place} is read as {data.spec.kind}{f': {data.because}' if data.because else ''}")
    from ktray.runs.first_space import first_space

    with counting_on_stderr(settings, "decoded") as report:
        found = first_space(
            data,
            name,
            args.minutes,
            settings,
            report,
            lambda draw: settings.print_info(f"ktray: measuring {draw} on a few images"),
        )
    _written(args, path, found.text)
    home = f" --home {shlex.quote(str(args.home))}" if args.home else ""
    answer = {"file": str(path), "kind": data.spec.kind, "because": data.because, **found.as_data()}
    print_result(args, answer, _text(found, data, args.minutes, path, home))
    return 0


def _refuse_existing(args: argparse.Namespace, path: Path) -> None:
    if path.exists() and not args.force:
        raise UserError(f"{path} exists", instead="Choose another file with --out, or replace it with --force.")


def _written(args: argparse.Namespace, default: Path, text: str) -> Path:
    path: Path = args.out or default
    _refuse_existing(args, path)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", instead="Choose another file with --out.") from error
    return path


def _text(found: FirstSpace, data: RecognisedData, minutes: int, path: Path, home: str) -> str:
    from ktray.cli.data_command import description
    from ktray.runs.study_status import span

    draft, forecast = found.draft, found.forecast
    estimate = (
        f"about {span(forecast.seconds)} ({span(forecast.low)} to {span(forecast.high)}), {forecast.bytes / 2**20:.0f} MB, of "
        f"{counted(minutes, 'minute')} asked for; scaled from a few images"
        if forecast
        else "no estimate"
    )
    written = [
        f"wrote {path}: {counted(draft.trials, 'trial')}; images of {draft.data['size']} px; "
        f"k of {', '.join(map(str, draft.ks))}; students of {draft.epochs} epochs",
        f"machine: {found.machine}",
        f"estimate: {estimate}",
        *(f"note: {note}" for note in found.notes),
        "next:",
        f"  ktray search {shlex.quote(str(path))}{home}",
    ]
    return "\n".join([*description(found.found), *map(visible_name, written)])

"""Export the student of a trial: weights, a card and, where asked for, a program; usable without ktray."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ktray.cli.terminal import path_argument, print_result, settings_of

if TYPE_CHECKING:
    from ktray.runs.launch import LaunchNote

HELP = "the student as safetensors, or as a program (pt2, onnx)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("name", metavar="NAME[/TRIAL]", help="the study's best pair, or one of its trials")
    parser.add_argument("directory", type=path_argument, metavar="DIR")
    parser.add_argument("--format", choices=["safetensors", "pt2", "onnx"], default="safetensors", help="a program beside them")
    parser.add_argument("--preprocessing", action="store_true", help="the program takes uint8 images of any size")
    parser.add_argument("--register", action="store_true", help="also as a model in MLflow's registry: ktray-STUDY")
    parser.add_argument("--head", choices=["none", "classifier"], default="none", help="keep the pseudo-label classifier")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: no such study or completed trial, the folder is occupied, or the tracker cannot register it.
    """
    from ktray.runs.launch import read_note
    from ktray.runs.student_export import export_trial, register_student

    settings = settings_of(args)
    study, _, number = args.name.partition("/")
    note = read_note(settings.home, study)
    if note is not None and not (settings.home / "studies" / study).is_dir():
        return _fetch(args, note)
    files = export_trial(settings, study, number, args.directory, args.head, args.format, args.preprocessing)
    lines = [f"wrote {path}" for path in files]
    if args.register:
        lines.append(register_student(settings, study, number, args.directory))
    print_result(args, [str(path) for path in files], "\n".join(lines))
    return 0


def _fetch(args: argparse.Namespace, note: LaunchNote) -> int:
    """Export where the study was searched, and bring the files here."""
    from ktray.runs.launch_following import fetch_student

    words = [args.name, "--format", args.format, "--head", args.head, *(["--register"] if args.register else [])]
    words += ["--preprocessing"] if args.preprocessing else []
    files = fetch_student(note, words, args.directory)
    print_result(args, [str(path) for path in files], "\n".join(f"fetched {path}" for path in files))
    return 0

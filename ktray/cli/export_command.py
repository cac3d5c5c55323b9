"""Export the student of a trial: weights, a card and, where asked for, a program; usable without ktray."""

from __future__ import annotations

import argparse

from ktray.cli.terminal import path_argument, print_result, settings_of

HELP = "the student as safetensors, or as a program (pt2, onnx)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("name", metavar="NAME[/TRIAL]", help="the study's best pair, or one of its trials")
    parser.add_argument("directory", type=path_argument, metavar="DIR")
    parser.add_argument("--format", choices=["safetensors", "pt2", "onnx"], default="safetensors", help="a program beside them")
    parser.add_argument("--register", action="store_true", help="also as a model in MLflow's registry: ktray-STUDY")
    parser.add_argument("--head", choices=["none", "classifier"], default="none", help="keep the pseudo-label classifier")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: no such study or completed trial, the folder is occupied, or the tracker cannot register it.
    """
    from ktray.runs.student_export import export_trial, register_student

    settings = settings_of(args)
    study, _, number = args.name.partition("/")
    files = export_trial(settings, study, number, args.directory, args.head, args.format)
    lines = [f"wrote {path}" for path in files]
    if args.register:
        lines.append(register_student(settings, study, number, args.directory))
    print_result(args, [str(path) for path in files], "\n".join(lines))
    return 0

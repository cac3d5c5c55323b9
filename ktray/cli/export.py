"""Export the student of a trial: weights, a card and, where asked for, a program; usable without ktray."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktray.cli.settings import Settings, settings
from ktray.stores import Store

if TYPE_CHECKING:
    from ktray.export.student_files import Form, Head

HELP = "the student as safetensors, or as a program (pt2, onnx)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("name", metavar="NAME[/TRIAL]", help="the study's best pair, or one of its trials")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--format", choices=["safetensors", "pt2", "onnx"], default="safetensors", help="a program beside them")
    parser.add_argument("--register", action="store_true", help="also as a model in MLflow's registry: ktray-STUDY")
    parser.add_argument("--head", choices=["none", "classifier"], default="none", help="keep the pseudo-label classifier")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: no such study or completed trial, the folder is occupied, or the tracker cannot register it.
    """
    options = settings(args)
    name, _, number = args.name.partition("/")
    files = write_student(options.home, options.open_store(), name, number, args.directory, args.head, args.format)
    said = [f"wrote {path}" for path in files]
    if args.register:
        said.append(register(options, name, number, args.directory))
    options.answer([str(path) for path in files], "\n".join(said))
    return 0


def register(options: Settings, name: str, number: str, directory: Path) -> str:
    """Put the exported student into MLflow's registry; a sentence about it.

    Raises:
        UserError: the tracker does not know the trial, or has no registry.
    """
    from ktray import tracking
    from ktray.export.student_files import CARD, load_student
    from ktray.tracking import model_registry

    trial, best = _trial(options.home, name, number), _trial(options.home, name, "")
    card = json.loads((directory / CARD).read_text())
    model, version = model_registry.register_student(
        options.tracking or tracking.default_uri(options.home),
        options.home,
        name,
        trial.number,
        load_student(directory),
        card["input"]["size"][0],
        trial.number == best.number,
        {"ktray.trial": str(trial.number), "ktray.pair": card["lineage"]["pair"], "ktray.student": trial.keys["student"]},
    )
    return f"registered version {version} of {model} as {'champion' if trial.number == best.number else 'challenger'}"


def write_student(home: Path, store: Store, name: str, number: str, out: Path, head: Head, form: Form) -> list[Path]:
    """The files of an exported student.

    Args:
        number: of the trial; empty for the study's best.

    Raises:
        UserError: there is no such study or completed trial, its student is gone, or `out` is occupied.
    """
    from ktray.errors import UserError
    from ktray.export.student_files import export_student
    from ktray.pipeline.naming import pair_name
    from ktray.spec import PairSpec

    trial = _trial(home, name, number)
    snapshot = store.find(trial.keys["student"])
    if snapshot is None:
        raise UserError(
            f"the student of trial {trial.number} is no longer in the store", instead="Search again to get it back."
        )
    pair = PairSpec.model_validate(dict(trial.pair))
    size: int = pair.data.transfer.size  # type: ignore[attr-defined]
    k = getattr(pair.transfer, "k", None)
    classes = k if isinstance(k, int) else None  # several k have several classifiers in one
    lineage = {"study": name, "trial": trial.number, "pair": pair_name(trial.pair), "keys": dict(trial.keys)}
    return export_student(snapshot.directory, pair.student, size, trial.metrics, lineage, out, classes, head, form)


def _trial(home: Path, name: str, number: str) -> Any:
    from ktray.errors import UserError
    from ktray.search import ranking
    from ktray.search.history import read

    study = read(home, name)
    ranked = ranking.ranked(study.trials, study.objectives)
    if number:
        ranked = [trial for trial in ranked if str(trial.number) == (number.lstrip("0") or "0")]
    if not ranked:
        what = f"completed trial {number}" if number else "completed trial"
        raise UserError(f"the study {name!r} has no {what}", instead=f"See ktray show {name}.")
    return ranked[0]

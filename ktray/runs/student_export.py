"""Export the student of a trial, and register it as a model in MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktray.errors import UserError
from ktray.runs.settings import Settings
from ktray.search.trial import Trial
from ktray.stores import Store, intact_file

if TYPE_CHECKING:
    from ktray.export.student_files import Form, Head


def export_trial(
    settings: Settings,
    study: str,
    number: str,
    directory: Path,
    head: Head = "none",
    form: Form = "safetensors",
    from_pixels: bool = False,
) -> list[Path]:
    """Write a trial's student into a new folder; the files.

    Args:
        number: of the trial; empty for the study's best.
        from_pixels: the program includes the preprocessing.

    Raises:
        UserError: there is no such study or completed trial, its student is gone, or `directory` is occupied.
        MissingInput: its student is damaged.
    """
    from ktray.export.student_files import export_student
    from ktray.pipeline.naming import pair_name
    from ktray.pipeline.references import CEILING, RANDOM
    from ktray.runs.best_trials import results_on_test
    from ktray.search.journal import study_folder
    from ktray.spec import PairSpec

    trial = _completed_trial(settings.home, study, number)
    snapshot = settings.open_store().find(trial.keys["student"])
    if snapshot is None:
        raise UserError(
            f"the student of trial {trial.number} is no longer in the store", instead="Search again to get it back."
        )
    intact_file(snapshot, "weights.safetensors")
    pair = PairSpec.model_validate(dict(trial.pair))
    size = pair.student.image_size or pair.data.transfer.size
    k = getattr(pair.transfer, "k", None)
    classes = k if isinstance(k, int) else None  # several k have several classifiers in one
    lineage: dict[str, Any] = {"study": study, "trial": trial.number, "pair": pair_name(trial.pair), "keys": dict(trial.keys)}
    lineage |= {"licences": found} if (found := licences_of(trial.keys, settings.open_store())) else {}
    test = results_on_test(study_folder(settings.home, study))
    lineage["test"] = {name: test[name] for name in (str(trial.number), RANDOM, CEILING) if name in test}
    weights, student, metrics = snapshot.directory, pair.student, trial.metrics
    return export_student(weights, student, size, metrics, lineage, directory, classes, head, form, from_pixels)


def licences_of(keys: Mapping[str, Any], store: Store) -> dict[str, str]:
    """Pretrained weights that a trial rests on, also through its chain of teachers -> their licence, as records say it."""
    from ktray.report.stage_reuse import with_inputs

    made = with_inputs([keys["student"]], store.find).values()
    records = [artifact.record for artifact in made if artifact.record.get("licence")]
    return {str(record["weights"]): str(record["licence"]) for record in records}


def register_student(settings: Settings, study: str, number: str, directory: Path) -> str:
    """Put the exported student into MLflow's registry; a sentence about it.

    Args:
        number: of the trial; empty for the study's best.
        directory: where `export_trial` has written it.

    Raises:
        UserError: the tracker does not know the trial, or has no registry.
    """
    from ktray.export import programs
    from ktray.export.student_files import CARD, load_student
    from ktray.tracking import model_registry

    trial, best = (_completed_trial(settings.home, study, each) for each in (number, ""))
    card = json.loads((directory / CARD).read_text())
    network, size = load_student(directory), card["input"]["size"][0]
    try:
        model, version = model_registry.register_student(
            settings.tracking_uri,
            settings.home,
            study,
            trial.number,
            network,
            size,
            trial.number == best.number,
            _tags(trial, card["lineage"]),
            lambda stored: programs.compare(network, stored, size, "the stored model", "Use it without the registry."),
        )
    except UserError as error:
        instead = f"{directory} has the student, the registry has not. {error.instead}"
        raise UserError(error.problem, error.where, instead) from error
    return f"registered version {version} of {model} as {'champion' if trial.number == best.number else 'challenger'}"


def _tags(trial: Trial, lineage: Mapping[str, Any]) -> dict[str, str]:
    """The tags of a version: where it comes from, and what the test split said of it, each value with one standard error."""
    tags = {"ktray.trial": str(trial.number), "ktray.pair": lineage["pair"], "ktray.student": trial.keys["student"]}
    for name, result in lineage["test"].items():
        of = "test" if name == str(trial.number) else f"test.{name}"
        for metric, value in result["metrics"].items():
            error = result.get("errors", {}).get(metric)
            tags[f"ktray.{of}.{metric}"] = f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
    return tags


def _completed_trial(home: Path, study: str, number: str) -> Trial:
    from ktray.search import ranking
    from ktray.search.history import read_study

    history = read_study(home, study)
    ranked = ranking.ranked(history.trials, history.objectives)
    if number:
        ranked = [trial for trial in ranked if str(trial.number) == (number.lstrip("0") or "0")]
    if not ranked:
        what = f"completed trial {number}" if number else "completed trial"
        raise UserError(f"the study {study!r} has no {what}", instead=f"See ktray show {study}.")
    return ranked[0]

"""What a data set holds, decoding it into the store, and whether a study's images are still those it was begun with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ktray.errors import UserError
from ktray.fingerprint import canonical
from ktray.pipeline.pair_graph import Identity, generations
from ktray.runs.settings import Settings
from ktray.search.space import Space
from ktray.search.trial import Trial
from ktray.spec import DataRoles, DataSpec

FILE = "data.json"


def parse_data(text: str) -> DataSpec:
    """The spec of a data set given as text, such as ``folder:/photos`` or ``parquet:/p?label=label``.

    Raises:
        UserError: no such kind, or a field is wrong.
    """
    from pydantic import TypeAdapter, ValidationError

    from ktray import plugins
    from ktray.search import spec_errors

    kind = plugins.module("dataset", text.partition("?")[0].partition(":")[0]).Spec
    try:
        data: DataSpec = TypeAdapter(DataSpec).validate_python(text)
        return data
    except ValidationError as error:
        spec_errors.raise_if_any(spec_errors.from_validation(error, kind, {}, lambda path: ".".join(map(str, path))), text)
        raise AssertionError("unreachable: a validation error has problems") from error


def describe_splits(spec: DataSpec) -> dict[str, dict[str, Any]]:
    """Split -> how many ``images`` and ``classes`` it has, and whether it is ``labelled``; absent splits are left out."""
    from ktray import plugins

    splits = plugins.module_of("dataset", spec).load(spec)
    return {
        name: {"images": len(part.names), "classes": len(part.classes), "labelled": part.labels is not None}
        for name in ("train", "val", "test")
        if (part := getattr(splits, name)) is not None
    }


def import_images(spec: Any, settings: Settings) -> dict[str, float]:
    """Decode a data set into the store, in this process; the metrics of its stage."""
    from ktray.pipeline.execute import execute
    from ktray.pipeline.identity import data_identity
    from ktray.pool import StageContext
    from ktray.scheduler.local_scheduler import LocalScheduler
    from ktray.stages.images_stage import stage_of

    stage = stage_of(spec, data_identity(settings.cache)(spec))
    scheduler = LocalScheduler(settings.open_store(), execute, StageContext(), lambda event: None)
    metrics: dict[str, float] = scheduler.obtain([stage], "data import")[0]["metrics"]
    return metrics


def refuse_changed_data(space: Space, trials: Iterable[Trial], identity: Identity, folder: Path) -> None:
    """Note the content of a space's data when its study begins; later, refuse other content under the same spec.

    The trials of a study are compared with each other, so they must all have seen the same images.

    Args:
        trials: the study's. Until one of them has a result, the data may still be corrected.
        folder: the study's.

    Raises:
        UserError: it names the data that have changed.
    """
    specs = {canonical(spec.model_dump(mode="json")): spec for spec in _data_specs(space)}
    found = {name: identity(spec) for name, spec in specs.items()}
    file = folder / FILE
    has_results = any(trial.state not in ("failed", "duplicate") for trial in trials)
    noted = json.loads(file.read_text()) if file.exists() and has_results else {}
    changed = [name for name, content in found.items() if noted.get(name, content) != content]
    if changed:
        spec = specs[changed[0]]
        path = getattr(spec, "path", None)
        location = f" in {path}" if path else f" of {spec.kind}"
        raise UserError(
            f"the images{location} are no longer those that the study {folder.name!r} was begun with, so that new trials "
            "could not be compared with its own",
            space.source,
            "Give this search another --name, or put the old images back.",
        )
    if found != noted:
        scratch = file.with_suffix(".tmp")
        scratch.write_text(json.dumps(found, indent=1, sort_keys=True))
        scratch.replace(file)


def _data_specs(space: Space) -> Iterator[DataSpec]:
    """The data of every role in every branch, of all generations of a chain."""
    for _, params in space.boundary_draws():
        for pair in generations(space.pair(params)):
            for role in DataRoles.model_fields:
                yield getattr(pair.data, role)

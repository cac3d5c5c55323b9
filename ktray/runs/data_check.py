"""What a data set holds, decoding it into the store, and whether a study's images are still those it was begun with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ktray.errors import UserError
from ktray.fingerprint import canonical
from ktray.images import Source
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


def describe(spec: DataSpec) -> dict[str, Any]:
    """What a data set holds and what was assumed about it, as docs/json.md describes the answer of `ktray data check`."""
    from ktray import plugins
    from ktray.images import split_rows

    splits = plugins.module_of("dataset", spec).load(spec)
    present = {name: part for name in SPLITS if (part := getattr(splits, name)) is not None}
    layout, held_out = splits.layout, split_rows(splits, spec.split).get("val")
    return {
        "kind": spec.kind,
        "size": spec.size,
        "splits": {name: _split(part, dict(layout.read_from.get(name, {}))) for name, part in present.items()},
        "held_out": {"images": len(held_out[1]), "share": spec.split.val, "seed": spec.split.seed}
        if held_out and splits.val is None
        else None,
        "classes_from": layout.classes,
        "order": layout.order,
        "left_out": dict(layout.left_out),
        "warnings": [*layout.warnings, *_suspicious(present)],
    }


SPLITS = ("train", "val", "test")


def _split(part: Source, read_from: dict[str, int]) -> dict[str, Any]:
    counts = None
    if part.labels is not None:
        counts = dict(zip(part.classes, np.bincount(part.labels, minlength=len(part.classes)).tolist(), strict=True))
    return {
        "images": len(part.names),
        "classes": len(part.classes),
        "labelled": part.labels is not None,
        "images_of_class": counts,
        "read_from": read_from,
    }


def _suspicious(splits: dict[str, Source]) -> list[str]:
    """Sentences about labels that look wrong, for data sets of any kind."""
    found = []
    labelled = {name: part for name, part in splits.items() if part.labels is not None}
    for name, part in labelled.items():
        present = np.unique(part.labels) if part.labels is not None else ()
        if len(present) == 1 and len(part.names) > 1:
            found.append(
                f"all images of {name} have the class {part.classes[present[0]]!r}, so that any classifier is always right"
            )
        absent = [label for number, label in enumerate(part.classes) if number not in set(present)]
        if absent and len(present) > 1:
            found.append(f"{name} has no image of {_some(absent, 'class', 'classes')}")
    if "train" in labelled:
        found += [f"{name} has no labels, although train has" for name in splits if name not in labelled]
    return found


def _some(names: Sequence[str], one: str, many: str) -> str:
    """``the class 'a'`` or ``3 classes: 'a', 'b', 'c'``, at most five of them."""
    listed = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
    return f"the {one} {listed}" if len(names) == 1 else f"{len(names)} {many}: {listed}"


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

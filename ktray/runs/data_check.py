"""A study's images must stay what they were, because its trials are compared with each other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ktray.errors import UserError
from ktray.fingerprint import canonical
from ktray.pipeline.pair_graph import Identity, generations
from ktray.search.space import Space
from ktray.search.trial import Trial
from ktray.spec import DataRoles
from ktray.strict import StrictSpec

FILE = "data.json"


def same_data(space: Space, trials: Iterable[Trial], identity: Identity, folder: Path) -> None:
    """Note what the data of a space hold when its study begins, and refuse to go on with other data under the same spec.

    Args:
        trials: the study's. Before any of them has come to something, the data may still be put right.
        folder: the study's.

    Raises:
        UserError: it names the data that have changed.
    """
    specs = {canonical(spec.model_dump(mode="json")): spec for spec in _data(space)}
    found = {name: identity(spec) for name, spec in specs.items()}
    file = folder / FILE
    judged = any(trial.state not in ("failed", "duplicate") for trial in trials)
    noted = json.loads(file.read_text()) if file.exists() and judged else {}
    changed = [name for name, content in found.items() if noted.get(name, content) != content]
    if changed:
        spec: Any = specs[changed[0]]
        place = f" in {spec.path}" if getattr(spec, "path", None) else f" of {spec.kind}"
        raise UserError(
            f"the images{place} are no longer those that the study {folder.name!r} was begun with, so that new trials "
            "could not be compared with its own",
            space.source,
            "Give this search another --name, or put the old images back.",
        )
    if found != noted:
        scratch = file.with_suffix(".tmp")
        scratch.write_text(json.dumps(found, indent=1, sort_keys=True))
        scratch.replace(file)


def _data(space: Space) -> Iterator[StrictSpec]:
    """The data of every role in every branch, of all generations of a chain."""
    for _, params in space.boundary_draws():
        for pair in generations(space.pair(params)):
            for role in DataRoles.model_fields:
                yield getattr(pair.data, role)

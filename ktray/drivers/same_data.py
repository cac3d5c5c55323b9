"""A study's images must stay what they were, because its trials are compared with each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ktray.errors import UserError
from ktray.fingerprint import canonical
from ktray.pipeline.graph import Identity, generations
from ktray.search.space import Space
from ktray.spec import DataRoles, Spec

FILE = "data.json"


def same_data(space: Space, identity: Identity, folder: Path) -> None:
    """Note what the data of a space hold when its study begins, and refuse to go on with other data under the same spec.

    Args:
        folder: the study's.

    Raises:
        UserError: it names the data that have changed.
    """
    found = {canonical(spec.model_dump(mode="json")): identity(spec) for spec in _data(space)}
    file = folder / FILE
    noted = json.loads(file.read_text()) if file.exists() else {}
    changed = [spec for spec, content in found.items() if noted.get(spec, content) != content]
    if changed:
        raise UserError(
            f"the images of {changed[0]} are no longer those that the study {folder.name!r} was begun with, so what its trials "
            "are worth cannot be compared with what new ones would be",
            space.source,
            "Give this search another --name, or put the old images back.",
        )
    if found != noted:
        scratch = file.with_suffix(".tmp")
        scratch.write_text(json.dumps(noted | found, indent=1, sort_keys=True))
        scratch.replace(file)


def _data(space: Space) -> Iterator[Spec]:
    """The data of every role in every branch, of all generations of a chain."""
    for _, params in space.corners():
        for pair in generations(space.pair(params)):
            for role in DataRoles.model_fields:
                yield getattr(pair.data, role)

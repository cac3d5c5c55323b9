"""Which kind of data set lies at a path: each kind says whether it recognises it, and the strongest layout is taken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ktray import plugins
from ktray.errors import UserError
from ktray.images import Recognised
from ktray.local_path import local_path
from ktray.runs.data_check import parse_data
from ktray.spec import DataSpec


@dataclass(frozen=True)
class RecognisedData:
    """A data set, and how it was recognised.

    Attributes:
        because: what speaks for this kind, as a phrase; empty if the user named it.
        passed_over: sentences about kinds that might have been meant.
    """

    spec: DataSpec
    because: str = ""
    passed_over: tuple[str, ...] = ()


def recognise(text: str) -> RecognisedData:
    """The data set that a user names: by a path, or by kind and path, such as ``folder:/photos``.

    Raises:
        UserError: nothing is there, or nothing that ktray reads; or a layout may be read in two ways.
    """
    kind, _, location = text.partition("?")[0].partition(":")
    if kind in plugins.kinds("dataset") and (location or not Path(text).exists()):
        return RecognisedData(parse_data(text))
    path = local_path(text, "FOLDER").absolute()
    if not path.exists():
        raise UserError(f"there is no folder or file {path}", instead="Give the folder of your images.")
    found, refused = _recognised(path)
    if not found:
        if refused:
            raise refused[0]
        raise UserError(
            f"there are no images in {path} that ktray reads",
            instead="It reads folders of JPEG, PNG, WebP, BMP, GIF, TIFF and PPM, and parquet or tar files of encoded images.",
        )
    best = max(found, key=lambda each: found[each].strength)
    others = tuple(str(error) for error in refused)
    return RecognisedData(plugins.parse("dataset", {"kind": best, **found[best].fields}), found[best].because, others)


def _recognised(path: Path) -> tuple[dict[str, Recognised], list[UserError]]:
    """Kind -> how it recognises the path, and what kinds refuse that might have been meant."""
    found: dict[str, Recognised] = {}
    refused = []
    for kind in plugins.kinds("dataset"):
        recognise_kind = getattr(plugins.module("dataset", kind), "recognise", None)
        try:
            if recognise_kind is not None and (each := recognise_kind(path)) is not None:
                found[kind] = each
        except UserError as error:
            refused.append(error)
    return found, refused

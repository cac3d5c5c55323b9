"""The spaces that come with ktray, installed or in a checkout."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from ktray.errors import UserError
from ktray.text import near_word, shown

FOLDER = "search_spaces"  # in the package, a link to the folder at the root of the repository; a wheel holds the files


@dataclass(frozen=True)
class ShippedSpace:
    """A space that comes with ktray.

    Attributes:
        name: such as ``quickstart``.
        what: the question that it asks, which is the first line of its file.
        text: the file.
    """

    name: str
    what: str
    text: str


def shipped_spaces() -> dict[str, ShippedSpace]:
    """All of them, by name."""
    found = {}
    for file in sorted(files("ktray").joinpath(FOLDER).iterdir(), key=lambda each: each.name):
        if file.name.endswith(".yaml"):
            text, name = file.read_text(encoding="utf-8"), file.name.removesuffix(".yaml")
            found[name] = ShippedSpace(name, text.partition("\n")[0].removeprefix("# "), text)
    return found


def shipped_space(name: str) -> ShippedSpace:
    """The space of this name.

    Raises:
        UserError: there is none.
    """
    known = shipped_spaces()
    name = name.removesuffix(".yaml").rpartition("/")[2]
    if name not in known:
        near = near_word(name, known)
        hint = f"Did you mean {near!r}? " if near else ""
        raise UserError(f"no space called {shown(name)} comes with ktray", instead=f"{hint}Known: {', '.join(known)}.")
    return known[name]

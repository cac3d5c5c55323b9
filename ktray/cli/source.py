"""What a command line names: a search space, a pair, or an experiment."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ktray.errors import UserError
from ktray.spec import PairSpec

if TYPE_CHECKING:
    from ktray.search.space import Space


def load_pairs(path: Path, overrides: list[str]) -> Mapping[str, PairSpec]:
    """Name -> pair of an experiment (`.py` with `pairs()`) or of a pair YAML.

    Raises:
        UserError: no such file, not a pair, or a space where a pair is wanted.
    """
    _must_exist(path)
    if path.suffix == ".py":
        return _experiment(path, overrides)
    from ktray.search import space

    return space.load_pair(path, overrides)


def load_space(path: Path, overrides: list[str]) -> Space:
    """The search space of a YAML file, checked."""
    _must_exist(path)
    from ktray.search import space

    return space.load(path, overrides)


def is_space(path: Path) -> bool:
    """Whether a file describes a search space rather than pairs."""
    _must_exist(path)
    if path.suffix == ".py":
        return False
    from ktray.search import space

    return space.is_space(path)


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise UserError(
            f"there is no file {str(path)!r}", instead="Give a search space or pair (.yaml) or an experiment (.py)."
        )


def _experiment(path: Path, overrides: list[str]) -> Mapping[str, PairSpec]:
    if overrides:
        raise UserError("--set changes YAML files; an experiment is code", where=str(path), instead="Edit its pairs().")
    found = runpy.run_path(str(path)).get("pairs")
    if found is None:
        raise UserError("the experiment has no function pairs()", where=str(path), instead="See experiments/baselines.py.")
    pairs: Mapping[str, PairSpec] = found()
    return pairs

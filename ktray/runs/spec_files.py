"""Read the files that a user names: a search space, a pair, or an experiment."""

from __future__ import annotations

import runpy
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

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


def select_pairs(pairs: Mapping[str, PairSpec], only: Sequence[str]) -> Mapping[str, PairSpec]:
    """The pairs of these names, in this order; all where none is named.

    Raises:
        UserError: there is no pair of such a name.
    """
    unknown = sorted(set(only) - set(pairs))
    if unknown:
        raise UserError(f"there is no pair {unknown[0]!r}", instead=f"Known: {', '.join(pairs)}.")
    return {name: pairs[name] for name in only} if only else pairs


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
    try:
        found = runpy.run_path(str(path)).get("pairs")
        if found is None:
            raise UserError("the experiment has no function pairs()", str(path), "See experiments/baselines.py.")
        pairs: Mapping[str, PairSpec] = found()
    except UserError:
        raise
    except Exception as error:  # a boundary: the code is the user's, and whatever it raises is the user's to mend
        raise _experiment_error(error, path) from error
    wrong = [] if not isinstance(pairs, Mapping) else [name for name, p in pairs.items() if not isinstance(p, PairSpec)]
    if not isinstance(pairs, Mapping) or wrong:
        what = f"pairs()[{wrong[0]!r}] is no PairSpec" if wrong else "pairs() gives no mapping"
        raise UserError(what, str(path), "It returns {name: PairSpec, ...}; see experiments/baselines.py.")
    return pairs


def _experiment_error(error: Exception, path: Path) -> UserError:
    """What an experiment raised, with the line of the experiment that it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = f"{path}, line {line}" if line else str(path)
    if isinstance(error, ValidationError):
        from ktray.search.spec_errors import from_validation

        found = from_validation(error, PairSpec, {}, lambda steps: ".".join(map(str, steps)))
        return UserError("; ".join(map(str, found)), where)
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return UserError(f"the experiment raised {type(error).__name__}: {message}", where)

"""Read the files that a user names: a search space, a pair, or an experiment."""

from __future__ import annotations

import errno
import os
import runpy
import stat
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from ktray.errors import UserError
from ktray.spec import PairSpec
from ktray.text import first_few, near_word, shown

if TYPE_CHECKING:
    from ktray.search.space import Space


MAX_PAIRS = 3000  # of an experiment


def load_pairs(path: Path, overrides: list[str]) -> Mapping[str, PairSpec]:
    """Name -> pair of an experiment (`.py` with `pairs()`) or of a pair YAML.

    Raises:
        UserError: no such file, not a pair, or a space where a pair is wanted.
    """
    _must_exist(path)
    if path.suffix == ".py":
        return _experiment(path, overrides)
    from ktray.search import space

    return space.load_named_pair(path, overrides)


def select_pairs(pairs: Mapping[str, PairSpec], only: Sequence[str]) -> Mapping[str, PairSpec]:
    """The pairs of these names, in this order; all where none is named.

    Raises:
        UserError: there is no pair of such a name.
    """
    unknown = sorted(set(only) - set(pairs))
    if unknown:
        raise UserError(f"there is no pair {shown(unknown[0])}", instead=f"Known: {first_few(pairs)}.")
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
    right = "Give a search space or pair (.yaml) or an experiment (.py)."
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # a ValueError: the path has a NUL
        refused = isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ENOTDIR)
        why = f": {os.strerror(error.errno or 0)}" if isinstance(error, OSError) and refused else ""
        raise UserError(f"there is no file {shown(str(path), 200)}{why}", instead=f"{_near(path)}{right}") from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise UserError(f"{shown(str(path), 200)} is {what}", instead=right)


def _near(path: Path) -> str:
    """A hint at a file with a similar name in the same folder, or at a space that comes with ktray; empty without one."""
    from ktray.runs.shipped_spaces import shipped_spaces

    try:
        there = [each.name for each in path.parent.iterdir() if each.suffix in (".yaml", ".yml", ".py")]
    except (OSError, ValueError):
        there = []
    if near := near_word(path.name, there):
        return f"Did you mean {path.parent / near}? "
    if (known := path.stem) in shipped_spaces():
        return f"ktray init --example {known} writes it. "
    return ""


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
    except (Exception, SystemExit) as error:  # a boundary: the code is the user's, and whatever it raises is the user's to mend
        raise _experiment_error(error, path) from error
    instead = "It returns {name: PairSpec, ...}; see experiments/baselines.py."
    if not isinstance(pairs, Mapping):
        raise UserError("pairs() gives no mapping", str(path), instead)
    if len(pairs) > MAX_PAIRS:
        raise UserError(f"pairs() gives {len(pairs):,} pairs, and at most {MAX_PAIRS:,} are read", str(path), "Give fewer.")
    for name, pair in pairs.items():
        if not isinstance(name, str):
            raise UserError(f"pairs() names a pair {shown(name)}, which is not text", str(path), instead)
        if not isinstance(pair, PairSpec):
            raise UserError(f"pairs()[{shown(name)}] is no PairSpec", str(path), instead)
    return pairs


def _experiment_error(error: Exception | SystemExit, path: Path) -> UserError:
    """What an experiment raised, with the line of the experiment that it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = f"{path}, line {line}" if line else str(path)
    if isinstance(error, ValidationError):
        from ktray.search.spec_errors import problems_from_validation

        found = problems_from_validation(error, PairSpec, {}, lambda steps: ".".join(map(str, steps)))
        return UserError("; ".join(map(str, found)), where)
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return UserError(f"the experiment raised {type(error).__name__}: {message}", where)

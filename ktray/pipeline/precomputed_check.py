"""Whether ready-made features fit the images that will ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from ktray import plugins
from ktray.errors import UserError
from ktray.features import precomputed
from ktray.images import Splits, split_rows
from ktray.pipeline.identity import origin
from ktray.spec import PairSpec, PrecomputedTeacher
from ktray.strict import StrictSpec


def check_ready(pair: PairSpec, load: Callable[[StrictSpec], Splits]) -> None:
    """Refuse features whose rows are not those of the images; whether their numbers are finite, only the run sees.

    Raises:
        UserError: the first thing that is wrong, with its dotted path.
    """
    teacher: Any = pair.teacher
    if not isinstance(teacher, PrecomputedTeacher):
        return
    asked = list(_asked(pair, load))
    for (one, _, of_one), (other, _, of_other) in combinations(asked, 2):
        _refuse_ambiguous(teacher, (one, getattr(pair.data, one), of_one), (other, getattr(pair.data, other), of_other))
    rows: Any = None
    for role, split, names in asked:
        if rows is None:  # of one data set, where rows belong to one
            rows = precomputed.row_numbers(teacher, load(getattr(pair.data, role)).train.names)
        precomputed.refuse_missing(rows, names, f"{split} images of data.{role}")


def _asked(pair: PairSpec, load: Callable[[StrictSpec], Splits]) -> Iterator[tuple[str, str, list[str]]]:
    """(role, split, paths) of the images whose features the pair reads."""
    needs = plugins.module_of("transfer", pair.transfer).NEEDS
    wanted = [("cluster", "train")] if "clusters" in needs else []
    if {"clusters", "features"} & needs.keys():
        wanted += [("transfer", "train")]
    for entry in pair.evals:
        judge: Any = entry
        if judge.of == "teacher" and not getattr(plugins.module_of("evaluation", judge), "READS_PSEUDO_LABELS", False):
            wanted += [("target", "train"), ("target", judge.split)]
    for role, split in dict.fromkeys(wanted):
        spec: Any = getattr(pair.data, role)
        source, rows = split_rows(load(spec), spec.split)[split]
        yield role, split, [source.names[row] for row in rows]


Asked = tuple[str, Any, list[str]]  # role, data spec, paths


def _refuse_ambiguous(teacher: PrecomputedTeacher, one: Asked, other: Asked) -> None:
    """One row cannot belong to two images."""
    if origin(one[1]) == origin(other[1]):
        return
    if precomputed.matched_by_row(teacher):
        raise UserError(
            f"features without paths belong to one data set, and data.{one[0]} and data.{other[0]} are two",
            precomputed.WHERE,
            "Give a file of 'names'.",
        )
    both = set(one[2]) & set(other[2])
    if both:
        raise UserError(
            f"{len(both)} paths are in data.{one[0]} and in data.{other[0]}, such as {min(both)!r}",
            precomputed.WHERE,
            "Put both data sets below one folder, so that each image has a path of its own.",
        )

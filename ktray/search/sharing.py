"""Counts the different artifacts of each kind of stage that the draws of a space can need, and estimates how many they will."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ktray.search import space_tree
from ktray.search.space import MAX_BRANCH_COMBINATIONS, Space
from ktray.search.space_tree import Parameter, Params

Keys = Callable[[Params], Iterable[tuple[str, str]]]
"""Parameters of a draw -> (name, key) of its stages in the order in which they run; empty if it is no valid pair."""

Occurrence = tuple[str, int]
"""Name of a stage, and number of stages of this name before it: in a chain of pairs each generation has its own features."""


@dataclass(frozen=True)
class SharedStages:
    """Numbers of artifacts of one kind of stage.

    Attributes:
        stage: name of the kind.
        possible: different artifacts that draws can need; None if infinitely many.
        expected: different artifacts that random draws need on average.
    """

    stage: str
    possible: int | None
    expected: float


def sharing(space: Space, keys: Keys, draws: int) -> list[SharedStages]:
    """One row per kind of stage, in the order in which stages run.

    Changes one parameter at a time in each branch: a kind has as many artifacts as there are combinations of the parameters
    that change its key. The expectation is for random draws; the draws of a sampler share more.

    Args:
        draws: number of draws of the search.
    """
    branches = list(
        itertools.islice(
            space_tree.combinations(space.root, lambda parameter: space_tree.boundary_values(parameter)[:1]),
            MAX_BRANCH_COMBINATIONS,
        )
    )
    parameters = {parameter.name: parameter for parameter, _ in space_tree.parameters(space.root)}
    groups: dict[tuple[str, str, frozenset[str]], float] = {}
    for base in branches:
        own, dependencies = _dependencies(base, parameters, keys)
        for occurrence, key in own.items():
            group = (occurrence[0], key, frozenset(dependencies[occurrence]))
            groups[group] = groups.get(group, 0.0) + draws / len(branches)
    return _rows(groups, parameters)


def _dependencies(
    base: Params, parameters: Mapping[str, Parameter], keys: Keys
) -> tuple[dict[Occurrence, str], dict[Occurrence, set[str]]]:
    """Stage -> its key for the draw `base`; stage -> the parameters that change this key."""
    own = _by_occurrence(keys(base))
    dependencies: dict[Occurrence, set[str]] = {occurrence: set() for occurrence in own}
    for name in (name for name in base if not space_tree.is_branch(parameters[name])):
        for value in space_tree.boundary_values(parameters[name])[1:]:
            changed = _by_occurrence(keys({**base, name: value}))
            for stage in own if changed else ():
                if changed.get(stage) != own[stage]:
                    dependencies[stage].add(name)
    return own, dependencies


def _by_occurrence(stages: Iterable[tuple[str, str]]) -> dict[Occurrence, str]:
    seen: Counter[str] = Counter()
    found: dict[Occurrence, str] = {}
    for name, key in stages:
        found[name, seen[name]] = key
        seen[name] += 1
    return found


def _rows(groups: Mapping[tuple[str, str, frozenset[str]], float], parameters: Mapping[str, Parameter]) -> list[SharedStages]:
    rows: dict[str, SharedStages] = {}
    for (name, _, dependencies), draws in groups.items():
        values = [space_tree.all_values(parameters[each]) for each in dependencies]
        sizes = [len(each) for each in values if each is not None]
        infinite = len(sizes) < len(values)
        combinations = math.prod(sizes)
        expected = draws if infinite else _distinct(combinations, draws)
        before = rows.get(name, SharedStages(name, 0, 0.0))
        possible = None if infinite or before.possible is None else before.possible + combinations
        rows[name] = SharedStages(name, possible, before.expected + min(expected, draws))
    return list(rows.values())


def _distinct(combinations: int, draws: float) -> float:
    """Expected number of different combinations among `draws` draws, if all combinations are equally likely."""
    if combinations == 1:
        return 1.0
    return -combinations * math.expm1(draws * math.log1p(-1 / combinations))

"""What the draws of a space have in common: how many different artifacts of each stage there can be, and how many to expect."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ktray.search import space_tree
from ktray.search.space import BRANCHINGS, Space
from ktray.search.space_tree import Parameter, Params

Keys = Callable[[Params], Iterable[tuple[str, str]]]
"""The stages that a draw needs: (name, key) of each, in the order in which they run; none if its values do not go together."""

Place = tuple[str, int]
"""The name of a stage, and how many of this name run before it: in a chain each generation has features of its own."""


@dataclass(frozen=True)
class SharedStages:
    """One kind of stage in a space.

    Attributes:
        stage: its name.
        possible: different artifacts that draws can need; None if there is no end to them.
        expected: how many of them so many random draws need.
    """

    stage: str
    possible: int | None
    expected: float


def sharing(space: Space, keys: Keys, draws: int) -> list[SharedStages]:
    """What is shared, kind by kind, in the order in which stages run.

    Found by changing one parameter at a time in each branch: a kind has as many artifacts as there are combinations of the
    parameters that change its keys. Draws of a sampler repeat themselves more than the random ones that are assumed here.

    Args:
        draws: how many the search makes.
    """
    branches = list(
        itertools.islice(
            space_tree.combinations(space.root, lambda parameter: space_tree.boundary_values(parameter)[:1]), BRANCHINGS
        )
    )
    listed = {parameter.name: parameter for parameter, _ in space_tree.parameters(space.root)}
    groups: dict[tuple[str, str, frozenset[str]], float] = {}
    for base in branches:
        own, movers = _movers(base, listed, keys)
        for place, key in own.items():
            group = (place[0], key, frozenset(movers[place]))
            groups[group] = groups.get(group, 0.0) + draws / len(branches)
    return _summed(groups, listed)


def _movers(base: Params, listed: Mapping[str, Parameter], keys: Keys) -> tuple[dict[Place, str], dict[Place, set[str]]]:
    """Stage -> its key in the draw `base`; stage -> parameters that change it."""
    own = _placed(keys(base))
    movers: dict[Place, set[str]] = {place: set() for place in own}
    for name in (name for name in base if not space_tree.is_branch(listed[name])):
        for value in space_tree.boundary_values(listed[name])[1:]:
            changed = _placed(keys({**base, name: value}))
            for stage in own if changed else ():
                if changed.get(stage) != own[stage]:
                    movers[stage].add(name)
    return own, movers


def _placed(stages: Iterable[tuple[str, str]]) -> dict[Place, str]:
    seen: Counter[str] = Counter()
    found: dict[Place, str] = {}
    for name, key in stages:
        found[name, seen[name]] = key
        seen[name] += 1
    return found


def _summed(groups: Mapping[tuple[str, str, frozenset[str]], float], listed: Mapping[str, Parameter]) -> list[SharedStages]:
    rows: dict[str, SharedStages] = {}
    for (name, _, movers), draws in groups.items():
        values = [space_tree.all_values(listed[each]) for each in movers]
        sizes = [len(each) for each in values if each is not None]
        endless = len(sizes) < len(values)
        combinations = math.prod(sizes)
        expected = draws if endless else _distinct(combinations, draws)
        before = rows.get(name, SharedStages(name, 0, 0.0))
        possible = None if endless or before.possible is None else before.possible + combinations
        rows[name] = SharedStages(name, possible, before.expected + min(expected, draws))
    return list(rows.values())


def _distinct(combinations: int, draws: float) -> float:
    """How many different ones of equally likely combinations so many draws are expected to hold."""
    if combinations == 1:
        return 1.0
    return -combinations * math.expm1(draws * math.log1p(-1 / combinations))

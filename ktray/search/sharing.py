"""What the draws of a space have in common: how many different artifacts of each stage there can be, and how many to expect."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ktray.search import tree
from ktray.search.space import BRANCHINGS, Space
from ktray.search.tree import Parameter, Params

Keys = Callable[[Params], Iterable[tuple[str, str]]]
"""The stages that a draw needs: (name, key) of each; none if its values do not go together."""


@dataclass(frozen=True)
class Shared:
    """One kind of stage in a space.

    Attributes:
        stage: its name.
        possible: different artifacts that draws can need; None if there is no end to them.
        expected: how many of them so many random draws need.
    """

    stage: str
    possible: int | None
    expected: float


def sharing(space: Space, keys: Keys, draws: int) -> list[Shared]:
    """What is shared, kind by kind, in the order in which stages run.

    Found by changing one parameter at a time in each branch: a kind has as many artifacts as there are combinations of the
    parameters that change its keys. Draws of a sampler repeat themselves more than the random ones that are assumed here.

    Args:
        draws: how many the search makes.
    """
    branches = list(itertools.islice(tree.points(space.root, lambda parameter: tree.ends(parameter)[:1]), BRANCHINGS))
    listed = {parameter.name: parameter for parameter, _ in tree.parameters(space.root)}
    groups: dict[tuple[str, frozenset[str], frozenset[str]], float] = {}
    for base in branches:
        own, movers = _movers(base, listed, keys)
        for name, found in own.items():
            group = (name, frozenset(found), frozenset(movers[name]))
            groups[group] = groups.get(group, 0.0) + draws / len(branches)
    return _summed(groups, listed)


def _movers(base: Params, listed: Mapping[str, Parameter], keys: Keys) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Stage -> its keys in the draw `base`; stage -> parameters that change them."""
    own = _by_name(keys(base))
    movers: dict[str, set[str]] = {name: set() for name in own}
    for name in (name for name in base if not tree.branching(listed[name])):
        for value in tree.ends(listed[name])[1:]:
            changed = _by_name(keys({**base, name: value}))
            for stage in own if changed else ():
                if changed.get(stage) != own[stage]:
                    movers[stage].add(name)
    return own, movers


def _by_name(stages: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, key in stages:
        found.setdefault(name, set()).add(key)
    return found


def _summed(
    groups: Mapping[tuple[str, frozenset[str], frozenset[str]], float], listed: Mapping[str, Parameter]
) -> list[Shared]:
    rows: dict[str, Shared] = {}
    for (name, keys, movers), draws in groups.items():
        values = [tree.all_values(listed[each]) for each in movers]
        sizes = [len(each) for each in values if each is not None]
        endless = len(sizes) < len(values)
        combinations = math.prod(sizes)
        expected = draws if endless else _distinct(combinations, draws)
        before = rows.get(name, Shared(name, 0, 0.0))
        possible = None if endless or before.possible is None else before.possible + combinations * len(keys)
        rows[name] = Shared(name, possible, before.expected + min(expected, draws) * len(keys))
    return list(rows.values())


def _distinct(combinations: int, draws: float) -> float:
    """How many different ones of equally likely combinations so many draws are expected to hold."""
    if combinations == 1:
        return 1.0
    return -combinations * math.expm1(draws * math.log1p(-1 / combinations))

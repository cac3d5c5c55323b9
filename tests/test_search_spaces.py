"""The spaces that ship: each checks, and every branch and option of each is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktray.search import sampler, space
from ktray.search.tree import Choice, parameters
from tests.source import ROOT

FILES = sorted((ROOT / "search_spaces").glob("*.yaml"))


def test_the_spaces_of_the_readme_are_there() -> None:
    assert {"quickstart", "cifar10_teachers"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_space_checks_and_its_draws_share_their_prefix(path: Path) -> None:
    assert space.load(path, []).warnings() == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_branch_and_option_of_a_shipped_space_is_drawn(path: Path) -> None:
    found = space.load(path, [])
    drawn = {(name, value) for seed in range(300) for name, value in sampler.at_random(found, seed).items()}
    for parameter, _ in parameters(found.root):
        if isinstance(parameter, Choice):
            assert {(parameter.name, label) for label in parameter.labels} <= drawn


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_planned_draws_of_a_shipped_space_are_pairs(path: Path) -> None:
    found = space.load(path, [])
    for planned in found.start_with:
        assert found.pair(found.complete(planned)).evals

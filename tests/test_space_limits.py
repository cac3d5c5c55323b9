"""Limits of a space: each has a sentence, and what is within them is checked to the last branch."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest

from ktray.errors import UserError
from ktray.search import space
from ktray.search.space import Space
from ktray.search.space_tree import MAX_SIZE
from tests.test_hostile_spaces import PAIR, SPACE, chain


def of(**parts: Any) -> dict[str, Any]:
    """A space with these parts of its pair."""
    found = copy.deepcopy(SPACE)
    found["pair"] |= parts
    del found["start_with"], found["early_stop"]
    return found


def clusters(**fields: Any) -> dict[str, Any]:
    return {"kind": "clusters", "k": 5, **fields}


def branches(count: int, last: Any) -> dict[str, Any]:
    return {"one_of": {f"b{n}": clusters(k=n + 2) if n < count - 1 else last for n in range(count)}}


HOGS = {"one_of": {f"h{n}": {"descriptor": {"kind": "hog", "cell": 7}} for n in range(30)}}
LIMITS = {
    "options": (of(transfer=clusters(k={"choice": list(range(2, 1003))})), "'choice' has 1,001 options, and at most 1,000"),
    "branches": (of(transfer=branches(201, clusters())), "'one_of' has 201 branches, and at most 200"),
    "pairs": (
        of(transfer=clusters(**{name: {"choice": list(range(1, 1001))} for name in ("pca", "seed", "iterations", "min_size")})),
        "more than 3,000 pairs to check",
    ),
    "parameters": (
        of(teacher={"descriptor": {f"f{n}": {"choice": [1]} for n in range(1001)}}),
        "it has more than 1,000 parameters",
    ),
    "evaluations": (
        of(evals=[{"kind": "knn", "name": f"n{n}"} for n in range(101)]),
        "evals is a list and should be a list of at most 100",
    ),
    "a chain": ({**of(), "pair": {**chain(20), "evals": ["knn"]}}, "this is a chain of 21 pairs"),
    "a data set's text": (of(data=f"folder:/{'x' * 5000}"), "written in at most 4,096 characters, and this one has 5,008"),
    "a query": (of(data="parquet:/p?" + "&".join(f"f{n}=1" for n in range(1500))), "written in at most 4,096 characters"),
    "a field that is there twice": (of(data="parquet:/p?label=a&label=b"), "says 'label' twice"),
    "a whole number": (of(transfer=clusters(seed={"int": [0, 2**53 + 1]})), "may be at most 9,007,199,254,740,992"),
    "a number": (of(student={**PAIR["student"], "seed": {"float": [-1e300, 1e300]}}), "may be at most 1e+100"),
    "a branch's name": (of(transfer={"one_of": {"b" * 101: clusters()}}), "at most 100 characters"),
    "objectives": ({**of(), "objectives": [{"metric": f"m{n}"} for n in range(21)]}, "should be a list of at most 20"),
    "first draws": ({**of(), "start_with": [{"transfer.k": 5}] * 1001}, "should be a list of at most 1000"),
    "a first draw that is no number": ({**of(), "start_with": [{"transfer.k": [1e400]}]}, "line 1"),
    "wrong entries": (of(evals=[{"kind": "knnn"} for _ in range(100)]), "50 things are wrong"),
    "a study that looks like an option": ({**of(), "study": "-x"}, "not start with a dot or a dash"),
    "a long name of a study": ({**of(), "study": "x" * 101}, "at most 100 characters"),
    "trials": ({**of(), "budget": {"trials": 10**10}}, "should be at most 999999999"),
}


@pytest.mark.parametrize(("content", "said"), LIMITS.values(), ids=LIMITS.keys())
def test_a_limit_has_a_sentence_and_costs_no_time(content: dict[str, Any], said: str) -> None:
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        space.parse(json.dumps(content), [], "space.yaml")
    if said != "line 1":
        assert said in str(caught.value)
    assert len(str(caught.value)) < 4000
    assert time.process_time() - began < 10


def test_a_wrong_branch_is_found_however_many_combinations_there_are() -> None:
    with pytest.raises(UserError, match=r"pair\.transfer\.b29"):
        space.parse(json.dumps(of(teacher=HOGS, transfer=branches(30, clusters(k=1)))), [], "space.yaml")
    first = {"one_of": {**HOGS["one_of"], "last": {"descriptor": {"kind": "hog", "cell": 1}}}}
    with pytest.raises(UserError, match=r"pair\.teacher\.last\.descriptor\.cell: cell is 1"):
        space.parse(json.dumps(of(teacher=first, transfer=branches(30, clusters()))), [], "space.yaml")


def test_a_space_of_a_thousand_parameters_is_counted_up_to_a_limit() -> None:
    fields = {f"f{n}": {"choice": list(range(9))} for n in range(900)}
    found = Space.from_content(of(teacher={"descriptor": {"kind": "hog", **fields}}), "space.yaml")
    assert found.draw_count() == MAX_SIZE
    assert len(next(iter(found.all_draws()))) == 901


OVERRIDES = {
    "no path": ("=5", "sets nothing"),
    "an empty step": ("transfer..k=5", "sets nothing"),
    "a dot": (".=5", "sets nothing"),
    "many steps": (".".join(["a"] * 40) + "=5", "is no path of a field: it has 40 steps"),
    "a long step": ("a" * 2000 + "=5", "is no path of a field: it has 1 step"),
    "a digit of another script": ("evals.²=5", "without an entry '²'"),
    "an entry beyond any": ("evals.99999999999999999999=5", "without an entry"),
    "a number that is none": ("transfer.k=!!int abc", "--set transfer.k=!!int abc, line 1, column 1: abc is no whole number"),
    "5,000 digits": (f"transfer.k={'9' * 5000}", "line 1, column 1"),
    "a list in itself": ("transfer.k=&a [*a]", "contains itself"),
    "deep nesting": (f"transfer.k={'[' * 5000}", "inside each other"),
    "a NUL": ('transfer.kind="a\\0"', "contains a NUL"),
    "a byte that is no UTF-8": ("transfer.kind=\udc80", r"it contains the character \x80"),
    "a deep place for deep values": (f"a.b.c.d.e.f.g.h={'[' * 60}{']' * 60}", "inside each other"),
    "a step into text": ("data.a.b=5", "is 'fashion_mnist_mini' and has no 'a'"),
}


@pytest.mark.parametrize(("override", "said"), OVERRIDES.values(), ids=OVERRIDES.keys())
def test_an_override_has_the_same_limits(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        space.parse(json.dumps(SPACE), [override], "space.yaml")
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


def test_a_field_that_is_set_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"'transfer\.k' is set 2 times"):
        space.parse(json.dumps(SPACE), ["transfer.k=5", "seed=1", "transfer.k=6"], "space.yaml")


def test_an_override_of_a_part_with_an_alias_changes_no_other_part() -> None:
    data = "{kind: fashion_mnist_mini, size: 28}"
    text = json.dumps(of(data="HERE")).replace('"HERE"', f"{{pretext: &d {data}, cluster: *d, transfer: *d, target: *d}}")
    found = space.parse(text, ["data.transfer.split.val=0.3", "transfer.k=5"], "space.yaml").pair({})
    assert [getattr(found.data, role).split.val for role in ("pretext", "cluster", "transfer", "target")] == [
        0.1,
        0.1,
        0.3,
        0.1,
    ]

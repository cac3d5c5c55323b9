"""The prefix of a pair: everything that is computed before its student and that several students can share.

A search saves most when many students share a prefix. Only this file decides which parameters of a space determine the prefix;
`tests/test_prefix.py` compares its answer with the keys of the stages that a parameter changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ktray import plugins
from ktray.search.space_tree import Choice, OneOf, Range

Path = tuple[str, ...]
"""Fields from the pair down, without the names of branches: ``("transfer", "k")``."""


def prefix_parameters(root: Any) -> frozenset[str]:
    """Names of the parameters that determine what is computed before the student.

    These are all parameters except those of the student, of the evaluations, and of transfer fields that only the student
    reads, such as a temperature: fields that the `NEEDS` of the transfer do not list.

    Args:
        root: the tree of a space.
    """
    return frozenset(name for name, path, before in _walk(root, (), frozenset()) if _decides_prefix(path, before))


def teacher_parameters(root: Any) -> frozenset[str]:
    """Names of the parameters that determine which teacher is trained, and on what data."""
    return frozenset(name for name, path, _ in _walk(root, (), frozenset()) if path[:1] in (("data",), ("teacher",)))


def _decides_prefix(path: Path, before: frozenset[str]) -> bool:
    part, *fields = path or ("",)
    if part in ("student", "evals"):
        return False
    return part != "transfer" or not fields or fields[0] == "kind" or fields[0] in before


def _walk(node: Any, path: Path, before: frozenset[str]) -> Iterator[tuple[str, Path, frozenset[str]]]:
    """(name, path, transfer fields that stages before the student read) of each parameter below a node."""
    if isinstance(node, OneOf):
        yield node.choice.name, path, before
        for body in node.branches.values():
            yield from _walk(body, path, before)
    elif isinstance(node, Choice | Range):
        yield node.name, path, before
    elif isinstance(node, dict):
        if path == ("transfer",):
            before = _read_before_student(node)
        for key, child in node.items():
            yield from _walk(child, (*path, key), before)
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _walk(child, (*path, str(index)), before)


def _read_before_student(transfer: Mapping[str, Any]) -> frozenset[str]:
    kind = transfer.get("kind")
    kinds: Iterable[Any] = kind.options if isinstance(kind, Choice) else [kind]
    needs = [plugins.module("transfer", str(each)).NEEDS for each in kinds]
    return frozenset(field for need in needs for fields in need.values() for field in fields)

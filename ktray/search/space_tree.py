"""The operators of a search space, and the tree of parameters that a pair with operators is parsed into."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktray.fingerprint import canonical
from ktray.search.spec_errors import SpecProblem
from ktray.text import first_few, near_word, shown

RANGES = ("int", "log_int", "float", "log_float")
OPERATORS = ("choice", *RANGES, "one_of")
MAX_OPTIONS, MAX_BRANCHES = 1000, 200  # of a choice, of a one_of
MAX_WHOLE = 2**53  # ends of a range; above it floats, in which samplers compute, skip whole numbers
MAX_NUMBER = 1e100  # ends of a range; the squares of larger ones are infinite
MAX_BRANCH_NAME = 100  # characters
MAX_SIZE = 10**18  # points of a space that are counted; of more only that there are more is of interest
_SYNONYMS = {  # names in other tools
    "choices": "choice",
    "values": "choice",
    "categorical": "choice",
    "grid_search": "choice",
    "uniform": "float",
    "quniform": "float",
    "loguniform": "log_float",
    "log_uniform": "log_float",
    "randint": "int",
    "lograndint": "log_int",
    "oneof": "one_of",
    "branches": "one_of",
}

Scalar = None | bool | int | float | str
Params = dict[str, Scalar]


@dataclass(frozen=True)
class Choice:
    """One of several options. A draw contains the label of an option, so that every parameter is a scalar."""

    name: str
    options: tuple[Any, ...]
    labels: tuple[Scalar, ...]
    branches: bool = False


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included."""

    name: str
    low: float
    high: float
    log: bool
    integer: bool


@dataclass(frozen=True)
class OneOf:
    """One of several branches, each with its own parameters; the choice of a branch is itself a parameter."""

    choice: Choice
    branches: Mapping[str, Any]


Parameter = Choice | Range
Ask = Callable[[Parameter], Scalar]


def parse_tree(value: Any, path: tuple[str, ...], problems: list[SpecProblem]) -> Any:
    """The tree of a plain value: mappings, lists and scalars unchanged, operators as `Choice`, `Range` or `OneOf`.

    Errors are appended to `problems`; if there are any, the tree must not be used.
    """
    where = ".".join(("pair", *path))
    if isinstance(value, list | tuple):
        return [parse_tree(item, (*path, str(index)), problems) for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    not_text = [key for key in value if not isinstance(key, str)]
    if not_text:
        problems.append(SpecProblem(where, f"the key {shown(not_text[0])} is not text", "Quote it."))
        return None
    operators = [key for key in value if key in OPERATORS]
    if operators and len(value) > 1:
        others = first_few(repr(key) for key in value if key != operators[0])
        problems.append(SpecProblem(where, f"{operators[0]!r} must be the only key, and here {others} is beside it"))
        return None
    if operators:
        operand = value[operators[0]]
        if operators[0] == "one_of":
            return _parse_one_of(operand, path, problems)
        found = _parse_choice(operand, path) if operators[0] == "choice" else _parse_range(operators[0], operand, path)
        if isinstance(found, SpecProblem):
            problems.append(found)
        return found
    intended = _intended_operator(value)
    if intended:
        key = next(iter(value))
        problems.append(
            SpecProblem(
                where, f"there is no operator {shown(key)}", f"Did you mean {intended!r}? Known: {', '.join(OPERATORS)}."
            )
        )
        return None
    return {key: parse_tree(item, (*path, key), problems) for key, item in value.items()}


def _intended_operator(value: Mapping[str, Any]) -> str | None:
    if len(value) != 1:
        return None
    ((key, operand),) = value.items()
    if not isinstance(operand, list | Mapping):
        return None
    plain = key.lower().replace("-", "_")
    return _SYNONYMS.get(plain) or near_word(plain, OPERATORS, cutoff=0.7)


def _parameter_name(path: tuple[str, ...]) -> str:
    return ".".join(path) or "pair"


def _parse_choice(operand: Any, path: tuple[str, ...]) -> Choice | SpecProblem:
    where = ".".join(("pair", *path))
    if not isinstance(operand, list) or not operand:
        return SpecProblem(where, f"'choice' needs a list of options, and this is {shown(operand)}", "Write {choice: [a, b]}.")
    if len(operand) > MAX_OPTIONS:
        return SpecProblem(
            where,
            f"'choice' has {len(operand):,} options, and at most {MAX_OPTIONS:,} are read",
            "For numbers write {int: [1, 9]}.",
        )
    labels: list[Scalar] = []
    for option in operand:
        if _holds_operator(option):
            return SpecProblem(where, "an option of 'choice' holds an operator", "Use one_of: its branches may.")
        try:
            canonical(option, where)
            text = scalar_of(option)
        except TypeError as error:
            return SpecProblem(where, str(error).removeprefix(f"{where}: "))
        if text in labels:
            return SpecProblem(where, f"the option {shown(option)} is there twice")
        labels.append(text)
    return Choice(_parameter_name(path), tuple(operand), tuple(labels))


def scalar_of(option: Any) -> Scalar:
    """An option as a scalar: itself, or the JSON text of a list or mapping."""
    text: Scalar = canonical(option) if isinstance(option, list | tuple | Mapping) else option
    return text


def _holds_operator(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(key in OPERATORS or _holds_operator(item) for key, item in value.items())
    return isinstance(value, list) and any(_holds_operator(item) for item in value)


def _parse_range(operator: str, operand: Any, path: tuple[str, ...]) -> Range | SpecProblem:
    where = ".".join(("pair", *path))
    integer, log = operator.endswith("int"), operator.startswith("log_")
    kinds = int if integer else (int, float)
    right = f"Write {{{operator}: [{'1, 10' if integer else '0.01, 0.1'}]}}."
    if not isinstance(operand, list) or len(operand) != 2:
        return SpecProblem(where, f"{operator!r} needs its two ends, and this is {shown(operand)}", right)
    low, high = operand
    if not all(isinstance(end, kinds) and not isinstance(end, bool) and math.isfinite(end) for end in operand):
        return SpecProblem(
            where, f"the ends of {operator!r} are {'whole ' if integer else ''}numbers, and these are {shown(operand)}", right
        )
    if any(abs(end) > (MAX_WHOLE if integer else MAX_NUMBER) for end in operand):
        most = f"{MAX_WHOLE:,}" if integer else f"{MAX_NUMBER:g}"
        return SpecProblem(
            where, f"the ends of {operator!r} may be at most {most}, and these are {shown(operand)}", "Use others."
        )
    if low > high:
        return SpecProblem(where, f"the range [{low}, {high}] is empty", f"Write [{high}, {low}].")
    if log and low <= 0:
        return SpecProblem(
            where, f"a logarithmic range starts above 0, and this one at {low}", f"Raise {low}, or use {operator[4:]!r}."
        )
    return Range(_parameter_name(path), low if integer else float(low), high if integer else float(high), log, integer)


def _parse_one_of(operand: Any, path: tuple[str, ...], problems: list[SpecProblem]) -> OneOf | None:
    where = ".".join(("pair", *path))
    if not isinstance(operand, Mapping) or not operand:
        problems.append(
            SpecProblem(where, "'one_of' needs a mapping of branches", "Write {one_of: {first: {...}, second: {...}}}.")
        )
        return None
    wrong = [key for key in operand if not isinstance(key, str) or not 0 < len(key) <= MAX_BRANCH_NAME or "." in key]
    if wrong:
        right = f"A branch's name is text of at most {MAX_BRANCH_NAME} characters without a dot; quote it."
        problems.append(SpecProblem(where, f"{shown(wrong[0])} cannot name a branch", right))
        return None
    if len(operand) > MAX_BRANCHES:
        problems.append(SpecProblem(where, f"'one_of' has {len(operand):,} branches, and at most {MAX_BRANCHES} are read"))
        return None
    names = tuple(operand)
    branches = {name: parse_tree(body, (*path, name), problems) for name, body in operand.items()}
    return OneOf(Choice(_parameter_name(path), names, names, branches=True), branches)


def children(node: Any) -> Sequence[Any]:
    """The values of a mapping or a list of the tree; of anything else none."""
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def fill_params(node: Any, ask: Ask, params: Params) -> None:
    """Fills `params` by calling `ask` for each parameter of the chosen branches, in the order of the file."""
    if isinstance(node, OneOf):
        branch = str(ask(node.choice))
        params[node.choice.name] = branch
        fill_params(node.branches[branch], ask, params)
    elif isinstance(node, Choice | Range):
        params[node.name] = ask(node)
    for child in children(node):
        fill_params(child, ask, params)


def without_constants(node: Any) -> Any:
    """The tree without its constants, None if nothing is left; `fill_params` makes the same calls in the same order on it."""
    if isinstance(node, OneOf):
        return OneOf(node.choice, {branch: without_constants(body) for branch, body in node.branches.items()})
    if isinstance(node, Choice | Range):
        return node
    left = [found for child in children(node) if (found := without_constants(child)) is not None]
    return left or None


def substitute(node: Any, params: Mapping[str, Scalar]) -> Any:
    """The plain value of a tree with `params` put in.

    Raises:
        KeyError: a parameter is missing, or its value is not among the options.
    """
    if isinstance(node, OneOf):
        return substitute(node.branches[str(params[node.choice.name])], params)
    if isinstance(node, Choice):
        return dict(zip(node.labels, node.options, strict=True))[params[node.name]]
    if isinstance(node, Range):
        return params[node.name]
    if isinstance(node, dict):
        return {key: substitute(item, params) for key, item in node.items()}
    return [substitute(item, params) for item in node] if isinstance(node, list) else node


def combinations(node: Any, values: Callable[[Parameter], Iterable[Scalar]]) -> Iterator[Params]:
    """Every combination of `values(parameter)` over every combination of branches, lazily."""
    if isinstance(node, OneOf):
        for branch, body in node.branches.items():
            for point in combinations(body, values):
                yield {node.choice.name: branch, **point}
    elif isinstance(node, Choice | Range):
        for value in values(node):
            yield {node.name: value}
    else:
        yield from _product(children(node), values)


def _product(nodes: Sequence[Any], values: Callable[[Parameter], Iterable[Scalar]]) -> Iterator[Params]:
    """The combinations of several nodes, the last varying fastest; halved, so that a thousand nodes are no deep recursion."""
    if len(nodes) < 2:
        yield from combinations(nodes[0], values) if nodes else ({},)
        return
    half = len(nodes) // 2
    for head in _product(nodes[:half], values):
        for tail in _product(nodes[half:], values):
            yield {**head, **tail}


def draw_count(node: Any) -> int | None:
    """Number of different draws of this part of the space, counted up to `MAX_SIZE`; None if a parameter is continuous."""
    if isinstance(node, OneOf):
        sizes = [draw_count(body) for body in node.branches.values()]
        return None if None in sizes else min(MAX_SIZE, sum(item for item in sizes if item is not None))
    if isinstance(node, Choice | Range):
        found = all_values(node)
        return None if found is None else len(found)
    total = 1
    for child in children(node):
        factor = draw_count(child)
        if factor is None:
            return None
        total = min(MAX_SIZE, total * factor)
    return total


def all_values(parameter: Parameter) -> Sequence[Scalar] | None:
    """All values of a parameter in order; None if it is continuous."""
    if isinstance(parameter, Choice):
        return parameter.labels
    if parameter.integer:
        return range(int(parameter.low), int(parameter.high) + 1)
    return [parameter.low] if parameter.low == parameter.high else None


def parameters_with_conditions(node: Any) -> Iterator[tuple[Parameter, Params]]:
    """Every parameter of every branch, with its conditions: parameter that chooses a branch -> that branch."""
    if isinstance(node, OneOf):
        yield node.choice, {}
        for branch, body in node.branches.items():
            for parameter, conditions in parameters_with_conditions(body):
                yield parameter, {node.choice.name: branch, **conditions}
    elif isinstance(node, Choice | Range):
        yield node, {}
    for child in children(node):
        yield from parameters_with_conditions(child)


def chooses_branch(parameter: Parameter) -> bool:
    """Whether a parameter chooses a branch of a one_of."""
    return isinstance(parameter, Choice) and parameter.branches


def values_to_check(parameter: Parameter) -> Sequence[Scalar]:
    """Values of a parameter to check: all options, or both ends of a range, and for a continuous range one value in between.

    The value in between reveals a field that accepts only whole numbers, which the ends may be.
    """
    if isinstance(parameter, Choice):
        return parameter.labels
    between = [] if parameter.integer else [parameter.low + 0.382 * (parameter.high - parameter.low)]
    return list(dict.fromkeys((parameter.low, parameter.high, *between)))


def value_problem(parameter: Parameter, value: Scalar) -> tuple[str, str] | None:
    """Why a parameter cannot have this value, and which values it can have; None if it can."""
    if isinstance(parameter, Choice):
        if any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in parameter.labels):
            return None
        return f"{shown(value)} is not among the options", f"They are {first_few(parameter.labels)}."
    number = isinstance(value, int if parameter.integer else int | float) and not isinstance(value, bool)
    if number and parameter.low <= value <= parameter.high:  # type: ignore[operator]
        return None
    return f"{shown(value)} is outside the range", f"It goes from {parameter.low} to {parameter.high}."

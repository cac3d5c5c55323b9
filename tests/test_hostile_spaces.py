"""Space files and --set of any content: an answer or one paragraph, never a traceback, a hang or gigabytes."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ktray.errors import UserError
from ktray.scheduler.resources import load_runtime_settings
from ktray.text import visible_name
from tests.child import Child, require_user_error_or_answer

PAIR: dict[str, Any] = {
    "data": "fashion_mnist_mini",
    "teacher": {"descriptor": {"kind": "hog", "cell": 7}},
    "transfer": {"kind": "clusters", "k": {"choice": [5, 10]}},
    "student": {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": {"epochs": 2}},
    "evals": [{"kind": "knn"}],
}
SPACE: dict[str, Any] = {
    "study": "t",
    "objectives": [{"metric": "knn/top1"}],
    "budget": {"trials": 3},
    "early_stop": {"metric": "knn/top1", "rungs": [1, 2]},
    "pair": PAIR,
    "start_with": [{"transfer.k": 5}],
}
VALID_PATHS = [
    *("study", "objectives", "budget.trials", "budget.stop_after", "early_stop.rungs", "seed", "sampler", "start_with", "pair"),
    *("data", "teacher", "teacher.descriptor", "teacher.descriptor.cell", "transfer", "transfer.k", "transfer.kind"),
    *("student.backbone", "student.schedule.epochs", "student.schedule.lr", "evals", "evals.0", "evals.0.k", "evals.0.name"),
]
SENSIBLE: list[tuple[str, Any]] = [  # changes that leave the space valid
    ("transfer.k", 5),
    ("transfer.k", {"int": [2, 9]}),
    ("seed", 3),
    ("budget.stop_after", "1h30m"),
    ("teacher", {"one_of": {"\x1b[31mred": {"descriptor": "hog"}, "[red]": {"descriptor": "raw_pixels"}}}),
    ("teacher.descriptor", {"choice": ["hog", "raw_pixels"]}),
    ("student.schedule.lr", {"log_float": [0.001, 0.1]}),
    ("student.backbone", {"one_of": {"a": {"kind": "alexnet", "width": {"choice": [0.125, 0.25]}}, "b": "resnet"}}),
    ("start_with", []),
]
OPERATORS = ["choice", "int", "log_int", "float", "log_float", "one_of"]
WORDS = st.sampled_from(
    [
        *VALID_PATHS,
        *OPERATORS,
        "kind",
        "pair",
        "hog",
        "knn",
        "clusters",
        "none",
        "rotation",
        "<<",
        "*a",
        "&a",
        "!!int",
        "0x",
        "~",
    ]
)
ODD = st.sampled_from(
    [
        "",
        " ",
        "\x1b]0;owned\x07",
        "\u202egnp",
        "[red]",
        "<b>",
        "$x$",
        "a.b",
        "-x",
        "../x",
        "/",
        "x" * 300,
        "\u2028",
        "é",
        "😀",
        "\x7f",
    ]
)
TEXTS = WORDS | ODD | st.text(max_size=12)
NUMBERS = (
    st.sampled_from([0, 1, -1, 2, 5, 2**31, 2**53, 2**63 - 1, 0.0, -0.0, 1e-300, 1e300, 0.5])
    | st.integers(-20, 200)
    | st.floats()
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS


def _operator(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    operand = st.lists(NUMBERS, min_size=2, max_size=2) | st.lists(inside, max_size=4) | inside
    return st.builds(lambda name, value: {name: value}, st.sampled_from(OPERATORS), operand)


VALUES = st.recursive(
    SCALARS,
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(TEXTS, inside, max_size=4) | _operator(inside),
    max_leaves=10,
)


def nested(levels: int, form: str) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"list": [value], "mapping": {"a": value}, "one_of": {"one_of": {"a": value}}, "choice": {"choice": [value]}}[
            form
        ]
    return value


def chain(generations: int) -> dict[str, Any]:
    pair = copy.deepcopy({**PAIR, "transfer": {"kind": "clusters", "k": 5}})
    for _ in range(generations):
        pair = {**copy.deepcopy(PAIR), "teacher": {"pair": {name: part for name, part in pair.items() if name != "evals"}}}
    return pair


LARGE = st.one_of(
    st.builds(nested, st.integers(1, 120), st.sampled_from(["list", "mapping", "one_of", "choice"])),
    st.builds(lambda count: {"choice": list(range(2, 2 + count))}, st.integers(1, 20_000)),
    st.builds(lambda count: {"one_of": {f"b{n}": 5 for n in range(count)}}, st.integers(1, 3000)),
    st.builds(lambda count: [{"kind": "knn", "name": f"n{n}"} for n in range(count)], st.integers(1, 3000)),
    st.builds(lambda count: {f"f{n}": n for n in range(count)}, st.integers(1, 3000)),
    st.builds(lambda count: "parquet:/p?" + "&".join(f"f{n}={n}" for n in range(count)), st.integers(1, 9000)),
    st.builds(lambda text, count: text * count, TEXTS, st.integers(1, 3000)),
    st.builds(chain, st.integers(1, 60)),
)


def put(space: dict[str, Any], path: str, value: Any) -> None:
    """Puts a value at a path of the file, as far as the path leads."""
    steps = path.split(".")
    node: Any = space if steps[0] in SPACE else space["pair"]
    for step in steps[:-1]:
        node = node.get(step) if isinstance(node, dict) else None
    value = copy.deepcopy(value)  # the next value may be put into this one, which others share
    if isinstance(node, dict):
        node[steps[-1]] = value
    elif isinstance(node, list) and node:
        node[0] = value


@st.composite
def space_texts(draw: st.DrawFn) -> str:
    """The text of a file that is nearly a search space."""
    space = copy.deepcopy(SPACE)
    for path, value in draw(st.lists(st.sampled_from(SENSIBLE), max_size=4)):
        put(space, path, value)
    for _ in range(draw(st.integers(0, 2))):
        put(space, draw(st.sampled_from(VALID_PATHS)), draw(VALUES | LARGE))
    if draw(st.booleans()):
        text = yaml.dump(space, Dumper=yaml.SafeDumper, sort_keys=False, allow_unicode=draw(st.booleans()))
    else:
        text = json.dumps(space)
    if draw(st.integers(0, 3)) == 0:  # a piece of YAML anywhere in it
        place = draw(st.integers(0, len(text)))
        piece = draw(
            st.sampled_from(
                ["&a ", "*a", "<<: *a\n", "!!int ", "\t", "\0", "- ", "? ", "[", "{", "]", "}", "'", '"', "0x_", "%", ": "]
            )
        )
        text = text[:place] + piece * draw(st.sampled_from([1, 1, 1, 50, 3000])) + text[place:]
    return text


OVERRIDES = st.one_of(
    st.sampled_from([f"{path}={json.dumps(value)}" for path, value in SENSIBLE]),
    st.builds(lambda path, value: f"{path}={json.dumps(value)}", st.sampled_from(VALID_PATHS), VALUES | LARGE),
    st.builds(
        lambda steps, value: f"{'.'.join(steps)}={json.dumps(value)}",
        st.lists(TEXTS | st.sampled_from(["0", "9" * 400, "²", "-1"]), max_size=5),
        VALUES,
    ),
    st.builds(lambda count: ".".join(["a"] * count) + "=1", st.integers(1, 3000)),
    st.builds(lambda path, text: f"{path}={text}", st.sampled_from(VALID_PATHS), TEXTS),
    st.text(max_size=30),
)
FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=700, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spaces")


RUNTIME = {"cpus": 2, "dead_after": 60, "stages": {"student": {"gpus": 0.5}, "features": {"memory_bytes": 1000, "helpers": 3}}}
_numbers = itertools.count()


@st.composite
def runtime_texts(draw: st.DrawFn) -> str:
    """The text of a file that is nearly a runtime file."""
    content: dict[str, Any] = copy.deepcopy(RUNTIME)
    name = draw(st.sampled_from([*RUNTIME, "heartbeat_seconds", "memmap_bytes", "cpu"]) | TEXTS)
    stage, field = (
        draw(st.sampled_from(["student", "features", "stage"])),
        draw(st.sampled_from(["cpus", "gpus", "helpers", "x"])),
    )
    if draw(st.booleans()):
        content[name] = draw(VALUES)
    else:
        content["stages"][stage] = {field: draw(VALUES)}
    text = json.dumps(content)
    place = draw(st.integers(0, len(text)))
    return text[:place] + draw(st.sampled_from(["", "", "", "\t", "&a ", "*a", "[" * 300, "0x_", "\0"])) + text[place:]


def read_runtime(folder: Path, text: str) -> None:
    path = folder / "runtime.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    message = ""
    try:
        load_runtime_settings(path)
    except UserError as error:
        message = str(error)
    assert message == visible_name(message)
    assert len(message) < 4000


def plan(child: Child, folder: Path, text: str, overrides: list[str]) -> None:
    """Plans a file of this text."""
    path = folder / f"space{next(_numbers) % 50}.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    # A NUL cannot be on a command line, and a surrogate there is a byte of a name that is no UTF-8.
    given = [f"--set={override}" for override in overrides if "\0" not in override]
    require_user_error_or_answer(child.run("plan", str(path), *given))


@FEW
@given(space_texts())
def test_no_space_file_ends_in_a_traceback_a_hang_or_gigabytes(child: Child, folder: Path, text: str) -> None:
    plan(child, folder, text, [])


@FEW
@given(st.lists(OVERRIDES, min_size=1, max_size=2))
def test_no_override_ends_in_a_traceback_a_hang_or_gigabytes(child: Child, folder: Path, overrides: list[str]) -> None:
    plan(child, folder, json.dumps(SPACE), overrides)


@FEW
@given(runtime_texts())
def test_no_runtime_file_ends_in_a_traceback(folder: Path, text: str) -> None:
    read_runtime(folder, text)


@pytest.mark.slow
@MANY
@given(runtime_texts())
def test_none_of_many_runtime_files_ends_in_a_traceback(folder: Path, text: str) -> None:
    read_runtime(folder, text)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@MANY
@given(space_texts())
def test_none_of_many_space_files_ends_in_a_traceback_a_hang_or_gigabytes(child: Child, folder: Path, text: str) -> None:
    plan(child, folder, text, [])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@MANY
@given(st.lists(OVERRIDES, min_size=1, max_size=2))
def test_none_of_many_overrides_ends_in_a_traceback_a_hang_or_gigabytes(
    child: Child, folder: Path, overrides: list[str]
) -> None:
    plan(child, folder, json.dumps(SPACE), overrides)

"""The folder is the registry: `pretext/rotation.py` is the pretext task `rotation`.

This is the only module that imports by name. A kind with a dot (`my_lab.colour`) is a module outside of ktray. It is imported
only after `allow("my_lab")`, so that a YAML file alone can never make ktray import anything.
"""

from __future__ import annotations

import ast
import os
import pkgutil
import sys
import traceback
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, get_args, get_origin

from ktray.errors import UserError
from ktray.text import near_word, shown

if TYPE_CHECKING:
    from ktray.strict import StrictSpec

GROUPS = {  # group of plugins -> its folder in ktray
    "dataset": "datasets",
    "backbone": "backbones",
    "pretext": "pretext",
    "descriptor": "descriptors",
    "transfer": "transfer",
    "evaluation": "evals",
}
_GROUP_OF_PACKAGE = {f"ktray.{folder}": group for group, folder in GROUPS.items()}
_REQUIRED_FIELDS = {  # fields that ktray reads of every Spec of a group
    "dataset": ("size", "split", "max_unreadable"),
    "evaluation": ("name", "of", "layer", "pool", "split"),
}
_REQUIRED_NAMES = {  # what every plugin of a group defines
    "dataset": ("Spec", "REVISION", "LOCATION", "load"),
    "backbone": ("Spec", "REVISION", "build"),
    "pretext": ("Spec", "REVISION", "task"),
    "descriptor": ("Spec", "REVISION", "describe"),
    "transfer": ("Spec", "REVISION", "NEEDS"),
    "evaluation": ("Spec", "REVISION", "NEEDS_LABELS", "DIRECTION", "evaluate"),
}
_loaded: dict[tuple[str, str], ModuleType] = {}  # a search looks up the same few modules hundreds of thousands of times
_ALLOWED = "KTRAY_ALLOW_PLUGINS"  # an environment variable, so that Ray's workers inherit it


class PluginSpec(Protocol):
    """What ktray reads of the Spec of every plugin, which is a `StrictSpec` with a field `kind`."""

    @property
    def kind(self) -> str:
        """Name of the plugin's module: ``rotation``, or ``my_lab.colour`` from outside of ktray."""

    def model_dump(
        self, *, mode: str = "python", include: set[str] | None = None, exclude: set[str] | None = None
    ) -> dict[str, Any]:
        """The fields as plain data, as pydantic's method of that name."""

    def model_copy(self, *, update: dict[str, Any] | None = None) -> Self:
        """The same with some fields changed, as pydantic's method of that name."""

    def __hash__(self) -> int: ...


def allow(packages: list[str]) -> None:
    """Allow kinds from these top-level packages, in this process and those that it starts."""
    known = [name for name in os.environ.get(_ALLOWED, "").split(",") if name]
    os.environ[_ALLOWED] = ",".join(dict.fromkeys([*known, *packages]))


def kinds(group: str) -> list[str]:
    """Sorted names of the kinds of a group that ship with ktray, such as ``kinds("pretext")``."""
    return list(_shipped(group))


@lru_cache(maxsize=len(GROUPS))  # called for every spec, and a space has thousands
def _shipped(group: str) -> tuple[str, ...]:
    folder = import_module(f"ktray.{GROUPS[group]}")
    return tuple(sorted(entry.name for entry in pkgutil.iter_modules(folder.__path__)))


def module(group: str, kind: str) -> ModuleType:
    """The module that defines a kind.

    Raises:
        UserError: there is no such kind; the package of a dotted one was not allowed; or the module cannot be imported, lacks
            what every plugin of its group defines, or states another kind.
    """
    if (group, kind) in _loaded:
        return _loaded[group, kind]
    if "." in kind and all(part.isidentifier() for part in kind.split(".")):
        package = kind.split(".")[0]
        if package not in os.environ.get(_ALLOWED, "").split(","):
            raise UserError(
                f"the {group} kind {kind!r} comes from the package {package!r}, which this command does not trust",
                instead=f"Add --allow-plugins {package} if you do.",
            )
        return _imported(group, kind, kind)
    if kind not in _shipped(group):
        near = near_word(kind, kinds(group))
        hint = f"Did you mean {near!r}? " if near else ""
        raise UserError(f"there is no {group} kind {shown(kind)}", instead=f"{hint}Known: {', '.join(kinds(group))}.")
    _loaded[group, kind] = _imported(group, kind, f"ktray.{GROUPS[group]}.{kind}")
    return _loaded[group, kind]


def stated(group: str, kind: str, name: str, default: Any = ()) -> Any:
    """A constant of a kind's module, such as `NEEDS`; of a mapping its names alone. A shipped module is not imported for it.

    Commands that only read would otherwise import torch, with which most kinds compute.

    Raises:
        UserError: as `module`.
    """
    if (group, kind) in _loaded or kind not in _shipped(group):
        return getattr(module(group, kind), name, default)
    node = _top_level(group, kind).get(name)
    if node is None:
        return default
    try:
        return tuple(map(ast.literal_eval, node.keys)) if isinstance(node, ast.Dict) else ast.literal_eval(node)  # type: ignore[arg-type]
    except (ValueError, TypeError):  # an expression
        return getattr(module(group, kind), name, default)


def defines(group: str, kind: str, name: str) -> bool:
    """Whether a kind's module defines a function or constant. A shipped module is not imported for it.

    Raises:
        UserError: as `module`.
    """
    if (group, kind) in _loaded or kind not in _shipped(group):
        return hasattr(module(group, kind), name)
    return name in _top_level(group, kind)


@lru_cache(maxsize=64)
def _top_level(group: str, kind: str) -> dict[str, ast.expr | None]:
    """Name -> what is assigned to it at the top of a shipped module; functions and imported names have None."""
    found: dict[str, ast.expr | None] = {}
    spec = find_spec(f"ktray.{GROUPS[group]}.{kind}")
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:
        body = ast.parse(file.read()).body
    for node in body:
        if isinstance(node, ast.Assign):
            found |= {each.id: node.value for each in node.targets if isinstance(each, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node.value
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = None
        elif isinstance(node, ast.ImportFrom):
            found |= {each.asname or each.name: None for each in node.names}
    return found


def _imported(group: str, kind: str, name: str) -> ModuleType:
    try:
        found = import_module(name)
    except Exception as error:  # the module is the user's code and may raise anything
        problem = f"the {group} kind {kind!r} cannot be imported: {_error_text(error)}"
        raise UserError(problem, _raised_at(name, error), _install_hint(name, error)) from error
    missing = [each for each in _REQUIRED_NAMES[group] if not hasattr(found, each)]
    if missing:
        raise UserError(
            f"the {group} kind {kind!r} defines no {' and no '.join(missing)}",
            found.__file__ or name,
            f"A {group} defines {', '.join(_REQUIRED_NAMES[group])}; see {GROUPS[group]}/{kinds(group)[0]}.py.",
        )
    absent = [field for field in _REQUIRED_FIELDS.get(group, ()) if field not in found.Spec.model_fields]
    if absent:
        raise UserError(
            f"the Spec of the {group} kind {kind!r} has no {' and no '.join(absent)}",
            found.__file__ or name,
            f"Every {group} has {', '.join(_REQUIRED_FIELDS[group])}; see {GROUPS[group]}/{kinds(group)[0]}.py.",
        )
    literal = found.Spec.model_fields["kind"].annotation if "kind" in getattr(found.Spec, "model_fields", ()) else None
    if get_origin(literal) is Literal and kind not in get_args(literal):
        raise UserError(
            f"the Spec of the {group} kind {kind!r} calls itself {get_args(literal)[0]!r}",
            found.__file__ or name,
            f'Write kind: Literal["{kind}"] = "{kind}": outside of ktray the kind is the dotted name of its module.',
        )
    return found


def _install_hint(name: str, error: Exception) -> str:
    """How to make Python find the plugin's package; empty if it was found and one of its own imports was not."""
    if not isinstance(error, ModuleNotFoundError) or not f"{name}.".startswith(f"{error.name}."):
        return ""
    return f"Install the package {name.split('.')[0]!r}, or name the folder that holds it in PYTHONPATH."


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"


def _raised_at(name: str, error: Exception) -> str:
    """File and line of the plugin where the error was raised, or the plugin's name if none of its lines ran."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    own = os.path.join(*name.split("."))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if own in frame.filename]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else name


def identity_name(module: ModuleType) -> str:
    """The fixed name by which keys refer to a module with a REVISION, so that no key depends on where its file lies.

    A tool or stage states it as IDENTITY: ``kmeans``, ``stage.clusters``. A plugin that ships with ktray is named by its group
    and kind, ``pretext.rotation``; one from outside by its dotted kind, ``my_lab.colour``.
    """
    stated = getattr(module, "IDENTITY", None)
    if stated:
        return str(stated)
    package, _, kind = module.__name__.rpartition(".")
    return f"{_GROUP_OF_PACKAGE[package]}.{kind}" if package in _GROUP_OF_PACKAGE else module.__name__


def revisions(*sources: PluginSpec | StrictSpec | ModuleType) -> dict[str, int]:
    """Identity name -> REVISION of the code that determines a stage's result.

    Args:
        sources: modules and specs of plugins. A spec stands for its plugin's module and those of all specs inside it. Each
            module also stands for those that it names in TOOLS.
    """
    from ktray.strict import StrictSpec  # commands that only read a study do without pydantic

    found: dict[str, int] = {}
    for source in sources:
        module = source if isinstance(source, ModuleType) else sys.modules[type(source).__module__]
        if hasattr(module, "REVISION"):
            found[identity_name(module)] = module.REVISION
        found |= revisions(*getattr(module, "TOOLS", ()))
        if isinstance(source, StrictSpec):
            fields = (getattr(source, name) for name in type(source).model_fields)
            found |= revisions(*(value for value in fields if isinstance(value, StrictSpec)))
    return found


def parse(group: str, value: Any) -> Any:
    """`value` (a kind's name, a mapping with `kind`, or a ready Spec) as the Spec of its kind.

    Raises:
        UserError: the kind is unknown, or the mapping has no `kind`.
        pydantic.ValidationError: a field is wrong; the caller adds its path in the file.
    """
    if isinstance(value, str):
        value = {"kind": value}
    if isinstance(value, Mapping):
        kind = value.get("kind")
        if not isinstance(kind, str):
            raise UserError(
                f"{'an' if group[0] in 'aeiou' else 'a'} {group} needs a 'kind'", instead=f"One of: {', '.join(kinds(group))}."
            )
        return module(group, kind).Spec.model_validate(dict(value))
    return value


def module_of(group: str, spec: PluginSpec) -> ModuleType:
    """The module that defines the kind of a ready spec."""
    return module(group, spec.kind)

"""The folder is the registry: `pretext/rotation.py` is the pretext task `rotation`.

The only `import_module` of the project. A kind with a dot (`my_lab.colour`) is a module from outside and loads only after
`allow("my_lab")`, so that a YAML file alone can never make ktray import something.
"""

from __future__ import annotations

import difflib
import os
import pkgutil
import sys
import traceback
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, Protocol, Self, get_args, get_origin

from ktray.errors import UserError
from ktray.strict import StrictSpec

ROOMS = {
    "dataset": "datasets",
    "backbone": "backbones",
    "pretext": "pretext",
    "descriptor": "descriptors",
    "transfer": "transfer",
    "evaluation": "evals",
}
_ROOM_OF_PACKAGE = {f"ktray.{folder}": room for room, folder in ROOMS.items()}
_FIELDS = {  # what the house reads of every spec of a room, whatever its kind
    "dataset": ("size", "split", "max_unreadable"),
    "evaluation": ("name", "of", "layer", "pool", "split"),
}
_DEFINES = {  # what the house looks for in a plugin of each room
    "dataset": ("Spec", "REVISION", "LOCATION", "load"),
    "backbone": ("Spec", "REVISION", "build"),
    "pretext": ("Spec", "REVISION", "task"),
    "descriptor": ("Spec", "REVISION", "describe"),
    "transfer": ("Spec", "REVISION", "NEEDS"),
    "evaluation": ("Spec", "REVISION", "NEEDS_LABELS", "DIRECTION", "evaluate"),
}
_loaded: dict[tuple[str, str], ModuleType] = {}  # a search asks for the same few modules hundreds of thousands of times
_ALLOWED = "KTRAY_ALLOW_PLUGINS"  # an environment variable, so that Ray's workers inherit it


class PluginSpec(Protocol):
    """What ktray reads of the Spec of every plugin. A Spec is a `StrictSpec` with a field `kind`; see `_FIELDS` for more."""

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
    """Let kinds from these top-level packages load, here and in processes started from here."""
    known = [name for name in os.environ.get(_ALLOWED, "").split(",") if name]
    os.environ[_ALLOWED] = ",".join(dict.fromkeys([*known, *packages]))


def kinds(room: str) -> list[str]:
    """Sorted names of the kinds that ship in a room, such as ``kinds("pretext")``."""
    return list(_shipped(room))


@lru_cache(maxsize=len(ROOMS))  # asked for with every spec, and a space has thousands
def _shipped(room: str) -> tuple[str, ...]:
    folder = import_module(f"ktray.{ROOMS[room]}")
    return tuple(sorted(entry.name for entry in pkgutil.iter_modules(folder.__path__)))


def module(room: str, kind: str) -> ModuleType:
    """The module that defines a kind.

    Raises:
        UserError: no such kind (with the nearest names), a dotted one whose package was not allowed, or a file that cannot be
            imported, lacks what every plugin of its room defines, or gives itself another kind.
    """
    if (room, kind) in _loaded:
        return _loaded[room, kind]
    if "." in kind and all(part.isidentifier() for part in kind.split(".")):
        package = kind.split(".")[0]
        if package not in os.environ.get(_ALLOWED, "").split(","):
            raise UserError(
                f"the {room} kind {kind!r} comes from the package {package!r}, which this command does not trust",
                instead=f"Add --allow-plugins {package} if you do.",
            )
        return _imported(room, kind, kind)
    if kind not in _shipped(room):
        near = difflib.get_close_matches(kind, kinds(room), n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UserError(f"there is no {room} kind {kind!r}", instead=f"{hint}Known: {', '.join(kinds(room))}.")
    _loaded[room, kind] = _imported(room, kind, f"ktray.{ROOMS[room]}.{kind}")
    return _loaded[room, kind]


def _imported(room: str, kind: str, name: str) -> ModuleType:
    try:
        found = import_module(name)
    except Exception as error:  # a boundary: the module is the user's, and whatever it raises is the user's to mend
        said = f"the {room} kind {kind!r} cannot be imported: {_said(error)}"
        raise UserError(said, _place(name, error), _findable(name, error)) from error
    missing = [each for each in _DEFINES[room] if not hasattr(found, each)]
    if missing:
        raise UserError(
            f"the {room} kind {kind!r} defines no {' and no '.join(missing)}",
            found.__file__ or name,
            f"A {room} defines {', '.join(_DEFINES[room])}; see {ROOMS[room]}/{kinds(room)[0]}.py.",
        )
    absent = [field for field in _FIELDS.get(room, ()) if field not in found.Spec.model_fields]
    if absent:
        raise UserError(
            f"the Spec of the {room} kind {kind!r} has no {' and no '.join(absent)}",
            found.__file__ or name,
            f"Every {room} has {', '.join(_FIELDS[room])}; see {ROOMS[room]}/{kinds(room)[0]}.py.",
        )
    literal = found.Spec.model_fields["kind"].annotation if "kind" in getattr(found.Spec, "model_fields", ()) else None
    if get_origin(literal) is Literal and kind not in get_args(literal):
        raise UserError(
            f"the Spec of the {room} kind {kind!r} calls itself {get_args(literal)[0]!r}",
            found.__file__ or name,
            f'Write kind: Literal["{kind}"] = "{kind}": outside of ktray the kind is the dotted name of its module.',
        )
    return found


def _findable(name: str, error: Exception) -> str:
    """How Python finds the plugin's own package; nothing where that was found and something that it needs was not."""
    if not isinstance(error, ModuleNotFoundError) or not f"{name}.".startswith(f"{error.name}."):
        return ""
    return f"Install the package {name.split('.')[0]!r}, or name the folder that holds it in PYTHONPATH."


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"


def _place(name: str, error: Exception) -> str:
    """The plugin's file with the line that raised, or its name if no line of it ran."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    own = os.path.join(*name.split("."))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if own in frame.filename]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else name


def identity_name(module: ModuleType) -> str:
    """The fixed name by which keys refer to a module with a REVISION: no key depends on where a file lies.

    A tool and a stage state it as IDENTITY: ``kmeans``, ``stage.clusters``. A plugin that ships with ktray has that of its room
    and kind, ``pretext.rotation``; one from outside its dotted kind, ``my_lab.colour``.
    """
    stated = getattr(module, "IDENTITY", None)
    if stated:
        return str(stated)
    package, _, kind = module.__name__.rpartition(".")
    return f"{_ROOM_OF_PACKAGE[package]}.{kind}" if package in _ROOM_OF_PACKAGE else module.__name__


def revisions(*sources: PluginSpec | StrictSpec | ModuleType) -> dict[str, int]:
    """Identity name -> REVISION of the code that gives a stage its meaning.

    Args:
        sources: modules, and specs of plugins, which bring the plugin's module and those of the specs inside them, however
            deep. Each module brings those that it names in TOOLS.
    """
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


def parse(room: str, value: Any) -> Any:
    """`value` (a kind's name, a mapping with `kind`, or a ready Spec) as the Spec of its kind.

    Raises:
        UserError: unknown kind, or not a mapping with `kind`.
        pydantic.ValidationError: a field of the kind is wrong; the caller knows the path.
    """
    if isinstance(value, str):
        value = {"kind": value}
    if isinstance(value, Mapping):
        kind = value.get("kind")
        if not isinstance(kind, str):
            raise UserError(f"a {room} needs a 'kind'", instead=f"One of: {', '.join(kinds(room))}.")
        return module(room, kind).Spec.model_validate(dict(value))
    return value


def module_of(room: str, spec: PluginSpec) -> ModuleType:
    """The module that defines the kind of a ready spec."""
    return module(room, spec.kind)

"""What stages may use and how the scheduler watches its workers: the runtime file. None of it is hashed or changes a result."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ktray.errors import UserError


@dataclass(frozen=True)
class ResourceRequest:
    """What one stage needs while it runs.

    Attributes:
        cpus: CPUs of the worker that runs it; the usual worker holds one.
        gpus: share of a GPU, such as 0.5, or a number of GPUs; such a worker holds no CPU in Ray's books. None leaves it to
            `shares.Shares`, 0 says that it runs on CPUs also where there are GPUs.
        memory_bytes: host memory that admission reserves on the node; 0 reserves nothing.
        helpers: how many more workers of the same shape it may borrow while they are idle.
    """

    cpus: float = 1.0
    gpus: float | None = None
    memory_bytes: int = 0
    helpers: int = 0


STAGES = ("images", "teacher", "features", "clusters", "pseudo_labels", "student", "evaluation")
SPLITTABLE = {name: ResourceRequest(helpers=63) for name in ("images", "features", "clusters", "pseudo_labels")}


@dataclass(frozen=True)
class RuntimeSettings:
    """Resources, limits and patience, from the file given with ``--runtime``.

    Attributes:
        cpus: CPUs for workers, None for all that the cluster has.
        stages: stage name -> needs; a stage that is not named needs one CPU, or, if it runs a network and the cluster has GPUs,
            a share of one of these and no CPU.
        heartbeat_seconds: how often a worker tells that it lives.
        dead_after: seconds without a heartbeat after which a worker is killed and its stage starts elsewhere.
        idle_exit_seconds: how long a scheduler without a driver lives on.
        checkpoint_seconds: how much work a killed stage may lose.
        memmap_bytes: pixels above this are streamed instead of written to a memmap.
    """

    cpus: int | None = None
    stages: Mapping[str, ResourceRequest] = field(default_factory=lambda: dict(SPLITTABLE))
    heartbeat_seconds: float = 0.5
    dead_after: float = 15.0
    idle_exit_seconds: float = 30.0
    checkpoint_seconds: float = 20.0
    memmap_bytes: int = 20 << 30

    def of(self, stage: str) -> ResourceRequest:
        """What the stage of this name needs."""
        return self.stages.get(stage, ResourceRequest())


def load_runtime(path: Path | None) -> RuntimeSettings:
    """The runtime in a YAML file, such as ``{cpus: 8, stages: {student: {gpus: 0.5}}}``; defaults without one.

    Raises:
        UserError: the file is unreadable, or a field is unknown or has no sensible value.
    """
    if path is None:
        return RuntimeSettings()
    try:
        given = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"the runtime file cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError:
        raise UserError("the runtime file is no text in UTF-8", str(path)) from None
    except yaml.YAMLError as error:
        raise UserError(f"this is not valid YAML: {getattr(error, 'problem', None) or error}", str(path)) from None
    fields = _checked(given, RuntimeSettings, str(path))
    stages = {**SPLITTABLE}
    for name, entry in _mapping(fields.get("stages") or {}, f"{path}: stages").items():
        where = f"{path}: stages.{name}"
        if name not in STAGES:
            close = difflib.get_close_matches(name, STAGES, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Known are {', '.join(STAGES)}."
            raise UserError(f"there is no stage {name!r}", where, hint)
        stages[name] = dataclasses.replace(stages.get(name, ResourceRequest()), **_checked(entry, ResourceRequest, where))
    return dataclasses.replace(RuntimeSettings(), **{**fields, "stages": stages})


def _mapping(given: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        right = "Write {cpus: 8, stages: {student: {gpus: 0.5}}}."
        raise UserError(f"{given!r} is not a mapping of names to values", where, right)
    return {str(name): value for name, value in given.items()}


def _checked(given: Any, kind: type, where: str) -> dict[str, Any]:
    defaults = {entry.name: entry for entry in dataclasses.fields(kind)}
    checked: dict[str, Any] = {}
    for name, value in _mapping(given, where).items():
        if name not in defaults:
            close = difflib.get_close_matches(name, defaults, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Known are {', '.join(defaults)}."
            raise UserError(f"the field {name!r} is unknown", where, hint)
        checked[name] = value if name == "stages" else _number(name, value, str(defaults[name].type), where)
    return checked


def _number(name: str, value: Any, kind: str, where: str) -> float | int | None:
    if value is None and "None" in kind:
        return None
    if "int" in kind:
        least = 1 if name == "cpus" else 0
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name}: {value!r} is not a whole number from {least}", where)
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    zero = name == "gpus"
    if not number or not 0 <= value < float("inf") or (value == 0 and not zero):
        raise UserError(f"{name}: {value!r} is not a number {'from' if zero else 'above'} 0", where)
    return float(value)

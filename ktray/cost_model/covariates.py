"""What of a stage decides how long it runs: numbers that its time grows with, and kinds that each have a pace of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ktray.fingerprint import fingerprint

EXPONENTS = {  # seconds grow about with number ** exponent, before any record says otherwise, and give or take that much
    "epochs": (1.0, 0.15),
    "images": (0.8, 0.3),
    "size": (1.0, 0.7),
    "width": (0.8, 0.5),
    "depth": (0.8, 0.4),
    "k": (0.5, 0.3),
    "dim": (0.6, 0.3),
}
PACES = {"what": 1.5, "backbone": 1.0, "device": 1.5, "of": 0.7}  # log of the factor between two kinds, give or take


class StageFacts(NamedTuple):
    """What is known of a stage, from itself or from its artifact's record."""

    stage: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, str]
    metrics: Mapping[str, float]


Look = Callable[[str], StageFacts | None]
"""Key -> facts, or None."""


@dataclass(frozen=True)
class Covariates:
    """Numbers above 0 and kinds; what is not known is absent."""

    numbers: Mapping[str, float]
    kinds: Mapping[str, str]


def covariates(facts: StageFacts, look: Look, dims: Mapping[str, float], device: str | None) -> Covariates:
    """The traits of one stage.

    Args:
        look: finds the stages that it reads.
        dims: `view` of features -> their width D.
    """
    spec = facts.spec
    numbers: dict[str, float | None] = {"epochs": spec.get("epoch")}
    kinds: dict[str, str | None] = {"device": device, "of": spec.get("of")}
    kinds["what"] = next((name for name in map(_kind, (spec.get("pretext"), spec.get("descriptor"), spec)) if name), None)
    judged = (spec.get("judged") or {}) if spec.get("of") == "student" else {}
    backbone = spec.get("backbone") or (spec.get("descriptor") or judged).get("backbone") or {}
    kinds["backbone"] = _kind(backbone)
    numbers |= {name: backbone.get(name) for name in ("width", "depth")}
    if facts.stage == "clusters":
        numbers["k"] = spec.get("k")
    read = _read(facts, look)
    images = [facts] if facts.stage == "images" else [each for each in read if each.stage == "images"]
    counts = [count for count in map(_count, images) if count]
    numbers["images"] = max(counts, default=None)
    numbers["size"] = max((each.spec["size"] for each in images if _number(each.spec.get("size"))), default=None)
    widths = [dims[view(each)] for each in read if each.stage == "features" and view(each) in dims]
    numbers["dim"] = max(widths, default=None)
    return Covariates(
        {name: float(value) for name, value in numbers.items() if value is not None and _number(value)},
        {name: value for name, value in kinds.items() if value},
    )


def view(facts: StageFacts) -> str:
    """What of features decides their width: the layer and its pool or the descriptor, whatever the teacher has learned."""
    return fingerprint({name: value for name, value in facts.spec.items() if name != "dtype"})


def _read(facts: StageFacts, look: Look) -> list[StageFacts]:
    """The features and images that a stage reads, also those that its features were made of."""
    direct = [found for found in map(look, facts.inputs.values()) if found]
    behind = [each for found in direct if found.stage == "features" for each in map(look, found.inputs.values()) if each]
    return [*direct, *behind]


def _count(images: StageFacts) -> float | None:
    """How many images there are; before they were decoded as many as the data set's spec says."""
    found = images.metrics.get("count", images.spec.get("count"))
    return float(found) if found is not None and _number(found) else None


def _kind(value: Any) -> str | None:
    return value.get("kind") if isinstance(value, Mapping) else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0

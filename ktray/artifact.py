"""A stage before it ran, and the artifact that it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ktray.fingerprint import canonical, fingerprint

KEY_FORMAT = 2
"""What a key is made of; raised when that changes for all keys at once. 2: fixed identity names (ktray 0.2.0)."""


@dataclass(frozen=True)
class Stage:
    """One step of a pair, as plain data: it travels to any worker and hashes to its key.

    Attributes:
        name: what is done, such as ``features``; `stages.WORK` holds the function of that name.
        spec: all that determines the result beside the inputs, as JSON values; the function executes this and nothing else.
        revisions: revision numbers of the code that gives the spec its meaning.
        inputs: role -> key of the stages whose artifacts this one reads.
        starts: keys of earlier snapshots of the same training, latest first. Training is bitwise the same wherever it is cut,
            so a run begins at the first of these that it finds; they are no part of the identity.
        local: places alone, which the function needs to find files: data sets, a checkpoint, ready-made features. Not hashed.
        about: what the record tells people, such as the lineage of a student. Never read by the function, not hashed.
        varies: fields of the spec in which stages of one family differ; one run can make a whole family. Not hashed.
        computed_with: others of the family that the same run publishes; each keeps its own spec and key. Not hashed.
    """

    name: str
    spec: Mapping[str, Any]
    revisions: Mapping[str, int]
    inputs: Mapping[str, str] = field(default_factory=dict)
    starts: tuple[str, ...] = ()
    local: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    varies: tuple[str, ...] = ()
    computed_with: tuple[Stage, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """64 hex digits of everything that determines the result."""
        return fingerprint(identity_parts(self.name, self.revisions, self.spec, self.inputs))

    @cached_property
    def key(self) -> str:
        """Readable head and 12 hex digits, such as ``clusters-3f9a1c0b2d44``; also the artifact's directory name."""
        return f"{self.name}-{self.sha256[:12]}"

    @cached_property
    def family(self) -> str:
        """What stages have in common that one run can make together; empty for those that are made alone."""
        if not self.varies:
            return ""
        common = {name: value for name, value in self.spec.items() if name not in self.varies}
        return fingerprint({"stage": self.name, "revisions": self.revisions, "spec": common, "inputs": self.inputs})


def identity_parts(
    stage: str, revisions: Mapping[str, int], spec: Mapping[str, Any], inputs: Mapping[str, str]
) -> dict[str, Any]:
    """What the key of a stage is the hash of; see docs/identity.md."""
    return {"key_format": KEY_FORMAT, "stage": stage, "revisions": revisions, "spec": spec, "inputs": inputs}


def identity_text(record: Mapping[str, Any]) -> str | None:
    """The canonical JSON whose sha256 begins with the key of the artifact of this record; None for a key of an older format."""
    if outdated(record):
        return None
    return canonical(identity_parts(record["stage"], record["revisions"], record["spec"], record["inputs"]))


def outdated(record: Mapping[str, Any]) -> bool:
    """Whether an artifact was made by an earlier version, under a key that nobody asks for any more."""
    return bool(record.get("key_format") != KEY_FORMAT)


def numbered(name: str, place: int) -> str:
    """What a pair calls its stages of one name: ``clusters``, ``clusters_2``, ``clusters_3`` at places 0, 1, 2."""
    return name if place == 0 else f"{name}_{place + 1}"


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its files, its metrics and the record of how it came to be."""

    key: str
    directory: Path
    metrics: Mapping[str, float]
    record: Mapping[str, Any]

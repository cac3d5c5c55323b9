"""`Stage`, one step of a pair with its key, and `Artifact`, the finished result of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ktray.fingerprint import canonical, fingerprint

KEY_FORMAT = 2
"""Version of what a key is made of, raised when all keys change at once. 2: fixed identity names (ktray 0.2.0)."""


@dataclass(frozen=True)
class Stage:
    """One step of a pair, as plain data that can be sent to any worker. Its hash is its key.

    Attributes:
        name: what is done, such as ``features``; `stages.work_of` gives the function of that name.
        spec: everything that determines the result besides the inputs, as JSON values. The function executes this alone.
        revisions: revision numbers of the code that gives the spec its meaning.
        inputs: role -> key of an artifact that this stage reads.
        resume_from: keys of earlier snapshots of the same training, latest first. A run resumes from the first that exists. The
            result is bitwise the same wherever training was interrupted, so they are not hashed.
        local: where the function finds files on this machine: data sets, a checkpoint, precomputed features. Not hashed.
        about: what the record says for people, such as the lineage of a student. The function never reads it. Not hashed.
        varying_fields: fields of the spec in which stages of one family differ. One run can make a whole family. Not hashed.
        other_views: views of the network that this stage reads which other stages of the pair read, too; one pass may extract
            them all. Not hashed.
        computed_with: other stages of the family that the same run publishes, each with its own spec and key. Not hashed.
    """

    name: str
    spec: Mapping[str, Any]
    revisions: Mapping[str, int]
    inputs: Mapping[str, str] = field(default_factory=dict)
    resume_from: tuple[str, ...] = ()
    local: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    varying_fields: tuple[str, ...] = ()
    other_views: tuple[Mapping[str, Any], ...] = ()
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
        """Hash of what the stages share that one run can make together; empty for a stage that is made alone."""
        if not self.varying_fields:
            return ""
        common = {name: value for name, value in self.spec.items() if name not in self.varying_fields}
        return fingerprint({"stage": self.name, "revisions": self.revisions, "spec": common, "inputs": self.inputs})


def identity_parts(
    stage: str, revisions: Mapping[str, int], spec: Mapping[str, Any], inputs: Mapping[str, str]
) -> dict[str, Any]:
    """The value whose hash is the key of a stage; see docs/identity.md."""
    return {"key_format": KEY_FORMAT, "stage": stage, "revisions": revisions, "spec": spec, "inputs": inputs}


def identity_text(record: Mapping[str, Any]) -> str | None:
    """The canonical JSON whose sha256 gives the key of this record's artifact; None for a key of an older format."""
    if outdated(record):
        return None
    return canonical(identity_parts(record["stage"], record["revisions"], record["spec"], record["inputs"]))


def outdated(record: Mapping[str, Any]) -> bool:
    """Whether an earlier version made the artifact, under a key that is no longer used."""
    return bool(record.get("key_format") != KEY_FORMAT)


def kind_of(key: str) -> str:
    """The kind of stage that a key names: ``clusters`` of ``clusters-3f9a1c0b2d44``."""
    return key.rpartition("-")[0]


def numbered(name: str, index: int) -> str:
    """Name of the stage with this index among a pair's stages of one name: ``clusters``, ``clusters_2``, ``clusters_3``."""
    return name if index == 0 else f"{name}_{index + 1}"


def kind_and_index(name: str) -> tuple[str, int]:
    """What `numbered` made a name of: ``("clusters", 1)`` of ``clusters_2``."""
    kind, _, number = name.rpartition("_")
    return (kind, int(number) - 1) if number.isdigit() and kind else (name, 0)


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its files, its metrics and the record of how it came to be."""

    key: str
    directory: Path
    metrics: Mapping[str, float]
    record: Mapping[str, Any]

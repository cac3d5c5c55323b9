"""The artifacts of a store: which there are, which are damaged, and which no study of the home uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktray.artifact import Artifact
from ktray.errors import DamagedArtifact, UserError
from ktray.runs.settings import Settings
from ktray.stores import Store


@dataclass(frozen=True)
class _Verified:
    """What `verify` found.

    Attributes:
        damaged: key -> what is wrong with the artifact.
        moved_aside: those that this call has moved; other processes have moved or made anew the others meanwhile.
    """

    damaged: dict[str, str]
    moved_aside: list[str]


def size_of(artifact: Artifact) -> int:
    """Bytes of an artifact's files, by its record."""
    return sum(int(entry["size"]) for entry in artifact.record["files"].values())


def artifacts(store: Store) -> list[Artifact]:
    """All artifacts of a store."""
    return [found for found in map(store.find, store.keys()) if found]


def verify(store: Store) -> _Verified:
    """Compare every file with its record; damaged artifacts are moved aside, to be computed again.

    Searches may run meanwhile: each stage compares what it reads itself, and one whose input is moved away runs again.
    """
    damaged, moved = {}, []
    for key in list(store.keys()):
        with suppress(FileNotFoundError):  # another process has moved it
            inode = (store.root / key).stat().st_ino
            problem = store.verify(key)
            if problem:
                damaged[key] = problem
                moved += [key] if store.set_aside(DamagedArtifact(store.root / key, inode, problem)) else []
    return _Verified(damaged, moved)


def unused(settings: Settings) -> list[Artifact]:
    """Artifacts that no trial of any study of this home uses."""
    store = settings.open_store()
    needed = _needed(store, settings.home)
    return [found for found in artifacts(store) if found.key not in needed]


def remove(store: Store, keys: Iterable[str]) -> None:
    """Delete these artifacts, and what dead attempts and damaged artifacts have left.

    Raises:
        UserError: a search or a run uses the store.
    """
    with _exclusive(store, "Prune when it has ended."):
        for key in keys:
            store.remove(key)
        store.sweep()
        store.discard_damaged()


@contextmanager
def _exclusive(store: Store, instead: str) -> Iterator[None]:
    """Nothing else may use the store: artifacts of a trial in flight are not in its study yet.

    Raises:
        UserError: something does; `instead` says what to do then.
    """
    from ktray.stores.locks import try_lock_store

    lock = try_lock_store(store.url)
    if lock is None:
        raise UserError(f"a search or a run uses the store {store.url} now", instead=instead)
    try:
        yield
    finally:
        lock.release()


def _needed(store: Store, home: Path) -> set[str]:
    """Keys that trials and reference lines of all studies rest on, and every evaluation of those, which are small."""
    from ktray.pipeline import references
    from ktray.search import journal
    from ktray.search.history import keys_in_use

    used = keys_in_use(home)
    for name in journal.study_names(home):
        for line in references.read(journal.study_folder(home, name)).values():
            used |= set(artifact_keys(line["keys"]))
    needed = _with_inputs(store, used)
    evaluations = [found for found in artifacts(store) if found.record["stage"] == "evaluation"]
    return needed | {found.key for found in evaluations if set(found.record["inputs"].values()) <= needed}


def artifact_keys(keys: Mapping[str, Any]) -> list[str]:
    """All keys in a graph's ``{stage: key, "evaluation": {name: key}}``."""
    return [*(key for key in keys.values() if isinstance(key, str)), *keys.get("evaluation", {}).values()]


def _with_inputs(store: Store, keys: set[str]) -> set[str]:
    """`keys` and everything they were made from."""
    needed: set[str] = set()
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        if key in needed:
            continue
        needed.add(key)
        found = store.find(key)
        if found:
            waiting.extend(found.record["inputs"].values())
            if found.record.get("started_from"):
                waiting.append(found.record["started_from"])
    return needed

"""A search that runs elsewhere: the script that starts it there, what is sent along, and the note that is kept of it here.

Start with `RemoteSearch`. Its script may be run again after any end: it goes on with the study in the shared folder.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ktray.errors import UserError
from ktray.search.space_file import check_study_name, read_content
from ktray.text import near_word, shown
from ktray.yaml_file import read_text

SPACE_FILE, RUNTIME_FILE, SCRIPT_FILE = "space.yaml", "runtime.yaml", "start.sh"
_PATH_FIELDS = ("path", "checkpoint", "features", "names")
_KEY = re.compile(r"(teacher|student)-[0-9a-f]{12}")


@dataclass(frozen=True)
class RemoteSearch:
    """A search as it will run on a cluster.

    Attributes:
        study: the study's name.
        space: the text of the space file.
        shared: folder that all nodes of the cluster see under this path; it is the search's home there.
        runtime: the text of the runtime file; None for the defaults.
        arguments: further arguments of `ktray search`, such as ``("--trials", "50")``.
        everywhere: arguments of every verb there, such as ``("--store", "file:///mnt/store")``.
        changes: arguments that change the space, for `ktray plan`, too, such as ``("--set", "transfer.k=50")``.
        preflight: whether a few images go through every stage before a new study begins.
        packages: folders and files of plugins that are sent along.
    """

    study: str
    space: str
    shared: str
    runtime: str | None = None
    arguments: tuple[str, ...] = ()
    everywhere: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    preflight: bool = True
    packages: tuple[str, ...] = ()

    @property
    def places(self) -> tuple[str, ...]:
        """The arguments that say where things are there."""
        runtime = ("--runtime", RUNTIME_FILE) if self.runtime is not None else ()
        return ("--home", self.shared, *runtime, *self.everywhere)

    @property
    def script(self) -> str:
        """The text of the script that starts the search, or goes on with it, on a machine of the cluster."""
        plan = shlex.join(["ktray", "plan", SPACE_FILE, "--preflight", "--address", "auto", *self.changes, *self.places])
        own = ["--address", "auto", "--name", self.study, *self.changes, *self.arguments, *self.places]
        first = f"if [ ! -d {shlex.quote(f'{self.shared}/studies/{self.study}')} ]; then\n  {plan}\nfi\n"
        return (
            "#!/usr/bin/env bash\n"
            "# Begins the search, or goes on with it: it may be run again after any end.\n"
            'set -eu\ncd "$(dirname "$0")"\n'
            f"{first if self.preflight else ''}"
            f"code=0\n{shlex.join(['ktray', 'search', SPACE_FILE, *own])} || code=$?\n"
            "# 3: it is done, and some trials failed. To run it again would not mend them.\n"
            'if [ "$code" = 3 ]; then code=0; fi\nexit "$code"\n'
        )

    @property
    def files(self) -> dict[str, str]:
        """Name -> text of the files that the script needs beside it, and itself."""
        runtime = {} if self.runtime is None else {RUNTIME_FILE: self.runtime}
        return {SPACE_FILE: self.space, **runtime, SCRIPT_FILE: self.script}


def read_search(
    space: Path,
    shared: str,
    *,
    name: str | None = None,
    overrides: list[str],
    runtime: Path | None = None,
    arguments: tuple[str, ...] = (),
    everywhere: tuple[str, ...] = (),
    preflight: bool = True,
    packages: tuple[str, ...] = (),
) -> RemoteSearch:
    """The search of a space file, to be run elsewhere. The space is parsed here; its data are only there.

    Raises:
        UserError: the space or the runtime file is not valid, or something in it only holds on this machine.
    """
    from ktray.runs.spec_files import load_space
    from ktray.scheduler.resources import load_runtime_settings

    if not shared.startswith("/"):
        raise UserError(
            f"{shown(shared)} is no absolute path", "--shared", "Give the path under which all nodes see the folder."
        )
    load_runtime_settings(runtime)
    study = name or load_space(space, overrides).study_name
    try:
        check_study_name(study)
    except ValueError as error:
        raise UserError(str(error), "--name") from error
    for where, path in relative_paths(read_content(space, overrides)):
        raise UserError(
            f"{where}: {shown(path)} is a relative path, and the search runs on other machines",
            str(space),
            "Write the absolute path under which they see it.",
        )
    changes = tuple(word for override in overrides for word in ("--set", override))
    text = None if runtime is None else read_text(runtime)
    return RemoteSearch(
        study, read_text(space), shared.rstrip("/") or "/", text, arguments, everywhere, changes, preflight, packages
    )


def relative_paths(content: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, value) of what is a relative path in a space's content."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            place = f"{where}.{name}" if where else str(name)
            if name in _PATH_FIELDS and isinstance(value, str):
                if not value.startswith(("/", "~")) and not _KEY.fullmatch(value):
                    yield place, value
            else:
                yield from relative_paths(value, place)
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from relative_paths(value, f"{where}.{number}")
    elif isinstance(content, str) and (found := re.match(r"\w+:([^/~?][^?]*)", content)) and "data" in where.split("."):
        yield where, found.group(1)


# ---- the note of a search that runs elsewhere


@dataclass(frozen=True)
class LaunchNote:
    """Where a study runs, as this home remembers it.

    Attributes:
        form: ``job``, ``rayjob``, ``slurm`` or ``up``.
        shared: the search's home there.
        place: what finds it: `address` and `job` of a Ray job, `name` and `namespace` of a RayJob, `job` and `log` of a Slurm
            job, `file` of `ray up`.
        everywhere: arguments that say where the rest is there, such as the store.
    """

    study: str
    form: str
    shared: str
    place: Mapping[str, str] = field(default_factory=dict)
    everywhere: Sequence[str] = ()


def write_note(home: Path, note: LaunchNote) -> None:
    """Remember where a study runs; a later launch of the same study replaces the note."""
    path = _note(home, note.study)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(note), indent=1))
    partial.replace(path)


def read_note(home: Path, study: str) -> LaunchNote | None:
    """Where a study was launched to from this home; None if it was not."""
    try:
        return LaunchNote(**json.loads(_note(home, study).read_text()))
    except (OSError, ValueError, TypeError):  # no note, or none of this version: then it is as if it had not been launched
        return None


def require_note(home: Path, study: str) -> LaunchNote:
    """The same.

    Raises:
        UserError: this home knows of no such search.
    """
    note = read_note(home, study)
    if note is None:
        known = sorted(path.stem for path in (home / "launched").glob("*.json"))
        near = near_word(study, known)
        hint = f"Did you mean {near}?" if near else f"Launched from here: {', '.join(known) or 'none'}."
        raise UserError(f"no search {shown(study)} was launched from this home", str(home), hint)
    return note


def _note(home: Path, study: str) -> Path:
    return home / "launched" / f"{study.replace('/', '_')}.json"

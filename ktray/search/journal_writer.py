"""Writing of studies on disk: an Optuna study in a journal file, which `optuna-dashboard` can show while a search runs.

A new trial is a single line of the journal, so that a killed driver leaves no partial draw. Optuna's states are RUNNING (also
for paused trials), COMPLETE, PRUNED and FAIL (also for duplicates, so that no sampler learns from them); everything else is
stored in attributes. `journal.py` reads them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from ktray.checksums import json_text, require_line
from ktray.errors import SearchStopped, UserError
from ktray.search.journal import DRIVER_LOCK, FILE, damaged_line_error, study_folder, trial_from
from ktray.search.space import Space
from ktray.search.trial import Trial
from ktray.stores.locks import lock_owner, name_of_this_process, try_lock

_FINAL = {
    "completed": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "duplicate": TrialState.FAIL,
}


class Journal:
    """The trials and notes of one study, for the process that writes them, within `lock_and_repair_journal`."""

    def __init__(self, home: Path, name: str, space: Space) -> None:
        from ktray.search import sampler, tpe  # with scipy, which reading a study does not need

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._journal = space, _JournalFile(study_folder(home, name) / FILE)
        self._storage = JournalStorage(self._journal)
        self._distributions = tpe.optuna_distributions(space)
        self._study = optuna.create_study(
            study_name=name,
            storage=self._storage,
            sampler=RandomSampler(),
            directions=sampler.optuna_directions(space),
            load_if_exists=True,
        )

    def notes(self) -> dict[str, Any]:
        """All notes on the study as a whole, name -> JSON value."""
        return dict(self._study.user_attrs)

    def write_note(self, name: str, value: Any) -> None:
        """Writes one note, a JSON value."""
        with self._journal.synced():
            self._study.set_user_attr(name, value)

    def trials(self) -> list[Trial]:
        """All trials in the order of their numbers. Completes the saving of trials during which a driver was killed."""
        found = []
        for frozen in self._study.get_trials(deepcopy=False):
            trial = trial_from(frozen.number, frozen.params, frozen.user_attrs)
            if trial.state in _FINAL and not frozen.state.is_finished():
                self.save(trial)
            found.append(trial)
        return found

    def add(self, trial: Trial) -> None:
        """Writes a new trial as one line; its number must be the next."""
        with self._journal.synced():
            self._study.add_trial(self._to_frozen_trial(trial))

    def _to_frozen_trial(self, trial: Trial) -> FrozenTrial:
        return create_trial(
            state=_FINAL.get(trial.state, TrialState.RUNNING),
            params=dict(trial.params),
            distributions={name: self._distributions[name] for name in trial.params},
            user_attrs={
                "pair": json.dumps(trial.pair),
                "started": trial.started,
                "planned": trial.planned,
                **_attributes_of_trial(trial),
            },
        )

    def save(self, trial: Trial) -> None:
        """Writes the changes of a trial; its state comes last, so that a trial in a final state is always complete."""
        with self._journal.synced():
            self._save_unsynced(trial)

    def _save_unsynced(self, trial: Trial) -> None:
        frozen = self._stored_trial(trial.number)
        single = len(self._space.objectives) == 1
        if single:  # with several objectives Optuna allows no intermediate values
            for epoch in trial.scores.keys() - frozen.intermediate_values.keys():
                self._storage.set_trial_intermediate_value(frozen._trial_id, epoch, trial.scores[epoch])
        for name, value in _attributes_of_trial(trial).items():
            if frozen.user_attrs.get(name) != value:
                self._storage.set_trial_user_attr(frozen._trial_id, name, value)
        if trial.state in _FINAL:
            values = [trial.objectives[metric] for metric, _ in self._space.objectives] if trial.state == "completed" else None
            if trial.state == "pruned" and single:
                values = [trial.scores[trial.epoch]] if trial.scores else None
            self._storage.set_trial_state_values(frozen._trial_id, _FINAL[trial.state], values)

    def _stored_trial(self, number: int) -> FrozenTrial:
        study = self._study._study_id  # reads one trial; the public API of a study reads all of them
        return self._storage.get_trial(self._storage.get_trial_id_from_study_id_trial_number(study, number))


class _JournalFile(JournalFileBackend):
    """Optuna's journal file, made safe against a full disk and synced to the disk once per change of a trial.

    Optuna syncs each of the about ten lines per trial, which takes 50 ms. Here every line is written at once, but only `synced`
    waits for the disk: only a crash of the machine can lose lines, the last ones first.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file_lock = path, JournalFileSymlinkLock(str(path))
        super().__init__(str(path), self._file_lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Appends all lines or none: a partial line would make the next one unreadable, too.

        Raises:
            SearchStopped: the disk is full.
        """
        lines = "".join(f"{json_text(log)}\n" for log in logs).encode()
        try:
            self._file_lock.acquire()  # creates a symbolic link, which fails on a full disk, too
        except OSError as error:
            raise _translate_disk_full(error, self._path) from error
        try:
            with open(self._path, "ab", buffering=0) as file:
                size = file.tell()
                try:
                    if file.write(lines) != len(lines):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                except OSError as error:
                    file.truncate(size)
                    raise _translate_disk_full(error, self._path) from error
        finally:
            self._file_lock.release()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """The lines from this number on; a damaged last line may be half written and is left out.

        Raises:
            UserError: a line is damaged.
        """
        number, damaged = log_number_from, False
        try:
            for number, log in enumerate(super().read_logs(log_number_from), log_number_from + 1):
                if damaged:
                    raise damaged_line_error(self._path, number - 1)
                try:
                    require_line(log)
                except ValueError:
                    damaged = True
                    continue
                yield log
        except ValueError as error:  # not even JSON, and other lines follow
            raise damaged_line_error(self._path, number + 1) from error

    @contextlib.contextmanager
    def synced(self) -> Iterator[None]:
        """A context that waits at its end until everything written so far is on the disk."""
        yield
        try:
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise _translate_disk_full(error, self._path) from error


def _translate_disk_full(error: OSError, path: Path) -> Exception:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return SearchStopped(f"the disk is full: {path} cannot be written") if full else error


def _attributes_of_trial(trial: Trial) -> dict[str, Any]:
    found: dict[str, Any] = {"keys": dict(trial.keys)} if trial.keys else {}
    found |= {"cost": dict(trial.cost)} if trial.cost else {}
    found |= (
        {"charges": {part: dict(stages) for part, stages in trial.attributed_costs.items()}} if trial.attributed_costs else {}
    )
    if trial.state == "completed":
        found |= {"metrics": dict(trial.metrics), "objectives": dict(trial.objectives)}
    if trial.state in _FINAL:
        found |= {"ended": trial.ended, "cause": trial.cause, "duplicate_of": trial.duplicate_of}
    scores = {str(epoch): score for epoch, score in trial.scores.items()}
    return {**found, "progress": {"state": trial.state, "epoch": trial.epoch, "scores": scores, "teacher": trial.teacher_score}}


@contextlib.contextmanager
def lock_and_repair_journal(home: Path, name: str) -> Iterator[None]:
    """Within it only this process drives a study; its journal, which a killed driver may have left damaged, is repaired first.

    Raises:
        UserError: another process drives the study.
    """
    directory = study_folder(home, name)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / DRIVER_LOCK
    lock = try_lock(path, name_of_this_process())
    if lock is None:
        raise UserError(
            f"the study {name!r} is being searched by {lock_owner(path) or 'another process'}",
            instead="Wait for it, stop it, or give this search another --name.",
        )
    with lock:
        _remove_interrupted_write(directory / FILE)
        yield


def _remove_interrupted_write(journal: Path) -> None:
    # A driver killed while it writes leaves Optuna's lock file, for which the next one would wait 30 s, and perhaps a partial
    # line. Optuna ignores a partial last line, but fails once the next line is appended to it.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{journal}.lock")
    if not journal.exists():
        return
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    last = whole[whole[:-1].rfind(b"\n") + 1 :]
    try:
        if last:
            require_line(json.loads(last))
    except (ValueError, AttributeError):
        whole = whole[: len(whole) - len(last)]
    if len(whole) < len(content):
        os.truncate(journal, len(whole))

"""Send a study that has been searched to another tracking server: its trials, stages, references and summary."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ktray import __version__
from ktray.errors import UserError
from ktray.fingerprint import fingerprint
from ktray.pipeline import pair_metrics, references
from ktray.report.stage_reuse import with_inputs
from ktray.runs.best_trials import results_on_test
from ktray.runs.settings import Settings
from ktray.runs.study_logger import TrialLogger, log_stage
from ktray.runs.uncertainty import level_with_best
from ktray.search import ranking
from ktray.search.history import driver_of_study, read_study
from ktray.search.journal import study_folder
from ktray.search.trial import Trial, keys_in
from ktray.stores import Store
from ktray.tracking import Tracker, Unwritten
from ktray.tracking.connection import validated_uri
from ktray.tracking.spool import Spool

LONGEST = 24 * 3600.0  # seconds for the server to take everything; Ctrl-C ends it before


@dataclass(frozen=True)
class Sent:
    """What was sent: trials and stages, and what the tracker has not got."""

    trials: int
    stages: int
    missing: Unwritten


class _Clock:
    """The time of what is logged: that of the search, not of the sending."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def sync(study: str, uri: str, settings: Settings, share_images: bool = False, longest: float = LONGEST) -> Sent:
    """Send a study to a tracker; sending it again changes nothing there, and adds what is new.

    Args:
        uri: of the tracker.
        share_images: send contact sheets of the images to a server, too.
        longest: seconds for it to take everything. What it has not got then waits, and the same call goes on.

    Raises:
        UserError: there is no such study, it is being searched, or no tracker has this URI.
    """
    history, folder, store = read_study(settings.home, study), study_folder(settings.home, study), settings.open_store()
    driver = driver_of_study(settings.home, study)
    if driver is not None:
        raise UserError(f"the study {study!r} is being searched", str(settings.home), "Wait until it has ended, or stop it.")
    spool, clock = _spool_of(folder, validated_uri(uri)), _Clock()
    clock.now = min((trial.started for trial in history.trials if trial.started is not None), default=0.0)
    tags = {"ktray.version": __version__}
    tracker = Tracker(uri, settings.home, study, share_images=share_images, version_tags=tags, spool=spool, clock=clock)
    logger = TrialLogger(tracker, history.space)
    tracker.start()
    logger.describe_study()
    for trial in history.trials:
        _log_trial(logger, trial, store, clock)
    lines = references.read(folder)
    keys = {key for trial in history.trials for key in trial.artifact_keys}
    keys |= {key for line in lines.values() for key in keys_in(line.get("keys", {}))}
    stages = with_inputs(sorted(keys), store.find)
    for artifact in stages.values():
        log_stage(tracker, artifact)
    best = ranking.ranked(history.trials, history.objectives)[:5]
    level = level_with_best(best, history.objectives[0][0], store)
    logger.log_summary(history.trials, lines, level, results_on_test(folder))
    tracker.close("FINISHED", longest)
    return Sent(len(history.trials), len(stages), tracker.unwritten())


def _spool_of(folder: Path, uri: str) -> Path:
    """A spool for this tracker alone, under the same identity of the study; that of the searches if they write to it, too."""
    if Spool(folder / "tracking").load_position().tracker == fingerprint(uri):
        return folder / "tracking"
    spool, known = folder / f"tracking-{fingerprint(uri)[:12]}", folder / "tracking" / "study_id"
    spool.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):  # never searched with a tracker
        (spool / "study_id").write_text(known.read_text())
    return spool


def _log_trial(logger: TrialLogger, trial: Trial, store: Store, clock: _Clock) -> None:
    """One trial with its curve and its scores, at the times that it had."""
    clock.now = trial.started if trial.started is not None else clock.now
    if trial.state == "duplicate" or not trial.keys:
        logger.log_unrun_draw(trial)
        return
    logger.begin_trial(trial, trial.keys)
    student = store.find(trial.keys["student"]) if "student" in trial.keys else None
    logger.tracker.log_curve(trial.number, pair_metrics.prefixed_curve(student, "student") if student is not None else [])
    logger.log_scores(trial)
    clock.now = trial.ended if trial.ended is not None else clock.now
    if trial.state == "completed":
        logger.complete_trial(trial, trial.keys, trial.metrics, trial.epoch)
    else:
        logger.end_trial(trial, trial.keys, {})

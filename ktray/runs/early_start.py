"""A Ray that starts while the command that needs it still imports torch and checks its input.

Only for a program of our own, which ends with the command, and a Ray of our own: see `ktray.cli.run_program`. Images are
decoded as soon as torch is imported, while the networks of a space are still tried. If the space is refused, this Ray is ended;
what it has put into the home (its lock, token and log, decoded images) stays there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktray.artifact import kind_of
from ktray.errors import UserError
from ktray.runs.interruption import Interruption, run_until_ended
from ktray.runs.settings import Settings
from ktray.stores.locks import FileLock, lock_home
from ktray.yaml_file import read_yaml

MIN_CPUS = 4

if TYPE_CHECKING:
    from ktray.artifact import Stage
    from ktray.runs.profile import Profile
    from ktray.scheduler.client import SchedulerClient
    from ktray.scheduler.ray_session import RaySession


class EarlyStart:
    """Ray, checked by `preflight`, with its scheduler, whose workers start at once; all of it in a thread of its own.

    The thread lives until `end`, because the processes of our own Ray end with the thread that started them.

    Args:
        lock: the home's.
        profile: collects what happens.
    """

    def __init__(self, settings: Settings, interruption: Interruption, lock: FileLock, profile: Profile | None = None) -> None:
        self._settings, self._interruption, self._lock, self._profile = settings, interruption, lock, profile
        self._session: RaySession | None = None
        self._client: SchedulerClient | None = None
        self._error: BaseException | None = None
        self._finished, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="early-start", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._start()
        except BaseException as error:  # noqa: BLE001 - raised by `result`, in the thread that waits for it
            self._error = error
        self._finished.set()
        self._over.wait()

    def _start(self) -> None:
        from ktray.runs.preflight import connect_after_preflight
        from ktray.scheduler import ray_session, resources

        runtime = resources.load_runtime_settings(self._settings.runtime)
        self._session = session = ray_session.open_session(
            self._settings.home, None, runtime, self._interruption.lose, ends_process=True, lock=self._lock
        )
        ray_session.start_ray(session)
        if self._profile is not None:
            self._profile.mark("Ray started")
        self._client = connect_after_preflight(session, self._settings.open_store(), self._profile)
        if self._profile is not None:
            self._profile.mark("scheduler answers")

    def result(self) -> tuple[RaySession, SchedulerClient]:
        """Wait until it has started.

        Raises:
            UserError, PreflightFailed: it does not start.
            KeyboardInterrupt: a stop was requested.
            SearchStopped: Ray has ended.
        """

        def wait() -> tuple[RaySession, SchedulerClient]:
            self._finished.wait()
            if self._error is not None:
                raise self._error
            assert self._session is not None, "there is neither an error nor a session"
            assert self._client is not None, "there is neither an error nor a scheduler"
            return self._session, self._client

        return run_until_ended(wait, self._interruption, grace=0.0)  # `end` ends it

    def compute_ahead(self, stages: Callable[[], Sequence[Stage]]) -> None:
        """Compute these stages before any trial asks for them, after those that trials wait for; their errors come up there.

        Args:
            stages: called now.
        """
        wanted = stages()

        def prefetch() -> None:
            self._finished.wait()
            if self._client is not None and wanted:
                with suppress(Exception):  # Ray may end meanwhile; the search itself reports why
                    self._client.prefetch(wanted)

        threading.Thread(target=prefetch, name="compute-ahead", daemon=True).start()

    def end(self) -> None:
        """End Ray, even one that is just starting; further calls do nothing."""
        from ktray.scheduler import ray_session

        if self._over.is_set():
            return
        self._over.set()
        session = self._session
        if session is None:
            self._lock.release()
            return
        if self._finished.is_set() and not session.started:
            return  # it could not start, and has cleaned up
        if not self._finished.is_set():
            session.called_off = True  # what it starts from now on ends with this process
            session.on_stop.clear()  # nothing answers any more
        ray_session.stop(session)


@contextmanager
def early_start(
    settings: Settings, interruption: Interruption, is_wanted: bool, profile: Profile | None = None
) -> Iterator[EarlyStart | None]:
    """Within it, Ray starts; it ends with it at the latest. None where it is not wanted, or another process uses this home.

    Nor does it start early on fewer than `MIN_CPUS`: there, imports and Ray only delay each other.
    """
    early = None
    if is_wanted and interruption.ends_process and len(os.sched_getaffinity(0)) >= MIN_CPUS:
        with suppress(UserError):  # whoever needs Ray tries again, and says what is wrong
            early = EarlyStart(settings, interruption, lock_home(settings.home), profile)
    try:
        yield early
    finally:
        if early is not None:
            early.end()


def surely_computes(space: Path, overrides: Sequence[str], name: str | None, trials: str | None, settings: Settings) -> bool:
    """Whether a search of this space will have to compute something, as far as can be told at once.

    It will if its study is new and the store has fewer evaluations than the study wants trials, because each trial is judged by
    at least one. A study that is there already may be complete.

    Args:
        space: its file; not checked yet.
        overrides: of its fields, such as ``["budget.trials=12"]``.
        name, trials: as in `SearchOptions`.
    """
    if not space.is_file():
        return False
    try:
        fields = read_yaml(space)
    except (UserError, OSError):
        return False
    changed = dict(each.split("=", 1) for each in overrides if "=" in each)
    study = name or changed.get("study") or _text(fields, "study")
    wanted = trials or changed.get("budget.trials") or _text(fields, "budget", "trials")
    if not study or (settings.home / "studies" / study).exists():
        return False
    made = Path(settings.store_url.removeprefix("file://")).is_dir()  # to open a store would make it
    keys = list(settings.open_store().keys()) if made else []
    evaluations = sum(kind_of(key) == "evaluation" for key in keys)
    return evaluations < (int(wanted) if wanted.isdecimal() else 1)


def _text(fields: Any, *path: str) -> str:
    """A field of a file that may be anything; empty where there is no such text or number."""
    for name in path:
        fields = fields.get(name) if isinstance(fields, Mapping) else None
    return str(fields) if isinstance(fields, str | int) else ""

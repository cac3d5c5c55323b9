"""Which tracker, and how to reach it: URIs, the once-only creation of the database, the experiment of a study."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ktray.errors import UserError

# No retries and short waits inside MLflow: our spool retries without holding anyone up, and urllib3 would warn at each of
# its own. MLflow's telemetry would call out, and its "View run at" lines go to stdout, which is data.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True)
class Connection:
    """An open tracker: the client, the study's experiment, and whether its artifacts stay on this machine."""

    client: Any
    experiment: str
    local: bool


def default_uri(home: Path) -> str:
    """``MLFLOW_TRACKING_URI`` if it is set, else the sqlite database of `home`."""
    return checked(os.environ.get("MLFLOW_TRACKING_URI") or _sqlite_uri(home.absolute() / "mlflow.db"))


def checked(uri: str) -> str:
    """`uri` with an absolute path if it is a sqlite one: a relative path means another file in another directory.

    Raises:
        UserError: a file store, which MLflow no longer serves and which could not be written twice without duplicates.
    """
    if path := sqlite_path(uri):
        return _sqlite_uri(path)
    if urlsplit(uri).scheme in ("", "file"):
        raise UserError(
            f"{uri!r} is an MLflow file store, which cannot be replayed safely and which MLflow itself gave up",
            "--tracking or MLFLOW_TRACKING_URI",
            "Use sqlite:////absolute/mlflow.db or the URL of a server; `mlflow migrate-filestore` moves old runs.",
        )
    return uri


def sqlite_path(uri: str) -> Path | None:
    """The database file of a sqlite URI, None for every other tracker."""
    return Path(unquote(uri.removeprefix("sqlite:///"))).absolute() if uri.startswith("sqlite:///") else None


@contextmanager
def environment() -> Iterator[None]:
    """MLflow's settings while we write; what the user has set stays."""
    added = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def connect(uri: str, home: Path, study: str, tags: Mapping[str, str]) -> Connection:
    """Opens the tracker, creating a sqlite database and the experiment `study` if they are missing.

    Slow (importing MLflow takes more than a second, a fresh database several); raises whatever MLflow raises.
    """
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback per busy database; we say it once
    path = sqlite_path(uri)
    with _creation_lock(path) if path else nullcontext():
        if path and not path.exists():
            _create(path)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        experiment = _experiment(client, study, tags, (home / "mlartifacts" / study).absolute().as_uri() if path else None)
    return Connection(client, experiment.experiment_id, path is not None and _is_local(experiment.artifact_location))


def _experiment(client: Any, study: str, tags: Mapping[str, str], artifacts: str | None) -> Any:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(study)
    if experiment is None:
        try:
            client.create_experiment(study, artifact_location=artifacts, tags=dict(tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another search of the same server was a moment earlier
                raise
        experiment = client.get_experiment_by_name(study)
    if experiment.lifecycle_stage == "deleted":  # a study that is searched again is wanted again
        client.restore_experiment(experiment.experiment_id)
    return experiment


@contextmanager
def _creation_lock(database: Path) -> Iterator[None]:
    """Two processes that create one database at once both fail, so the first creates and the others wait."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(database.with_name(f"{database.name}.lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _create(database: Path) -> None:
    """Let MLflow make its tables under another name: a full disk or a kill half-way would leave a database that never opens."""
    from mlflow.tracking import MlflowClient

    partial = database.with_name(f".{database.name}.partial")
    partial.unlink(missing_ok=True)
    MlflowClient(tracking_uri=_sqlite_uri(partial), registry_uri=_sqlite_uri(partial))
    partial.replace(database)


def _is_local(artifacts: str) -> bool:
    return urlsplit(artifacts).scheme in ("", "file")


def _sqlite_uri(path: Path) -> str:
    return f"sqlite:///{str(path).replace('%', '%25').replace('?', '%3F')}"

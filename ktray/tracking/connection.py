"""Opening a tracker: its URI, the creation of a sqlite database, the experiment of a study."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ktray.errors import UserError
from ktray.stores.locks import wait_for_lock
from ktray.tracking.artifact_locations import FOLDER, follow_home

# No retries and short timeouts inside MLflow: the spool retries without blocking anyone, and urllib3 warns at each retry of its
# own. MLflow's telemetry sends data out, and its "View run at" lines go to stdout, which is for results.
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True)
class Connection:
    """An open tracker.

    Attributes:
        client: an `MlflowClient`.
        experiment: id of the study's experiment.
        local: whether its artifacts stay on this machine.
    """

    client: Any
    experiment: str
    local: bool


def default_uri(home: Path) -> str:
    """Return ``MLFLOW_TRACKING_URI`` if it is set, else the sqlite database in `home`."""
    return validated_uri(os.environ.get("MLFLOW_TRACKING_URI") or _sqlite_uri(home.absolute() / "mlflow.db"))


def validated_uri(uri: str) -> str:
    """Return `uri`, with an absolute path if it is a sqlite one: a relative path would depend on the current directory.

    Raises:
        UserError: it is a file store, which MLflow no longer supports and where writing twice makes duplicates.
    """
    if path := sqlite_path(uri):
        return _sqlite_uri(path)
    if urlsplit(uri).scheme in ("", "file"):
        raise UserError(
            f"{uri!r} is an MLflow file store, which MLflow no longer supports and where writing twice makes duplicates",
            "--tracking or MLFLOW_TRACKING_URI",
            "Use sqlite:////absolute/mlflow.db or the URL of a server; `mlflow migrate-filestore` moves old runs.",
        )
    return uri


def sqlite_path(uri: str) -> Path | None:
    """Return the database file of a sqlite URI; None for any other tracker."""
    return Path(unquote(uri.removeprefix("sqlite:///"))).absolute() if uri.startswith("sqlite:///") else None


@contextmanager
def mlflow_environment() -> Iterator[None]:
    """Apply `MLFLOW_SETTINGS` for a while, except where the user has set something else."""
    added = {name: value for name, value in MLFLOW_SETTINGS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def connect(uri: str, home: Path, study: str, tags: Mapping[str, str]) -> Connection:
    """Open the tracker. Create the sqlite database and the experiment `study` if they are missing.

    Slow: importing MLflow takes more than a second, creating a database several. Raises whatever MLflow raises.

    Args:
        tags: of a new experiment.
    """
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it logs a traceback whenever the database is busy
    path = sqlite_path(uri)
    # Two processes must not create the database at the same time: MLflow would fail in both.
    with wait_for_lock(path.with_name(f"{path.name}.lock")) if path else nullcontext():
        if path and not path.exists():
            _create(path)
        if path:
            follow_home(path, home, study)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        experiment = _experiment(client, study, tags, (home / FOLDER / study).absolute().as_uri() if path else None)
    return Connection(client, experiment.experiment_id, path is not None and _is_local(experiment.artifact_location))


def _experiment(client: Any, study: str, tags: Mapping[str, str], artifacts: str | None) -> Any:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(study)
    if experiment is None:
        try:
            client.create_experiment(study, artifact_location=artifacts, tags=dict(tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another search created it a moment ago
                raise
        experiment = client.get_experiment_by_name(study)
    if experiment.lifecycle_stage == "deleted":  # searching a study again restores it
        client.restore_experiment(experiment.experiment_id)
    return experiment


def _create(database: Path) -> None:
    """Let MLflow create its tables in a file of another name: a half-created database would never open again."""
    from mlflow.tracking import MlflowClient

    partial = database.with_name(f".{database.name}.partial")
    partial.unlink(missing_ok=True)
    MlflowClient(tracking_uri=_sqlite_uri(partial), registry_uri=_sqlite_uri(partial))
    partial.replace(database)


def _is_local(artifacts: str) -> bool:
    return urlsplit(artifacts).scheme in ("", "file")


def _sqlite_uri(path: Path) -> str:
    return f"sqlite:///{str(path).replace('%', '%25').replace('?', '%3F')}"

"""Opening a tracker: its URI, the creation of a sqlite database, the experiment of a study."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ktray.errors import UserError
from ktray.redaction import without_secrets
from ktray.stores.locks import wait_for_lock
from ktray.tracking.artifact_locations import FOLDER, follow_home, open_read_only

# No retries and short timeouts inside MLflow: the spool retries without blocking anyone, and urllib3 warns at each retry of its
# own. MLflow's telemetry sends data out, and its "View run at" lines go to stdout, which is for results.
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


_DATABASES = ("postgresql", "mysql", "mssql")  # MLflow's, besides sqlite
_HOST_AND_PORT = re.compile(r"(?:[^\s/@]*@)?(?:[\w.-]+|\[[0-9a-fA-F:]+\]):\d+(?:/\S*)?")
_SQLITE = "Use sqlite:////absolute/mlflow.db or the URL of a server."
_MOVE = "Move it away: a new one is made, and `ktray sync STUDY TRACKER` writes a study into it again."


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
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return validated_uri(given) if given else _sqlite_uri(home.absolute() / "mlflow.db")


def validated_uri(uri: str) -> str:
    """Return `uri`, with an absolute path if it is a sqlite one: a relative path would depend on the current directory.

    Raises:
        UserError: no tracker that ktray can use has this URI.
    """
    scheme = urlsplit(uri).scheme if _is_split(uri) else ""
    if uri.lower().startswith("sqlite"):
        problem, instead = _problem_with_sqlite(uri), _SQLITE
        if not problem:
            problem, instead = _damage_of(sqlite_path(uri)), _MOVE
    elif uri.lower().startswith("databricks"):
        problem, instead = "is Databricks, where a study cannot name an experiment: it demands a path of the workspace", _SQLITE
    elif scheme in ("http", "https"):
        problem, instead = _problem_with_server(uri), "Write it as http://HOST:PORT."
    elif scheme.partition("+")[0] in _DATABASES:
        problem, instead = (
            _problem_with_database(uri),
            "Write the scheme with its driver, as in postgresql+psycopg2, and install that package.",
        )
    elif _HOST_AND_PORT.fullmatch(uri):
        problem, instead = "lacks its scheme", f"Write http://{without_secrets(uri)}, or https."
    elif scheme == "file" or ("://" not in uri and "@" not in uri):
        problem = "is an MLflow file store, which MLflow no longer supports and where writing twice makes duplicates"
        instead = f"{_SQLITE} `mlflow migrate-filestore` moves old runs."
    else:
        known = {entry.name for entry in entry_points(group="mlflow.tracking_store")}  # of MLflow plugins
        problem, instead = "" if scheme in known else "is no tracker that MLflow knows", _SQLITE
    if problem:
        raise UserError(f"{without_secrets(repr(uri))} {problem}", "--tracking or MLFLOW_TRACKING_URI", instead)
    path = sqlite_path(uri)
    return _sqlite_uri(path) if path else uri


def _is_split(uri: str) -> bool:
    try:
        urlsplit(uri)
    except ValueError:  # half a bracket, such as http://[::1
        return False
    return True


def _problem_with_sqlite(uri: str) -> str:
    path = sqlite_path(uri)
    try:
        if path is None or "\0" in uri or uri.removeprefix("sqlite:///").strip() in ("", ":memory:"):
            return "names no file in the form that ktray reads"
        if path.is_dir():
            return "is a folder"
        if not path.parent.is_dir():
            return f"is in the folder {path.parent}, which does not exist"
        if path.exists() and not path.is_file():
            return "is no file"
        with open(path, "rb") if path.exists() else nullcontext() as file:
            return "" if file is None or file.read(16) in (b"", b"SQLite format 3\0") else "is no sqlite database"
    except (OSError, ValueError) as error:  # no permission, a name too long, a null byte
        return f"cannot be opened: {getattr(error, 'strerror', None) or error}"


def _damage_of(database: Path | None) -> str:
    """What sqlite says of a file that it cannot read; empty if it can, or if the file is absent, empty or locked."""
    if database is None or not database.exists():
        return ""
    try:
        with open(database, "rb") as file:
            versions = file.read(20)[18:]  # of the format: 1 and 2 are known
        with closing(open_read_only(database)) as opened:
            opened.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:  # locked, or no permission for the files beside it
        return ""
    except (OSError, sqlite3.DatabaseError) as error:
        return f"is damaged: {error}"
    return "is damaged: its header names an unknown version of the format" if set(versions) - {1, 2} else ""


def _problem_with_server(uri: str) -> str:
    try:
        parts = urlsplit(uri)
        port = parts.port
    except ValueError as error:
        return f"is no URL: {str(error).partition(':')[0]}"
    if not parts.hostname or any(char.isspace() for char in uri):
        return "names no host" if not parts.hostname else "has a space in it"
    return "has the port 0" if port == 0 else ""


def _problem_with_database(uri: str) -> str:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except ImportError as error:
        return f"needs the package {error.name}, which is not installed"
    except (SQLAlchemyError, ValueError) as error:
        return f"is no URL of a database: {type(error).__name__}"
    return ""


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

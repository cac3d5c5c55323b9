"""Where artifacts of a sqlite tracker lie: MLflow stores absolute locations, which here follow a home that was moved."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

FOLDER = "mlartifacts"
_LOCATIONS = (  # tables and columns of MLflow's database that hold locations below that of an experiment
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
    ("model_versions", "source"),
)


def open_read_only(database: Path, timeout: float = 5.0) -> sqlite3.Connection:
    """Open a sqlite database that must exist and that nobody changes through this connection."""
    return sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True, timeout=timeout)


def follow_home(database: Path, home: Path, study: str = "") -> None:
    """Replace locations in another home by those in this one, where this home has the files or nobody has them.

    An experiment belongs to this home if it is that of `study`, if its artifacts lie here, or if its old home is gone. Any
    other is left to its own home: several may use one database.

    Args:
        database: of the tracker.
        home: the home whose folder ``mlartifacts`` has the artifacts.
        study: the study that is searched in this home.

    Raises:
        sqlite3.Error: the database cannot be read or written.
    """
    with closing(sqlite3.connect(database, timeout=20)) as tables, tables:
        experiments = tables.execute("SELECT experiment_id, name, artifact_location FROM experiments").fetchall()
        for experiment, name, location in experiments:
            old = _path(location)
            if old is None or old.parent.name != FOLDER:
                continue
            new = (home / FOLDER / old.name).absolute()
            if old == new or (old.exists() and new.exists() and old.samefile(new)):
                continue
            if name != study and not new.exists() and old.parent.exists():
                continue
            for table, column, row, moved in _moved(tables, old, new):
                tables.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (moved.as_uri(), row))
            tables.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (new.as_uri(), experiment))


def _moved(tables: sqlite3.Connection, old: Path, new: Path) -> Iterator[tuple[str, str, int, Path]]:
    """Table, column, row and new path of everything that is no longer below `old`."""
    prefix = f"{old.as_uri()}/"
    for table, column in _LOCATIONS:
        if column not in {name for _, name, *_ in tables.execute(f"PRAGMA table_info({table})")}:
            continue  # of another version of MLflow
        query = f"SELECT rowid, {column} FROM {table} WHERE substr({column}, 1, ?) = ?"
        for row, location in tables.execute(query, (len(prefix), prefix)).fetchall():
            relative = unquote(location.removeprefix(prefix))
            if (new / relative).exists() or not (old / relative).exists():
                yield table, column, row, new / relative


def _path(location: str) -> Path | None:
    """The path of a ``file:`` location; None for any other."""
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") and parts.path.startswith("/") else None

"""Where data lies, and which image files lie there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ktray import plugins
from ktray.errors import UserError
from ktray.spec import DataSpec

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def data_folder(path: str | None) -> Path:
    """`path` as an absolute path; null means the folder in the environment variable KTRAY_DATA, or `./data`."""
    return Path(path or os.environ.get("KTRAY_DATA") or "data").expanduser().absolute()


def with_absolute_path(spec: DataSpec) -> DataSpec:
    """The data spec with its `path` made absolute, so that it means the same in a worker with another working directory."""
    if "path" not in plugins.module_of("dataset", spec).LOCATION:
        return spec
    return spec.model_copy(update={"path": str(data_folder(getattr(spec, "path", None)))})


def location_fields(spec: DataSpec) -> dict[str, Any]:
    """The fields of a data spec that say where it lies and nothing of what it is, its path made absolute."""
    found = with_absolute_path(spec)
    return {field: getattr(found, field) for field in plugins.module_of("dataset", spec).LOCATION}


def _scanned(folder: str) -> Any:
    try:
        return os.scandir(folder)
    except OSError as error:  # left out without a word, its images would be missed by nobody
        raise UserError(f"the folder {folder} cannot be read: {error.strerror}", "data.path", "Change its rights.") from error


def list_images(root: Path) -> tuple[tuple[str, Path], ...]:
    """(relative name, path) of every image file below `root` at any depth, sorted by name.

    By suffix, in any case; hidden files and folders are left out, links are followed and a folder is entered once.

    Raises:
        UserError: `root` is not a folder, or a folder in it cannot be read.
    """
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}", where="data.path", instead="Give the folder of the images, such as folder:/photos."
        )
    found: dict[str, Path] = {}
    entered = set()
    waiting = [(str(root), "")]
    while waiting:
        folder, above = waiting.pop()
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in entered:
            continue
        entered.add((state.st_dev, state.st_ino))
        with _scanned(folder) as entries:
            # Sorted, so that of two links to one folder the same one is entered everywhere.
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append((entry.path, f"{above}{entry.name}/"))
                elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                    # A file name may hold bytes that are no UTF-8, and those cannot be written into JSON.
                    name = os.fsencode(above + entry.name).decode("utf-8", "backslashreplace")
                    found[name] = Path(entry.path)
    return tuple(sorted(found.items()))

"""The files of a data set: their location, the list of its images, and their download.

Files are fetched only for specs with `download: true`; ktray fetches data nowhere else.
"""

from __future__ import annotations

import os
import socket
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
    """The data spec with an absolute `path`, valid in workers with another working directory."""
    if "path" not in plugins.module_of("dataset", spec).LOCATION:
        return spec
    return spec.model_copy(update={"path": str(data_folder(getattr(spec, "path", None)))})


def location_fields(spec: DataSpec) -> dict[str, Any]:
    """The fields of a data spec that give only the location of the data, with an absolute path."""
    found = with_absolute_path(spec)
    return {field: getattr(found, field) for field in plugins.module_of("dataset", spec).LOCATION}


def _scandir(folder: str) -> Any:
    try:
        return os.scandir(folder)
    except OSError as error:  # skipping it silently would hide missing images
        raise UserError(
            f"the folder {folder} cannot be read: {error.strerror}", "data.path", "Change its permissions."
        ) from error


def list_images(root: Path) -> tuple[tuple[str, Path], ...]:
    """(relative name, path) of every image file below `root` at any depth, sorted by name.

    By suffix, ignoring case. Hidden files and folders are skipped, links are followed, and each folder is visited once.

    Raises:
        UserError: `root` is not a folder, or a folder below it cannot be read.
    """
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}", where="data.path", instead="Give the folder of the images, such as folder:/photos."
        )
    found: dict[str, Path] = {}
    visited = set()
    pending = [(str(root), "")]
    while pending:
        folder, parent = pending.pop()
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in visited:
            continue
        visited.add((state.st_dev, state.st_ino))
        with _scandir(folder) as entries:
            # Sorted, so that of two links to a folder the same one is followed on every machine.
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append((entry.path, f"{parent}{entry.name}/"))
                elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                    # File names may contain bytes that are not UTF-8 and cannot be written to JSON.
                    name = os.fsencode(parent + entry.name).decode("utf-8", "backslashreplace")
                    found[name] = Path(entry.path)
    return tuple(sorted(found.items()))


_TIMEOUT_S = 30.0  # torchvision sets none, and without a network a connection may hang forever


def download(name: str, root: Path) -> None:
    """Fetch the data set `name` (a class of `torchvision.datasets`) into `root` with torchvision, which verifies checksums.

    Raises:
        UserError: no network, a server that refuses or does not answer, or a wrong checksum.
    """
    import torchvision

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)
    try:
        getattr(torchvision.datasets, name)(str(root), download=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(
            f"torchvision could not fetch {name}: {error}",
            where="data.download",
            instead=f"Fetch it on a machine with a network and copy torchvision's files to {root}.",
        ) from error
    finally:
        socket.setdefaulttimeout(before)

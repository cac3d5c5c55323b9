"""The location of a data set, and its download.

Files are fetched only for specs with `download: true`; ktray fetches data nowhere else.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from ktray import plugins
from ktray.errors import UserError
from ktray.local_path import local_path
from ktray.spec import DataSpec


def data_folder(path: str | None) -> Path:
    """`path` as an absolute path; null means the folder in the environment variable KTRAY_DATA, or `./data`.

    Raises:
        UserError: it is a URL, or begins with ``~`` and there is no such home folder.
    """
    return local_path(path or os.environ.get("KTRAY_DATA") or "data", "data.path" if path else "KTRAY_DATA").absolute()


def with_absolute_path(spec: DataSpec) -> DataSpec:
    """The data spec with an absolute `path`, valid in workers with another working directory."""
    if "path" not in plugins.module_of("dataset", spec).LOCATION:
        return spec
    return spec.model_copy(update={"path": str(data_folder(getattr(spec, "path", None)))})


def location_fields(spec: DataSpec) -> dict[str, Any]:
    """The fields of a data spec that give only the location of the data, with an absolute path."""
    found = with_absolute_path(spec)
    return {field: getattr(found, field) for field in plugins.module_of("dataset", spec).LOCATION}


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

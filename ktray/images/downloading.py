"""Download of data sets, only for specs with `download: true`; ktray fetches data nowhere else."""

from __future__ import annotations

import socket
from pathlib import Path

from ktray.errors import UserError

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

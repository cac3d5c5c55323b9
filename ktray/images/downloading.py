"""The only way that ktray fetches a data set, and only where a spec says `download: true`."""

from __future__ import annotations

import socket
from pathlib import Path

from ktray.errors import UserError

_SILENCE_S = 30.0  # torchvision sets no timeout of its own, and a machine without a way out may never be told so


def download(name: str, root: Path) -> None:
    """Let torchvision fetch the data set `name` (a class of `torchvision.datasets`) into `root`; checksums are torchvision's.

    Raises:
        UserError: no network, a refused or silent server, a wrong checksum.
    """
    import torchvision

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE_S)
    try:
        getattr(torchvision.datasets, name)(str(root), download=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(
            f"torchvision could not fetch {name}: {error}",
            where="data.download",
            instead=f"Fetch it on a machine with a network and lay torchvision's files into {root}.",
        ) from error
    finally:
        socket.setdefaulttimeout(before)

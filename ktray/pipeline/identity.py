"""Identity of what lies outside: data sets and checkpoint files, by their content."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from ktray import checkpoint, images
from ktray.fingerprint import canonical, file_sha256
from ktray.spec import Spec


def data_identity(cache: Path | None = None) -> Callable[[Spec], str]:
    """A function data spec -> sha256 of its content; every data set is read once, file hashes are kept under `cache`."""
    known: dict[str, str] = {}

    def identity(spec: Spec) -> str:
        name = canonical(spec.model_dump())
        if name not in known:
            known[name] = images.identity(spec, cache)
        return known[name]

    return identity


def checkpoint_sha256(path: str) -> str:
    """sha256 of the weights in a checkpoint: a file, or the folder of an exported student or of a snapshot.

    Raises:
        UserError: there is no such file or folder.
    """
    file = checkpoint.weights_file(Path(path)).absolute()
    found = file.stat()
    return _sha256_as_of(file, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256_as_of(file: Path, size: int, mtime_ns: int) -> str:
    """A search asks for the same gigabytes once per trial; another size or time of change makes it read them again."""
    return file_sha256(file)

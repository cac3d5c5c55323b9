"""Environment of a scheduler's processes, and its hash: drivers with the same code and environment share a scheduler."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import ktray
from ktray.fingerprint import fingerprint


def environment() -> dict[str, str]:
    """Environment of the processes of a scheduler: where this package is, which plugins are allowed, one thread per library."""
    outside = [entry or os.getcwd() for entry in sys.path if not entry.startswith((sys.prefix, sys.base_prefix))]
    parent = str(Path(ktray.__file__).parent.parent)
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = dict.fromkeys(os.path.abspath(folder) for folder in [parent, *outside, *given] if folder)
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    plugins = {name: value for name, value in os.environ.items() if name == "KTRAY_ALLOW_PLUGINS"}
    return {"PYTHONPATH": os.pathsep.join(folders), **dict.fromkeys(threads, "1"), **plugins}


def plugin_paths() -> list[str]:
    """Folder or file of each allowed plugin package that is installed here, to be shipped to the nodes of a cluster."""
    found = []
    for name in filter(None, os.environ.get("KTRAY_ALLOW_PLUGINS", "").split(",")):
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            found += list(spec.submodule_search_locations)[:1]
        elif spec is not None and spec.origin:
            found.append(spec.origin)
    return found


def environment_hash() -> str:
    """Hash of the code and environment that this driver's workers would have, whatever the order of folders and plugins."""
    given = environment()
    lists = {"PYTHONPATH": os.pathsep, "KTRAY_ALLOW_PLUGINS": ","}
    entries = {name: sorted(filter(None, value.split(lists.get(name)))) for name, value in given.items()}
    return fingerprint([entries, _source_hash(("ktray", *entries.get("KTRAY_ALLOW_PLUGINS", ())))])


@cache
def _source_hash(packages: tuple[str, ...]) -> str:
    """Hash of these packages as they are when the driver first asks: drivers of two versions never share a broker."""
    digest = hashlib.sha256()
    for package in packages:
        for name, path in _sources(package):
            digest.update(f"{package}/{name}".encode() + path.read_bytes())
    return digest.hexdigest()


def _sources(package: str) -> Iterator[tuple[str, Path]]:
    """Relative name and path of a package's Python files, found without importing it."""
    spec = find_spec(package)
    if spec is None:
        return
    if spec.submodule_search_locations is None:
        yield "", Path(str(spec.origin))
    for folder in map(Path, spec.submodule_search_locations or ()):
        yield from ((str(path.relative_to(folder)), path) for path in sorted(folder.rglob("*.py")))

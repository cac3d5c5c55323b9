"""Content hashes of a pair's external inputs: data sets, checkpoints and precomputed features."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ktray import images, plugins
from ktray.errors import UserError
from ktray.features import precomputed
from ktray.fingerprint import FileVersion, canonical, file_sha256, file_version, version_is_reliable
from ktray.local_path import local_path
from ktray.spec import Columns, DataSpec, EvaluationSpec, PrecomputedTeacher
from ktray.training import pretrained
from ktray.training.checkpoint_file import open_checkpoint


def data_identity(cache: Path | None = None) -> Callable[[DataSpec], str]:
    """A function data spec -> sha256 of its content. Each data set is read once; hashes of files are kept in `cache`."""
    known: dict[str, str] = {}

    def identity(spec: DataSpec) -> str:
        name = canonical(spec.model_dump())
        if name not in known:
            known[name] = images.identity(spec, cache)
        return known[name]

    return identity


def origin(spec: DataSpec) -> tuple[str, str]:
    """What specs of the same images have in common: kind and location, or all but size and split where there is no location."""
    location = set(plugins.module_of("dataset", spec).LOCATION) - {"download"}
    plain = images.with_absolute_path(spec).model_dump()
    return spec.kind, canonical({n: v for n, v in plain.items() if (n in location if location else n not in ("size", "split"))})


def checkpoint_sha256(path: str) -> str:
    """sha256 of the weights in a checkpoint: a file, or the folder of an exported student or of a snapshot.

    Raises:
        UserError: there is no such file or folder, or it is no checkpoint, which is seen without reading all of it.
    """
    return weights_sha256(pretrained.weights_file(pretrained.checkpoint_path(path)))


def weights_sha256(file: Path) -> str:
    """sha256 of a file with weights.

    Raises:
        UserError: it is no checkpoint, which is seen without reading all of it.
    """
    return _sha256(file, file.stat(), open_checkpoint)


def features_identity(teacher: PrecomputedTeacher) -> dict[str, Any]:
    """Identity of precomputed features: sha256 of the file, sha256 of the names or null, and the columns or null.

    Raises:
        UserError: there is no such file, or it is of another kind, which is seen without reading all of it.
    """
    found = {field: (path, path.stat()) for field, path in precomputed.feature_files(teacher).items()}
    checks = {"features": precomputed.check_header, "names": precomputed.check_names_header}
    hashes = {field: _sha256(path, state, checks[field]) for field, (path, state) in found.items()}
    columns = (teacher.columns or Columns()).model_dump() if teacher.features.endswith(".parquet") else None
    return {"file": hashes["features"], "names": hashes.get("names"), "columns": columns}


def evaluation_files(evaluation: EvaluationSpec) -> dict[str, tuple[str, str]]:
    """Field -> sha256 and absolute path of each file that an evaluation reads: its fields in `FILES` that hold a path.

    Raises:
        UserError: there is no such file.
    """
    found = {}
    for field in getattr(plugins.module_of("evaluation", evaluation), "FILES", ()):
        given = getattr(evaluation, field)
        if given is None or not Path(given).suffix:  # a word, such as selective_search
            continue
        path = local_path(given, f"evals.{field}").absolute()
        if not path.is_file():
            raise UserError(f"there is no file {given}", f"evals.{field}", "Give an existing one.")
        found[field] = (_sha256(path, path.stat(), Path.stat), str(path))
    return found


def _sha256(file: Path, found: os.stat_result, check: Callable[[Path], object]) -> str:
    """sha256 of a file, after a check of its header: hashing one that claims terabytes would take days."""
    version = file_version(found)
    if version_is_reliable(version):
        return _sha256_as_of(file, version, check)
    check(file)
    return file_sha256(file)


@lru_cache(maxsize=256)
def _sha256_as_of(file: Path, version: FileVersion, check: Callable[[Path], object]) -> str:
    """Cached, because every trial of a search asks for the same files; in another version, a file is read again."""
    check(file)
    return file_sha256(file)

"""Proposals: regions of an image in which an object may be, from a file, or from selective search by OpenCV.

A file is one of these; each image must be in it, and boxes are in pixels of the whole image:

- .npz: an array (R, 4) [x0, y0, x1, y1] per image, x1 and y1 exclusive, under the image's name (``000012``, ``000012.jpg`` or
  its whole path in the data set).
- .json: the same as lists, in one mapping.
- .mat: `boxes` and `images`, cells as in the files of Girshick's Fast R-CNN: [y1, x1, y2, x2] counted from 1, the last
  included.

Source: Uijlings, van de Sande, Gevers and Smeulders, "Selective Search for Object Recognition" (2013); OpenCV's
`ximgproc.segmentation`, in the fast mode that Fast R-CNN uses. It draws from the C library's generator to order its regions, so
all are taken and sorted.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import progress
from ktray.errors import UserError
from ktray.file_kind import LARGE, require_readable, what_it_is
from ktray.fingerprint import seed_of
from ktray.local_path import local_path
from ktray.text import shown

IDENTITY, REVISION = "proposals", 1

SELECTIVE_SEARCH = "selective_search"
SUFFIXES = (".npz", ".json", ".mat")
SHORTER_SIDE = 200  # pixels to which an image is scaled for selective search, as OpenCV's own example does
LEAST_SIDE = 8  # pixels below which a region is no proposal, about half a cell of the maps
_MOST_OF_A_BYTE = 100  # bytes of arrays that a byte of a compressed file can stand for; boxes take one half of theirs
_READ_IN_PLAN = 64 << 20  # bytes of the largest .json that a plan reads, in a second
_SEE = "See ktray/fine_tuning/proposals.py for the forms of such a file."
_FORMS = {".npz": "arrays of NumPy in a zip file", ".json": "mapping in JSON", ".mat": "file of MATLAB"}
_MATLAB_HDF5 = b"MATLAB 7.3 MAT-file"


def check_proposals(given: str) -> None:
    """Raise unless `given` is "selective_search", and can run, or a file of a known kind.

    Raises:
        UserError: there is no such file, it is of another kind, or OpenCV's contributed modules are not installed.
    """
    if given == SELECTIVE_SEARCH:
        _segmentation()
        return
    path = local_path(given, "proposals")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"proposals are {SELECTIVE_SEARCH} or a file {', '.join(SUFFIXES)}, and this is {given!r}", "proposals")
    if not path.is_file():
        raise UserError(f"there is no file of proposals {given!r}", "proposals", f"Or write {SELECTIVE_SEARCH}.")
    _require_form(path)


def _require_form(path: Path) -> None:
    """Check by a file's first bytes that it is of the form that its suffix says; a whole one may have gigabytes.

    Raises:
        UserError: it is of another form.
    """
    require_readable(path, "proposals")
    with open(path, "rb") as file:
        head = file.read(4096)
    suffix, text = path.suffix.lower(), head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if suffix == ".mat" and head.startswith(_MATLAB_HDF5):
        raise UserError(f"{path.name} was written with -v7.3", "proposals", "Save it with -v7.")
    found, instead = what_it_is(path)
    if head.startswith(b"PK") if suffix == ".npz" else text.startswith(b"{") if suffix == ".json" else not found:
        return
    problem = f"the proposals in {path.name} are no {_FORMS[suffix]}{': the file ' * bool(found)}{found}"
    raise UserError(problem, "proposals", _SEE if not instead or found.startswith("is a text") else instead)


def from_file(path: Path, names: Sequence[str]) -> list[NDArray[np.float64]]:
    """The proposals (R, 4) of each image, in the order of `names`.

    Raises:
        UserError: the file is of another form, an image is not in it, or two names of it mean the same image.
    """
    known = _read(path)
    keys = _keys(path, known.keys(), names)
    found = [_checked(known[key], f"{path.name}, image {name}") for key, name in zip(keys, names, strict=True)]
    if sum(map(len, found)) > 1 and all((boxes <= 1).all() for boxes in found):
        raise UserError(
            f"all proposals in {path.name} lie within the first pixel, as boxes in shares of the sides do",
            "proposals",
            "Write them in pixels of the whole image.",
        )
    return found


def require_images(given: str, names: Sequence[str]) -> None:
    """Raise if a file has no proposals for an image. Only the names in it are read; those of a large .json are not.

    Args:
        given: as for `check_proposals`.

    Raises:
        UserError: the file is of another form, an image is not in it, or two names of it mean the same image.
    """
    if given == SELECTIVE_SEARCH:
        return
    path = local_path(given, "proposals")
    if path.suffix.lower() == ".json" and path.stat().st_size > _READ_IN_PLAN:
        return
    _keys(path, _read(path, only_names=True).keys(), names)


def _keys(path: Path, known: Set[str], names: Sequence[str]) -> list[str]:
    """The name of each image in the file, which has the names `known`."""
    stems = [PurePosixPath(name).stem for name in names]
    if len(set(stems)) < len(stems) and not set(names) <= known:
        raise UserError("several images have the same name in different folders", "proposals", "Give whole paths in the file.")
    found = []
    for name, stem in zip(names, stems, strict=True):
        key = next((key for key in (name, PurePosixPath(name).name, stem) if key in known), None)
        if key is None:
            raise UserError(f"{path.name} has no proposals for the image {name}", "proposals", "Give them for every image.")
        found.append(key)
    return found


def _read(path: Path, only_names: bool = False) -> Mapping[str, Any]:
    """Name of an image -> its boxes, not checked, and with `only_names` not always read.

    Raises:
        UserError: the file is of another form.
    """
    _require_form(path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            return _json(path)
        return _npz(path, only_names) if suffix == ".npz" else _mat(path, only_names)
    except Exception as error:  # NumPy, SciPy and zip each have errors of their own for a damaged file
        why = f"it has no {error}" if isinstance(error, KeyError) else (str(error).splitlines() or ["it is damaged"])[0]
        raise UserError(f"the proposals in {path.name} cannot be read: {why}", "proposals", _SEE) from error


def _checked(rows: Any, where: str) -> NDArray[np.float64]:
    try:
        stated = np.asarray(rows)
    except ValueError:  # lists of different lengths
        stated = np.full((1, 4), np.nan)
    boxes = stated.reshape(-1, 4) if not stated.size else stated
    if stated.size and stated.dtype.kind not in "fiu":
        raise UserError(f"{where}: its proposals are not numbers", "proposals", "Expected are rows [x0, y0, x1, y1].")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise UserError(
            f"{where}: its proposals have the shape {boxes.shape}", "proposals", "Expected are rows [x0, y0, x1, y1]."
        )
    if not np.isfinite(boxes).all() or (boxes[:, 2:] <= boxes[:, :2]).any():
        raise UserError(f"{where}: a proposal is no box [x0, y0, x1, y1] with x0 < x1 and y0 < y1", "proposals")
    return boxes.astype(np.float64)


def _npz(path: Path, only_names: bool) -> Mapping[str, Any]:
    with zipfile.ZipFile(path) as archive:
        claimed, held = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
        if only_names:
            return dict.fromkeys(name.removesuffix(".npy") for name in archive.namelist())
    if claimed > max(LARGE, _MOST_OF_A_BYTE * held):
        raise ValueError(f"its arrays claim {claimed:,} bytes in a file of {held:,}")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON; one that has a name twice is refused, of which Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in names if names.count(name) > 1))} is there twice")
    return found


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8: byte {error.start}") from error
    if not isinstance(found, dict):
        raise ValueError("it is no mapping from names of images to boxes")
    return found


def _mat(path: Path, only_names: bool) -> Mapping[str, Any]:
    from scipy.io import loadmat

    content = loadmat(path, variable_names=["images"] if only_names else ["images", "boxes"])
    names = [str(np.ravel(entry)[0]) for entry in np.ravel(content["images"])]
    if only_names:
        return dict.fromkeys(names)
    boxes = np.ravel(content["boxes"])
    if len(names) != len(boxes):
        raise ValueError(f"it has {len(names)} images and boxes of {len(boxes)}")
    return {name: _exclusive(rows, name) for name, rows in zip(names, boxes, strict=True)}


def _exclusive(rows: Any, name: str) -> NDArray[np.float64]:
    """[x0, y0, x1, y1] with x1 and y1 exclusive, from [y1, x1, y2, x2] counted from 1."""
    found = np.asarray(rows, np.float64)
    if found.size and (found.ndim != 2 or found.shape[1] != 4):
        raise ValueError(f"its boxes of {name} have the shape {found.shape} instead of (R, 4)")
    moved: NDArray[np.float64] = found.reshape(-1, 4)[:, [1, 0, 3, 2]] - np.array([1, 1, 0, 0])
    return moved


def _segmentation() -> Any:
    try:
        import cv2

        return cv2.ximgproc.segmentation
    except (ImportError, AttributeError) as error:
        raise UserError(
            "selective search needs OpenCV with its contributed modules",
            "proposals",
            "Install them: pip install 'ktray[detection]', or give a file of proposals.",
        ) from error


def selective_search(pixels: NDArray[np.uint8], most: int) -> NDArray[np.float64]:
    """Proposals (R, 4) of an image (h, w, 3), at most `most`; the same for the same pixels.

    Raises:
        UserError: OpenCV's contributed modules are not installed.
    """
    import cv2

    segmentation = _segmentation()
    height, width = pixels.shape[:2]
    scale = min(1.0, SHORTER_SIDE / min(height, width)) if min(height, width) > SHORTER_SIDE else 1.0
    small: NDArray[Any] = pixels
    if scale < 1:
        small = cv2.resize(pixels, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    search = segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(small[:, :, ::-1]))  # OpenCV's order of channels
    search.switchToSelectiveSearchFast()
    corners = np.asarray(search.process(), np.float64).reshape(-1, 4)  # x, y, width, height
    boxes = np.hstack([corners[:, :2], corners[:, :2] + corners[:, 2:]]) / scale
    boxes = np.minimum(boxes, np.array([width, height, width, height], np.float64))
    large = (boxes[:, 2:] - boxes[:, :2] >= LEAST_SIDE).all(1)
    boxes = np.unique(boxes[large], axis=0)
    if len(boxes) > most:
        chosen = np.random.default_rng(seed_of("proposals", len(boxes))).permutation(len(boxes))[:most]
        boxes = boxes[np.sort(chosen)]
    whole = np.array([[0.0, 0.0, width, height]])
    return boxes if len(boxes) else whole


def proposals_of(
    given: str, names: Sequence[str], read: Callable[[int], NDArray[np.uint8]], most: int
) -> list[NDArray[np.float64]]:
    """The proposals of each image: from the file `given`, or by selective search.

    Args:
        read: index -> pixels (h, w, 3).
        most: per image, for selective search.
    """
    if given != SELECTIVE_SEARCH:
        return from_file(Path(given), names)
    found = []
    for index in range(len(names)):
        found.append(selective_search(read(index), most))
        progress.advance("proposals")
    return found

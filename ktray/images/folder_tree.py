"""The image files below a folder, in the order of torchvision's ImageFolder; which folders are splits; what was left out."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from ktray.errors import UserError
from ktray.images.image_formats import image_format
from ktray.images.split_words import SPLITS, split_words, splits_of
from ktray.text import counted, first_few

WHERE = "data.path"
ORDER = "by class folder, then by folder, then by file name, as torchvision's ImageFolder"

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo"),
    *(".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
_UNREAD = frozenset(
    (
        *(
            ".heic",
            ".heif",
            ".heics",
            ".hif",
            ".avif",
            ".avifs",
            ".jxl",
            ".jp2",
            ".j2k",
            ".j2c",
            ".jpc",
            ".jpf",
            ".jpx",
            ".jpm",
        ),
        *(
            ".jxr",
            ".wdp",
            ".hdp",
            ".psd",
            ".psb",
            ".xcf",
            ".svg",
            ".svgz",
            ".eps",
            ".ai",
            ".ico",
            ".icns",
            ".cur",
            ".tga",
            ".pcx",
        ),
        *(".dds", ".exr", ".hdr", ".pfm", ".pam", ".qoi", ".sgi", ".ras", ".xbm", ".xpm", ".fits", ".fit", ".fts", ".dcm"),
        *(".dicom", ".nii", ".nrrd", ".mha", ".mhd", ".czi", ".lsm", ".nd2", ".svs", ".ndpi", ".mrxs", ".scn", ".dng", ".cr2"),
        *(".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw", ".x3f", ".raw", ".jps"),
    )
)
"""Suffixes of images that ktray does not read."""

_NO_DATA = frozenset(("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__"))
_MOST_REPEATED = 300_000  # entries of folders that are reached again through links
_MOST_OTHERS = 300_000  # entries that are not images, if they outnumber the images by far
_OTHERS_PER_IMAGE = 20
_LOOKED_INTO = 200  # files of each unknown suffix whose first bytes are read

_NOWHERE = "links that lead nowhere"


class ImageFile(NamedTuple):
    """An image file below a root.

    Attributes:
        name: path relative to the root, with `/`; bytes that are not UTF-8 are escaped, because they cannot be written to JSON.
        folders: names of the folders from the root to the file, as the operating system gives them.
        path: of the file.
        inode: device and number of the file, through links.
    """

    name: str
    folders: tuple[str, ...]
    path: Path
    inode: tuple[int, int]


@dataclass
class Folder:
    """A folder, and what lies directly in it.

    Attributes:
        files: its images.
        left_out: what it has besides, by suffix or as a phrase -> number.
        unread: how many of these are images.
        subfolders: name -> folder.
        images: number of images at any depth.
    """

    files: list[ImageFile] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    unread: int = 0
    subfolders: dict[str, Folder] = field(default_factory=dict)
    images: int = 0

    def with_images(self) -> dict[str, Folder]:
        """The folders directly below that hold images at any depth, by name."""
        return {name: folder for name, folder in sorted(self.subfolders.items()) if folder.images}

    def all_folders(self) -> Iterator[Folder]:
        """This folder and all below; without recursion, because folders may be nested a thousand deep."""
        pending = [self]
        while pending:
            folder = pending.pop()
            yield folder
            pending.extend(folder.subfolders.values())

    def at(self, folders: Sequence[str]) -> Folder:
        """The folder at this path below."""
        found = self
        for name in folders:
            found = found.subfolders[name]
        return found

    def all_left_out(self) -> dict[str, int]:
        """What was left out at any depth, the most frequent first."""
        total: Counter[str] = Counter()
        for folder in self.all_folders():
            total.update(folder.left_out)
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    def all_unread(self) -> int:
        """How many images were left out at any depth."""
        return sum(folder.unread for folder in self.all_folders())


def shown(name: str) -> str:
    """A name from the operating system as text that can be printed and written to JSON."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_tree(root: Path) -> Folder:
    """All image files below `root`, by suffix in any case, and what else there is.

    Hidden files and folders are left out. Links are followed, but not to a folder above; a folder that is reached twice counts
    twice, as in torchvision.

    Raises:
        UserError: `root` is not a folder, a folder below cannot be read, links lead to the same folders without end, or nearly
            nothing below is an image.
    """
    if not root.is_dir():
        what = "is a link that leads nowhere" if root.is_symlink() else "is a file" if root.is_file() else ""
        problem = f"{root} {what}, not a folder" if what else f"there is no folder {root}"
        raise UserError(problem, where=WHERE, instead="Give the folder of the images, such as folder:/photos.")
    top, seen, repeated, others = Folder(), set[tuple[int, int]](), 0, 0
    looked_into: Counter[str] = Counter()
    pending: list[tuple[str, tuple[str, ...], tuple[Folder, ...], tuple[tuple[int, int], ...]]] = [(str(root), (), (top,), ())]
    while pending:
        place, folders, chain, above = pending.pop()
        folder = chain[-1]
        with _reading(place):
            state = os.stat(place)
            inode = (state.st_dev, state.st_ino)
            if inode in above:
                chain[-2].left_out["links to a folder above"] += 1
                del chain[-2].subfolders[folders[-1]]
                continue
            entries = os.scandir(place)
        below, before, count = [], len(folder.files), 0
        with entries, _reading(place):
            for entry in entries:
                count += 1
                if (kind := _kind(entry, looked_into)) == _FOLDER:
                    below.append(entry.name)
                elif kind == _IMAGE:
                    folder.files.append(_image(entry, folders, state.st_dev))
                else:
                    folder.left_out[kind] += 1
                    folder.unread += kind.endswith(_ARE_IMAGES)
                    others += 1
        for each in chain:
            each.images += len(folder.files) - before
        repeated += count + 1 if inode in seen else 0
        seen.add(inode)
        _refuse_endless(root, place, repeated, others, top.images)
        for name in sorted(below, reverse=True):
            folder.subfolders[name] = Folder()
            pending.append((os.path.join(place, name), (*folders, name), (*chain, folder.subfolders[name]), (*above, inode)))
    return top


_FOLDER, _IMAGE, _ARE_IMAGES = "folder", "image", "images that ktray does not read)"


def _kind(entry: os.DirEntry[str], looked_into: Counter[str]) -> str:
    """What an entry is: a folder, an image, or why it is left out."""
    if entry.name.startswith("."):
        return "hidden"
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()
    except OSError:  # a link to itself, or to a place that may not be read
        return _NOWHERE
    if is_folder:
        return f"folder {entry.name}" if entry.name.lower() in _NO_DATA else _FOLDER
    if not is_file:
        return _NOWHERE if entry.is_symlink() else "neither files nor folders"
    if entry.name.lower().endswith(SUFFIXES):
        return _IMAGE
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix and not (suffix[1:].isalnum() and suffix.isascii() and len(suffix) <= 10 and not suffix[1:].isdigit()):
        what = "with another suffix"
    else:
        what = suffix or "without a suffix"
    if suffix in _UNREAD or _looks_like_an_image(entry, what, looked_into):
        return f"{what} ({_ARE_IMAGES}"
    return what


def _looks_like_an_image(entry: os.DirEntry[str], what: str, looked_into: Counter[str]) -> bool:
    """Whether the first bytes are those of an image; only the first files of each suffix are opened."""
    looked_into[what] += 1
    if looked_into[what] > _LOOKED_INTO or len(looked_into) > _LOOKED_INTO:
        return False
    try:
        if not entry.stat().st_size:
            return False
        file = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK)  # some files of /proc would block
        try:
            return image_format(os.read(file, 512)) is not None
        finally:
            os.close(file)
    except OSError:
        return False


def _image(entry: os.DirEntry[str], folders: tuple[str, ...], device: int) -> ImageFile:
    inode = (device, entry.inode())
    if entry.is_symlink():
        state = entry.stat()
        inode = (state.st_dev, state.st_ino)
    return ImageFile(shown("/".join((*folders, entry.name))), folders, Path(entry.path), inode)


@contextmanager
def _reading(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # skipping it silently would hide missing images
        raise UserError(
            f"the folder {shown(folder)} cannot be read: {error.strerror}", WHERE, "Change its permissions, or move it away."
        ) from error


def _refuse_endless(root: Path, place: str, repeated: int, others: int, images: int) -> None:
    if repeated > _MOST_REPEATED:
        raise UserError(
            f"links below {root} lead to the same folders again and again, such as {shown(place)}",
            WHERE,
            "Remove the links, or give the folder of the images themselves.",
        )
    if others > _MOST_OTHERS and others > _OTHERS_PER_IMAGE * images:
        raise UserError(
            f"of the first {others + images} files below {root}, only {images} are images",
            WHERE,
            "Give the folder of the images themselves.",
        )


def in_order(folder: Folder, depth: int) -> list[ImageFile]:
    """The images at any depth of a folder that lies `depth` folders below the root, in the order of torchvision's ImageFolder.

    By class folder; then by folder, as the text of its path; then by name. Images outside every class folder come first.
    """

    def order(file: ImageFile) -> tuple[tuple[str, ...], str, str]:
        below = file.folders[depth:]
        return below[:1], "/".join(below), file.path.name

    files = sorted((file for each in folder.all_folders() for file in each.files), key=order)
    names = Counter(file.name for file in files)
    if len(names) < len(files):
        raise UserError(f"two files have the name {max(names, key=names.__getitem__)!r} in UTF-8", WHERE, "Rename one of them.")
    return files


def split_folders(tree: Folder, root: Path, labelled: bool) -> dict[str, tuple[str, ...]]:
    """Split -> the folder below `root` with its images; the folder itself, as ``train``, if none is named like a split.

    Args:
        labelled: whether folders may be classes.

    Raises:
        UserError: folders named like splits lie beside others, two have the same split, or none is for training.
    """
    start: tuple[str, ...] = ()
    if not labelled:  # folders around all others say nothing
        while len(only := tree.at(start).with_images()) == 1 and not tree.at(start).files and not split_words(next(iter(only))):
            start += (next(iter(only)),)
    top = tree.at(start)
    found = top.with_images()
    splits = {name: split for name, split in splits_of(list(found)).items() if split}
    if not splits:
        _refuse_hidden_words(list(found), root.joinpath(*start))
        return {"train": ()}
    others = [name for name in found if name not in splits]
    place = root.joinpath(*start)
    if others or top.files:
        if _are_meant(splits, found, labelled):
            beside = (
                f"{_named(others)} beside them {'is' if len(others) == 1 else 'are'} not"
                if others
                else "there are images beside them"
            )
            raise UserError(
                f"in {shown(str(place))}, {_named(list(splits))} {'is' if len(splits) == 1 else 'are'} named like "
                f"{'a split' if len(splits) == 1 else 'splits'}, and {beside}",
                WHERE,
                "If they are splits, move everything else away; if not, put all into one folder named 'train'.",
            )
        return {"train": ()}
    by_split = {split: [name for name, each in splits.items() if each == split] for split in SPLITS}
    for split, names in by_split.items():
        if len(names) > 1:
            raise UserError(
                f"{shown(str(place))} has several folders that are named like the split {split!r}: {_named(names)}",
                WHERE,
                "Leave one of them; if they are not splits, put them into one folder named 'train'.",
            )
    if not by_split["train"]:
        raise UserError(
            f"all folders of {shown(str(place))} are named like splits, and none is for training: {_named(list(splits))}",
            WHERE,
            "Name the folder of the training images 'train', or give the folder with the images of one split.",
        )
    return {split: _innermost(top, (*start, names[0]), tree) for split, names in by_split.items() if names}


def _refuse_hidden_words(names: Sequence[str], place: Path) -> None:
    """Refuse folders that all have words of splits inside longer words, as `mytrain` and `mytest`."""
    for_training = [name for name in names if "train" in name.lower()]
    others = [name for name in names if re.search("test|val", name.lower()) and name not in for_training]
    if for_training and others and len(for_training) + len(others) == len(names):
        raise UserError(
            f"the folders {_named([*for_training, *others])} in {shown(str(place))} may be splits, or classes",
            WHERE,
            "For splits, set the words train, val and test apart, as in my-train; put classes into one folder named 'train'.",
        )


def _innermost(top: Folder, folders: tuple[str, ...], tree: Folder) -> tuple[str, ...]:
    """The folder itself, or the one of the same split that is all it has: `seg_train/seg_train`."""
    while not tree.at(folders).files and len(only := tree.at(folders).with_images()) == 1:
        name = next(iter(only))
        if not split_words(name) or split_words(name) != split_words(folders[-1]):
            break
        folders = (*folders, name)
    return folders


def _are_meant(splits: Mapping[str, str], found: Mapping[str, Folder], labelled: bool) -> bool:
    """Whether folders named like splits, beside others, can be meant as splits: `test`, but not `test_bench`."""
    alone = [name for name in splits if len(re.findall(r"[^\W\d_]+", name)) == 1]
    several = "train" in splits.values() and len(set(splits.values())) > 1
    hold_folders = not any(found[name].files for name in splits)
    if labelled:
        return bool(alone) or (several and hold_folders)
    return several and (len(alone) == len(splits) or hold_folders)


def refuse_splits_below(folder: Folder, place: Path) -> None:
    """Refuse folders that hold splits: `cat/train` and `cat/test`.

    Raises:
        UserError: the message has the first such folder.
    """
    for name, each in folder.with_images().items():
        found = each.with_images()
        splits = {below: split for below, split in splits_of(list(found)).items() if split}
        several = "train" in splits.values() and len(set(splits.values())) > 1
        if several or (splits and len(splits) == len(found) and not each.files and set(splits.values()) != {"train"}):
            raise UserError(
                f"{shown(str(place / name))} holds folders that are named like splits: {_named(list(splits))}",
                WHERE,
                "Put the splits outermost, such as train/CLASS and test/CLASS, or give the folder that holds the splits.",
            )


def nested_classes(folder: Folder) -> tuple[str, ...]:
    """The folders around the class folders: ``("photos",)``, if all images are in its folders `cat` and `dog`; else empty."""
    around: tuple[str, ...] = ()
    while len(found := folder.at(around).with_images()) == 1 and not folder.at(around).files:
        around += (next(iter(found)),)
    return around if len(found) > 1 and not folder.at(around).files else ()


def _named(names: Sequence[str], most: int = 5) -> str:
    """``'a', 'b' and 3 more``."""
    return first_few((repr(shown(name)) for name in names), most)


def warnings_about(tree: Folder, splits: Mapping[str, Sequence[ImageFile]]) -> list[str]:
    """Sentences about images that were left out, and about files that are in several splits or twice in one."""
    found = []
    left_out, unread = tree.all_left_out(), tree.all_unread()
    if unread:
        kinds = ", ".join(
            f"{what.partition(' (')[0]} {count}" for what, count in left_out.items() if what.endswith(_ARE_IMAGES)
        )
        found.append(
            f"{unread} of {unread + tree.images} images are left out, because ktray does not read their format: {kinds}"
        )
    if left_out.get(_NOWHERE):
        found.append(f"{counted(left_out[_NOWHERE], 'link')} to nowhere")
    inodes = {split: {file.inode for file in files} for split, files in splits.items()}
    for split, files in splits.items():
        if len(inodes[split]) < len(files):
            found.append(f"{counted(len(files) - len(inodes[split]), 'image')} of {split} twice in it, through links")
    for first, second in combinations(splits, 2):
        both = len(inodes[first] & inodes[second])
        if both:
            found.append(f"{counted(both, 'image')} both in {first} and in {second}, through links")
    return found


def paths(files: Sequence[ImageFile]) -> Callable[[int], Path]:
    """A function index -> path."""
    return lambda index: files[index].path


def read_from(tree: Folder, folders: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, int]]:
    """Split -> {folder: number of its images}. Without folders of splits, the outermost folders."""
    if folders != {"train": ()}:
        return {split: {shown("/".join(each)) + "/": tree.at(each).images} for split, each in folders.items()}
    direct = {"the folder itself": len(tree.files)} if tree.files else {}
    return {"train": {**direct, **{shown(name) + "/": folder.images for name, folder in tree.with_images().items()}}}


def but_others(folder: Folder) -> str:
    """``; it has .heic (images that ktray does not read) 12, .txt 1``, for an error; empty if it has nothing."""
    found = [f"{what} {count}" for what, count in folder.all_left_out().items()]
    return f"; it has {', '.join(found[:5])}{' and more' * (len(found) > 5)}" if found else ""

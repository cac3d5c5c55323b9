"""Composes a data set in VOC's layout from labelled images: objects on other backgrounds, with boxes, masks and lists.

It stands in for PASCAL VOC where that is not at hand: for tests, demonstrations and experiments of known difficulty. An image
shows 1 to 4 objects, each a labelled image with soft edges, on a blurred image with noise, among pieces of shuffled images that
belong to no class. Where the border of an image is of one colour, as the black of Fashion-MNIST, an object has its own outline.
Later objects cover earlier ones in part, some are cut off by the edge (`truncated`), some are small, faint and blurred
(`difficult`). Image i depends on the seed and i alone. Test images are made of the data set's test images.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.ndimage import binary_fill_holes

from ktray import plugins, progress
from ktray.errors import UserError
from ktray.fingerprint import seed_of
from ktray.images import VOID, Source, split_rows, with_absolute_path
from ktray.spec import DataSpec
from ktray.text import MAX_SHOWN, cut

YEAR = "2007"
_LISTS = {"train": 0.25, "val": 0.25, "test": 0.5}  # shares of VOC 2007's lists
_MOST_OBJECTS, _MOST_DISTRACTORS = 4, 3
_LEAST_SIDE, _MOST_SIDE = 48, 4096
_MOST_IMAGES = 999_999
_LONGEST_FILE_NAME = 255  # bytes
_DIFFICULT = 0.12  # share of objects
_EDGE = 0.5  # an object is where it covers at least this much of a pixel
_LEAST_VISIBLE = 0.5  # share of an object's pixels that later ones leave, and that lie in the image
_FLAT, _MOSTLY = 16.0, 0.6  # a border is of one colour if this share of it differs by at most this much, of 255

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class _Cutout:
    """An object to paste: colours (s, s, 3) in [0, 255] and how much of each pixel it covers (s, s) in [0, 1]."""

    colours: Pixels
    cover: Pixels


@dataclass(frozen=True)
class _Object:
    """An object of a scene: its class, where it is visible (h, w), and whether it is difficult or truncated."""

    label: int
    visible: NDArray[np.bool_]
    difficult: bool
    truncated: bool

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """xmin, ymin, xmax and ymax as VOC writes them: from 1, both ends included."""
        rows, columns = np.flatnonzero(self.visible.any(axis=1)), np.flatnonzero(self.visible.any(axis=0))
        return int(columns[0]) + 1, int(rows[0]) + 1, int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True)
class _Scene:
    """An image (h, w, 3) uint8 with its objects."""

    pixels: NDArray[np.uint8]
    objects: tuple[_Object, ...]


@dataclass(frozen=True)
class _Material:
    """Labelled images of one split to compose scenes of."""

    source: Source
    rows: NDArray[np.int64]

    def draw(self, generator: np.random.Generator) -> tuple[NDArray[np.uint8], int]:
        """An image of a class, all classes equally likely, and the class."""
        label = int(generator.choice(list(self._rows_of)))
        return self.source.read(int(generator.choice(self._rows_of[label]))), label

    @cached_property
    def _rows_of(self) -> dict[int, NDArray[np.int64]]:
        """Class -> its rows, of those that have any; an image takes some thirty draws."""
        assert self.source.labels is not None
        labels = self.source.labels[self.rows]
        return {int(label): self.rows[labels == label] for label in np.unique(labels)}


def compose(
    spec: DataSpec, out: Path, images: int = 2000, size: int = 160, seed: int = 0, coco: bool = False
) -> dict[str, Any]:
    """Write `out`/VOCdevkit/VOC2007, and with `coco` the same images as `out`/coco; lists are written last.

    Args:
        spec: labelled images, one class each.
        images: number of all images; a quarter each for train and val, half for test.
        size: longer side of an image in pixels.

    Returns:
        "images" by list, "objects", how many are "difficult" and "truncated", and the "classes".

    Raises:
        UserError: the data have no labels, the folder exists, or there are too few images or pixels.
    """
    if not _LEAST_SIDE <= size <= _MOST_SIDE:
        raise UserError(f"images of {size} pixels", "--size", f"Give {_LEAST_SIDE} to {_MOST_SIDE} pixels.")
    root = out / "VOCdevkit" / f"VOC{YEAR}"
    if root.exists() or (coco and (out / "coco").exists()):
        raise UserError(f"{out} already holds a data set", "OUT", "Give another folder, or remove this one.")
    material, classes = _material(spec)
    names = _lists(images)
    try:
        for folder in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationObject"):
            (root / folder).mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{root} cannot be made: {error.strerror}", "OUT", "Give another folder.") from error
    shown: dict[str, list[_Shown]] = {}
    in_coco = _Coco(classes)
    counts = {"objects": 0, "difficult": 0, "truncated": 0}
    for split, of_split in names.items():
        for index, name in of_split:
            scene = _compose_scene(material["test" if split == "test" else "train"], size, seed, index)
            _write_image(root, name, scene, classes)
            in_coco.add("test" if split == "test" else "train", name, scene)
            easy = {each.label for each in scene.objects if not each.difficult}
            shown.setdefault(split, []).append((easy, {each.label for each in scene.objects}))
            for what, count in _counts(scene).items():
                counts[what] += count
            progress.advance("images")
    if coco:
        in_coco.write(out / "coco", root / "JPEGImages")
    _write_lists(root, {split: [name for _, name in of_split] for split, of_split in names.items()}, shown, classes)
    return {"images": {split: len(of_split) for split, of_split in names.items()}, **counts, "classes": classes}


def _counts(scene: _Scene) -> dict[str, int]:
    return {
        "objects": len(scene.objects),
        "difficult": sum(each.difficult for each in scene.objects),
        "truncated": sum(each.truncated for each in scene.objects),
    }


def _lists(images: int) -> dict[str, list[tuple[int, str]]]:
    """List -> number and name of each of its images."""
    if images < 4:
        raise UserError(f"{images} images are too few for train, val and test", "--images", "Give at least 4.")
    if images > _MOST_IMAGES:
        raise UserError(f"{images:,} images have no names of six digits", "--images", f"Give at most {_MOST_IMAGES:,}.")
    sizes = {name: round(share * images) for name, share in _LISTS.items()}
    sizes["test"] = images - sizes["train"] - sizes["val"]
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    return {name: [(start + i, f"{start + i + 1:06d}") for i in range(sizes[name])] for name, start in starts.items()}


def _material(spec: DataSpec) -> tuple[dict[str, _Material], list[str]]:
    """Images for "train" (of train and val) and for "test", and the names of the classes in alphabetical order."""
    spec = with_absolute_path(spec)
    splits = plugins.module_of("dataset", spec).load(spec)
    parts = split_rows(splits, spec.split)
    if splits.train.labels is None or len(splits.train.classes) < 2:
        raise UserError(
            f"the images of {spec.kind!r} have no classes to compose scenes of",
            "--from",
            "Use labelled images, such as cifar10, fashion_mnist or imagefolder:/photos.",
        )
    judged = "test" if "test" in parts else "val"
    if judged not in parts:
        raise UserError(f"the data of {spec.kind!r} have neither test nor val images", "--from", "Leave a share for val.")
    names = [_file_name(name) for name in splits.train.classes]
    if len(set(names)) < len(names):
        raise UserError("two classes have the same name as a file", "--from", "Rename one of them.")
    if too_long := [name for name in names if len(f"{name}_trainval.txt".encode()) > _LONGEST_FILE_NAME]:
        raise UserError(f"the name of the class {cut(too_long[0], MAX_SHOWN)!r} is too long for files", "--from", "Shorten it.")
    order = sorted(range(len(names)), key=names.__getitem__)
    number = np.argsort(order)  # VOC numbers classes in alphabetical order

    def renumbered(part: str) -> _Material:
        source, rows = parts[part]
        assert source.labels is not None
        return _Material(Source(source.names, source.read, number[source.labels].astype(np.int64)), rows)

    return {"train": renumbered("train"), "test": renumbered(judged)}, [names[each] for each in order]


def _file_name(name: str) -> str:
    """The name of a class as VOC writes it, which is part of file names: ``T-shirt_top`` for ``T-shirt/top``."""
    return "".join(char if char.isalnum() or char in "-." else "_" for char in name).lstrip(".") or "_"


# ---- a scene ----


def _compose_scene(material: _Material, size: int, seed: int, index: int) -> _Scene:
    """Image number `index`; the number of objects, their classes, sizes and places are random."""
    generator = np.random.default_rng(seed_of("voc composition", seed, index))
    shorter = round(size * generator.uniform(0.66, 1.0))
    height, width = (shorter, size) if generator.random() < 0.7 else (size, shorter)
    canvas = _background(material, height, width, generator)
    for _ in range(int(generator.integers(0, _MOST_DISTRACTORS + 1))):
        side = round(min(height, width) * generator.uniform(0.15, 0.35))
        piece = _shuffled(_cutout(material.draw(generator)[0], side, generator), generator)
        _paste(canvas, piece, *_place(height, width, side, generator))
    objects: list[_Object] = []
    wanted = int(generator.integers(1, _MOST_OBJECTS + 1))
    for _ in range(10 * wanted):
        if len(objects) < wanted:
            _try_to_add(canvas, objects, material, generator)
    if not any(not each.difficult for each in objects):  # at least one object that counts
        return _compose_scene(material, size, seed_of(seed, "again"), index)
    noisy = canvas + generator.normal(0, 3, canvas.shape)
    return _Scene(noisy.clip(0, 255).astype(np.uint8), tuple(objects))


def _try_to_add(canvas: Pixels, objects: list[_Object], material: _Material, generator: np.random.Generator) -> None:
    """Paste an object onto the canvas, unless it would hide too much of itself or of the earlier ones."""
    height, width = canvas.shape[:2]
    pixels, label = material.draw(generator)
    difficult = bool(generator.random() < _DIFFICULT)
    share = generator.uniform(0.12, 0.2) if difficult else generator.uniform(0.25, 0.6)
    side = max(8, round(min(height, width) * share))
    cutout = _cutout(pixels, side, generator)
    top, left = _place(height, width, side, generator)
    covers = np.zeros((height, width), np.bool_)
    rows, columns, inside = _overlap(height, width, side, top, left)
    covers[rows, columns] = cutout.cover[inside] >= _EDGE
    whole = int((cutout.cover >= _EDGE).sum())
    if covers.sum() < max(16, _LEAST_VISIBLE * whole):
        return
    if any((each.visible & ~covers).sum() < _LEAST_VISIBLE * each.visible.sum() for each in objects):
        return
    if difficult:
        cutout = _Cutout(_blurred(cutout.colours, side / 24), cutout.cover * np.float32(0.6))
    _paste(canvas, cutout, top, left)
    objects[:] = [_Object(each.label, each.visible & ~covers, each.difficult, each.truncated) for each in objects]
    objects.append(_Object(label, covers, difficult, bool(covers.sum() < 0.95 * whole)))


def _background(material: _Material, height: int, width: int, generator: np.random.Generator) -> Pixels:
    """A part of some image, enlarged and blurred until nothing of its object is left, with coarse noise of its own."""
    pixels = material.draw(generator)[0]
    coarse = generator.uniform(40, 215, (5, 5, 3)).astype(np.float32)
    blurred = _blurred(_resized(pixels.astype(np.float32), height, width), max(height, width) / 8)
    return np.asarray(0.5 * blurred + 0.5 * _resized(coarse, height, width), np.float32)


def _cutout(pixels: NDArray[np.uint8], side: int, generator: np.random.Generator) -> _Cutout:
    """An image as an object of this side, mirrored half of the time."""
    colours = pixels[:, ::-1] if generator.random() < 0.5 else pixels
    cover = _outline(colours)
    coloured = _resized(colours.astype(np.float32), side, side)
    return _Cutout(coloured, _resized(cover[:, :, None].repeat(3, 2), side, side)[:, :, 0].clip(0, 1))


def _outline(pixels: NDArray[np.uint8]) -> Pixels:
    """How much of each pixel an image's object covers: all that differs from a border of one colour; else a rounded square."""
    height, width = pixels.shape[:2]
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).astype(np.float32)
    middle = np.median(border, axis=0)
    if (np.abs(border - middle).max(axis=1) <= _FLAT).mean() >= _MOSTLY:
        differs = binary_fill_holes(np.abs(pixels.astype(np.float32) - middle).max(axis=2) > _FLAT)
        if differs.mean() > 0.05:
            return np.asarray(differs, np.float32)
    v, u = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    radius = (np.abs(u) ** 4 + np.abs(v) ** 4) ** 0.25
    return np.asarray(((1 - radius) / 0.12).clip(0, 1), np.float32)


def _shuffled(cutout: _Cutout, generator: np.random.Generator) -> _Cutout:
    """The same outline with the parts of the image in another order, so that it is of no class."""
    side = cutout.colours.shape[0]
    edges = np.linspace(0, side, 5).astype(int)
    step = int(np.diff(edges).min())
    colours = cutout.colours.copy()
    order = generator.permutation(16)
    for place, piece in enumerate(order.tolist()):
        (y, x), (v, u) = divmod(place, 4), divmod(piece, 4)
        taken = cutout.colours[edges[v] : edges[v] + step, edges[u] : edges[u] + step]
        colours[edges[y] : edges[y] + step, edges[x] : edges[x] + step] = taken
    return _Cutout(colours, cutout.cover)


def _place(height: int, width: int, side: int, generator: np.random.Generator) -> tuple[int, int]:
    """Top and left of a square, which lies inside the image most of the time."""
    beyond = side * 0.45 if generator.random() < 0.25 else 0.0
    return (
        round(generator.uniform(-beyond, height - side + beyond)),
        round(generator.uniform(-beyond, width - side + beyond)),
    )


def _overlap(height: int, width: int, side: int, top: int, left: int) -> tuple[slice, slice, tuple[slice, slice]]:
    """Rows and columns of the image that a square covers, and the part of the square that is inside."""
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + side, height), min(left + side, width)
    return slice(y0, y1), slice(x0, x1), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))


def _paste(canvas: Pixels, cutout: _Cutout, top: int, left: int) -> None:
    rows, columns, inside = _overlap(canvas.shape[0], canvas.shape[1], len(cutout.cover), top, left)
    cover = cutout.cover[inside][:, :, None]
    canvas[rows, columns] = cover * cutout.colours[inside] + (1 - cover) * canvas[rows, columns]


def _resized(pixels: Pixels, height: int, width: int) -> Pixels:
    channels = [Image.fromarray(pixels[:, :, c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
    return np.stack([np.asarray(channel, np.float32) for channel in channels], axis=2).clip(0, 255)


def _blurred(pixels: Pixels, radius: float) -> Pixels:
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image, np.float32)


# ---- VOC's files ----


def _write_image(root: Path, name: str, scene: _Scene, classes: Sequence[str]) -> None:
    Image.fromarray(scene.pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=92)
    (root / "Annotations" / f"{name}.xml").write_text(_xml(name, scene, classes), encoding="utf-8")
    numbers = {
        "SegmentationClass": [each.label + 1 for each in scene.objects],
        "SegmentationObject": list(range(1, 1 + len(scene.objects))),
    }
    for folder, of_objects in numbers.items():
        mask = Image.fromarray(_mask(scene, of_objects))
        mask.putpalette(_palette())
        mask.save(root / folder / f"{name}.png")


def _mask(scene: _Scene, numbers: Sequence[int]) -> NDArray[np.uint8]:
    """Numbers where objects are, 255 on difficult ones and on the outlines of others, as in VOC."""
    mask = np.zeros(scene.pixels.shape[:2], np.uint8)
    for number, each in zip(numbers, scene.objects, strict=True):
        mask[each.visible] = VOID if each.difficult else number
    for each in scene.objects:
        mask[_grown(each.visible) & ~each.visible & (mask == 0)] = VOID
    return mask


def _grown(visible: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """All pixels that touch a side of one of these."""
    grown = visible.copy()
    grown[1:] |= visible[:-1]
    grown[:-1] |= visible[1:]
    grown[:, 1:] |= visible[:, :-1]
    grown[:, :-1] |= visible[:, 1:]
    return grown


def _palette() -> list[int]:
    """VOC's colours: the bits of the number, from the lowest, spread over red, green and blue from the highest."""
    return [
        sum(((number >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
        for number in range(256)
        for channel in range(3)
    ]


def _xml(name: str, scene: _Scene, classes: Sequence[str]) -> str:
    height, width = scene.pixels.shape[:2]
    objects = "".join(
        f"\t<object>\n\t\t<name>{escape(classes[each.label])}</name>\n\t\t<pose>Unspecified</pose>\n"
        f"\t\t<truncated>{int(each.truncated)}</truncated>\n\t\t<difficult>{int(each.difficult)}</difficult>\n"
        "\t\t<bndbox>\n\t\t\t<xmin>{}</xmin>\n\t\t\t<ymin>{}</ymin>\n\t\t\t<xmax>{}</xmax>\n\t\t\t<ymax>{}</ymax>\n".format(
            *each.corners
        )
        + "\t\t</bndbox>\n\t</object>\n"
        for each in scene.objects
    )
    return (
        f"<annotation>\n\t<folder>VOC{YEAR}</folder>\n\t<filename>{name}.jpg</filename>\n"
        "\t<source>\n\t\t<database>ktray data make-voc</database>\n\t</source>\n"
        f"\t<size>\n\t\t<width>{width}</width>\n\t\t<height>{height}</height>\n\t\t<depth>3</depth>\n\t</size>\n"
        f"\t<segmented>1</segmented>\n{objects}</annotation>\n"
    )


_Shown = tuple[set[int], set[int]]  # the classes of an image's objects that are not difficult, and of all its objects


def _write_lists(
    root: Path, names: Mapping[str, Sequence[str]], shown: Mapping[str, Sequence[_Shown]], classes: Sequence[str]
) -> None:
    """`ImageSets`: the names of each list, and those with 1, 0 or -1 for each class."""
    main, segmentation = root / "ImageSets" / "Main", root / "ImageSets" / "Segmentation"
    main.mkdir(parents=True)
    segmentation.mkdir()
    everything = {
        **{split: list(zip(names[split], shown[split], strict=True)) for split in names},
        "trainval": [row for split in ("train", "val") for row in zip(names[split], shown[split], strict=True)],
    }
    for split, rows in everything.items():
        for number, label in enumerate(classes):
            lines = [f"{name} {_value(number, *of_image):2d}\n" for name, of_image in rows]
            (main / f"{label}_{split}.txt").write_text("".join(lines))
        for folder in (segmentation, main):
            (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name, _ in rows))


def _value(number: int, easy: set[int], shown: set[int]) -> int:
    return 1 if number in easy else 0 if number in shown else -1


# ---- COCO's files ----


class _Coco:
    """The same scenes as COCO describes them. Numbers of categories have gaps, as COCO's; difficult objects are crowds."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.categories = [{"id": 2 * number + 1, "name": name} for number, name in enumerate(classes)]
        self.images: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
        self.annotations: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}

    def add(self, split: str, name: str, scene: _Scene) -> None:
        """Add a scene to the images of a split."""
        height, width = scene.pixels.shape[:2]
        self.images[split].append({"id": int(name), "file_name": f"{name}.jpg", "height": height, "width": width})
        for each in scene.objects:
            xmin, ymin, xmax, ymax = each.corners
            self.annotations[split].append(
                {
                    "id": len(self.annotations[split]) + 1,
                    "image_id": int(name),
                    "category_id": self.categories[each.label]["id"],
                    "bbox": [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1],
                    "area": int(each.visible.sum()),
                    "iscrowd": int(each.difficult),
                    "segmentation": {"size": [height, width], "counts": list(_run_lengths(each.visible))},
                }
            )

    def write(self, out: Path, images: Path) -> None:
        """Write `annotations/instances_SPLIT.json`, and copies of the images to a folder per split."""
        (out / "annotations").mkdir(parents=True)
        for split, of_split in self.images.items():
            (out / split).mkdir()
            for each in of_split:
                shutil.copyfile(images / each["file_name"], out / split / each["file_name"])
            whole = {"images": of_split, "annotations": self.annotations[split], "categories": self.categories}
            (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(whole))


def _run_lengths(mask: NDArray[np.bool_]) -> Iterator[int]:
    """The lengths of runs of 0 and 1 in turn, column by column, beginning with 0, as COCO's uncompressed masks."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges.tolist(), len(flat)]).tolist()
    yield from ([0, *lengths] if flat[0] else lengths)

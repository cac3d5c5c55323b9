"""Images: decoded as Pillow and torchvision would, the same from disk and on the way, and known by their content."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from ktray import images, plugins
from ktray.errors import UserError
from ktray.images import Source, Splits, Unreadable, decode, fit, fit_boxes
from ktray.pool import LocalPool
from ktray.spec import Split
from tests.pools import ShuffledPool

folder = plugins.module("dataset", "folder")


def noise(height: int = 40, width: int = 40, channels: int = 3, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[:, :, 0] if channels == 1 else pixels


def png(array: np.ndarray, mode: str | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """200 images of many kinds in nested folders, one of them broken (0.5 %)."""
    root = tmp_path / "mixed"
    for part in ("a/deep", "b", ".hidden"):
        (root / part).mkdir(parents=True)
    for index in range(194):
        Image.fromarray(noise(20, 24, seed=index)).save(root / f"a/deep/{index:03d}.png")
    Image.fromarray(noise(90, 70)).save(root / "b/photo.JPG", quality=95)
    Image.fromarray(noise(30, 30, 1)).save(root / "b/grey.png")
    Image.fromarray(noise(30, 30, 4)).save(root / "b/clear.png")
    Image.fromarray(noise(30, 30)).convert("P").save(root / "b/palette.gif")
    Image.fromarray(noise(30, 30)).save(root / "b/photo.webp")
    (root / "b/broken.jpg").write_bytes((root / "b/photo.JPG").read_bytes()[:500])
    (root / ".hidden/x.png").write_bytes((root / "b/grey.png").read_bytes())
    (root / "notes.txt").write_text("no image")
    return root


def spec_of(root: Path, **fields: object):
    return folder.Spec(path=str(root), **{"size": 16, **fields})


def written(spec, out: Path, pool=None, **options: int):
    metrics = images.write(spec, out, pool or LocalPool(), **options)
    return metrics, images.open_split(out, "train", spec), images.open_split(out, "val", spec)


# ---- decoding ----


def test_png_pixels_are_kept_exactly() -> None:
    assert (decode(png(noise()), 40) == noise()).all()


def test_grey_becomes_three_equal_channels() -> None:
    pixels = decode(png(noise(channels=1)), 40)
    assert pixels.shape == (40, 40, 3)
    assert (pixels == noise(channels=1)[:, :, None]).all()


def test_sixteen_bit_grey_keeps_its_upper_bits_and_is_not_clipped() -> None:
    wide = np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40
    assert (decode(png(wide), 40)[:, :, 0] == wide >> 8).all()


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_transparency_is_laid_on_white(alpha: int) -> None:
    rgba = np.full((4, 4, 4), (200, 100, 0, alpha), np.uint8)
    expected = np.round(np.array([200, 100, 0]) * alpha / 255 + 255 * (1 - alpha / 255))
    assert np.abs(decode(png(rgba), 4)[0, 0] - expected).max() <= 1


def test_a_transparent_palette_colour_is_white() -> None:
    palette = Image.fromarray(np.zeros((4, 4), np.uint8), "L").convert("P")
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    assert (decode(buffer.getvalue(), 4) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected_as_pillow_does(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = png(noise(8, 12), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    assert (decode(encoded, 8) == np.asarray(expected)).all()


def test_cmyk_jpeg_is_readable() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 255, np.uint8)).convert("CMYK").save(buffer, "JPEG")
    assert decode(buffer.getvalue(), 16).min() > 250


def test_a_stereo_photo_gives_its_first_picture() -> None:
    buffer = io.BytesIO()
    first, second = Image.new("RGB", (16, 16), "white"), Image.new("RGB", (16, 16), "black")
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    assert decode(buffer.getvalue(), 16).min() > 250


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 100 million pixels: between Pillow's warning and its error."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_an_unreadable_image() -> None:
    with pytest.raises(Unreadable, match="10000"):
        decode(bomb(), 16)


@pytest.mark.parametrize("encoded", [b"", b"GIF89a", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n"], ids=str)
def test_what_is_no_image_is_unreadable(encoded: bytes) -> None:
    with pytest.raises(Unreadable):
        decode(encoded, 16)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_scribbled_images_are_decoded_or_unreadable_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(noise(16, 16)).save(buffer, kind)
        for _ in range(40):
            scribbled = bytearray(buffer.getvalue())
            for place in random.integers(0, len(scribbled), 12):
                scribbled[place] = random.integers(256)
            try:
                assert decode(bytes(scribbled), 16).dtype == np.uint8
            except Unreadable:
                continue


def test_resizing_is_that_of_torchvision() -> None:
    from torchvision.transforms import InterpolationMode, v2

    pixels = noise(60, 60)
    resize = v2.Resize(17, InterpolationMode.BILINEAR, antialias=True)
    assert (fit(pixels, 17) == np.asarray(resize(Image.fromarray(pixels)))).all()


def test_the_square_is_cut_from_the_centre() -> None:
    wide = noise(10, 30)
    assert (fit(wide, 10) == wide[:, 10:20]).all()
    high = noise(30, 10)
    assert (fit(high, 10) == high[10:20]).all()


def test_boxes_move_with_the_pixels_and_leave_with_them() -> None:
    boxes = np.array([[10, 0, 20, 10, 3], [0, 0, 9, 9, 1], [5, 5, 15, 10, 2]], np.float32)
    assert fit_boxes(boxes, 10, 30, 20).tolist() == [[0, 0, 20, 20, 3], [0, 10, 10, 20, 2]]


def test_a_large_jpeg_decoded_at_lower_resolution_differs_little() -> None:
    from skimage import data

    photo = Image.fromarray(data.astronaut())
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=95)
    small = decode(buffer.getvalue(), 32)
    assert small.shape == (64, 64, 3)
    expected = np.asarray(photo.resize((32, 32), Image.Resampling.BILINEAR), np.int64)
    assert np.abs(fit(small, 32) - expected).mean() < 2


# ---- writing and reading ----


def test_a_mixed_folder_is_decoded_and_its_broken_image_left_out(mixed: Path, tmp_path: Path) -> None:
    metrics, train, val = written(spec_of(mixed), tmp_path / "out")
    assert metrics == {"count": 199, "unreadable": 1}
    assert {"b/photo.JPG", "b/grey.png", "b/clear.png", "b/palette.gif", "b/photo.webp"} <= {*train.names, *val.names}
    assert "b/broken.jpg" not in {*train.names, *val.names}
    assert "b/broken.jpg" in (tmp_path / "out/splits.json").read_text()
    assert train.labels is None
    for part in (train, val):
        for index, name in enumerate(part.names):
            expected = fit(decode(mixed / name, 16), 16)
            assert (part.read(np.array([index]))[0] == expected).all(), name


def test_more_than_one_percent_unreadable_fails_and_names_them(mixed: Path, tmp_path: Path) -> None:
    for number in range(2):
        (mixed / f"b/bad{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"3 of 202 images are unreadable.*b/b.*\.(png|jpg)"):
        images.write(spec_of(mixed), tmp_path / "out", LocalPool())
    assert images.write(spec_of(mixed, max_unreadable=0.02), tmp_path / "two", LocalPool())["unreadable"] == 3


def test_streamed_pixels_equal_those_of_the_memmap(mixed: Path, tmp_path: Path) -> None:
    spec = spec_of(mixed)
    _, *mapped = written(spec, tmp_path / "mapped")
    metrics, *streamed = written(spec, tmp_path / "streamed", memmap_bytes=0)
    assert metrics == {"count": 199, "unreadable": 1}
    assert not list((tmp_path / "streamed").glob("train.npy"))
    for one, other in zip(mapped, streamed, strict=True):
        indices = np.random.default_rng(0).permutation(len(one))
        assert one.names == other.names
        assert (one.read(indices) == other.read(indices)).all()


def test_the_files_do_not_depend_on_the_workers(mixed: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ktray.images.writing._BLOCK_BYTES", 7 * 16 * 16 * 3)
    for name, pool in (("one", LocalPool()), ("three", ShuffledPool(3))):
        images.write(spec_of(mixed), tmp_path / name, pool)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "three").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes(), name


def test_the_memmap_is_a_plain_npy_file_of_the_readable_images(mixed: Path, tmp_path: Path) -> None:
    _, train, val = written(spec_of(mixed), tmp_path / "out")
    for name, part in (("train", train), ("val", val)):
        pixels = np.load(tmp_path / f"out/{name}.npy", allow_pickle=False)
        assert pixels.shape == (len(part), 16, 16, 3)
        assert (tmp_path / f"out/{name}.npy").stat().st_size == 128 + pixels.nbytes


def test_a_batch_is_a_fresh_array(mixed: Path, tmp_path: Path) -> None:
    _, train, _ = written(spec_of(mixed), tmp_path / "out")
    batch = train.read(np.array([0, 1]))
    batch[:] = 7
    assert (train.read(np.array([0, 1])) != 7).any()


def test_a_streamed_source_that_changed_is_refused(mixed: Path, tmp_path: Path) -> None:
    spec = spec_of(mixed)
    images.write(spec, tmp_path / "out", LocalPool(), memmap_bytes=0)
    (mixed / "a/deep/000.png").unlink()
    with pytest.raises(ValueError, match="no longer what was listed"):
        images.open_split(tmp_path / "out", "train", spec)


def test_a_missing_split_is_an_error_that_says_which_there_are(mixed: Path, tmp_path: Path) -> None:
    written(spec_of(mixed), tmp_path / "out")
    with pytest.raises(UserError, match="train, val"):
        images.open_split(tmp_path / "out", "test", spec_of(mixed))


def test_a_relative_path_means_the_same_in_a_worker_elsewhere(mixed: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(mixed.parent)
    spec = images.located(spec_of(Path(mixed.name)))
    monkeypatch.chdir(tmp_path / "..")
    assert images.write(spec, tmp_path / "out", LocalPool())["count"] == 199


MEMORY = """
import resource, sys
from pathlib import Path
from ktray import images, plugins
from ktray.pool import LocalPool
import numpy as np
spec = plugins.parse("dataset", {"kind": sys.argv[1], "path": sys.argv[2], "size": 224})
warm = plugins.parse("dataset", {"kind": "synthetic", "count": 4, "test": 0, "size": 224})
images.write(warm, Path(sys.argv[3]) / "warm", LocalPool())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = images.write(spec, Path(sys.argv[3]) / "out", LocalPool(), memmap_bytes=int(sys.argv[4]))["count"]
print(int(count), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("memmap_bytes", [1 << 40, 0], ids=["memmap", "streamed"])
def test_many_images_are_never_in_memory_together(memmap_bytes: int, tmp_path: Path) -> None:
    root = tmp_path / "many"
    root.mkdir()
    Image.fromarray(noise(224, 224)).resize((224, 224)).save(root / "0000.jpg", quality=30)
    for index in range(1, 1500):
        os.link(root / "0000.jpg", root / f"{index:04d}.jpg")
    arguments = [sys.executable, "-c", MEMORY, "folder", str(root), str(tmp_path), str(memmap_bytes)]
    answer = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    count, grown_mb = map(int, answer.stdout.split())
    assert count == 1500
    assert grown_mb < 40, "226 MB of pixels"


# ---- splitting ----


def labelled(count: int = 200, classes: int = 4) -> Source:
    labels = np.random.default_rng(0).integers(0, classes, count)
    return Source(
        names=tuple(f"{index}" for index in range(count)),
        read=lambda index: np.zeros((8, 8, 3), np.uint8),
        labels=labels,
        classes=tuple("abcd"[:classes]),
    )


def test_val_is_stratified_seeded_and_disjoint_from_train() -> None:
    source = labelled()
    found = images.parts(Splits(source), Split(val=0.2, seed=1))
    train, val = found["train"][1], found["val"][1]
    assert len(val) == 40
    assert sorted([*train, *val]) == list(range(200))
    assert np.abs(np.bincount(source.labels[val]) - 0.2 * np.bincount(source.labels)).max() <= 1
    again = images.parts(Splits(source), Split(val=0.2, seed=1))["val"][1]
    other = images.parts(Splits(source), Split(val=0.2, seed=2))["val"][1]
    assert (val == again).all()
    assert len(np.intersect1d(val, other)) < 30


def test_every_class_keeps_an_image_to_train_on() -> None:
    labels = np.array([0, 0, 1, 2, 2, 2])
    val = images.held_out("abcdef", labels, 0.5, 0)
    assert set(np.delete(labels, val)) == {0, 1, 2}


def test_tiny_classes_still_give_a_val_split() -> None:
    labels = np.repeat(np.arange(100), 4)
    assert len(images.held_out([str(i) for i in range(400)], labels, 0.1, 0)) == 40


def test_an_added_image_moves_few_others_between_the_splits() -> None:
    names = [f"{index}.png" for index in range(1000)]
    before = {names[i] for i in images.held_out(names, None, 0.1, 0)}
    after = {(["a.png", *names])[i] for i in images.held_out(["a.png", *names], None, 0.1, 0)}
    assert len(before ^ after) <= 2


def test_a_share_of_zero_means_no_val_split() -> None:
    assert list(images.parts(Splits(labelled()), Split(val=0))) == ["train"]


# ---- identity ----


def test_a_copy_of_a_folder_keeps_its_identity_and_a_changed_image_does_not(mixed: Path, tmp_path: Path) -> None:
    original = images.identity(spec_of(mixed))
    copy = tmp_path / "elsewhere/copy"
    shutil.copytree(mixed, copy)
    assert images.identity(spec_of(copy)) == original
    assert images.identity(spec_of(copy, size=32, split=Split(val=0.3))) == original
    Image.fromarray(noise(20, 24, seed=999)).save(copy / "a/deep/000.png")
    changed = images.identity(spec_of(copy))
    assert changed != original
    shutil.copy(mixed / "a/deep/000.png", copy / "a/deep/000.png")
    (copy / "b/grey.png").rename(copy / "b/gray.png")
    assert images.identity(spec_of(copy)) not in (original, changed)


def test_the_cache_spares_reading_and_notices_a_change(mixed: Path, tmp_path: Path, monkeypatch) -> None:
    for path in mixed.rglob("*.*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    cache = tmp_path / "cache"
    first = images.identity(spec_of(mixed), cache)
    hashed: list[Path] = []
    real = images.content.file_sha256
    monkeypatch.setattr("ktray.images.content.file_sha256", lambda path: hashed.append(path) or real(path))
    assert images.identity(spec_of(mixed), cache) == first
    assert hashed == []
    (mixed / "b/grey.png").write_bytes(png(noise(30, 30, 1, seed=5)))
    assert images.identity(spec_of(mixed), cache) != first
    assert hashed == [mixed / "b/grey.png"]


def test_a_file_of_this_very_moment_is_not_remembered(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data/x.png"
    file.write_bytes(png(noise(seed=1)))
    state = file.stat()
    first = images.identity(spec_of(tmp_path / "data"), tmp_path / "cache")
    changed = bytearray(file.read_bytes())
    changed[60] ^= 1
    file.write_bytes(changed)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # the same size and time: git's racy entry
    assert images.identity(spec_of(tmp_path / "data"), tmp_path / "cache") != first


def test_a_cut_off_cache_is_ignored(mixed: Path, tmp_path: Path) -> None:
    first = images.identity(spec_of(mixed), tmp_path)
    for book in tmp_path.glob("contents-*.json"):
        book.write_text('{"a": [1,')
    assert images.identity(spec_of(mixed), tmp_path) == first


def test_identity_includes_labels_classes_and_boxes(monkeypatch) -> None:
    def identity_of(source: Source) -> str:
        module = ModuleType("stand_in")
        module.LOCATION, module.load = (), lambda spec: Splits(source, identity="pixels")
        monkeypatch.setattr(plugins, "module_of", lambda room, spec: module)
        return images.identity(object())

    names, read = ("0", "1"), labelled().read
    boxes = (np.zeros((1, 5), np.float32), np.ones((0, 5), np.float32))
    variants = [
        Source(names, read),
        Source(names, read, np.array([0, 1]), ("a", "b")),
        Source(names, read, np.array([1, 1]), ("a", "b")),
        Source(names, read, np.array([0, 1]), ("a", "c")),
        Source(names, read, np.array([0, 1]), ("a", "b"), boxes),
    ]
    assert len({identity_of(source) for source in variants}) == len(variants)

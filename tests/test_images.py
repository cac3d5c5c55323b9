"""Images: equal from a memmap and decoded on demand, split without overlap, identified by their content."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from ktray import file_kind, images, plugins
from ktray.checksums import write_json
from ktray.errors import UserError
from ktray.fingerprint import file_version
from ktray.images import Source, Splits, Unreadable, decode, fit, image_formats
from ktray.pool import LocalPool
from ktray.spec import Split
from ktray.stages import images_stage
from tests.pictures import noise, png
from tests.pools import ShuffledPool

folder = plugins.module("dataset", "folder")


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
    with pytest.raises(ValueError, match=r"3 of 202 images are unreadable.*b/b.*\.(png|jpg).* or raise max_unreadable of the"):
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
    with pytest.raises(ValueError, match="has changed since it was listed"):
        images.open_split(tmp_path / "out", "train", spec)


def test_the_error_for_a_missing_split_lists_the_available_ones(mixed: Path, tmp_path: Path) -> None:
    written(spec_of(mixed), tmp_path / "out")
    with pytest.raises(UserError, match="train, val"):
        images.open_split(tmp_path / "out", "test", spec_of(mixed))


def test_a_relative_path_is_resolved_before_a_worker_with_another_working_directory_reads_it(
    mixed: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(mixed.parent)
    spec = images.with_absolute_path(spec_of(Path(mixed.name)))
    monkeypatch.chdir(tmp_path / "..")
    assert images.write(spec, tmp_path / "out", LocalPool())["count"] == 199


MEMORY = """
import sys
from pathlib import Path
from tests.child import peak_memory
from ktray import images, plugins
from ktray.pool import LocalPool
import numpy as np
spec = plugins.parse("dataset", {"kind": sys.argv[1], "path": sys.argv[2], "size": 224})
warm = plugins.parse("dataset", {"kind": "synthetic", "count": 4, "test": 0, "size": 224})
images.write(warm, Path(sys.argv[3]) / "warm", LocalPool())
before = peak_memory()
count = images.write(spec, Path(sys.argv[3]) / "out", LocalPool(), memmap_bytes=int(sys.argv[4]))["count"]
print(int(count), (peak_memory() - before) >> 20)
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


# ---- split ----


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
    found = images.split_rows(Splits(source), Split(val=0.2, seed=1))
    train, val = found["train"][1], found["val"][1]
    assert len(val) == 40
    assert sorted([*train, *val]) == list(range(200))
    assert np.abs(np.bincount(source.labels[val]) - 0.2 * np.bincount(source.labels)).max() <= 1
    again = images.split_rows(Splits(source), Split(val=0.2, seed=1))["val"][1]
    other = images.split_rows(Splits(source), Split(val=0.2, seed=2))["val"][1]
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
    assert list(images.split_rows(Splits(labelled()), Split(val=0))) == ["train"]


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


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """The files that are read for an identity from now on; those of just now count as old."""
    files: list[Path] = []
    real = images.source.file_sha256
    monkeypatch.setattr("ktray.images.source.file_sha256", lambda path: files.append(path) or real(path))
    monkeypatch.setattr("ktray.fingerprint.TIME_GRANULARITY_NS", 0)
    return files


def test_the_cache_saves_hashing_and_detects_changes(mixed: Path, tmp_path: Path, hashed: list[Path]) -> None:
    first = images.identity(spec_of(mixed), tmp_path / "cache")
    hashed.clear()
    assert images.identity(spec_of(mixed), tmp_path / "cache") == first
    assert hashed == []
    (mixed / "b/grey.png").write_bytes(png(noise(30, 30, 1, seed=5)))
    assert images.identity(spec_of(mixed), tmp_path / "cache") != first
    assert hashed == [mixed / "b/grey.png"]


def rewrite(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def rename_over(file: Path, content: bytes) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(content)
    os.utime(other, ns=(EPOCH, EPOCH))
    other.rename(file)


def unpack(file: Path, content: bytes) -> None:
    """As a deterministic archive does."""
    with tarfile.open(file.with_suffix(".tar"), "w") as tar:
        info = tarfile.TarInfo(file.name)
        info.size, info.mtime = len(content), EPOCH // 10**9
        tar.addfile(info, io.BytesIO(content))
    file.unlink()
    subprocess.run(["tar", "-xf", str(file.with_suffix(".tar")), "-C", str(file.parent)], check=True)


EPOCH = 315_532_800 * 10**9


@pytest.mark.parametrize("replace", [rewrite, rename_over, unpack])
def test_an_image_replaced_by_one_of_equal_size_and_time_is_another(replace, tmp_path: Path, hashed: list[Path]) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data/x.ppm"
    Image.fromarray(noise(seed=1)).save(file)
    os.utime(file, ns=(EPOCH, EPOCH))
    first = images.identity(spec_of(tmp_path / "data"), tmp_path / "cache")
    other = io.BytesIO()
    Image.fromarray(noise(seed=2)).save(other, "PPM")
    before = file.stat()
    replace(file, other.getvalue())
    os.utime(file, ns=(EPOCH, EPOCH))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert images.identity(spec_of(tmp_path / "data"), tmp_path / "cache") != first


def swapped_folders(one: Path, other: Path, path: Path) -> None:
    for each, to in ((one.parent, path), (other.parent, one.parent), (path, other.parent)):
        subprocess.run(["mv", str(each), str(to)], check=True)


def linked_otherwise(one: Path, other: Path, path: Path) -> None:
    """The files lie elsewhere, and the links to them change places."""
    targets = [os.readlink(one), os.readlink(other)]
    for link, target in zip((one, other), reversed(targets), strict=True):
        link.unlink()
        link.symlink_to(target)


@pytest.mark.parametrize("swap", [swapped_folders, linked_otherwise])
def test_files_of_equal_size_and_times_that_change_places_are_other_data(swap, tmp_path: Path, hashed: list[Path]) -> None:
    """The oracle is the identity without a cache. Pairs of files are written until both have the same ctime."""
    contents = []
    for seed in range(2):
        Image.fromarray(noise(seed=seed)).save(buffer := io.BytesIO(), "PPM")
        contents.append(buffer.getvalue())
    for attempt in range(1000):
        root = tmp_path / f"data{attempt}"
        paths = [root / name / "0.ppm" for name in ("cat", "dog")]
        files = paths if swap is swapped_folders else [tmp_path / f"{attempt}-{name}.ppm" for name in ("one", "two")]
        for path in {path.parent for path in paths + files}:
            path.mkdir(parents=True, exist_ok=True)
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        for file in files:
            os.utime(file, ns=(EPOCH, EPOCH))
        for path, file in zip(paths, files, strict=True):
            if path != file:
                path.symlink_to(file)
        states = [path.stat() for path in paths]
        if len({(state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states}) == 1:
            break
    else:
        pytest.skip("no two files got the same time of change here")
    first = images.identity(spec_of(root), tmp_path / "cache")
    hashed.clear()
    assert images.identity(spec_of(root), tmp_path / "cache") == first
    assert hashed == [], "the cache is in use"
    swap(*paths, tmp_path / "aside")
    found = images.identity(spec_of(root), tmp_path / "cache")
    assert found == images.identity(spec_of(root)) != first


def test_hashes_that_an_earlier_version_noted_are_not_trusted(tmp_path: Path, hashed: list[Path]) -> None:
    """It noted size and times alone."""
    (tmp_path / "data").mkdir()
    file = tmp_path / "data/x.ppm"
    Image.fromarray(noise(seed=1)).save(file)
    expected = images.identity(spec_of(tmp_path / "data"), tmp_path / "cache")
    (noted,) = (tmp_path / "cache").glob("contents-*.json")
    state = file.stat()
    write_json(noted, {str(file): [state.st_size, state.st_mtime_ns, state.st_ctime_ns, "0" * 64]})
    hashed.clear()
    assert images.identity(spec_of(tmp_path / "data"), tmp_path / "cache") == expected
    assert hashed == [file]


CLAIMED = 20 << 30
NO_IMAGES = {  # beginnings of files that hold nothing else
    "zeros": b"",
    "a PNG": png(noise())[:60],
    "a whole PNG": png(noise()),
    "a JPEG": b"\xff\xd8\xff\xe0\0\x10JFIF\0",
    "a TIFF": b"II*\0\x08\0\0\0",
    "a PGM": b"P5\n8 8\n255\n",
    "a PGM with a comment that does not end": b"P5\n#",
    "text": b"hello",
}


def bytes_read() -> int:
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


@pytest.mark.parametrize("begins", NO_IMAGES.values(), ids=NO_IMAGES)
def test_a_file_that_claims_20_gib_is_unreadable_without_being_read(begins: bytes, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/good.png").write_bytes(png(noise()))
    with open(tmp_path / "data/huge.png", "wb") as file:
        file.write(begins)
        file.truncate(CLAIMED)
    spec, before = spec_of(tmp_path / "data", max_unreadable=0.5, split=Split(val=0)), bytes_read()
    first = images.identity(spec, tmp_path / "cache")
    assert images.write(spec, tmp_path / "out", LocalPool()) == {"count": 1, "unreadable": 1}
    assert bytes_read() - before < 4 << 20
    (left_out,) = json.loads((tmp_path / "out/splits.json").read_text())["unreadable"]
    assert left_out["name"] == "huge.png"
    assert re.match(
        r"the file claims 21,474,836,480 bytes, of which only [\d,]+ are on disk; the rest is a hole$", left_out["why"]
    )
    (tmp_path / "data/huge.png").write_bytes(png(noise(seed=1)))
    assert images.identity(spec, tmp_path / "cache") != first


LONG = {
    "noise": (b"\x07", "unknown image format, of"),
    "zeros": (b"\0", "unknown image format, of"),
    "a web page": (b"<html>", "an HTML page, not an image, of"),
    "a HEIC": (b"\0\0\0\x18ftypheic", "unknown image format: HEIC, which ktray does not read, of"),
    "a JPEG without segments": (b"\xff\xd8\xff\xe0\0\x10", "a damaged JPEG file, of"),
    "a PGM of one comment": (b"P5\n#", "a damaged PPM file, of"),
}


@pytest.mark.parametrize(("begins", "said"), LONG.values(), ids=LONG)
def test_a_large_file_that_is_no_image_is_not_read_to_its_end(
    begins: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size that counts as large is lowered, so that no test writes a GiB."""
    for module in (file_kind, image_formats):
        monkeypatch.setattr(module, "LARGE", 1 << 20)
    (tmp_path / "data").mkdir()
    path = tmp_path / "data/huge.png"
    path.write_bytes(begins + b"\x07" * (8 << 20))
    before = bytes_read()
    images.identity(spec_of(tmp_path / "data"))
    with pytest.raises(Unreadable, match=said):
        decode(path, 16)
    assert bytes_read() - before < 1 << 20


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_a_large_image_is_read_and_hashed_like_a_small_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data/image.png"
    Image.fromarray(noise()).save(path, kind, **({"exif": Image.Exif(), "comment": b"x"} if kind == "JPEG" else {}))
    expected, content = decode(path, 40), images.identity(spec_of(tmp_path / "data"))
    for module in (file_kind, image_formats):
        monkeypatch.setattr(module, "LARGE", 100)
    assert (decode(path, 40) == expected).all()
    assert images.identity(spec_of(tmp_path / "data")) == content
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert images.identity(spec_of(tmp_path / "data")) != content


def test_only_data_with_a_range_have_the_revision_of_the_range_in_their_keys(mixed: Path) -> None:
    plain, ranged = (images_stage.stage_of(spec_of(mixed, range=each), "0" * 64).revisions for each in (None, (0, 4095)))
    assert ranged == {**plain, "image_decoding.range": images.RANGE_REVISION}


@pytest.mark.parametrize("copy", [["cp", "-rp"], ["cp", "-r"], ["cp", "-rl"]], ids=" ".join)
def test_a_copy_in_the_place_of_the_original_is_the_same_data(copy, mixed: Path, tmp_path: Path, hashed: list[Path]) -> None:
    first = images.identity(spec_of(mixed), tmp_path / "cache")
    mixed.rename(tmp_path / "old")
    subprocess.run([*copy, str(tmp_path / "old"), str(mixed)], check=True)
    assert images.identity(spec_of(mixed), tmp_path / "cache") == first
    hashed.clear()
    assert images.identity(spec_of(mixed), tmp_path / "cache") == first
    assert hashed == []


def test_a_file_modified_just_now_is_not_cached(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data/x.png"
    file.write_bytes(png(noise(seed=1)))
    os.utime(file, ns=(EPOCH, EPOCH))
    frozen = os.stat(file)
    first = images.identity(spec_of(tmp_path / "data"), tmp_path / "cache")
    changed = bytearray(file.read_bytes())
    changed[60] ^= 1
    file.write_bytes(changed)
    # A file system with coarse times: size and both times are the same as before.
    monkeypatch.setattr("ktray.images.source.file_version", lambda state: file_version(frozen))
    assert images.identity(spec_of(tmp_path / "data"), tmp_path / "cache") != first


def test_a_truncated_cache_is_ignored(mixed: Path, tmp_path: Path) -> None:
    first = images.identity(spec_of(mixed), tmp_path)
    for book in tmp_path.glob("contents-*.json"):
        book.write_text('{"a": [1,')
    assert images.identity(spec_of(mixed), tmp_path) == first


def test_identity_includes_labels_classes_and_boxes(monkeypatch) -> None:
    def identity_of(source: Source) -> str:
        module = ModuleType("stand_in")
        module.LOCATION, module.load = (), lambda spec: Splits(source, identity="pixels")
        monkeypatch.setattr(plugins, "module_of", lambda group, spec: module)
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


# ---- several labels, boxes and masks ----


def annotated_source(root: Path, sides: list[tuple[int, int]]) -> Source:
    """JPEG files of noise of these (height, width), each with two boxes and a mask."""
    root.mkdir(parents=True, exist_ok=True)
    files = [root / f"{index}.jpg" for index in range(len(sides))]
    for file, (height, width) in zip(files, sides, strict=True):
        if not file.exists():
            Image.fromarray(noise(height, width)).save(file)
    return Source(
        names=tuple(file.name for file in files),
        read=lambda index: decode(files[index], 16, annotated=sides[index]),
        classes=("cat", "dog"),
        original=lambda index: files[index],
        presence=np.array([[1, -1], [0, 1], [-1, 1]], np.int8)[: len(sides)],
        sizes=np.array(sides, np.int64),
        boxes=tuple(np.array([[0, 0, w, h, 0], [0, 0, 4, 4, 1]], np.float32) for h, w in sides),
        box_flags=tuple(np.array([[1, 0, 0], [0, 1, 0]], np.bool_) for _ in sides),
        mask=lambda index: np.full(sides[index], 255, np.uint8),
    )


SIDES = [(200, 100), (30, 90), (40, 40)]


@pytest.fixture
def annotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder to which images with everything that can be stated of them were written, as `folder` data."""
    root = tmp_path / "annotated"

    def load(spec: object) -> Splits:
        source = annotated_source(root, SIDES)
        return Splits(source, val=source, files=tuple((name, root / name) for name in source.names))

    monkeypatch.setattr(folder, "load", load)
    images.write(spec_of(root), tmp_path / "out", LocalPool())
    return tmp_path / "out"


def test_what_was_stated_of_images_is_read_as_it_was_written(annotated: Path) -> None:
    found = images.open_split(annotated, "train", spec_of(annotated.parent / "annotated"))
    assert found.presence.tolist() == [[1, -1], [0, 1], [-1, 1]]
    assert found.presence.dtype == np.int8
    # The square of the first image is its middle, 100 x 100 of 100 x 200: the small box in the corner is not in it.
    assert found.boxes[0].tolist() == [[0, 0, 16, 16, 0]]
    assert found.box_flags[0].tolist() == [[True, False, False]]
    assert found.boxes[2].tolist() == [[0, 0, 16, 16, 0], pytest.approx([0, 0, 1.6, 1.6, 1])]


def test_whole_images_keep_their_aspect_ratio_and_their_boxes(annotated: Path) -> None:
    whole = images.open_split(annotated, "train", spec_of(annotated.parent / "annotated")).whole()
    original = np.asarray(Image.open(annotated.parent / "annotated/1.jpg"))
    assert (whole.read(1, None) == original).all()
    assert [whole.read(index, 45).shape for index in range(3)] == [(45, 22, 3), (15, 45, 3), (40, 40, 3)]
    assert whole.sizes.tolist() == [list(sides) for sides in SIDES]
    assert whole.boxes[1].tolist() == [[0, 0, 90, 30, 0], [0, 0, 4, 4, 1]]
    assert whole.box_flags[1].tolist() == [[True, False, False], [False, True, False]]
    assert whole.mask(1).shape == (30, 90)


def test_a_whole_image_that_is_another_now_is_refused(annotated: Path) -> None:
    whole = images.open_split(annotated, "train", spec_of(annotated.parent / "annotated")).whole()
    Image.fromarray(noise(30, 91)).save(annotated.parent / "annotated/1.jpg")
    with pytest.raises(ValueError, match=r"1\.jpg was readable when the data were written.*90 x 30 pixels.*91 x 30"):
        whole.read(1, None)


def test_an_image_turned_by_its_orientation_is_not_read_with_an_annotation(tmp_path: Path) -> None:
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(noise(20, 30)).save(turned, exif=exif)
    assert decode(turned, 16).shape == (20, 30, 3)
    with pytest.raises(Unreadable, match="EXIF orientation 3"):
        decode(turned, 16, annotated=(20, 30))


def test_images_without_annotations_are_read_whole_too(mixed: Path, tmp_path: Path) -> None:
    _, train, _ = written(spec_of(mixed), tmp_path / "out")
    whole, row = train.whole(), train.names.index("b/photo.JPG")
    assert whole.read(row, None).shape == (90, 70, 3)
    assert whole.read(row, 45).shape == (45, 35, 3)
    assert (whole.boxes, whole.sizes, whole.mask) == (None, None, None)


def test_a_class_whose_only_images_are_unreadable_is_not_lost_without_a_word(tmp_path: Path, monkeypatch) -> None:
    source = annotated_source(tmp_path / "few", SIDES)
    monkeypatch.setattr(folder, "load", lambda spec: Splits(source, val=source, files=(("0.jpg", tmp_path / "few/0.jpg"),)))
    (tmp_path / "few/0.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"all 1 images of the class 'cat' in train are unreadable: 0\.jpg"):
        images.write(spec_of(tmp_path / "few", max_unreadable=0.5), tmp_path / "out", LocalPool())


def test_identity_includes_several_labels_and_flags_and_sizes(monkeypatch) -> None:
    def identity_of(**fields: object) -> str:
        module = ModuleType("stand_in")
        source = Source(("0",), labelled().read, classes=("a", "b"), **fields)
        module.LOCATION, module.load = (), lambda spec: Splits(source, identity="pixels")
        monkeypatch.setattr(plugins, "module_of", lambda group, spec: module)
        return images.identity(object())

    variants = [
        {},
        {"presence": np.array([[1, -1]], np.int8)},
        {"presence": np.array([[1, 0]], np.int8)},
        {"sizes": np.array([[4, 5]])},
        {"box_flags": (np.array([[True, False, False]]),)},
        {"box_flags": (np.array([[False, True, False]]),)},
    ]
    assert len({identity_of(**fields) for fields in variants}) == len(variants)

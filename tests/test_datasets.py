"""Data sets: each kind reads real files of its layout, says what is missing, and is the same every time."""

from __future__ import annotations

import ast
import gzip
import hashlib
import os
import pickle
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from ktray import images, plugins
from ktray.errors import UserError
from ktray.pool import LocalPool
from ktray.spec import Split
from ktray.strict import StrictSpec
from tests.pictures import data_spec, listed, picture

ROOT = Path(__file__).parents[1]
KINDS = plugins.kinds("dataset")


# ---- the contract of every kind ----


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_defines_what_a_data_set_must(kind: str) -> None:
    module = plugins.module("dataset", kind)
    fields = module.Spec.model_fields
    assert module.Spec.__bases__ == (StrictSpec,)
    assert fields["kind"].default == kind
    assert fields["split"].default == Split()
    assert fields["max_unreadable"].default == 0.01
    assert "size" in fields
    assert isinstance(module.REVISION, int)
    assert set(module.LOCATION) <= {"path", "download"} & set(fields)
    assert module.__doc__
    assert module.__doc__.splitlines()[0].endswith(".")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "path" in plugins.module("dataset", kind).Spec.model_fields])
def test_a_wrong_path_is_a_user_error_that_says_what_to_do(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        listed(f"{kind}:{tmp_path}/nowhere")
    assert str(tmp_path) in str(caught.value)
    assert caught.value.instead


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_imports_no_slow_library(kind: str) -> None:
    tree = ast.parse(Path(plugins.module("dataset", kind).__file__).read_text())
    imported = {
        name.split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert not imported & {"torchvision", "pyarrow", "sklearn", "skimage", "pickle"}


def test_fields_in_the_string_form_become_numbers_and_truth_values() -> None:
    spec = data_spec("cifar10:/p?size=64&download=true&max_unreadable=0.2")
    assert (spec.path, spec.size, spec.download, spec.max_unreadable) == ("/p", 64, True, 0.2)
    assert data_spec("fashion_mnist_mini?size=64").size == 64
    assert data_spec("synthetic?count=7&classes=3").count == 7


def test_a_wrong_number_in_the_string_form_is_refused() -> None:
    with pytest.raises(ValidationError, match="size"):
        data_spec("fashion_mnist_mini?size=big")


# ---- the embedded set ----


def test_the_embedded_set_has_six_hundred_and_one_hundred_images_per_class() -> None:
    splits = listed("fashion_mnist_mini")
    assert Counter(splits.train.labels.tolist()) == dict.fromkeys(range(10), 600)
    assert Counter(splits.test.labels.tolist()) == dict.fromkeys(range(10), 100)
    assert splits.train.classes == plugins.module("dataset", "fashion_mnist").CLASSES


def test_the_embedded_pixels_are_those_of_fashion_mnist() -> None:
    """The checksum was taken from Debian's dataset-fashion-mnist itself: the raw bytes of the chosen images."""
    splits = listed("fashion_mnist_mini")
    sums = {}
    for name, source in (("train", splits.train), ("test", splits.test)):
        pixels = np.stack([source.read(index)[:, :, 0] for index in range(len(source.names))])
        sums[name] = hashlib.sha256(pixels.tobytes() + source.labels.astype(np.uint8).tobytes()).hexdigest()[:16]
    assert sums == {"train": "d04919469196668f", "test": "22489d4842e74e85"}


def test_the_embedded_set_at_its_own_size_is_not_resampled(tmp_path: Path) -> None:
    spec = data_spec("fashion_mnist_mini")
    images.write(spec, tmp_path, LocalPool())
    test = images.open_split(tmp_path, "test", spec)
    source = listed("fashion_mnist_mini").test
    assert (test.read(np.array([123]))[0] == source.read(123)).all()
    assert (test.labels == source.labels).all()


def test_the_wheel_carries_the_embedded_images(tmp_path: Path) -> None:
    """A wheel built by the build backend itself, from a copy, without a network."""
    pytest.importorskip("setuptools", minversion="77")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a checkout")
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "copy" / name).write_bytes((ROOT / name).read_bytes())
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tmp_path / "copy", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    folder = "ktray/datasets/fashion_mnist_mini"
    assert {f"{folder}/{name}" for name in ("train.png", "test.png", "labels.json", "LICENSE", "__init__.py")} <= set(names)


# ---- torchvision's files ----


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()


def fashion_files(folder: Path, pack: bool) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 10)):
        for name, array in (("images-idx3", random.integers(0, 256, (count, 28, 28))), ("labels-idx1", np.arange(count) % 10)):
            content = idx(array)
            path = folder / f"{part}-{name}-ubyte{'.gz' if pack else ''}"
            path.write_bytes(gzip.compress(content) if pack else content)


@pytest.mark.parametrize(("folder", "pack"), [("FashionMNIST/raw", False), (".", True)])
def test_fashion_mnist_is_what_torchvision_reads(folder: str, pack: bool, tmp_path: Path) -> None:
    from torchvision.datasets import FashionMNIST

    fashion_files(tmp_path / "oracle/FashionMNIST/raw", pack=False)
    fashion_files(tmp_path / "x" / folder, pack)
    splits = listed(f"fashion_mnist:{tmp_path}/x")
    for source, train in ((splits.train, True), (splits.test, False)):
        oracle = FashionMNIST(str(tmp_path / "oracle"), train=train)
        assert source.classes == tuple(oracle.classes)
        assert source.labels.tolist() == oracle.targets.tolist()
        for index in (0, 7):
            assert (source.read(index) == np.asarray(oracle[index][0].convert("RGB"))).all()


def test_a_cut_off_fashion_mnist_file_is_named(tmp_path: Path) -> None:
    fashion_files(tmp_path / "x", pack=True)
    file = tmp_path / "x/train-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=r"train-labels.*damaged"):
        listed(f"fashion_mnist:{tmp_path}/x")


def cifar_files(folder: Path, protocol: int) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(1).integers(0, 256, (6, 20, 3072), dtype=np.uint8)
    labels = np.random.default_rng(2).integers(0, 10, (6, 20))
    for number, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        batch = {"batch_label": name, "labels": labels[number].tolist(), "data": pixels[number], "filenames": ["x.png"] * 20}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    return {"pixels": pixels, "labels": labels}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar_batches_are_read_without_running_them(protocol: int, tmp_path: Path) -> None:
    known = cifar_files(tmp_path / "cifar-10-batches-py", protocol)
    splits = listed(f"cifar10:{tmp_path}")
    assert splits.train.labels.tolist() == known["labels"][:5].reshape(-1).tolist()
    assert splits.test.labels.tolist() == known["labels"][5].tolist()
    expected = known["pixels"][2, 5].reshape(3, 32, 32).transpose(1, 2, 0)  # as torchvision.datasets.CIFAR10 does
    assert (splits.train.read(45) == expected).all()


def test_a_hostile_cifar_batch_runs_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    cifar_files(tmp_path / "cifar-10-batches-py", 2)
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps({"labels": [1], "data": Hostile()}, 2))
    with pytest.raises(UserError):
        listed(f"cifar10:{tmp_path}")
    assert not (tmp_path / "harm").exists()


def test_the_binary_cifar_layout_holds_the_same_images(tmp_path: Path) -> None:
    known = cifar_files(tmp_path / "py/cifar-10-batches-py", 2)
    folder = tmp_path / "bin/cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for number, name in enumerate([f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]):
        rows = np.concatenate([known["labels"][number][:, None].astype(np.uint8), known["pixels"][number]], axis=1)
        (folder / name).write_bytes(rows.tobytes())
    one, other = listed(f"cifar10:{tmp_path}/py"), listed(f"cifar10:{tmp_path}/bin")
    assert (one.train.labels == other.train.labels).all()
    assert all((one.train.read(index) == other.train.read(index)).all() for index in range(100))


def test_a_download_without_a_network_is_a_users_error(tmp_path: Path, monkeypatch) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # the discard port: refused at once
    for kind in ("fashion_mnist", "cifar10"):
        with pytest.raises(UserError, match="could not fetch"):
            listed(f"{kind}:{tmp_path}?download=true")


def test_the_default_folder_comes_from_the_environment(tmp_path: Path, monkeypatch) -> None:
    fashion_files(tmp_path / "FashionMNIST/raw", pack=False)
    monkeypatch.setenv("KTRAY_DATA", str(tmp_path))
    assert len(listed("fashion_mnist").train.names) == 30


# ---- folders ----


def test_a_folder_is_listed_alike_through_links_and_loops(tmp_path: Path) -> None:
    (tmp_path / "x/one").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    picture(0).save(tmp_path / "x/one/a.png")
    picture(1).save(tmp_path / "outside/b.png")
    (tmp_path / "x/linked").symlink_to(tmp_path / "outside")
    (tmp_path / "x/one/loop").symlink_to(tmp_path / "x")
    (tmp_path / "x/gone.png").symlink_to(tmp_path / "nowhere.png")
    assert listed(f"folder:{tmp_path}/x").train.names == ("linked/b.png", "one/a.png")


def class_folders(root: Path, count: int = 4) -> None:
    for number, label in enumerate(("cat", "ant", "bee")):
        (root / label / "nested").mkdir(parents=True)
        for index in range(count):
            picture(10 * number + index).save(root / label / ("nested" if index % 2 else ".") / f"{index}.png")


def test_class_folders_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    class_folders(tmp_path)
    source = listed(f"imagefolder:{tmp_path}").train
    oracle = ImageFolder(str(tmp_path))
    assert source.classes == tuple(oracle.classes)
    expected = {os.path.relpath(path, tmp_path): label for path, label in oracle.samples}
    assert dict(zip(source.names, source.labels.tolist(), strict=True)) == expected


def test_train_val_and_test_folders_are_the_splits(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        class_folders(tmp_path / split, 2)
    splits = listed(f"imagefolder:{tmp_path}")
    assert [len(part.names) for part in (splits.train, splits.val, splits.test)] == [6, 6, 6]
    found = images.split_rows(splits, Split(val=0.5))
    assert {name: len(rows) for name, (_, rows) in found.items()} == {"train": 6, "val": 6, "test": 6}


def test_a_test_class_without_training_images_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "test")
    (tmp_path / "test/dog").mkdir()
    picture(0).save(tmp_path / "test/dog/1.png")
    with pytest.raises(UserError, match="'dog'"):
        listed(f"imagefolder:{tmp_path}")


def test_an_image_outside_the_class_folders_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path)
    picture(0).save(tmp_path / "stray.png")
    with pytest.raises(UserError, match="stray"):
        listed(f"imagefolder:{tmp_path}")


# ---- generated ----


def test_a_generated_image_depends_only_on_seed_and_index() -> None:
    few, many = listed({"kind": "synthetic", "count": 5}), listed({"kind": "synthetic", "count": 500})
    for index in (4, 0, 2):
        assert (few.train.read(index) == many.train.read(index)).all()
        assert few.train.labels[index] == many.train.labels[index]
    other = listed({"kind": "synthetic", "count": 5, "seed": 1})
    assert (few.train.read(0) != other.train.read(0)).any()
    assert (few.train.read(0) != few.test.read(0)).any()


@pytest.mark.parametrize("size", [16, 64, 120])
def test_boxes_are_tight_around_what_is_drawn(size: int) -> None:
    source = listed({"kind": "synthetic", "count": 60, "classes": 48, "size": size, "noise": 0}).train
    for index in range(60):
        ((x0, y0, x1, y1, label),) = source.boxes[index]
        assert label == source.labels[index]
        pixels = source.read(index).astype(np.int64)
        away = np.ones((size, size), bool)  # a soft edge reaches half a pixel further
        away[max(0, int(y0) - 1) : int(y1) + 2, max(0, int(x0) - 1) : int(x1) + 2] = False
        plane = _plane(size)
        ground, *_ = np.linalg.lstsq(plane[away.reshape(-1)], pixels[away], rcond=None)
        distance = np.abs(pixels - (plane @ ground).reshape(size, size, 3)).max(axis=2)
        assert distance[away].max() < 2, "something is drawn outside its box"
        rows, columns = np.flatnonzero((distance > 40).any(axis=1)), np.flatnonzero((distance > 40).any(axis=0))
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(np.array(found) - [x0, y0, x1, y1]).max() <= 2


def _plane(size: int) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size] + 0.5
    return np.stack([x.reshape(-1), y.reshape(-1), np.ones(size * size)], axis=1)


def test_grey_shapes_are_grey_and_have_no_colour_classes() -> None:
    pixels = listed({"kind": "synthetic", "count": 1, "channels": "grey"}).train.read(0)
    assert (pixels[..., 0] == pixels[..., 2]).all()
    with pytest.raises(ValidationError, match="grey"):
        data_spec({"kind": "synthetic", "channels": "grey", "classes": 7})


def test_boxes_survive_writing_with_the_images_they_belong_to(tmp_path: Path) -> None:
    spec = data_spec({"kind": "synthetic", "count": 40, "objects": 4, "classes": 8})
    images.write(spec, tmp_path, LocalPool())
    train = images.open_split(tmp_path, "train", spec)
    source = listed(spec).train
    for name, boxes in zip(train.names, train.boxes, strict=True):
        assert np.allclose(boxes, source.boxes[source.names.index(name)], atol=1e-4)


def test_the_identity_of_generated_data_is_that_of_its_settings() -> None:
    one = images.identity(data_spec("synthetic?count=50"))
    assert images.identity(data_spec({"kind": "synthetic", "count": 50, "split": {"val": 0.5}})) == one
    assert images.identity(data_spec("synthetic?count=50&seed=1")) != one

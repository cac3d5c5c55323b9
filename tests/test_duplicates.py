"""Pictures that are there twice: as files, in their pixels, and nearly; between splits they are said to be a leak."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from ktray.images.duplicates import Signature, find_duplicates, signature
from ktray.runs.data_check import describe
from tests.pictures import data_spec, noise

PICTURES = {name: getattr(data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")}


def as_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


COPIES = {
    "a JPEG of quality 90": lambda pixels: as_jpeg(pixels, 90),
    "a JPEG of quality 20": lambda pixels: as_jpeg(pixels, 20),
    "half as large": lambda pixels: np.asarray(Image.fromarray(pixels).resize((pixels.shape[1] // 2, pixels.shape[0] // 2))),
    "brighter": lambda pixels: np.clip(pixels.astype(int) + 12, 0, 255).astype(np.uint8),
}


@pytest.mark.parametrize("change", COPIES.values(), ids=COPIES.keys())
def test_a_changed_copy_is_found_and_no_other_photograph(change) -> None:
    pictures = list(PICTURES.values())
    found = find_duplicates([signature(each) for each in (*pictures, change(pictures[1]))], lambda index: None)
    assert found.near == ((1, len(pictures)),)


def test_blank_pages_are_the_same_only_if_all_their_pixels_are() -> None:
    pages = [np.full((40, 40, 3), grey, np.uint8) for grey in (255, 250, 255)]
    found = find_duplicates([signature(each) for each in pages], lambda index: None)
    assert (found.near, found.same_pixels) == ((), ((0, 2),))


def test_mirrored_and_cropped_photographs_and_noise_are_not_the_same() -> None:
    pixels = PICTURES["coffee"]
    others = [pixels[:, ::-1], pixels[40:-40, 40:-40], *(noise(64, 64, seed=seed) for seed in range(30))]
    found = find_duplicates([signature(np.ascontiguousarray(each)) for each in (pixels, *others)], lambda index: None)
    assert (found.near, found.same_pixels, found.same_file) == ((), (), ())


def test_pairs_within_the_limit_of_bits_are_all_found_as_by_comparing_every_pair() -> None:
    generator = np.random.default_rng(0)
    bits = [int(each) for each in generator.integers(0, 2**63, 200)]
    bits += [each ^ sum(1 << int(at) for at in generator.choice(63, generator.integers(0, 8), replace=False)) for each in bits]
    alike = np.arange(768, dtype=np.uint8).reshape(256, 3)
    found = find_duplicates(
        [Signature(bytes([n >> 8, n & 255]), each, alike) for n, each in enumerate(bits)], lambda index: None
    )
    wanted = {(i, j) for i in range(len(bits)) for j in range(i) if (bits[i] ^ bits[j]).bit_count() <= 4}
    assert {(group[1], group[0]) for group in found.near} == wanted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photographs each for train and test; of those of test one is the same file, one the same pixels, one nearly."""
    root = tmp_path_factory.mktemp("repeated")
    for name, pixels in PICTURES.items():
        for split, small in (("train", pixels[:200, :200]), ("test", pixels[-200:, -200:])):
            (root / split / "a").mkdir(parents=True, exist_ok=True)
            Image.fromarray(small).save(root / split / "a" / f"{name}.png")
    (root / "test" / "a" / "copy.png").write_bytes((root / "train" / "a" / "astronaut.png").read_bytes())
    Image.open(root / "train" / "a" / "coffee.png").save(root / "test" / "a" / "other.bmp")
    Image.open(root / "train" / "a" / "chelsea.png").save(root / "test" / "a" / "near.jpg", quality=60)
    return root


def test_data_check_names_what_is_in_train_and_in_test(folder: Path) -> None:
    answer = describe(data_spec(f"folder:{folder}"))
    repeated = answer["repeated"]
    assert [[name for _, name in group] for group in repeated["same_file"]] == [["train/a/astronaut.png", "test/a/copy.png"]]
    assert [[name for _, name in group] for group in repeated["same_pixels"]] == [["train/a/coffee.png", "test/a/other.bmp"]]
    assert [[name for _, name in group] for group in repeated["near"]] == [["train/a/chelsea.png", "test/a/near.jpg"]]
    assert repeated["across_splits"] == 3
    assert any("3 pictures are in several splits" in warning for warning in answer["warnings"])


def test_a_picture_with_two_labels_is_said(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(2):
            Image.fromarray(noise(32, 32, seed=number if number == 0 else hash(label) % 1000 + 5)).save(
                tmp_path / label / f"{number}.png"
            )
    answer = describe(data_spec(f"imagefolder:{tmp_path}"))
    assert answer["repeated"]["other_labels"] == 1
    assert "1 repeated picture has several labels" in answer["warnings"]


def test_data_check_decodes_every_image_and_names_each_that_cannot_be_read(tmp_path: Path) -> None:
    for number in range(100):
        Image.fromarray(noise(16, 16, seed=number)).save(tmp_path / f"{number:03d}.png")
    (tmp_path / "037.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    answer = describe(data_spec(f"folder:{tmp_path}"))
    assert answer["decoded"]["images"] == 100
    assert list(answer["decoded"]["unreadable"]) == ["037.png"]
    assert describe(data_spec(f"folder:{tmp_path}"), sample=10)["decoded"]["images"] == 10

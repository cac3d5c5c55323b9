"""Decoding agrees with Pillow, torchvision and scikit-image for every kind of image file."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ktray.images import Unreadable, decode, fit, fit_boxes
from tests.pictures import noise, png


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
def test_transparency_becomes_white(alpha: int) -> None:
    rgba = np.full((4, 4, 4), (200, 100, 0, alpha), np.uint8)
    expected = np.round(np.array([200, 100, 0]) * alpha / 255 + 255 * (1 - alpha / 255))
    assert np.abs(decode(png(rgba), 4)[0, 0] - expected).max() <= 1


def test_a_transparent_palette_colour_is_white() -> None:
    palette = Image.fromarray(np.zeros((4, 4), np.uint8), "L").convert("P")
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    assert (decode(buffer.getvalue(), 4) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_in_pillow(orientation: int) -> None:
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
def test_a_file_that_is_not_an_image_is_unreadable(encoded: bytes) -> None:
    with pytest.raises(Unreadable):
        decode(encoded, 16)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_corrupt_images_are_either_decoded_or_unreadable() -> None:
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


def test_resizing_agrees_with_torchvision() -> None:
    from torchvision.transforms import InterpolationMode, v2

    pixels = noise(60, 60)
    resize = v2.Resize(17, InterpolationMode.BILINEAR, antialias=True)
    assert (fit(pixels, 17) == np.asarray(resize(Image.fromarray(pixels)))).all()


def test_the_square_is_cut_from_the_centre() -> None:
    wide = noise(10, 30)
    assert (fit(wide, 10) == wide[:, 10:20]).all()
    high = noise(30, 10)
    assert (fit(high, 10) == high[10:20]).all()


def test_boxes_move_with_the_pixels_and_are_dropped_with_them() -> None:
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

"""Decoding agrees with Pillow, torchvision and scikit-image for every kind of image file."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from ktray.images import Unreadable, decode, fit, fit_boxes, pixels_and_properties
from ktray.runs.data_check import describe
from tests.pictures import data_spec, noise, png


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


def bomb(side: int = 10_000) -> bytes:
    """A small PNG that claims `side` squared pixels: 100 million are between Pillow's warning and its error."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_an_unreadable_image() -> None:
    with pytest.raises(Unreadable, match="10000 x 10000 pixels are more than max_pixels=89478485"):
        decode(bomb(), 16)


@pytest.mark.parametrize(("side", "limit"), [(20_000, 1000), (20_000, 89_478_485), (60_000, 10**9)])
def test_the_message_about_a_bomb_names_the_setting_and_not_the_limit_of_pillow(
    side: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)
    with pytest.raises(Unreadable, match=rf"^{side**2} pixels are more than max_pixels={limit} of the data set allows$"):
        decode(bomb(side), 16, max_pixels=limit)


@pytest.mark.parametrize("limit", [1599, 1600])
def test_the_largest_image_has_the_number_of_pixels_of_the_setting(limit: int) -> None:
    if limit == 1600:
        assert (decode(png(noise()), 40, max_pixels=limit) == noise()).all()
        return
    with pytest.raises(Unreadable, match="40 x 40 pixels are more than max_pixels=1599"):
        decode(png(noise()), 40, max_pixels=limit)


def test_a_limit_above_that_of_pillow_lets_larger_images_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(Image.DecompressionBombError):  # Pillow refuses more than twice its limit
        Image.open(io.BytesIO(png(noise())))
    assert (decode(png(noise()), 40, max_pixels=1600) == noise()).all()
    with pytest.raises(Unreadable, match="max_pixels=1000"):
        decode(png(noise()), 40, max_pixels=1000)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


LARGE = zlib.compress(b"x" * (3 << 20))
TEXTS = {
    "zTXt": chunk(b"zTXt", b"Comment\0\0" + LARGE),
    "iTXt": chunk(b"iTXt", b"Comment\0\1\0en\0\0" + LARGE),
    "iTXt without a language": chunk(b"iTXt", b"Comment\0\1\0\0\0" + LARGE),
    "tEXt": chunk(b"tEXt", b"Comment\0" + b"x" * (3 << 20)),
    "iCCP": chunk(b"iCCP", b"p\0\0" + LARGE),
    "a damaged iCCP": chunk(b"iCCP", b"p\0\0not zlib"),
    "many": 100 * chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (900 << 10))),
}


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind them"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_large_comment_does_not_make_an_intact_png_unreadable(text: bytes, behind: bool) -> None:
    encoded = png(noise())
    at = len(encoded) - 12 if behind else 33
    assert (decode(encoded[:at] + text + encoded[at:], 40) == noise()).all()


def test_a_large_comment_leaves_the_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = png(noise(), exif=exif)
    (tmp_path / "x.png").write_bytes(encoded[:33] + TEXTS["zTXt"] + encoded[33:])
    assert (decode(tmp_path / "x.png", 40) == np.rot90(noise(), -1)).all()


def test_a_damaged_png_with_a_large_comment_stays_unreadable() -> None:
    encoded = png(noise())
    with pytest.raises(Unreadable):
        decode(encoded[:33] + TEXTS["zTXt"] + encoded[33:200], 40)


def test_nothing_that_pillow_says_reaches_the_screen(tmp_path: Path) -> None:
    """In a process of its own, as pytest catches warnings: images for which Pillow warns, logs or fails."""
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "bands.tif", np.zeros((16, 16, 13), np.uint16), photometric="minisblack", planarconfig="contig")
    Image.new("1", (10_000, 9_500)).save(tmp_path / "large.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 16)).save(tmp_path / "exif.jpg", exif=exif.tobytes()[:-9])
    Image.new("P", (16, 16)).save(tmp_path / "palette.png", transparency=bytes(range(256)))
    (tmp_path / "cut.tif").write_bytes((tmp_path / "bands.tif").read_bytes()[:300])
    script = """
import logging, sys
from pathlib import Path
from ktray.images import Unreadable, decode
logging.basicConfig(level=logging.WARNING)
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        decode(path, 16)
    except Unreadable:
        pass
"""
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


# ---- more than 8 bits ----

WIDE = {
    "12 bits": (np.uint16, 4095),
    "8 bits in 16": (np.uint16, 255),
    "16 bits": (np.uint16, 65535),
    "32 bits": (np.int32, 100_000),
}
WIDE |= {"signed": (np.int16, 3000), "floating point": (np.float32, 1.0)}


@pytest.mark.parametrize(("dtype", "top"), WIDE.values(), ids=WIDE)
def test_a_range_spreads_the_values_of_wide_images_over_all_levels(dtype: type, top: float) -> None:
    """The oracle is scikit-image's rescale_intensity."""
    from skimage.exposure import rescale_intensity

    values = np.linspace(-0.1 * top if np.issubdtype(dtype, np.signedinteger) else 0, top, 1600).reshape(40, 40).astype(dtype)
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.int32) if dtype == np.int16 else values).save(buffer, "TIFF")
    expected = rescale_intensity(values.astype(np.float64), (0, top), (0, 255)).round()
    found = decode(buffer.getvalue(), 40, pixel_range=(0, top))
    assert np.abs(found[:, :, 0] - expected).max() <= 1
    assert len(np.unique(found)) >= 200


NO_WHITE = {
    "32 bits": ("<u4", "32-bit"),
    "signed 32 bits": ("<i4", "signed 32-bit"),
    "big-endian signed 32 bits": (">i4", "signed 32-bit"),
    "signed 16 bits": ("<i2", "signed 16-bit"),
    "big-endian signed 16 bits": (">i2", "signed 16-bit"),
    "floating point": ("<f4", "floating point"),
}


@pytest.mark.parametrize("top", [1, 255, 30_000, 65_535, 100_000])
@pytest.mark.parametrize(("dtype", "kind"), NO_WHITE.values(), ids=NO_WHITE)
def test_numbers_without_a_white_are_unreadable_whatever_their_values(dtype: str, kind: str, top: int) -> None:
    """Of files by tifffile, which also reads back what they hold."""
    tifffile = pytest.importorskip("tifffile")
    top = min(top, 30_000) if dtype[1:] == "i2" else top
    values = np.linspace(0, top, 1600).reshape(40, 40).astype(dtype)
    tifffile.imwrite(buffer := io.BytesIO(), values, byteorder=dtype[0])
    with pytest.raises(Unreadable, match=f"^{kind} pixels have no known range; state it as 'range' of the data set"):
        decode(buffer.getvalue(), 40)
    buffer.seek(0)
    expected = (tifffile.imread(buffer).astype(np.float64) * (255 / top)).round()
    assert np.abs(decode(buffer.getvalue(), 40, pixel_range=(0, top))[:, :, 0] - expected).max() <= 1


@pytest.mark.parametrize("top", [1, 255, 4095, 65_535])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_unsigned_numbers_of_16_bits_keep_their_upper_8_whatever_their_values(form: str, top: int) -> None:
    values = np.linspace(0, top, 1600).reshape(40, 40).astype(np.uint16)
    Image.fromarray(values).save(buffer := io.BytesIO(), form)
    assert (decode(buffer.getvalue(), 40)[:, :, 0] == values >> 8).all()


def test_a_range_leaves_images_of_8_bits_as_they_are_and_refuses_colours_of_16() -> None:
    assert (decode(png(noise()), 40, pixel_range=(0, 4095)) == noise()).all()
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.full((8, 8, 3), 4095, np.uint16), photometric="rgb")
    assert decode(buffer.getvalue(), 8).max() == 15
    with pytest.raises(Unreadable, match="'range' cannot be applied"):
        decode(buffer.getvalue(), 8, pixel_range=(0, 4095))


@pytest.mark.parametrize("text", ["0,4095", "0.5,7"])
def test_a_range_may_stand_in_the_text_form_of_a_data_set(text: str) -> None:
    assert data_spec(f"folder:/p?range={text}").range == tuple(map(float, text.split(",")))


@pytest.mark.parametrize("value", [[5, 5], [9, 1], [0], [0, 1, 2], ["a", "b"], [0, float("inf")], "9", True])
def test_a_range_of_no_two_ascending_numbers_is_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        data_spec({"kind": "folder", "path": "/p", "range": value})


def netpbm(kind: str, maxval: int, numbers: np.ndarray) -> bytes:
    """A PGM (P2, P5) or PPM (P3, P6) of these numbers, as its specification says."""
    height, width = numbers.shape[:2]
    header = f"{kind}\n# by hand\n{width} {height}\n{maxval}\n".encode()
    if kind in ("P2", "P3"):
        return header + b" ".join(b"%d" % number for number in numbers.ravel().tolist()) + b"\n"
    return header + numbers.astype(">u2" if maxval > 255 else np.uint8).tobytes()


@pytest.mark.parametrize("kind", ["P2", "P5"])
@pytest.mark.parametrize("maxval", [256, 300, 1000, 1023, 4095, 16383, 32768, 65534, 65535])
def test_the_range_of_a_pgm_is_in_the_numbers_of_the_file(kind: str, maxval: int) -> None:
    numbers = np.arange(40 * 40).reshape(40, 40) * maxval // 1599
    encoded = netpbm(kind, maxval, numbers)
    for low, high in ((0, maxval), (0, 4095), (17, 200)):
        expected = ((numbers - low) * (255 / (high - low))).round().clip(0, 255)
        assert (decode(encoded, 40, pixel_range=(low, high))[:, :, 0] == expected).all()
    assert np.abs(decode(encoded, 40)[:, :, 0] - numbers * (255 / maxval)).max() <= 1  # white by the header
    found = pixels_and_properties(encoded, data_spec("folder:/p"))[1]
    assert (found.bits, found.low, found.high, found.limit) == (16, 0, maxval, maxval)


@pytest.mark.parametrize("maxval", [256, 4095, 65534])
@pytest.mark.parametrize("kind", ["P2", "P5"])
def test_every_number_of_a_pgm_is_found_again(kind: str, maxval: int) -> None:
    """A range of 256 numbers keeps each of them."""
    numbers = np.arange(maxval + 1)[None]
    encoded = netpbm(kind, maxval, numbers)
    for low in (0, maxval // 2, maxval - 255):
        found = decode(encoded, 8, pixel_range=(low, low + 255))[0, :, 0]
        assert (found == (numbers[0] - low).clip(0, 255)).all()


@pytest.mark.parametrize("maxval", [1, 15, 100, 255])
@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
def test_a_range_leaves_a_pgm_and_ppm_of_8_bits_as_they_are(kind: str, maxval: int) -> None:
    numbers = np.arange(48).reshape((4, 4, 3) if kind in ("P3", "P6") else (6, 8)) % (maxval + 1)
    expected = (numbers * (255 / maxval)).round()
    for pixel_range in (None, (0, 4095)):
        found = decode(netpbm(kind, maxval, numbers), 8, pixel_range=pixel_range)
        assert (found == (expected if expected.ndim == 3 else expected[:, :, None])).all()
    assert pixels_and_properties(netpbm(kind, maxval, numbers), data_spec("folder:/p"))[1].bits == 8


@pytest.mark.parametrize("maxval", [256, 4095, 65535])
@pytest.mark.parametrize("kind", ["P3", "P6"])
def test_a_ppm_of_16_bits_takes_no_range_but_that_of_its_header(kind: str, maxval: int) -> None:
    numbers = np.linspace(0, maxval, 48).astype(int).reshape(4, 4, 3)
    encoded = netpbm(kind, maxval, numbers)
    for pixel_range in (None, (0, maxval)):
        assert np.abs(decode(encoded, 8, pixel_range=pixel_range) - numbers * (255 / maxval)).max() <= 1
    with pytest.raises(Unreadable, match="'range' cannot be applied"):
        decode(encoded, 8, pixel_range=(0, maxval - 1))
    found = pixels_and_properties(encoded, data_spec("folder:/p"))[1]
    assert (found.bits, found.limit, found.high) == (16, maxval, maxval)


def test_a_range_leaves_a_bmp_of_three_channels_in_16_bits_as_it_is() -> None:
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0) + struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    encoded = b"BM" + struct.pack("<IHHI", 14 + len(header) + 4, 0, 0, 14 + len(header)) + header + b"\xff\xff\0\xf8"
    assert decode(encoded, 8, pixel_range=(0, 4095)).tolist() == [[[255, 255, 255], [255, 0, 0]]]


def test_the_numbers_of_a_floating_point_map_are_those_of_the_file() -> None:
    values = np.array([[0, 1, 2, 4]], "<f4")
    encoded = b"Pf\n4 1\n-2.5\n" + values.tobytes()
    assert decode(encoded, 8, pixel_range=(0, 4))[0, :, 0].tolist() == [0, 64, 128, 255]


PICTURE = np.arange(1536, dtype=np.uint16).reshape(16, 32, 3) * 40
TIFFS: dict[str, tuple[np.ndarray, dict[str, object], str | None]] = {  # what tifffile writes, and what is said of it
    "13 bands": (
        np.zeros((16, 16, 13), np.uint16),
        {"photometric": "minisblack", "planarconfig": "contig"},
        "13 bands of 16 bits",
    ),
    "13 planes": (
        np.zeros((13, 16, 16), np.uint16),
        {"photometric": "minisblack", "planarconfig": "separate"},
        "13 bands of 16",
    ),
    "5 bands": (np.zeros((16, 16, 5), np.uint8), {"photometric": "minisblack", "planarconfig": "contig"}, "5 bands of 8 bits"),
    "2 bands": ((PICTURE[..., :2] >> 8).astype(np.uint8), {"photometric": "minisblack", "planarconfig": "contig"}, None),
    "64-bit floating point": (np.zeros((16, 16)), {}, "1 band of 64-bit floating point"),
    "colours in floating point": (np.zeros((16, 16, 3), np.float32), {"photometric": "rgb"}, "3 bands of 32-bit floating"),
    "colours of 16 bits in planes": (
        np.moveaxis(PICTURE, 2, 0),
        {"photometric": "rgb", "planarconfig": "separate"},
        "16-bit colours in separate planes",
    ),
    "signed bytes": (np.full((16, 16), -5, np.int8), {}, "signed pixels"),
    "white is zero": (PICTURE[..., 0], {"photometric": "miniswhite"}, None),
    "colours of 16 bits": (PICTURE, {"photometric": "rgb"}, None),
    "planes of 8 bits": (
        np.moveaxis((PICTURE >> 8).astype(np.uint8), 2, 0),
        {"photometric": "rgb", "planarconfig": "separate"},
        None,
    ),
    "big TIFF": ((PICTURE >> 8).astype(np.uint8), {"photometric": "rgb", "bigtiff": True}, None),
    "big-endian": (PICTURE[..., 0], {"byteorder": ">"}, None),
    "near infrared": (np.dstack([PICTURE, PICTURE[..., :1]]), {"photometric": "rgb", "extrasamples": ["unspecified"]}, None),
}


@pytest.mark.parametrize(("array", "options", "said"), TIFFS.values(), ids=TIFFS)
def test_a_tiff_is_read_right_or_named(array: np.ndarray, options: dict, said: str | None) -> None:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    if said is not None:
        with pytest.raises(Unreadable, match=said):
            decode(buffer.getvalue(), 16)
        return
    found = decode(buffer.getvalue(), 16)
    buffer.seek(0)
    oracle = tifffile.imread(buffer)
    oracle = np.moveaxis(oracle, 0, -1) if options.get("planarconfig") == "separate" else oracle
    oracle = 65535 - oracle if options.get("photometric") == "miniswhite" else oracle
    oracle = oracle[..., :3] if oracle.ndim == 3 and oracle.shape[2] > 2 else oracle.reshape(16, 32, -1)[..., :1].repeat(3, 2)
    assert (found == (oracle >> (8 if oracle.dtype.itemsize == 2 else 0))).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\0\0\0\x18ftypheic" + bytes(99), "HEIC"),
        (b"\0\0\0\x20ftypavif" + bytes(99), "AVIF"),
        (b"8BPS\0\1" + bytes(99), "Photoshop"),
        (b"\0\0\0\x0cjP  \r\n" + bytes(99), "JPEG 2000"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (bytes(128) + b"DICM" + bytes(99), "DICOM"),
        (b"II*\0\xff\xff\xff\xff", "a damaged TIFF"),
        (b"\0\0\0\x18ftypisom" + bytes(99), "a video or another file in MP4's container, not an image"),
        (b"\x1f\x8b\x08" + bytes(99), "a gzip archive, not an image"),
        (b"PK\x03\x04" + bytes(99), "a zip archive, not an image"),
        (b"%PDF-1.7", "a PDF, not an image"),
        (b'{"error": "quota"}', 'a text file that begins with \'{"error": "quota"}\', not an image'),
        (bytes(4096), "begins with zeros, as a download that did not finish leaves them"),
        (base64.b64encode(bytes(range(256)) * 8), "text in base64, not the bytes of an image: decode it first"),
        (b"data:image/png;base64," + base64.b64encode(bytes(range(256))), "text in base64"),
    ],
)
def test_what_is_no_image_is_named(content: bytes, said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        decode(content, 16)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "jpeg", "group4"])
def test_what_libtiff_finds_wrong_does_not_reach_the_screen(compression: str, capfd: pytest.CaptureFixture[str]) -> None:
    buffer = io.BytesIO()
    image = Image.fromarray(noise(64, 64))
    (image.convert("1") if compression == "group4" else image).save(buffer, "TIFF", compression=compression)
    content = bytearray(buffer.getvalue())
    for at in range(150, len(content) - 300, 37):
        content[at] ^= 0xFF
    with contextlib.suppress(Unreadable):
        decode(bytes(content), 16)
    assert capfd.readouterr() == ("", "")


def test_a_sample_says_that_images_of_16_bits_use_12(tmp_path: Path) -> None:
    for number in range(10):
        Image.fromarray(np.full((8, 8), 300 * number, np.uint16)).save(tmp_path / f"{number}.png")
    (warning,) = describe(data_spec(f"folder:{tmp_path}"))["warnings"]
    assert "use only 12 of them" in warning
    assert "11 of 256 levels are left; write range: [0, 4095] in the data set" in warning
    answer = describe(data_spec(f"folder:{tmp_path}?range=0,4095"))
    assert answer["warnings"] == []
    assert (answer["decoded"]["wide"]["low"], answer["decoded"]["wide"]["high"]) == (0, 2700)


TWELVE = Image.fromarray(np.full((8, 8), 2700, np.uint16))
FULL = Image.fromarray(np.full((8, 8), 65000, np.uint16))
COUNTS = np.full((8, 8), 3000, np.int32)
BESIDE: dict[str, tuple[dict[str, Image.Image | bytes], list[str]]] = {
    "a PGM of 12 bits": ({"a.pgm": netpbm("P5", 4095, np.full((8, 8), 4000))}, []),
    "a PGM of 12 bits as text": ({"a.pgm": netpbm("P2", 4095, np.full((8, 8), 4000))}, []),
    "a PPM of 12 bits": ({"a.ppm": netpbm("P6", 4095, np.full((8, 8, 3), 4000))}, []),
    "a PGM that uses few of its numbers": (
        {"a.pgm": netpbm("P5", 4095, np.full((8, 8), 200))},
        ["images of 12 bits use only 8 of them: their largest value is 200, .* range: \\[0, 255\\]"],
    ),
    "a PGM beside a PNG of 12 bits": (
        {"a.pgm": netpbm("P5", 4095, np.full((8, 8), 4000)), "b.png": TWELVE},
        ["images of 16 bits in PNG files use only 12 .* 2700, so that 11 of 256 levels are left; write range: \\[0, 4095\\]"],
    ),
    "a PGM of 10 bits beside a PNG of 12": (
        {"a.pgm": netpbm("P5", 1023, np.full((8, 8), 1000)), "b.png": TWELVE},
        ["images of 16 bits in PNG files use only 12 .*; convert them to 8 bits"],
    ),
    "a TIFF of 16 bits beside a PNG of 12": (
        {"a.tiff": FULL, "b.png": TWELVE},
        ["images of 16 bits in PNG files use only 12 .*; convert them to 8 bits"],
    ),
    "two PNGs of 12 bits and one with a saturated pixel": (
        {"a.png": TWELVE, "b.png": Image.fromarray(np.full((8, 8), 1500, np.uint16)), "c.png": FULL},
        ["half of the images of 16 bits have no value above 2700, and others reach 65000; .* write range: \\[0, 4095\\]"],
    ),
    "a PPM of 8 bits beside a PNG of 12": (
        {"a.ppm": netpbm("P6", 255, np.full((8, 8, 3), 200)), "b.png": TWELVE},
        ["images of 16 bits use only 12 of them: .* write range: \\[0, 4095\\]"],
    ),
    "a TIFF of 32 bits beside a PNG of 12": (
        {"a.tiff": Image.fromarray(COUNTS), "b.png": TWELVE},
        [
            r"1 of 2 images cannot be read, such as a\.tiff: signed 32-bit pixels have no known range; state it",
            r"images of 16 bits use only 12 of them: .* write range: \[0, 4095\]",
        ],
    ),
}


@pytest.mark.parametrize(("files", "said"), BESIDE.values(), ids=BESIDE)
def test_each_kind_of_file_is_judged_by_the_values_that_it_can_hold(
    files: dict[str, Image.Image | bytes], said: list[str], tmp_path: Path
) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            content.save(tmp_path / name)
    warnings = describe(data_spec(f"folder:{tmp_path}"))["warnings"]
    assert len(warnings) == len(said), warnings
    for warning, pattern in zip(warnings, said, strict=True):
        assert re.search(pattern, warning), warning


def test_a_sample_says_what_else_is_odd(tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(8, 8, seed=seed)) for seed in range(2)]
    frames[0].save(tmp_path / "0.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(noise(8, 8)).save(tmp_path / "1.jpg")
    (tmp_path / "2.png").write_bytes(b"<html>")
    found = describe(data_spec(f"folder:{tmp_path}"))
    assert found["decoded"]["formats"] == {"GIF": 1, "JPEG": 1}
    assert found["decoded"]["unreadable"] == {"2.png": "an HTML page, not an image"}
    assert any("several frames" in warning for warning in found["warnings"])
    for path in tmp_path.iterdir():
        path.unlink()
    Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / "mask.png")
    assert describe(data_spec(f"folder:{tmp_path}"))["warnings"] == ["no pixel of 1 image is brighter than 1 of 255"]


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

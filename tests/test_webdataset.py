"""Tar files of WebDataset: the images, labels and splits that Python's tarfile finds in them, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ktray import images
from ktray.datasets.webdataset import tar_members
from ktray.errors import UserError
from ktray.pool import LocalPool
from ktray.runs.recognition import recognise
from tests.pictures import data_spec, listed, noise, picture, png

File = tuple[str, bytes]


def write_tar(path: Path, files: Iterable[File], form: int = tarfile.PAX_FORMAT, mtime: float = 1.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), mtime if form == tarfile.PAX_FORMAT else int(mtime)
            archive.addfile(entry, io.BytesIO(content))
    return path


def samples(count: int, first: int = 0, folder: str = "", label: Any = lambda seed: seed % 3) -> list[File]:
    return [
        file
        for seed in range(first, first + count)
        for file in (
            (f"{folder}{seed:06d}.cls", str(label(seed)).encode()),
            (f"{folder}{seed:06d}.json", json.dumps({"label": {"id": label(seed)}}).encode()),
            (f"{folder}{seed:06d}.png", png(noise(24, 24, seed=seed))),
        )
    ]


FORMS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("folder", ["", "deep/" * 25, "größe/", f"{'n' * 90}/"])
def test_members_are_those_that_tarfile_finds(form: str, folder: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(7, folder=folder), FORMS[form])
    found, others = tar_members.members(path, lambda name, size: name.endswith(".cls"))
    with tarfile.open(path) as archive:
        expected = [(member.name, member.offset_data, member.size) for member in archive]
    assert [(member.name, member.start, member.size) for member in found] == expected
    assert [member.content for member in found if member.name.endswith(".cls")] == [b"%d" % (seed % 3) for seed in range(7)]
    assert not others


def test_what_the_tar_program_writes_is_read_links_apart(tmp_path: Path) -> None:
    for seed in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{seed}.png").write_bytes(png(noise(24, 24, seed=seed)))
    (tmp_path / "in" / "link.png").symlink_to("0.png")
    subprocess.run(["tar", "-cf", tmp_path / "a.tar", "-C", tmp_path / "in", "--sort=name", "."], check=True)
    found = listed(f"webdataset:{tmp_path}/a.tar")
    assert (found.train.read(2) == np.asarray(picture(2))).all()
    assert (len(found.train.names), dict(found.layout.left_out)) == (3, {"links": 1})


@pytest.mark.parametrize("label", ["cls", "json:label.id"])
def test_images_labels_and_splits_are_those_that_were_written(label: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", samples(5))
    write_tar(tmp_path / "train-000001.tar", samples(4, 5))
    write_tar(tmp_path / "val-000000.tar", samples(3, 20))
    found = listed(f"webdataset:{tmp_path}?label={label}")
    assert found.test is None
    for source, seeds in ((found.train, range(9)), (found.val, range(20, 23))):
        assert [(source.read(at) == np.asarray(picture(seed))).all() for at, seed in enumerate(seeds)] == [True] * len(seeds)
        assert source.labels.tolist() == [seed % 3 for seed in seeds]
        assert source.classes == ("0", "1", "2")
    assert found.train.names[5] == "train-000001.tar/000005.png"
    assert recognise(str(tmp_path)).spec == data_spec(f"webdataset:{tmp_path}?label=cls")


def test_a_range_in_braces_names_exactly_its_files(tmp_path: Path) -> None:
    for number in range(12):
        write_tar(tmp_path / f"{number:03d}.tar", samples(1, number))
    found = listed(f"webdataset:{tmp_path}/{{008..010}}.tar")
    assert found.train.names == ("008.tar/000008.png", "009.tar/000009.png", "010.tar/000010.png")
    with pytest.raises(UserError, match=r"012\.tar"):
        listed(f"webdataset:{tmp_path}/{{010..012}}.tar")
    (tmp_path / "005.tar").rename(tmp_path / "x.tar")
    write_tar(tmp_path / "part-0001.tar", samples(1))
    write_tar(tmp_path / "part-0004.tar", samples(1))
    assert "there are only 2 of the 4 files part-1 to 4" in listed(f"webdataset:{tmp_path}").layout.warnings


def test_pixels_written_once_and_decoded_on_demand_are_the_same(tmp_path: Path) -> None:
    files = samples(40)
    files[3 * 7 + 2] = ("000007.png", b"broken")
    write_tar(tmp_path / "data.tar", files)
    spec = data_spec(f"webdataset:{tmp_path}/data.tar?label=cls&size=16&max_unreadable=0.1")
    for name, limit in (("mapped", 1 << 30), ("streamed", 0)):
        assert images.write(spec, tmp_path / name, LocalPool(), limit) == {"count": 39, "unreadable": 1}
    one, other = (images.open_split(tmp_path / name, "train", spec) for name in ("mapped", "streamed"))
    indices = np.random.default_rng(0).permutation(len(one))
    assert (one.read(indices) == other.read(indices)).all()
    assert not list((tmp_path / "streamed").glob("*.bin")), "images in tar files need no copy"


def test_the_content_counts_and_the_place_does_not(tmp_path: Path) -> None:
    for place in ("here", "there", "other"):
        write_tar(tmp_path / place / "train.tar", samples(3, 1 if place == "other" else 0))
    here, there, other = (images.identity(data_spec(f"webdataset:{tmp_path}/{place}")) for place in ("here", "there", "other"))
    assert here == there != other
    assert here != images.identity(data_spec(f"webdataset:{tmp_path}/here?label=cls"))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("files", "query", "harm", "message"),
    [
        (samples(3), "", lambda path: cut(path, 5000), "cut off"),
        (samples(3), "", lambda path: cut(path, 700), "ends within the header at byte 512|cut off"),
        (samples(3), "", lambda path: path.write_bytes(gzip.compress(path.read_bytes())), "gzip archive.*Unpack"),
        (samples(3), "", lambda path: path.write_bytes(b"<html>"), "web page"),
        (samples(3), "", lambda path: path.write_bytes(b""), "is empty"),
        ([("a.txt", b"x")], "", None, "hold no images .*1 .txt"),
        ([("a.png", b"x"), ("a.jpg", b"x")], "", None, "several images: a.png, a.jpg.*image=png"),
        ([("a.png", b"x"), ("b.png", b"x"), ("a.png", b"x")], "", None, "sample a is twice"),
        (samples(3), "?label=txt", None, "3 of 3 images have no label in 'txt'"),
        (samples(3), "?label=json:class", None, "no label in 'json:class'"),
        (samples(3, label=lambda seed: ("cat", "Cat ", "dog")[seed]), "?label=cls", None, "look alike"),
        (
            samples(3, label=lambda seed: ("cat", 1, "dog")[seed]),
            "?label=cls",
            None,
            r"numbers \(1\) beside names \(cat, dog\)",
        ),
        (samples(3, label=lambda seed: [1]), "?label=json:label.id", None, "is no label"),
    ],
)
def test_what_is_damaged_or_ambiguous_is_refused(files, query, harm, message, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train.tar", files)
    if harm is not None:
        harm(path)
    with pytest.raises(UserError) as caught:
        listed(f"webdataset:{path}{query}")
    assert re.search(message, str(caught.value)), caught.value


def test_the_named_image_is_taken_and_a_test_split_may_hide_its_labels(tmp_path: Path) -> None:
    pair = [("a.in.png", png(noise(24, 24, seed=1))), ("a.seg.png", png(noise(24, 24, seed=2))), ("a.cls", b"7")]
    write_tar(tmp_path / "train.tar", pair)
    write_tar(tmp_path / "test.tar", [*pair[:2], ("a.cls", b"-1")])
    found = listed(f"webdataset:{tmp_path}?image=seg.png&label=cls")
    assert (found.train.read(0) == np.asarray(picture(2))).all()
    assert (found.train.classes, found.test.labels) == (("7",), None)


@pytest.mark.slow
def test_a_hundred_thousand_images_are_listed_in_less_than_600_bytes_each(tmp_path: Path) -> None:
    block = write_tar(tmp_path / "one.tar", samples(1000)).read_bytes()
    for number in range(100):
        (tmp_path / f"train-{number:06d}.tar").write_bytes(block)
    (tmp_path / "one.tar").unlink()
    code = """
import sys, time
from tests.child import peak_memory
from tests.pictures import listed
before, start = peak_memory(), time.perf_counter()
found = listed(f"webdataset:{sys.argv[1]}?label=cls")
print(len(found.train.names), (peak_memory() - before) / len(found.train.names), time.perf_counter() - start)
"""
    answer = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    count, bytes_each, _ = map(float, answer.stdout.split())
    assert count == 100_000
    assert bytes_each < 600

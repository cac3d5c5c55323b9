"""Which parquet files a path means, which split each belongs to, and what is said of files that are damaged."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from ktray import images
from ktray.cli.data_command import description
from ktray.errors import UserError
from ktray.images.source import Unreadable
from ktray.pool import LocalPool
from ktray.runs.data_check import describe
from tests.parquet_files import CLASSES, COLOURS, hub, image_of, write_classes
from tests.pictures import data_spec, listed


def files_of(data: Any) -> dict[str, list[str]]:
    return {split: list(files) for split, files in listed(data).layout.read_from.items()}


def write_all(root: Path, names: str) -> None:
    for name in names.split():
        write_classes(root / name, CLASSES, CLASSES)


# ---- splits ----


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("training-0.parquet testing-0.parquet", "train test"),
        ("Train.parquet Test.parquet Val.parquet", "train test val"),
        ("cifar-train.parquet cifar-test.parquet", "train test"),
        ("Training/0.parquet Testing/0.parquet Validation/0.parquet", "train test val"),
        ("data/dev-00000-of-00001.parquet data/train-00000-of-00001.parquet", "val train"),
        ("split=train/p-0.parquet split=test/p-0.parquet", "train test"),
        ("my-test-set/train.parquet my-test-set/valid.parquet", "train val"),
        ("train/latest.parquet test/latest.parquet", "train test"),
        ("seg_train/seg_train/0.parquet seg_test/seg_test/0.parquet", "train test"),
        ("default/train/0000.parquet default/partial-test/0000.parquet", "train test"),
        ("train.parquet eval.parquet", "train test"),
        ("train.parquet eval.parquet test.parquet", "train val test"),
        ("part-0.parquet part-1.parquet", "train train"),
        ("mytrain.parquet mytest.parquet", "train test"),
        ("trainval.parquet test.parquet", "train test"),
        ("tr.parquet fr.parquet", "train train"),
        ("latest.parquet", "train"),
        ("TRAIN.PARQUET test.Pq", "train test"),
        ("train.parquet/part-0.snappy.parquet test.parquet/part-0.snappy.parquet", "train test"),
    ],
)
def test_the_words_of_a_path_are_its_split(names: str, splits: str, tmp_path: Path) -> None:
    write_all(tmp_path, names)
    found = files_of(f"parquet:{tmp_path}?label=label")
    assert {name: split for split, files in found.items() for name in files} == dict(
        zip(names.split(), splits.split(), strict=True)
    )


@pytest.mark.parametrize(
    ("names", "message", "named"),
    [
        ("train-0.parquet extra-0.parquet", "belongs to no split", "extra-0.parquet"),
        ("train/0.parquet 0.parquet 1.parquet", "belong to no split", "0.parquet, 1.parquet"),
        ("test.parquet", "no training files", "test.parquet"),
        ("test.parquet valid.parquet", "no training files", "test.parquet for test; valid.parquet for val"),
        ("train/test-0.parquet test/train-0.parquet", "which split", "'train/test-0.parquet' (train and test)"),
        ("trainval.parquet val.parquet", "which split", "'trainval.parquet'"),
        ("is_train=0/0.parquet is_train=1/0.parquet", "which split", "'is_train=0/0.parquet'"),
        ("train_test_split-0.parquet", "which split", "'train_test_split-0.parquet'"),
        ("retrain.parquet retest.parquet", "different splits", "retrain.parquet and retest.parquet"),
        ("x-tr.parquet x-te.parquet", "different splits", "x-tr.parquet and x-te.parquet"),
    ],
)
def test_files_whose_split_is_unclear_are_refused_by_name(names: str, message: str, named: str, tmp_path: Path) -> None:
    write_all(tmp_path, names)
    with pytest.raises(UserError, match=message) as caught:
        listed(f"parquet:{tmp_path}")
    assert named in str(caught.value)
    assert caught.value.instead


def test_a_file_or_folder_that_is_given_by_name_is_for_training_and_its_other_word_is_said(tmp_path: Path) -> None:
    write_all(tmp_path, "test/part-0.parquet test/part-1.parquet train_test.parquet")
    for path, files in (("test/part-0.parquet", 1), ("test", 2), ("test/*.parquet", 2), ("train_test.parquet", 1)):
        layout = listed(f"parquet:{tmp_path}/{path}").layout
        assert len(layout.read_from["train"]) == files
        assert [("speaks of test" in warning) for warning in layout.warnings] == ([] if "part-0" in path else [True])


# ---- paths ----


@pytest.mark.parametrize(
    "folder", ["[v2] set", "a[b", "a]b", "[!x]", "[[]", "what?", "star*", "{a,b}", "x#y", "ä ö", "-x", "$HOME", "~x"]
)
def test_a_folder_of_any_name_is_taken_as_it_is(folder: str, tmp_path: Path) -> None:
    write_all(tmp_path / "decoy", "train.parquet")
    for name in ("train-0", "test-0"):
        write_classes(tmp_path / folder / "data" / f"{name}.parquet", CLASSES)
    for path in (folder, f"{folder}/data", f"{folder}/data/*.parquet", f"{folder}/**/*.parquet", f"{folder}/**"):
        splits = listed({"kind": "parquet", "path": str(tmp_path / path)})
        assert (len(splits.train.names), len(splits.test.names)) == (3, 3), path
    one = listed({"kind": "parquet", "path": str(tmp_path / folder / "data/test-0.parquet")})
    assert one.train.names == ("test-0.parquet#0", "test-0.parquet#1", "test-0.parquet#2")


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("*.parquet", "train-0 train-1 [a]-train"),
        ("train-?.parquet", "train-0 train-1"),
        ("train-[0].parquet", "train-0"),
        ("train-[!0].parquet", "train-1"),
        ("[a]-train.parquet", "[a]-train"),
        ("[a]-*.parquet", "[a]-train"),
        ("[[]a]-*.parquet", "[a]-train"),
        ("**/*-1.parquet", "train-1 deep/er/train-1"),
        ("**/**/*-1.parquet", "train-1 deep/er/train-1"),
        ("*/*/train-1.parquet", "deep/er/train-1"),
        ("d*/**", "deep/er/train-1"),
        ("de*/*/*", "deep/er/train-1"),
    ],
)
def test_a_pattern_selects_files(pattern: str, files: str, tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "[a]-train", "deep/er/train-1", ".hidden/train-1"):
        write_classes(tmp_path / f"{name}.parquet", CLASSES)
    (tmp_path / "deep/er/notes.txt").write_text("x")
    found = listed({"kind": "parquet", "path": f"{tmp_path}/{pattern}"}).files
    assert sorted(name for name, _ in found) == sorted(f"{name}.parquet" for name in files.split())


def test_a_pattern_of_files_without_the_suffix_takes_them(tmp_path: Path) -> None:
    write_all(tmp_path, "part-0 part-1 other")
    assert list(files_of(f"parquet:{tmp_path}/part-*")["train"]) == ["part-0", "part-1"]


def test_brackets_that_may_be_read_in_two_ways_are_refused(tmp_path: Path) -> None:
    write_all(tmp_path, "[ab]-train.parquet a-train.parquet")
    with pytest.raises(UserError, match="brackets") as caught:
        listed({"kind": "parquet", "path": f"{tmp_path}/[ab]-*.parquet"})
    assert "[[]" in caught.value.instead


@pytest.mark.parametrize(
    "path", ["none", "none/*.parquet", "*.parquet", "{a,b}/*.parquet", "empty", "a\0b", "x" * 300, "~nobody-here"]
)
def test_a_path_without_parquet_files_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/labels.csv").write_text("x")
    with pytest.raises(UserError) as caught:
        listed({"kind": "parquet", "path": path if path.startswith("~") else f"{tmp_path}/{path}"})
    assert caught.value.instead
    if path == "empty":
        assert "1 .csv" in str(caught.value)


def test_links_to_themselves_and_to_folders_above_end_and_are_counted(tmp_path: Path) -> None:
    write_all(tmp_path, "data/train.parquet data/test.parquet")
    for number in range(5):
        (tmp_path / f"data/up{number}").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "data/self.parquet").symlink_to(tmp_path / "data/self.parquet")
    (tmp_path / "data/gone.parquet").symlink_to(tmp_path / "gone.parquet")
    os.mkfifo(tmp_path / "data/pipe.parquet")
    splits = listed(f"parquet:{tmp_path}")
    assert files_of(f"parquet:{tmp_path}") == {"train": ["data/train.parquet"], "test": ["data/test.parquet"]}
    assert splits.layout.left_out == {"links to a folder above them": 5, "broken links and special files": 3}


def test_a_folder_with_too_much_below_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktray.images.file_patterns._MAX_ENTRIES", 50)
    for number in range(6):  # each folder holds two links to the next: 2^6 paths
        (tmp_path / f"f{number}").mkdir()
        for link in "ab":
            (tmp_path / f"f{number}/{link}").symlink_to(tmp_path / f"f{number + 1}", target_is_directory=True)
    with pytest.raises(UserError, match="more than 50"):
        listed({"kind": "parquet", "path": f"{tmp_path}/**"})


def test_one_file_under_two_names_is_refused(tmp_path: Path) -> None:
    write_all(tmp_path, "blobs/1234 snapshots/none.txt")
    for revision in ("a", "b"):
        (tmp_path / f"snapshots/{revision}").mkdir()
        (tmp_path / f"snapshots/{revision}/train.parquet").symlink_to(tmp_path / "blobs/1234")
    with pytest.raises(UserError, match=r"a/train\.parquet and snapshots/b/train\.parquet are the same file"):
        listed(f"parquet:{tmp_path}")
    assert len(listed(f"parquet:{tmp_path}/snapshots/a").train.names) == 3


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """pyarrow opens no such path."""
    write_classes(tmp_path / "x.parquet", CLASSES).rename(tmp_path / os.fsdecode(b"train-\xff.parquet"))
    with pytest.raises(UserError, match="is not UTF-8"):
        listed(f"parquet:{tmp_path}")


# ---- what is said ----


def test_the_layout_says_files_order_classes_and_what_was_left_out(tmp_path: Path) -> None:
    for name, labels in (("train-00000-of-00003", [2, 1, 0]), ("train-00002-of-00003", [0, 0, 0]), ("test", [0, 1, 2])):
        write_classes(tmp_path / f"data/{name}.parquet", ["dog"] * 3, labels, hub(CLASSES))
    write_classes(tmp_path / "data/validation.parquet", [], pa.array([], pa.int64()))
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "data/dataset_infos.JSON").write_text("{}")
    (tmp_path / "LICENSE").write_text("x")
    layout = listed(f"parquet:{tmp_path}?label=label").layout
    assert layout.read_from == {
        "train": {"data/train-00000-of-00003.parquet": 3, "data/train-00002-of-00003.parquet": 3},
        "test": {"data/test.parquet": 3},
    }
    assert layout.left_out == {".md": 1, ".json": 1, "without suffix": 1}
    assert layout.order == "files by name, rows as in their file"
    assert layout.classes == "names from the files' metadata, in its order"
    empty, missing = layout.warnings
    assert "no val split: data/validation.parquet has no rows" in empty
    assert "only 2 of the 3 files data/train-*-of-00003" in missing


def test_files_of_one_name_in_several_folders_are_pointed_out(tmp_path: Path) -> None:
    write_all(tmp_path, "small/train-0.parquet full/train-0.parquet full/train-1.parquet")
    (warning,) = listed(f"parquet:{tmp_path}").layout.warnings
    assert "train-0.parquet from each of 2 folders (full, small)" in warning


def test_data_check_prints_what_was_assumed(tmp_path: Path) -> None:
    write_classes(tmp_path / "train.parquet", CLASSES * 2, [2, 1, 0] * 2, hub(CLASSES))
    write_classes(tmp_path / "test.parquet", CLASSES, [0, 1, 2], hub(["ape", "cow", "zebra"]))
    text = "\n".join(description(describe(data_spec(f"parquet:{tmp_path}?label=label"))))
    for said in ("zebra 2, ape 2, cow 2", "3 test.parquet", "which number them differently; in the order of train.parquet"):
        assert said in text


# ---- columns ----


def image_column(kind: str) -> Any:
    blobs = [image_of(name) for name in CLASSES]
    if kind == "struct of large bytes":
        return pa.StructArray.from_arrays([pa.array(blobs, pa.large_binary()), pa.array(["a", "b", "c"])], ["bytes", "path"])
    if kind == "struct of a view":
        return pa.StructArray.from_arrays([pa.array(["a", "b", "c"]), pa.array(blobs, pa.binary_view())], ["path", "bytes"])
    if kind == "dictionary":
        return pa.array(blobs).dictionary_encode()
    return pa.array(blobs, getattr(pa, kind)())


KINDS = ["binary", "large_binary", "binary_view", "struct of large bytes", "struct of a view", "dictionary"]


@pytest.mark.parametrize("name", ["image", "my image", "image.bytes", "a.b.c"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_every_arrow_type_in_a_column_of_any_name_are_read(kind: str, name: str, tmp_path: Path) -> None:
    parquet.write_table(pa.table({"label": CLASSES, name: image_column(kind)}), tmp_path / "train.parquet")
    source = listed(f"parquet:{tmp_path}?label=label").train
    for row, expected in enumerate(CLASSES):
        assert source.encoded(row) == image_of(expected)
        assert (source.read(row) == np.array(COLOURS[expected], np.uint8)).all()


def test_a_struct_and_a_column_with_its_dotted_name_are_told_apart(tmp_path: Path) -> None:
    other = pa.array([b"no image"] * 3)
    table = pa.table({"image": image_column("struct of large bytes"), "image.bytes": other, "label": CLASSES, "label.x": other})
    parquet.write_table(table, tmp_path / "train.parquet")
    splits = listed(f"parquet:{tmp_path}?label=label&image=image")
    assert splits.train.encoded(1) == image_of("ape")
    assert [splits.train.classes[label] for label in splits.train.labels] == CLASSES
    assert listed(f"parquet:{tmp_path}?image=image.bytes").train.encoded(1) == b"no image"


@pytest.mark.parametrize(
    ("columns", "query", "message"),
    [
        (["image", "image", "label"], "", "several columns named 'image'"),
        (["image", "label", "label"], "?label=label", "several columns named 'label'"),
        (["image", "other", "label"], "", "Name one of image, other"),
        (["image", "label"], "?image=label", "no column 'label' of encoded images.*image"),
        (["label", "text"], "", r"Columns that can hold images: none. The file has label \(string\), text \(string\)"),
        (["image", "label"], "?label=Label", r"no column 'Label'. It has image \(binary\), label \(string\)"),
    ],
)
def test_doubled_and_absent_columns_are_refused(columns: list[str], query: str, message: str, tmp_path: Path) -> None:
    arrays = [image_column("binary") if name in ("image", "other") else pa.array(CLASSES) for name in columns]
    parquet.write_table(pa.Table.from_arrays(arrays, columns), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=message):
        listed(f"parquet:{tmp_path}{query}")


def test_a_doubled_column_that_nobody_asks_for_does_not_matter(tmp_path: Path) -> None:
    arrays = [image_column("binary"), pa.array(CLASSES), pa.array([1, 2, 3]), pa.array([4, 5, 6])]
    parquet.write_table(pa.Table.from_arrays(arrays, ["image", "label", "x", "x"]), tmp_path / "train.parquet")
    assert len(listed(f"parquet:{tmp_path}?label=label").train.names) == 3


def test_files_that_name_the_images_differently_are_refused(tmp_path: Path) -> None:
    for name in ("train", "test"):
        parquet.write_table(pa.table({f"{name} image": image_column("binary")}), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"train image in train\.parquet, test image in test\.parquet"):
        listed(f"parquet:{tmp_path}")


def test_files_that_store_the_images_differently_are_read(tmp_path: Path) -> None:
    for name, kind in (("train", "struct of large bytes"), ("test", "binary")):
        parquet.write_table(pa.table({"image": image_column(kind)}), tmp_path / f"{name}.parquet")
    splits = listed(f"parquet:{tmp_path}")
    assert splits.train.encoded(2) == splits.test.encoded(2) == image_of("cow")


def test_rows_that_only_name_paths_are_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    rows = [{"bytes": None, "path": f"{name}.png"} for name in CLASSES]
    table = pa.table({"image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))})
    parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"no row of .* holds an image"):
        listed(f"parquet:{tmp_path}")


# ---- damage ----

PNG = image_of("ape")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n <html><body>404", "web page"),
        (b"PAR1" + bytes(100), "has no end"),
        (b"PAR1", "is damaged"),
        (b"PAR1" + bytes(20) + b"PAR1", "is damaged"),
        (b"PAR1" + b"\xff" * 20 + (8).to_bytes(4, "little") + b"PAR1", "is damaged"),
        (b"PAR1" + bytes(20) + b"\xff\xff\xff\x7fPAR1", "is damaged"),
        (b"PARE" + bytes(20) + b"PARE", "is encrypted"),
        (PNG, "is an image"),
        (b"image,label\n", "text file that begins with 'image,label'"),
        (b"x", "text file that begins with 'x'"),
        (gzip.compress(b"PAR1", mtime=0), "gzip archive"),
        (bytes(1000), "begins with zeros"),
        (b"ARROW1" + bytes(100), "begins with b'ARRO'"),
    ],
)
def test_a_file_that_is_no_parquet_file_is_named_with_what_it_is(content: bytes, message: str, tmp_path: Path) -> None:
    write_all(tmp_path, "train-0.parquet")
    (tmp_path / "train-1.parquet").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        listed(f"parquet:{tmp_path}")
    assert str(tmp_path / "train-1.parquet") in str(caught.value)
    assert caught.value.instead


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_classes(tmp_path / "train.parquet", CLASSES, CLASSES).read_bytes()
    for length in range(0, len(whole), 53):
        (tmp_path / "train.parquet").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"train\.parquet (has no end|is damaged|is no parquet file)"):
            listed(f"parquet:{tmp_path}?label=label")


def test_a_sparse_file_of_a_hundred_terabytes_is_refused_at_once(tmp_path: Path) -> None:
    whole = write_classes(tmp_path / "whole.parquet", CLASSES, CLASSES).read_bytes()
    (tmp_path / "whole.parquet").unlink()
    with open(tmp_path / "train.parquet", "wb") as file:
        file.write(whole)
        try:
            file.seek(8 << 40)
        except OSError:
            pytest.skip("this file system has no files of 8 TiB")
        file.write(whole[-1000:])
    began = time.monotonic()
    with pytest.raises(UserError, match=r"claims 8,796,093,0.* bytes, of which only"):
        listed(f"parquet:{tmp_path}?label=label")
    assert time.monotonic() - began < 5


def test_a_billion_rows_without_images_are_refused_before_they_are_named(tmp_path: Path) -> None:
    rows = 3_000_000
    table = pa.table({"image": pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([PNG]))})
    parquet.write_table(table, tmp_path / "train.parquet", row_group_size=rows)
    with pytest.raises(UserError, match="cannot hold images in 3,000,000 rows"):
        listed(f"parquet:{tmp_path}")


@pytest.mark.parametrize("checksums", [True, False])
def test_a_damaged_page_costs_its_rows_and_no_time(checksums: bool, tmp_path: Path) -> None:
    blobs = [np.random.default_rng(row).bytes(500) for row in range(4000)]
    table = pa.table({"image": blobs})
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "data_page_size": 50_000, "write_batch_size": 50}
    parquet.write_table(table, tmp_path / "train.parquet", write_page_checksum=checksums, row_group_size=3000, **options)
    content = bytearray((tmp_path / "train.parquet").read_bytes())
    at = content.index(blobs[2000])  # zstd stores what it cannot compress
    content[at - 300 : at + 300] = bytes(600)
    (tmp_path / "train.parquet").write_bytes(content)
    source = listed(f"parquet:{tmp_path}").train
    began, unreadable, wrong = time.monotonic(), 0, 0
    for row, blob in enumerate(blobs):
        try:
            wrong += source.encoded(row) != blob
        except Unreadable:
            unreadable += 1
    assert time.monotonic() - began < 5
    assert source.encoded(3999) == blobs[3999]  # of the next row group
    if checksums:  # the rest of the row group cannot be reached
        assert (wrong, 1000 <= unreadable <= 1100) == (0, True)
    else:
        assert 0 < unreadable + wrong <= 1100


def test_text_labels_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe")])
    parquet.write_table(pa.table({"image": [PNG], "label": broken}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"'label' of .* has text that is not UTF-8: the byte 0x"):
        listed(f"parquet:{tmp_path}?label=label")


def test_decoded_images_keep_the_labels_of_readable_rows(tmp_path: Path) -> None:
    rows = [{"bytes": image_of(name), "path": None} for name in CLASSES * 40]
    rows[7], rows[50] = {"bytes": None, "path": "x.png"}, {"bytes": b"broken", "path": None}
    table = pa.table({"image": rows, "label": [["cow", "zebra", "ape"].index(name) for name in CLASSES * 40]})
    metadata = {"huggingface": json.dumps(hub(["cow", "zebra", "ape"]))}
    parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "train.parquet")
    spec = data_spec(f"parquet:{tmp_path}?label=label&size=8&max_unreadable=0.1")
    (tmp_path / "out").mkdir()
    assert images.write(spec, tmp_path / "out", LocalPool())["unreadable"] == 2
    for split in ("train", "val"):
        opened = images.open_split(tmp_path / "out", split, spec)
        for pixels, label in zip(opened.read(np.arange(len(opened))), opened.labels, strict=True):
            assert tuple(pixels[4, 4]) == COLOURS[opened.classes[label]]

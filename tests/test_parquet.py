"""Parquet files as published on data-set hubs, streamed row by row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from ktray import images
from ktray.errors import UserError
from ktray.pool import LocalPool
from tests.pictures import data_spec, listed, noise, picture, png


def table(count: int, form: str, first: int = 0, labels=None) -> pa.Table:
    blobs = [png(noise(24, 24, seed=first + index)) for index in range(count)]
    if form == "struct":
        paths = pa.array([f"{index}.png" for index in range(count)])
        column = pa.StructArray.from_arrays([pa.array(blobs, pa.binary()), paths], ["bytes", "path"])
    else:
        column = pa.array(blobs, form)
    return pa.table({"img": column, "label": pa.array([i % 3 for i in range(count)] if labels is None else labels)})


@pytest.mark.parametrize("form", ["struct", "binary", "large_binary"])
def test_parquet_rows_decode_to_the_images_that_were_written(form: str, tmp_path: Path) -> None:
    parquet.write_table(table(70, form), tmp_path / "train-00000-of-00002.parquet", row_group_size=40)
    parquet.write_table(table(50, form, 70), tmp_path / "train-00001-of-00002.parquet", row_group_size=7)
    parquet.write_table(table(9, form, 200), tmp_path / "test.parquet")
    splits = listed(f"parquet:{tmp_path}?label=label")
    assert (len(splits.train.names), len(splits.test.names), splits.val) == (120, 9, None)
    order = [0, 1, 69, 70, 119, 5, 39, 40, 38, 90]
    for index in order:
        assert (splits.train.read(index) == np.asarray(picture(index))).all(), index
    assert (splits.test.read(8) == np.asarray(picture(208))).all()
    assert splits.train.labels.tolist() == [i % 3 for i in range(70)] + [i % 3 for i in range(50)]
    assert splits.train.classes == ("0", "1", "2")


def test_streamed_parquet_equals_the_memmap_and_keeps_a_copy_for_random_access(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ktray.images.writing._BLOCK_ROWS", 16)
    rows = table(120, "struct").to_pylist()
    rows[50]["img"]["bytes"] = b"broken"
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=50)
    spec = data_spec(f"parquet:{tmp_path}/train.parquet?label=label&size=16")
    for name, limit in (("mapped", 1 << 30), ("streamed", 0)):
        assert images.write(spec, tmp_path / name, LocalPool(), limit) == {"count": 119, "unreadable": 1}
    (tmp_path / "train.parquet").unlink()
    for split in ("train", "val"):
        one, other = (images.open_split(tmp_path / name, split, spec) for name in ("mapped", "streamed"))
        indices = np.random.default_rng(0).permutation(len(one))
        assert (one.read(indices) == other.read(indices)).all()
        assert one.labels.tolist() == other.labels.tolist()


def test_hub_metadata_name_the_classes(tmp_path: Path) -> None:
    features = {"label": {"names": ["cat", "dog", "emu", "fox"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(table(6, "struct").replace_schema_metadata(metadata), tmp_path / "train.parquet")
    assert listed(f"parquet:{tmp_path}?label=label").train.classes == ("cat", "dog", "emu", "fox")


def test_string_labels_and_gaps_in_numbers_become_classes(tmp_path: Path) -> None:
    for name, labels in (("words", ["b", "a", "c"]), ("numbers", [10, 2, 100])):
        parquet.write_table(table(3, "binary", labels=labels), tmp_path / f"{name}.parquet")
    words, numbers = (listed(f"parquet:{tmp_path}/{name}.parquet?label=label").train for name in ("words", "numbers"))
    assert (words.classes, words.labels.tolist()) == (("a", "b", "c"), [1, 0, 2])
    assert (numbers.classes, numbers.labels.tolist()) == (("2", "10", "100"), [1, 0, 2])


def test_hidden_test_labels_leave_the_test_split_unlabelled(tmp_path: Path) -> None:
    parquet.write_table(table(4, "binary"), tmp_path / "train.parquet")
    parquet.write_table(table(4, "binary", labels=[-1] * 4), tmp_path / "test.parquet")
    splits = listed(f"parquet:{tmp_path}?label=label")
    assert splits.test.labels is None
    assert splits.train.labels is not None


def test_splits_are_read_from_folder_names_too_and_a_pattern_selects_files(tmp_path: Path) -> None:
    for name in ("default/train/0000", "default/validation/0000", "default/test/0000", "data/unlabeled-0", "data/unlabeled-1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table(5, "binary"), tmp_path / f"{name}.parquet")
    splits = listed(f"parquet:{tmp_path}/default")
    assert [len(part.names) for part in (splits.train, splits.val, splits.test)] == [5, 5, 5]
    assert len(listed(f"parquet:{tmp_path}/data/unlabeled*.parquet").train.names) == 10
    with pytest.raises(UserError, match="belong to no split"):
        listed(f"parquet:{tmp_path}")


@pytest.mark.parametrize(
    ("query", "message"),
    [("image=nothing", "img"), ("label=nothing", "nothing"), ("label=img", "whole numbers or texts")],
)
def test_a_wrong_column_is_refused_with_the_columns_that_exist(query: str, message: str, tmp_path: Path) -> None:
    parquet.write_table(table(3, "struct"), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=message):
        listed(f"parquet:{tmp_path}?{query}")


def test_two_columns_of_images_need_a_choice(tmp_path: Path) -> None:
    both = table(3, "binary").append_column("other", table(3, "binary", 50)["img"])
    parquet.write_table(both, tmp_path / "train.parquet")
    with pytest.raises(UserError, match="img, other"):
        listed(f"parquet:{tmp_path}")
    assert (listed(f"parquet:{tmp_path}?image=other").train.read(1) == np.asarray(picture(51))).all()


def test_a_large_row_group_is_not_read_into_memory(tmp_path: Path) -> None:
    blob = np.random.default_rng(0).bytes(200_000)  # bytes that no image has: all rows are unreadable, and only read
    writer = parquet.ParquetWriter(tmp_path / "train.parquet", pa.schema({"img": pa.binary()}), compression="none")
    writer.write_table(pa.table({"img": [blob] * 1500}), row_group_size=1500)
    writer.close()
    code = """
import sys
from tests.child import peak_memory
from ktray import plugins
spec = plugins.parse("dataset", {"kind": "parquet", "path": sys.argv[1]})
source = plugins.module_of("dataset", spec).load(spec).train
source.encoded(0)
before = peak_memory()
assert all(len(source.encoded(index)) == 200_000 for index in range(1500))
print((peak_memory() - before) >> 20)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "train.parquet")]
    answer = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert int(answer.stdout) < 100, "300 MB of rows"

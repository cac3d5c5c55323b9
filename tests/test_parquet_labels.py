"""Labels in parquet files: names decide, per file; what cannot be matched is refused with both lists of names."""

from __future__ import annotations

import decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ktray.errors import UserError
from tests.parquet_files import CLASSES, hub, named_labels, write_classes
from tests.pictures import listed

SORTED = sorted(CLASSES)
SIX = CLASSES * 2


def numbers(classes: list[str], names: list[str]) -> list[int]:
    return [names.index(name) for name in classes]


# ---- one file: every way to write a label ----

TEXTS: dict[str, Any] = {
    "string": pa.array(SIX),
    "large_string": pa.array(SIX, pa.large_string()),
    "string_view": pa.array(SIX, pa.string_view()),
    "dictionary": pa.array(SIX).dictionary_encode(),
    "dictionary of large strings": pa.array(SIX, pa.large_string()).dictionary_encode(),
    "dictionary with unused and reordered entries": pa.DictionaryArray.from_arrays(
        pa.array([2, 1, 3] * 2, pa.int8()), ["yak", "ape", "zebra", "cow"]
    ),
    "ordered dictionary": pa.DictionaryArray.from_arrays(pa.array([0, 1, 2] * 2, pa.uint8()), CLASSES, ordered=True),
    "bytes, as Spark writes texts": pa.array([name.encode() for name in SIX]),
    "large bytes": pa.array([name.encode() for name in SIX], pa.large_binary()),
    "bytes view": pa.array([name.encode() for name in SIX], pa.binary_view()),
    "two chunks": pa.chunked_array([pa.array(SIX[:2]), pa.array(SIX[2:])]),
    "json extension": pa.ExtensionArray.from_storage(pa.json_(), pa.array(SIX)) if hasattr(pa, "json_") else pa.array(SIX),
}


@pytest.mark.parametrize("form", TEXTS)
def test_texts_of_every_type_are_the_names_of_the_classes(form: str, tmp_path: Path) -> None:
    write_classes(tmp_path / "train.parquet", SIX, TEXTS[form])
    splits = listed(f"parquet:{tmp_path}?label=label")
    assert splits.train.classes == tuple(SORTED)
    said, seen = named_labels(splits, "train", tmp_path)
    assert said == seen
    assert splits.layout.classes == "the texts in 'label', sorted"


NUMBERS: dict[str, Any] = {
    **{str(kind): pa.array([0, 1, 2] * 2, kind) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())},
    **{str(kind): pa.array([0, 1, 2] * 2, kind) for kind in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())},
    **{str(kind): pa.array([0.0, 1.0, 2.0] * 2, kind) for kind in (pa.float16(), pa.float32(), pa.float64())},
    "decimal": pa.array([decimal.Decimal(n) for n in (0, 1, 2)] * 2, pa.decimal128(5, 2)),
    "dictionary of numbers": pa.array([0, 1, 2] * 2).dictionary_encode(),
}


@pytest.mark.parametrize("form", NUMBERS)
def test_numbers_of_every_type_get_the_names_of_the_metadata_in_its_order(form: str, tmp_path: Path) -> None:
    write_classes(tmp_path / "train.parquet", SIX, NUMBERS[form], hub(CLASSES))
    splits = listed(f"parquet:{tmp_path}?label=label")
    assert splits.train.classes == tuple(CLASSES)
    said, seen = named_labels(splits, "train", tmp_path)
    assert said == seen
    assert splits.train.labels.tolist() == [0, 1, 2] * 2
    assert splits.layout.classes == "names from the files' metadata, in its order"


def test_truth_values_are_classes_with_and_without_names(tmp_path: Path) -> None:
    labels = [True, False, True]
    write_classes(tmp_path / "plain/train.parquet", CLASSES, labels)
    write_classes(tmp_path / "named/train.parquet", CLASSES, labels, hub(["cow", "dog"]))
    plain, named = (listed(f"parquet:{tmp_path}/{name}?label=label").train for name in ("plain", "named"))
    assert [plain.classes[label] for label in plain.labels] == ["True", "False", "True"]
    assert [named.classes[label] for label in named.labels] == ["dog", "cow", "dog"]


@pytest.mark.parametrize(
    "names",
    [
        {"0": "zebra", "1": "ape", "2": "cow"},
        {"2": "cow", "0": "zebra", "1": "ape"},
        [{"name": "label", "dtype": {"class_label": {"names": {"0": "zebra", "1": "ape", "2": "cow"}}}}],
        [{"name": "image", "dtype": "image"}, {"name": "label", "dtype": {"class_label": {"names": CLASSES}}}],
    ],
)
def test_names_by_number_and_lists_of_features_are_metadata_too(names: Any, tmp_path: Path) -> None:
    metadata = {"info": {"features": names}} if isinstance(names, list) else hub(names)
    write_classes(tmp_path / "train.parquet", SIX, numbers(SIX, CLASSES), metadata)
    splits = listed(f"parquet:{tmp_path}?label=label")
    assert splits.train.classes == tuple(CLASSES)
    said, seen = named_labels(splits, "train", tmp_path)
    assert said == seen


@pytest.mark.parametrize(
    ("metadata", "warned"),
    [
        (b"not json", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"", "no JSON"),
        (b"[]", "another form"),
        (b"3", "another form"),
        ({"info": []}, None),
        ({"info": ["a"]}, "another form"),
        ({"info": {"features": "x"}}, "another form"),
        ({"info": {"features": [3]}}, "another form"),
        ({"info": {"features": [{"dtype": "image"}]}}, "another form"),
        ({"info": {"features": {"label": [1]}}}, "another form"),
        (hub("zebra"), "another form"),
        (hub([None, "ape", "cow"]), "another form"),
        (hub({"0": "zebra", "2": "cow", "3": "ape"}), "another form"),
        (hub(None), None),
        (hub([]), None),
        ({"info": {"features": None}}, None),
        ({"info": None}, None),
        ({}, None),
        ({"info": {"features": {"label": None}}}, None),
        ({"info": {"features": {"label": {"dtype": "int64", "_type": "Value"}}}}, None),
        ({"info": {"features": {"label": {"class_label": None}}}}, None),
    ],
)
def test_metadata_without_usable_names_leaves_the_numbers_and_says_so(
    metadata: Any, warned: str | None, tmp_path: Path
) -> None:
    write_classes(tmp_path / "train.parquet", SIX, numbers(SIX, CLASSES), metadata)
    splits = listed(f"parquet:{tmp_path}?label=label")
    assert splits.train.classes == ("0", "1", "2")
    assert "no file names them" in splits.layout.classes
    assert [warned in warning for warning in splits.layout.warnings] == ([True] if warned else [])


@pytest.mark.parametrize(
    ("labels", "metadata", "message"),
    [
        ([[0], [1], [2]], None, "One image has one label"),
        (pa.array([[0, 1]] * 3, pa.list_(pa.int64(), 2)), None, "One image has one label"),
        ([{"id": 1}] * 3, None, "One image has one label"),
        ([0.0, 0.5, 1.0], None, r"numbers such as 0\.5"),
        ([0.0, float("inf"), 1.0], None, "numbers such as inf"),
        ([0.0, 1e300, 1.0], None, "numbers such as 1e"),
        ([0, None, 2], None, "1 of 3 train labels"),
        ([0, -1, 2], None, "1 of 3 train labels"),
        ([0.0, float("nan"), 2.0], None, "1 of 3 train labels"),
        (["a", "", "b"], None, "1 of 3 train labels"),
        (pa.array(["a", None, "b"]).dictionary_encode(), None, "1 of 3 train labels"),
        (pa.nulls(3), None, "3 of 3 train labels"),
        ([-1, -1, -1], None, "3 of 3 train labels"),
        (pa.array([1, 2, 3], pa.date32()), None, "holds date32"),
        (pa.array([1, 2, 3], pa.timestamp("s")), None, "holds timestamp"),
        (pa.array([b"abc"] * 3, pa.binary(3)), None, "holds fixed_size_binary"),
        (pa.array([b"\xff"] * 3), None, "has text that is not UTF-8: the byte 0xff. Write the column as UTF-8 text"),
        ([0, 1, 3], hub(CLASSES), "label 3 .*zebra, ape, cow"),
        ([0, 1, -2], hub(CLASSES), "label -2 .*zebra, ape, cow"),
        (["zebra", "ape", "yak"], hub(CLASSES), "label 'yak' .*zebra, ape, cow"),
        (["0", "1", "2"], hub(CLASSES), "label '0' .*zebra, ape, cow"),
        ([0, 1, 2], hub(["cow", "ape", "cow"]), "several classes 'cow'"),
    ],
)
def test_labels_that_are_not_one_class_per_image_are_refused(labels: Any, metadata: Any, message: str, tmp_path: Path) -> None:
    write_classes(tmp_path / "train.parquet", CLASSES, labels, metadata)
    with pytest.raises(UserError, match=message) as caught:
        listed(f"parquet:{tmp_path}?label=label")
    assert str(tmp_path) in str(caught.value) or "train.parquet" in str(caught.value)
    assert caught.value.instead


# ---- several files ----


@pytest.mark.parametrize(
    ("train_names", "other_names"),
    [
        (CLASSES, SORTED),
        (CLASSES, CLASSES[::-1]),
        (CLASSES, [*SORTED, "dog"]),
        (CLASSES, ["cow", "zebra"]),
        ([*CLASSES, "dog"], SORTED),
    ],
)
@pytest.mark.parametrize("other", ["test-0", "val-0", "train-1"])
def test_files_that_number_classes_differently_mean_the_same_classes(
    train_names: list[str], other_names: list[str], other: str, tmp_path: Path
) -> None:
    present = [name for name in SIX if name in other_names]
    write_classes(tmp_path / "train-0.parquet", SIX, numbers(SIX, train_names), hub(train_names))
    write_classes(tmp_path / f"{other}.parquet", present, numbers(present, other_names), hub(other_names))
    splits = listed(f"parquet:{tmp_path}?label=label")
    assert splits.train.classes[: len(train_names)] == tuple(train_names)
    for split in splits.layout.read_from:
        said, seen = named_labels(splits, split, tmp_path)
        assert said == seen
    assert "which number them differently; in the order of train-0.parquet" in splits.layout.classes


def test_the_order_of_classes_is_that_of_the_training_files(tmp_path: Path) -> None:
    write_classes(tmp_path / "a-test.parquet", SIX, numbers(SIX, SORTED), hub(SORTED))
    write_classes(tmp_path / "b-train.parquet", SIX, numbers(SIX, CLASSES), hub(CLASSES))
    splits = listed(f"parquet:{tmp_path}?label=label")
    assert splits.train.classes == splits.test.classes == tuple(CLASSES)


TEXT, NAMED, NUMBERED = CLASSES, (numbers(CLASSES, SORTED), hub(SORTED)), numbers(CLASSES, CLASSES)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (TEXT, TEXT),
        (TEXT, NAMED),
        (NAMED, TEXT),
        (pa.array(CLASSES).dictionary_encode(), pa.array(CLASSES[::-1] + CLASSES)[3:].dictionary_encode()),
        (pa.array(CLASSES, pa.large_string()), [name.encode() for name in CLASSES]),
        (NAMED, (CLASSES, hub(CLASSES))),
    ],
    ids=["texts", "texts, names", "names, texts", "dictionaries", "large texts, bytes", "names, texts with names"],
)
def test_texts_and_named_numbers_of_different_files_are_matched(train: Any, test: Any, tmp_path: Path) -> None:
    for name, labels in (("train", train), ("test", test)):
        write_classes(tmp_path / f"{name}.parquet", CLASSES, *(labels if isinstance(labels, tuple) else (labels,)))
    splits = listed(f"parquet:{tmp_path}?label=label")
    for split in ("train", "test"):
        said, seen = named_labels(splits, split, tmp_path)
        assert said == seen


@pytest.mark.parametrize(
    ("train", "test", "both"),
    [
        (TEXT, NUMBERED, ("zebra, ape, cow", "0, 1, 2")),
        (NUMBERED, TEXT, ("zebra, ape, cow", "0, 1, 2")),
        (NAMED, NUMBERED, ("ape, cow, zebra", "0, 1, 2")),
        (NUMBERED, NAMED, ("ape, cow, zebra", "0, 1, 2")),
        (NAMED, (NUMBERED, b"not json"), ("ape, cow, zebra", "0, 1, 2")),
        ([True, False, True], [1, 0, 1], ("True, False", "1, 0")),
        ([1, 0, 1], ["1", "x", "1"], ("1, 0", "1, x")),
        (TEXT, ["Zebra", "Ape", "Cow"], ("'zebra'", "'Zebra'")),
        (TEXT, ["zebra ", "ape", "cow"], ("'zebra'", "'zebra '")),
        (["polo shirt", "bag", "cap"], ["polo_shirt", "bag", "cap"], ("'polo shirt'", "'polo_shirt'")),
        (["caf\u00e9", "bar", "inn"], ["cafe\u0301", "bar", "inn"], ("'caf\u00e9'", "'cafe\u0301'")),
        (TEXT, ["Pferd", "Affe", "Kuh"], ("zebra, ape, cow", "Pferd, Affe, Kuh")),
        (NAMED, (NUMBERED, hub(["Pferd", "Affe", "Kuh"])), ("zebra, ape, cow", "Pferd, Affe, Kuh")),
        ([0, 1, 2], [10, 11, 12], ("0, 1, 2", "10, 11, 12")),
        ([0, 1, 2], [1, 2, 3], ("from 0 to 2", "from 1 to 3")),
        ([1.0, 2.0, 4.0], [0, 1, 3], ("from 1 to 4", "from 0 to 3")),
    ],
)
def test_labels_that_cannot_be_matched_are_refused_with_both_lists(train: Any, test: Any, both: Any, tmp_path: Path) -> None:
    for name, labels in (("train", train), ("test", test)):
        write_classes(tmp_path / f"{name}.parquet", CLASSES, *(labels if isinstance(labels, tuple) else (labels,)))
    with pytest.raises(UserError, match="cannot be matched between files") as caught:
        listed(f"parquet:{tmp_path}?label=label")
    assert all(listed_names in str(caught.value) for listed_names in both)
    assert "test" in str(caught.value)
    assert "train" in str(caught.value)


@pytest.mark.parametrize(
    ("train", "test", "classes"),
    [
        (["7", "10", "9"], [7, 10, 9], ("7", "9", "10")),  # the same names, as text and as numbers
        ([0, 1, 2], ([0, 2, 1], hub(["0", "1", "2"])), ("0", "1", "2")),
        (pa.array([0, 1, 2], pa.uint8()), [0.0, 2.0, 1.0], ("0", "1", "2")),
        (["A", "a", "b"], ["a", "A", "A"], ("A", "a", "b")),  # a file that tells them apart
    ],
)
def test_numbers_that_are_names_and_names_that_differ_by_case_are_kept(
    train: Any, test: Any, classes: Any, tmp_path: Path
) -> None:
    for name, labels in (("train", train), ("test", test)):
        write_classes(tmp_path / f"{name}.parquet", CLASSES, *(labels if isinstance(labels, tuple) else (labels,)))
    splits = listed(f"parquet:{tmp_path}?label=label")
    assert splits.train.classes == splits.test.classes == classes
    values = test[0] if isinstance(test, tuple) else test
    assert [splits.test.classes[label] for label in splits.test.labels] == [f"{v:g}" if v != str(v) else v for v in values]


@pytest.mark.parametrize("hidden", [[-1] * 3, pa.nulls(3), pa.nulls(3, pa.string()), [float("nan")] * 3, [""] * 3, None])
def test_a_test_split_whose_labels_are_hidden_has_none(hidden: Any, tmp_path: Path) -> None:
    write_classes(tmp_path / "train.parquet", CLASSES, *NAMED)
    write_classes(tmp_path / "test.parquet", CLASSES, hidden, hub(SORTED))
    splits = listed(f"parquet:{tmp_path}?label=label")
    assert splits.test.labels is None
    assert splits.test.classes == ()
    assert splits.train.classes == tuple(SORTED)


def test_labels_hidden_in_one_of_two_test_files_are_refused_by_name(tmp_path: Path) -> None:
    write_classes(tmp_path / "train.parquet", CLASSES, *NAMED)
    write_classes(tmp_path / "test-0.parquet", CLASSES, *NAMED)
    write_classes(tmp_path / "test-1.parquet", CLASSES, [-1] * 3)
    with pytest.raises(UserError, match=r"3 of 6 test labels.*3 in test-1\.parquet"):
        listed(f"parquet:{tmp_path}?label=label")
    write_classes(tmp_path / "test-1.parquet", CLASSES)
    with pytest.raises(UserError, match=r"test-1\.parquet has no column 'label'"):
        listed(f"parquet:{tmp_path}?label=label")


def test_a_file_without_rows_says_nothing_about_labels(tmp_path: Path) -> None:
    write_classes(tmp_path / "train-1.parquet", CLASSES, TEXT)
    for number in (0, 2):
        write_classes(tmp_path / f"train-{number}.parquet", [], pa.array([], pa.int64()))
    splits = listed(f"parquet:{tmp_path}?label=label")
    said, seen = named_labels(splits, "train", tmp_path)
    assert said == seen


def test_a_column_of_captions_is_said_to_be_no_labels(tmp_path: Path) -> None:
    write_classes(tmp_path / "train.parquet", CLASSES * 50, [f"caption {number}" for number in range(150)])
    (warning,) = listed(f"parquet:{tmp_path}?label=label").layout.warnings
    assert "150 different values" in warning


def test_a_column_of_long_texts_is_refused_as_labels(tmp_path: Path) -> None:
    write_classes(tmp_path / "train.parquet", CLASSES * 4, [str(number) * 1_000_000 for number in range(12)])
    with pytest.raises(UserError, match="more than 10,000,000 characters of different values"):
        listed(f"parquet:{tmp_path}?label=label")


def test_a_column_of_labels_as_bytes_is_not_taken_for_the_images(tmp_path: Path) -> None:
    write_classes(tmp_path / "train.parquet", CLASSES, [name.encode() for name in CLASSES])
    splits = listed(f"parquet:{tmp_path}?label=label")
    assert named_labels(splits, "train", tmp_path)[0] == CLASSES
    with pytest.raises(UserError, match="several columns"):
        listed(f"parquet:{tmp_path}")

"""Parquet files of any layout: the right classes and counts or one paragraph, never a traceback, a hang or gigabytes."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from ktray.images.split_words import SPLITS
from tests.child import Answer, Child, require_user_error_or_answer
from tests.parquet_files import CLASSES, COLOURS, hub, image_of

WORDS = ["train", "Training", "TRAIN", "test", "Testing", "val", "valid", "dev", "eval", "trainval", "extra", "latest", "data"]
NAMES = st.one_of(
    st.builds(lambda word, number: f"{word}-{number}", st.sampled_from(WORDS), st.integers(0, 3)),
    st.builds(lambda word: f"{word}-00000-of-00002", st.sampled_from(WORDS)),
    st.builds(lambda one, other: f"{one}{other}", st.sampled_from(WORDS), st.sampled_from(WORDS)),
    st.sampled_from(["[v2]", "[", "]", "*", "??", "{a}", "a b", "é", "\x1b[31m", "-x", "x" * 200, "#1", "a=b", "%20"]),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=6),
)
SUFFIXES = st.sampled_from([".parquet", ".parquet", ".parquet", ".PARQUET", ".pq", ".json", ""])
ODD_METADATA = st.sampled_from(
    [
        b"",
        b"not json",
        b"[]",
        b"\xff",
        b"{" * 3000,
        {"info": None},
        {"info": {"features": None}},
        hub(None),
        hub("abc"),
        hub([1]),
    ]
)
IMAGES = ["struct", "binary", "large_binary", "binary_view", "dictionary", "text", "null", "paths", "list"]
LABELS = ["names", "texts", "dictionary", "bytes", "view", "numbers", "floats", "odd"]
ODD_LABELS = st.one_of(
    st.lists(st.integers(-2, 4), min_size=1),
    st.lists(st.floats(), min_size=1),
    st.lists(st.booleans() | st.none(), min_size=1),
    st.lists(st.text(max_size=3) | st.none(), min_size=1),
    st.lists(st.binary(max_size=3), min_size=1),
    st.lists(st.lists(st.integers(0, 3), max_size=2), min_size=1),
    st.lists(st.none(), min_size=1),
    st.lists(st.integers(0, 2**63 - 1), min_size=1),
)


@dataclass(frozen=True)
class File:
    """A file to write, and what its labels are called; `named` is None if nothing is certain about them."""

    path: str
    table: pa.Table
    options: dict[str, Any]
    damage: tuple[str, float]
    named: tuple[str, ...] | None


def images(form: str, classes: list[str]) -> Any:
    blobs = [image_of(name) for name in classes]
    if form in ("struct", "paths"):
        rows = [{"bytes": blob if form == "struct" else None, "path": "x.png"} for blob in blobs]
        return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    others = {
        "text": pa.array(["x.png"] * len(blobs)),
        "null": pa.nulls(len(blobs)),
        "list": pa.array([[blob] for blob in blobs]),
    }
    if form in others:
        return others[form]
    return pa.array(blobs).dictionary_encode() if form == "dictionary" else pa.array(blobs, getattr(pa, form)())


@st.composite
def files(draw: st.DrawFn) -> File:
    classes = draw(st.lists(st.sampled_from(list(COLOURS)), max_size=6) | st.just(CLASSES * 2))
    order = draw(st.permutations(list(COLOURS)))
    form, metadata, named = draw(st.sampled_from(LABELS)), draw(st.none() | ODD_METADATA), None
    numbers = [order.index(name) for name in classes]
    if form == "names":
        labels, metadata, named = pa.array(numbers), hub(order), tuple(classes)
    elif form in ("numbers", "floats"):
        labels = pa.array(numbers, pa.int16() if form == "numbers" else pa.float32())
    elif form == "odd":
        odd = draw(ODD_LABELS)
        labels = pa.array((odd * (len(classes) // len(odd) + 1))[: len(classes)])
    else:
        kinds = {"bytes": pa.binary(), "view": pa.string_view()}
        texts = [name.encode() for name in classes] if form == "bytes" else classes
        labels, named = pa.array(texts, kinds.get(form, pa.string())), tuple(classes)
        labels = labels.dictionary_encode() if form == "dictionary" else labels
        metadata = draw(st.none() | st.just(hub(order)))
    columns = [("image", images(draw(st.sampled_from(IMAGES[:5] * 3 + IMAGES)), classes)), ("label", labels)]
    columns += draw(st.sampled_from([[]] * 5 + [columns[:1], columns[1:], [("label.x", labels)], [("image.bytes", labels)]]))
    names = draw(st.sampled_from([["image", "label"]] * 8 + [["img", "label"], ["image", "target"], ["label", "image"]]))
    table = pa.Table.from_arrays([a for _, a in columns], names + [name for name, _ in columns[2:]])
    if metadata is not None:
        raw = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
        table = table.replace_schema_metadata({b"huggingface": raw})
    options = {"row_group_size": draw(st.sampled_from([1, 4, 1000])), "compression": draw(st.sampled_from(["zstd", "none"]))}
    folders = draw(st.lists(NAMES.filter(lambda name: name not in (".", "..")), max_size=2))
    path = "/".join([*folders, draw(NAMES) + draw(SUFFIXES)])
    damage = draw(st.sampled_from([*["none"] * 8, "cut", "flip", "zeros", "text", "doubled"])), draw(st.floats(0, 0.99))
    return File(path, table, options, damage, named)


def write(root: Path, file: File) -> bool:
    """Whether the file could be written; a path may be a folder of another one."""
    path = root / file.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as stream:
            parquet.write_table(file.table, stream, **file.options)
    except (OSError, pa.ArrowException):
        return False
    what, at = file.damage
    content = bytearray(path.read_bytes())
    place = int(at * len(content))
    if what == "cut":
        content = content[:place]
    elif what == "flip":
        content[place] ^= 1 << (place % 8)
    elif what == "zeros":
        content[place : place + 50] = bytes(min(50, len(content) - place))
    elif what == "text":
        content = bytearray(b"version https://git-lfs.github.com/spec/v1\n")
    elif what == "doubled":
        content = content * 2
    path.write_bytes(content)
    return True


_numbers = itertools.count()


def check(child: Child, home: Path, drawn: list[File], query: str, pattern: str) -> None:
    """Check, and import in every third case, a folder with these files."""
    number = next(_numbers)
    root = home / f"data{number % 20}"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    written = {file.path: file for file in drawn if write(root, file)}
    path = f"{root}/{pattern}" if pattern else next((str(root / name) for name in written if "?" not in name), str(root))
    answer = child.run("data", "check", f"parquet:{path}{query}", "--json")
    require_user_error_or_answer(answer)
    if answer.code == 0:
        require_right_classes(json.loads(answer.out), written)
        if number % 3 == 0:
            imported = child.run("data", "import", f"parquet:{path}{query}&size=8".replace("&", "&" if query else "?", 1))
            assert "Traceback" not in imported.err
            assert imported.code in (0, 2, 3), imported
            require_user_error_or_answer(Answer(**{**vars(imported), "code": 0}))


def require_right_classes(answer: dict[str, Any], written: dict[str, File]) -> None:
    """Checks the number of images of each class of each split, where every file's labels are certain."""
    for split in SPLITS:
        of_split = answer["splits"].get(split)
        if not of_split:
            continue
        found = [next(file for path, file in written.items() if path.endswith(name)) for name in of_split["read_from"]]
        if of_split["labelled"] and all(file.named is not None and file.damage[0] == "none" for file in found):
            counts = Counter(name for file in found for name in file.named or ())
            assert {name: n for name, n in of_split["images_of_class"].items() if n} == counts


QUERIES = st.sampled_from(["?label=label"] * 6 + ["", "?label=nothing", "?label=label&image=image", "?image=img"])
PATTERNS = st.sampled_from(["."] * 6 + ["", "**", "*", "*/*", "**/*.parquet", "[vt]*", "nothing", "t*"])
LAYOUTS = given(drawn=st.lists(files(), min_size=1, max_size=4), query=QUERIES, pattern=PATTERNS)
FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=500)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@FEW
@LAYOUTS
def test_no_parquet_layout_ends_in_a_traceback_a_hang_or_wrong_classes(
    child: Child, home: Path, drawn: list[File], query: str, pattern: str
) -> None:
    check(child, home, drawn, query, pattern)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@MANY
@LAYOUTS
def test_none_of_many_parquet_layouts_ends_in_a_traceback_a_hang_or_wrong_classes(
    child: Child, home: Path, drawn: list[File], query: str, pattern: str
) -> None:
    check(child, home, drawn, query, pattern)

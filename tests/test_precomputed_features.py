"""Precomputed features as a teacher: rows of a file, matched to images by path or by their order in the data set."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import yaml
from pyarrow import parquet

from ktray import plugins
from ktray.cli import main
from ktray.errors import StageFailed, UserError
from ktray.features import extraction
from ktray.features.precomputed import row_numbers
from ktray.images import open_split, split_rows
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.naming import pair_name, stage_name
from ktray.pipeline.pair_check import check_pair, data_loader
from ktray.pipeline.pair_graph import build
from ktray.pool import StageContext
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.search.space import parse_pair
from ktray.spec import PairSpec, PrecomputedTeacher
from ktray.stores.file import FileStore
from tests.precomputed_files import COUNT, WIDTH, npy, npy_names, numbers, paths, photos, table
from tests.toys import DATA, toy_pair, toy_spec

IDENTITY = data_identity()


def as_views(teacher: dict[str, Any]) -> dict[str, Any]:
    """The same table with its features as views of lists, which may lie in any order."""
    found = parquet.read_table(teacher["features"])
    views = pyarrow.array(found["clip"].to_pylist(), pyarrow.list_view(pyarrow.float32()))
    parquet.write_table(found.set_column(1, "clip", views), teacher["features"], row_group_size=7)
    return teacher


FORMS: dict[str, Callable[..., dict[str, Any]]] = {
    "npy and a text file": npy,
    "npy and an array of names": npy_names,
    "parquet": table,
    "parquet of one width": lambda *args: table(*args, fixed=True),
    "parquet of views": lambda *args: as_views(table(*args)),
}


def ready_pair(data: dict[str, Any], teacher: dict[str, Any], **changes: Any) -> PairSpec:
    return toy_pair(**{"data": data, "teacher": teacher, "evals": ["effective_rank"], **changes})


def run(pair: PairSpec, store: FileStore) -> dict[str, Any]:
    graph = build(pair, IDENTITY)
    LocalScheduler(store, execute, StageContext(), lambda event: None).obtain(list(graph.stages), "test")
    return dict(graph.keys)


def only_features(pair: PairSpec, store: FileStore) -> tuple[np.ndarray, list[str]]:
    """The features that the pair clusters, and the paths of their images."""
    graph = build(pair, IDENTITY)
    made = [stage for stage in graph.stages if stage.name in ("images", "features")]
    LocalScheduler(store, execute, StageContext(), lambda event: None).obtain(made, "test")
    images = store.find(next(stage.key for stage in made if stage.name == "images"))
    assert images is not None
    found = store.find(graph.keys["features"])
    assert found is not None
    return extraction.load(found.directory), list(open_split(images.directory, "train", pair.data.cluster).names)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_image_gets_the_row_of_its_path_for_any_order_of_the_file(form: Any, tmp_path: Path) -> None:
    data, values = photos(tmp_path / "photos"), numbers(COUNT + 3)
    names = [*paths(data), "of/no/image.png", "b/ehind.png", "another.png"]
    order = np.random.default_rng(1).permutation(len(names))
    teacher = form(tmp_path / "ready", values[order], [names[i] for i in order])
    found, asked = only_features(ready_pair(data, teacher), FileStore(tmp_path / "store"))
    assert len(asked) == COUNT * 9 // 10
    np.testing.assert_array_equal(found, values[[names.index(name) for name in asked]])


LISTS: dict[str, Callable[[str], bytes]] = {  # of the same paths, one a line
    "as Windows writes it": lambda text: text.replace("\n", "\r\n").encode(),
    "with a mark of byte order": lambda text: text.encode("utf-8-sig"),
    "without a break at its end": lambda text: text.removesuffix("\n").encode(),
    "of old Macs": lambda text: text.replace("\n", "\r").encode(),
    "as find prints it": lambda text: "".join(f"./{line}\n" for line in text.splitlines()).encode(),
}


@pytest.mark.parametrize("written", LISTS.values(), ids=LISTS.keys())
def test_a_list_of_paths_is_read_as_any_system_writes_it(written: Callable[[str], bytes], tmp_path: Path) -> None:
    data = photos(tmp_path / "photos")
    names = paths(data)
    teacher = npy(tmp_path / "ready", numbers(), names)
    Path(teacher["names"]).write_bytes(written(Path(teacher["names"]).read_text()))
    pair = ready_pair(data, teacher)
    check_pair(pair, data_loader())
    assert dict(row_numbers(pair.teacher, ())) == {name: row for row, name in enumerate(names)}


def test_a_path_may_hold_every_character_but_a_line_break(tmp_path: Path) -> None:
    names = [f"a/{chr(code)}.png" for code in (0x20, 0x0B, 0x0C, 0x1C, 0x85, 0x2028, 0x3000)]
    teacher = npy(tmp_path, numbers(len(names)), names)
    assert list(row_numbers(PrecomputedTeacher(**teacher), ())) == names


@pytest.mark.parametrize("data", [DATA, {"kind": "fashion_mnist_mini"}], ids=["synthetic", "fashion_mnist_mini"])
def test_without_paths_row_i_is_the_ith_training_image_before_some_are_held_out(data: dict[str, Any], tmp_path: Path) -> None:
    values = numbers(len(paths(data)))
    pair = ready_pair(data, npy(tmp_path / "ready", values, None))
    found, asked = only_features(pair, FileStore(tmp_path / "store"))
    spec: Any = pair.data.cluster
    _, rows = split_rows(plugins.module("dataset", data["kind"]).load(spec), spec.split)["train"]
    np.testing.assert_array_equal(found, values[rows])
    assert len(asked) == len(rows)


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "float32"), ("float64", "float32"), ("float32", "float16")])
def test_features_are_stored_in_the_dtype_of_the_spec_for_any_dtype_of_the_file(
    dtype: str, stored: str, tmp_path: Path
) -> None:
    data, values = photos(tmp_path / "photos"), numbers().astype(dtype)
    pair = ready_pair(data, {**npy(tmp_path / "ready", values, None), "dtype": stored})
    found, asked = only_features(pair, FileStore(tmp_path / "store"))
    expected = values[[paths(data).index(name) for name in asked]].astype("float32").astype(stored)
    np.testing.assert_array_equal(found, expected)
    shard = next((tmp_path / "store").glob("features-*/features-00000.npy"))
    assert np.load(shard, allow_pickle=False).dtype == stored


# --- identity


def test_a_copy_of_the_files_is_the_same_teacher_and_a_changed_number_or_name_another(tmp_path: Path) -> None:
    data, values = photos(tmp_path / "photos"), numbers()
    names = paths(data)

    def key(place: str, rows: np.ndarray, listed: list[str], **fields: Any) -> str:
        teacher = {**npy(tmp_path / place, rows, listed), **fields}
        return str(build(ready_pair(data, teacher), IDENTITY).keys["features"])

    first = key("here", values, names)
    assert key("there", values, names) == first
    assert key("here", values, names, dtype="float16") != first
    assert key("here", np.where(values == values[3, 3], 0, values), names) != first
    assert key("here", values, [*names[1:], names[0]]) != first


def test_features_that_were_replaced_after_planning_are_not_published_under_the_old_key(tmp_path: Path) -> None:
    data, store = photos(tmp_path / "photos"), FileStore(tmp_path / "store")
    graph = build(ready_pair(data, npy(tmp_path / "ready", numbers(), None)), IDENTITY)
    npy(tmp_path / "ready", numbers(seed=1), None)
    with pytest.raises(StageFailed, match=r"features-\w+ failed: .*clip\.npy changed after the run was planned"):
        LocalScheduler(store, execute, StageContext(), lambda event: None).obtain(list(graph.stages), "test")
    assert not [key for key in list(store.keys()) if not key.startswith("images")]


def test_names_of_pairs_and_stages_say_where_features_come_from(tmp_path: Path) -> None:
    pair = ready_pair(DATA, npy(tmp_path, numbers(), None))
    assert pair_name(pair.model_dump()) == "clip.npy k=5 -> alexnet w0.125"
    stage = next(stage for stage in build(pair, IDENTITY).stages if stage.name == "features")
    assert stage_name("features", stage.spec) == "features ready-made"


# --- end to end


def test_a_pair_runs_with_precomputed_features_and_evaluates_them_like_those_of_a_teacher(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    spec = plugins.parse("dataset", DATA)
    labels = plugins.module("dataset", "synthetic").load(spec).train.labels
    teacher = npy(tmp_path / "ready", np.eye(6, dtype=np.float32)[labels] + 0.01 * numbers(DATA["count"]), None)
    judges = [{"kind": "knn", "of": "teacher", "name": "teacher_knn"}, {"kind": "knn"}]
    pair = toy_spec(teacher={"features": "ready/clip.npy"}, evals=judges, transfer={"kind": "clusters", "k": 6})
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(pair))
    assert main(["run", "pair.yaml", "--local", "--json", "--quiet"]) == 0
    answer = json.loads(capsys.readouterr().out)[0]
    assert answer["metrics"]["teacher_knn/top1"] == 1.0, "the features give the label away"
    assert answer["metrics"]["pseudo_labels/nmi"] > 0.99
    assert answer["metrics"]["features/dim"] == 6
    assert "teacher" not in answer["keys"]
    assert Path(teacher["features"]).exists()
    assert main(["run", "pair.yaml", "--local", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["computed"] == {}


# --- what is wrong


def broken(at: Path, change: Callable[[np.ndarray, list[str]], Any], form: Any = npy) -> dict[str, Any]:
    """A teacher for the photos in `at` after a change of its rows and paths."""
    values, names = numbers().astype(np.float64), paths(photos(at / "photos"))
    changed = change(values, names)
    return form(at / "ready", *(changed if changed is not None else (values, names)))


def as_file(name: str, content: bytes) -> Callable[[Path], dict[str, Any]]:
    def write(at: Path) -> dict[str, Any]:
        photos(at / "photos")
        (at / name).write_bytes(content)
        return {"features": str(at / name)}

    return write


def ragged(at: Path) -> dict[str, Any]:
    names = paths(photos(at / "photos"))
    lists = [[0.5] * (WIDTH - (index == 9)) for index in range(COUNT)]
    parquet.write_table(pyarrow.table({"path": names, "features": lists}), at / "ragged.parquet")
    return {"features": str(at / "ragged.parquet")}


def with_null(row: bool, at: int = 9, length: int = -1) -> Callable[[Path], dict[str, Any]]:
    """A parquet in which a row, or one number of it, is null."""

    def write(folder: Path) -> dict[str, Any]:
        names = paths(photos(folder / "photos"))
        lists: list[Any] = [[0.5 + index] * WIDTH for index in range(COUNT)]
        lists[at] = None if row else [0.5, None] * (WIDTH // 2)
        columns = {"path": names, "features": pyarrow.array(lists, pyarrow.list_(pyarrow.float64(), length))}
        parquet.write_table(pyarrow.table(columns), folder / "null.parquet")
        return {"features": str(folder / "null.parquet")}

    return write


def empty_first(at: Path) -> dict[str, Any]:
    lists = [[0.5] * (WIDTH * (index > 0)) for index in range(COUNT)]
    parquet.write_table(pyarrow.table({"path": paths(photos(at / "photos")), "features": lists}), at / "empty.parquet")
    return {"features": str(at / "empty.parquet")}


def put(values: np.ndarray, row: int, value: float) -> None:
    values[row, 2] = value


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {  # by `ktray plan`
    "no file": (lambda at: {"features": str(at / "no.npy")}, r"teacher\.features: there is no file no\.npy"),
    "no names": (
        lambda at: {**npy(at, numbers(), None), "names": str(at / "no.txt")},
        r"teacher\.names: there is no file no\.txt",
    ),
    "rows and paths of another number": (
        lambda at: broken(at, lambda values, names: (values[:-1], names)),
        r"teacher\.names: clip\.npy has 39 rows, but clip\.txt has 40 paths",
    ),
    "another number of rows than images": (
        lambda at: broken(at, lambda values, names: (values[:-1], None)),
        r"teacher\.features: clip\.npy has 39 rows, but the data set has 40 training images",
    ),
    "an image without features": (
        lambda at: broken(at, lambda values, names: (values, [*(f"photos/{name}" for name in names)])),
        r"36 of 36 train images of data\.cluster have no features, the first is '\w/\d+\.png'\. .* such as 'photos/a/000\.png'",
    ),
    "a path twice": (
        lambda at: broken(at, lambda values, names: (values, [names[0], *names[:-1]])),
        r"teacher\.features: the path 'a/000\.png' occurs 2 times",
    ),
    "a path twice in a parquet": (
        lambda at: broken(at, lambda values, names: (values, [names[0], *names[:-1]]), table),
        r"teacher\.features: the path 'a/000\.png' occurs 2 times",
    ),
    "whole numbers": (
        lambda at: broken(at, lambda values, names: (values.astype(np.int64), names)),
        r"clip\.npy contains an array \(40, 6\) of int64\. Features must be \(N, D\) of float16, float32 or float64",
    ),
    "a cube": (
        lambda at: broken(at, lambda values, names: (values.reshape(40, 2, 3), names)),
        r"clip\.npy contains an array \(40, 2, 3\) of float64",
    ),
    "whole numbers in a parquet": (
        lambda at: broken(at, lambda values, names: (values.astype(np.int64), names), table),
        r"teacher\.columns\.features: the column 'clip' contains list<.*int64>",
    ),
    "another column": (
        lambda at: {**broken(at, lambda values, names: None, table), "columns": {"path": "file"}},
        r"teacher\.columns\.path: clip\.parquet has no column 'file'\. It has image, clip",
    ),
    "no parquet": (as_file("x.parquet", b"nothing"), r"x\.parquet is not a parquet file"),
    "no npy": (as_file("x.npy", b"nothing"), r"x\.npy is not a \.npy file of numbers"),
    "pickled objects": (
        lambda at: broken(at, lambda values, names: (np.array([[object()] * 2] * 40), names)),
        r"clip\.npy is not a \.npy file of numbers",
    ),
    "an empty line": (
        lambda at: broken(at, lambda values, names: (values, [*names[:7], "", *names[8:]])),
        r"teacher\.names: line 8 of clip\.txt is empty\. Give the path of one image in each line",
    ),
    "names in no encoding": (
        lambda at: {
            **broken(at, lambda values, names: (values, None)),
            "names": as_file("n.txt", b"\xff\xfe\xff")(at)["features"],
        },
        r"teacher\.names: n\.txt is not a list of paths",
    ),
}


@pytest.mark.parametrize(("teacher", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_errors_that_a_plan_can_detect_are_refused_before_anything_runs(
    teacher: Callable[[Path], dict[str, Any]], said: str, tmp_path: Path
) -> None:
    made = teacher(tmp_path)
    with pytest.raises(UserError, match=said) as refused:
        check_pair(ready_pair(photos(tmp_path / "photos"), made), data_loader())
    assert "\n" not in str(refused.value)


FAILED: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {  # by the stage that reads the numbers
    "NaN": (
        lambda at: broken(at, lambda values, names: put(values, 7, np.nan)),
        r"1 of 36 images has features of type float32 that are not finite, the first is image \d+ \(a/014\.png\)",
    ),
    "NaN in a parquet": (
        lambda at: broken(at, lambda values, names: put(values, 7, np.nan), table),
        r"that are not finite, the first is image \d+ \(a/014\.png\)",
    ),
    "infinite": (
        lambda at: broken(at, lambda values, names: put(values, 7, -np.inf)),
        r"that are not finite, the first is image \d+ \(a/014\.png\) with -inf",
    ),
    "more than float32 holds": (
        lambda at: broken(at, lambda values, names: put(values, 7, 1e39)),
        r"row 7 of clip\.npy \(a/014\.png\) has the number 1e\+39, which is beyond the range of float32: .* 3\.4e\+38",
    ),
    "more than float32 holds, in a parquet": (
        lambda at: broken(at, lambda values, names: put(values, 7, -2e300), table),
        r"row 7 of clip\.parquet \(a/014\.png\) has the number -2e\+300, which is beyond the range of float32",
    ),
    "more than float16 holds": (
        lambda at: {**broken(at, lambda values, names: put(values, 7, 1e6)), "dtype": "float16"},
        r"beyond the range of float16, .*\(a/014\.png\) with 1e\+06; float16 holds up to 65504, so write dtype: float32",
    ),
    "a null row": (with_null(row=True), r"teacher\.features: row 9 of null\.parquet is null in the column 'features'"),
    "the first row is null": (with_null(row=True, at=0), r"row 0 of null\.parquet is null in the column 'features'"),
    "a null in a row": (with_null(row=False), r"row 9 of null\.parquet \(a/018\.png\) has a null among its numbers"),
    "a null row among lists of one length": (
        with_null(row=True, length=WIDTH),
        r"the column 'features' of null\.parquet cannot be read: .*\. A row may be null: leave it out",
    ),
    "the first row is empty": (empty_first, r"row 0 of empty\.parquet has 0 numbers\. Features of all images"),
    "rows of two widths": (ragged, r"teacher\.features: row 9 of ragged\.parquet has 5 numbers, but the first has 6"),
}


@pytest.mark.parametrize(("teacher", "said"), FAILED.values(), ids=FAILED.keys())
def test_invalid_numbers_fail_the_stage_and_only_the_images_are_published(
    teacher: Callable[[Path], dict[str, Any]], said: str, tmp_path: Path
) -> None:
    made, store = teacher(tmp_path), FileStore(tmp_path / "store")
    pair = ready_pair(photos(tmp_path / "photos"), made)
    check_pair(pair, data_loader())
    with pytest.raises(StageFailed, match=rf"^features-\w+ failed: .*{said}"):
        run(pair, store)
    assert {key.partition("-")[0] for key in list(store.keys())} == {"images"}


def test_one_row_never_belongs_to_images_of_two_data_sets(tmp_path: Path) -> None:
    one, two = photos(tmp_path / "one"), photos(tmp_path / "two", seed=100)
    roles = {"pretext": one, "cluster": one, "transfer": two, "target": two}
    with pytest.raises(UserError, match=r"features without paths belong to one data set, and data\.cluster and data\.transfer"):
        check_pair(ready_pair(roles, npy(tmp_path / "a", numbers(), None)), data_loader())
    with pytest.raises(UserError, match=r"paths are in data\.cluster and in data\.transfer, such as '[ab]/\d+\.png'"):
        check_pair(ready_pair(roles, npy(tmp_path / "b", numbers(), paths(one))), data_loader())
    other = photos(tmp_path / "three/below", seed=200)
    apart = {**roles, "transfer": {**other, "path": str(tmp_path / "three")}}
    names = [*paths(one), *paths(apart["transfer"])]
    check_pair(ready_pair(apart, npy(tmp_path / "c", numbers(2 * COUNT), names)), data_loader())


def test_images_of_the_test_split_need_features_of_their_own(tmp_path: Path) -> None:
    teacher = npy(tmp_path, numbers(DATA["count"]), None)
    judge = {"kind": "knn", "of": "teacher", "split": "test"}
    with pytest.raises(UserError, match=r"200 of 200 test images of data\.target have no features"):
        check_pair(toy_pair(teacher=teacher, evals=[judge]), data_loader())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"features": "x.csv"}, r"teacher: ready-made features are a \.npy or a \.parquet file, and this is 'x\.csv'"),
        ({"features": "x.parquet", "names": "x.txt"}, r"teacher: a \.parquet has its paths in 'columns'"),
        ({"features": "x.npy", "columns": {"path": "p"}}, r"teacher: a \.parquet has its paths in 'columns'"),
        ({"features": "x.npy", "layer": "conv3"}, r"teacher\.layer: a ready-made teacher .* has no 'layer'"),
        ({"features": "x.npy", "nmaes": "x.txt"}, r"teacher\.nmaes: there is no field 'nmaes'\. Did you mean 'names'"),
        ({"features": "x.npy", "checkpoint": "y.pt"}, r"this one has checkpoint and features"),
    ],
)
def test_specs_reject_fields_that_do_not_apply_to_precomputed_features(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_pair(toy_spec(teacher=fields), "pair.yaml")


def test_an_evaluation_of_precomputed_features_has_no_layer(tmp_path: Path) -> None:
    judge = {"kind": "knn", "of": "teacher", "layer": "conv3"}
    with pytest.raises(UserError, match=r"evals\.0\.layer: the teacher is a file of features, which has no layer 'conv3'"):
        check_pair(toy_pair(teacher=npy(tmp_path, numbers(DATA["count"]), None), evals=[judge]), data_loader())


# --- files that are of another kind, or claim more than they hold


def header(shape: str, descr: str = "<f4", data: bytes = b"") -> bytes:
    """A .npy whose header claims this shape."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


def archived(at: Path) -> dict[str, Any]:
    photos(at / "photos")
    with open(at / "x.npy", "wb") as file:
        np.savez(file, a=numbers())
    return {"features": str(at / "x.npy")}


def appended(at: Path) -> dict[str, Any]:
    photos(at / "photos")
    with open(at / "x.npy", "wb") as file:
        np.save(file, numbers())
        np.save(file, numbers())
    return {"features": str(at / "x.npy")}


def hole(suffix: str) -> Callable[[Path], dict[str, Any]]:
    def write(at: Path) -> dict[str, Any]:
        photos(at / "photos")
        size = 10**12
        (at / f"x{suffix}").write_bytes(header(f"({size // 4 // 6}, 6)"))
        os.truncate(at / f"x{suffix}", 128 + size // 24 * 24)
        return {"features": str(at / f"x{suffix}")}

    return write


def two_columns(at: Path) -> dict[str, Any]:
    names, values = paths(photos(at / "photos")), pyarrow.array(list(numbers()))
    columns = pyarrow.Table.from_arrays([pyarrow.array(names), values, values], ["path", "features", "features"])
    parquet.write_table(columns, at / "two.parquet")
    return {"features": str(at / "two.parquet")}


def billions(at: Path) -> dict[str, Any]:
    """Few bytes that stand for 80 million equal rows."""
    photos(at / "photos")
    kind = pyarrow.schema({"path": pyarrow.string(), "features": pyarrow.list_(pyarrow.float32())})
    rows = 2_000_000
    path = pyarrow.DictionaryArray.from_arrays(np.zeros(rows, np.int32), ["a/000.png"]).cast(pyarrow.string())
    values = pyarrow.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32), np.zeros(rows, np.float32))
    parquet.write_table(pyarrow.table([path, values], schema=kind), at / "many.parquet", compression="zstd")
    return {"features": str(at / "many.parquet")}


def cut_parquet(at: Path) -> dict[str, Any]:
    made = broken(at, lambda values, names: None, table)
    content = Path(made["features"]).read_bytes()
    Path(made["features"]).write_bytes(content[: len(content) // 2])
    return made


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
ANOTHER_KIND: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "an empty npy": (as_file("x.npy", b""), r"x\.npy is not a \.npy file of numbers but is empty"),
    "a web page": (as_file("x.npy", b"<html>404</html>"), r"x\.npy is not a \.npy file of numbers but is a web page"),
    "an LFS pointer": (as_file("x.npy", LFS), r"but is a pointer of Git LFS and not the file itself\. Fetch .* git lfs pull"),
    "an LFS pointer to a parquet": (as_file("x.parquet", LFS), r"x\.parquet is not a parquet file: it is a pointer of Git LFS"),
    "an empty parquet": (as_file("x.parquet", b""), r"x\.parquet is not a parquet file: it is empty"),
    "a cut parquet": (cut_parquet, r"clip\.parquet is not a parquet file: it is cut off or damaged"),
    "several arrays": (archived, r"x\.npy is not a \.npy file of numbers but is a zip archive"),
    "two arrays, one behind the other": (appended, r"x\.npy contains more than one array: it has"),
    "a cut npy": (as_file("x.npy", header("(40, 6)", data=bytes(40 * 6 * 3))), r"x\.npy is cut off: it has .* which are 1,088"),
    "a negative shape": (
        as_file("x.npy", header("(-40, 6)", data=bytes(960))),
        r"damaged \.npy file: it claims the shape \(-40, 6\)",
    ),
    "a shape that is true": (as_file("x.npy", header("(True, 6)", data=bytes(24))), r"damaged \.npy file"),
    "a huge shape": (
        as_file("x.npy", header(f"({10**15}, {10**15})", data=bytes(960))),
        r"x\.npy is cut off: it has 1,088 bytes",
    ),
    "a shape of halves": (
        as_file("x.npy", header("(40.5, 6)", data=bytes(960))),
        r"damaged \.npy file: its header cannot be read",
    ),
    "a header of code": (as_file("x.npy", header("__import__('os')")), r"damaged \.npy file: its header cannot be read"),
    "a deep header": (as_file("x.npy", header("(" * 5000)), r"damaged \.npy file: its header cannot be read"),
    "no header": (as_file("x.npy", b"\x93NUMPY\x01\x00\xff\xff"), r"damaged \.npy file: its header cannot be read"),
    "another version": (as_file("x.npy", b"\x93NUMPY\x09\x00" + bytes(200)), r"damaged \.npy file: its header cannot be read"),
    "a terabyte that is a hole": (
        hole(".npy"),
        r"x\.npy claims 1,\d+,.* bytes, of which only .* are on disk; the rest is a hole",
    ),
    "a terabyte of parquet": (hole(".parquet"), r"x\.parquet claims 1,\d+,.* bytes, of which only .* are on disk"),
    "a column twice": (
        two_columns,
        r"teacher\.columns\.features: two\.parquet has 2 columns 'features'\. It has path, features",
    ),
    "millions of equal rows": (billions, r"many\.parquet claims 2,000,000 rows with 4,000,000 values in [\d,]+ bytes"),
    "names that are a huge array": (
        lambda at: {
            **broken(at, lambda values, names: (values, None)),
            "names": as_file("n.npy", header(f"({10**12},)", "<U100"))(at)["features"],
        },
        r"teacher\.names: n\.npy is cut off",
    ),
}


@pytest.mark.parametrize(("teacher", "said"), ANOTHER_KIND.values(), ids=ANOTHER_KIND.keys())
def test_a_file_of_another_kind_or_size_than_it_claims_is_refused_before_it_is_read(
    teacher: Callable[[Path], dict[str, Any]], said: str, tmp_path: Path
) -> None:
    pair = ready_pair(photos(tmp_path / "photos"), teacher(tmp_path))
    began = time.process_time()
    with pytest.raises(UserError, match=said) as refused:
        check_pair(pair, data_loader())
    assert "\n" not in str(refused.value)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_file_of_a_terabyte_is_not_hashed(suffix: str, tmp_path: Path) -> None:
    pair = ready_pair(photos(tmp_path / "photos"), hole(suffix)(tmp_path))
    with pytest.raises(UserError, match="the rest is a hole"):
        build(pair, IDENTITY)

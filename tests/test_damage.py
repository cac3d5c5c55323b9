"""A damaged byte of an artifact is never used: it is found, the artifact moved aside, and computed again in the same run."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ktray import checksums
from ktray.artifact import kind_of
from ktray.errors import DamagedArtifact, MissingInput, UserError
from ktray.images import open_split, source
from ktray.pipeline import references
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_graph import build
from ktray.pipeline.pair_metrics import learning_curve, metrics, published_artifacts
from ktray.plugins import parse
from ktray.pool import StageContext
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.search import journal
from ktray.search.study import Study
from ktray.stores import intact_file
from ktray.stores.file import MAX_DAMAGED, FileStore
from ktray.tracking.spool import Position, Spool
from tests.toy_space import drive, toy_space
from tests.toys import ROTATION, STUDENT, toy_pair

torch.set_num_threads(1)

PACKAGE = Path(checksums.__file__).parent
DATA = {"kind": "synthetic", "count": 90, "size": 28}
TEACHER = {**ROTATION, "schedule": {"epochs": 1, "batch_size": 32}}
SMALL = {"data": DATA, "student": {**STUDENT, "schedule": {"epochs": 2, "batch_size": 32}}}
PAIR = toy_pair(**SMALL, teacher=TEACHER)
OTHERS = {  # files that the first pair does not have: state.npz, nearest.npy and squared.npy, features read by a student
    "soft_clusters": toy_pair(
        **SMALL,
        teacher={"descriptor": {"kind": "bag_of_hog", "words": 8}},
        transfer={"kind": "soft_clusters", "k": 5, "neighbours": 3},
    ),
    "regression": toy_pair(**SMALL, transfer={"kind": "regression"}),
    "cluster_quality": toy_pair(**SMALL, evals=[{"kind": "cluster_quality"}]),
}
KINDS = ("images", "teacher", "features", "clusters", "pseudo_labels", "student", "evaluation")
NOBODY_READS = ("test", "iterations.json", "clusters.png", "optimizer.safetensors", "history.parquet", "state.json", "rows")
"""Files of a finished pair that no later stage of it reads; a flipped byte in them changes nothing else."""


def graph_of(pair):
    return build(pair, data_identity(), milestones={"student": [1, 2]})


def compute(pair, store, context=None):
    """The metrics of a pair, as a search of it in this process would find them."""
    graph = graph_of(pair)
    LocalScheduler(store, execute, context or StageContext(), lambda event: None).obtain(list(graph.stages), "test")
    return metrics(graph, published_artifacts(graph, store))


def results(found):
    return {name: value for name, value in found.items() if not name.endswith(("seconds", "images_per_s"))}


def flip(path, position):
    """Flip one bit of a file, and give it back its old modification time."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def files_of(directory):
    return sorted(path for path in directory.iterdir() if path.name != "record.json")


def positions(path):
    size = path.stat().st_size
    return sorted({0, size // 2, size - 1})


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A store with all artifacts of `PAIR`, and the metrics of that pair."""
    store = FileStore(tmp_path_factory.mktemp("pristine") / "store")
    return store, compute(PAIR, store)


@pytest.fixture
def copy(pristine, tmp_path):
    shutil.copytree(pristine[0].root, tmp_path / "store")
    return FileStore(tmp_path / "store")


def key_in(store, kind):
    """The last artifact of this kind in the graph of `PAIR`."""
    return next(stage.key for stage in reversed(graph_of(PAIR).stages) if stage.name == kind)


def remove_readers(store, graph, key):
    """Remove all artifacts that rest on one, so that their stages run again and read it."""
    gone = {key}
    for stage in graph.stages:
        if gone & {*stage.inputs.values(), *stage.resume_from}:
            gone.add(stage.key)
            store.remove(stage.key)


def require_equal_stores(store, wanted):
    """All artifacts are as they were computed first, byte by byte."""
    for key in list(wanted.keys()):
        assert store.verify(key) == "", key
        if kind_of(key) != "evaluation":
            assert store.find(key).record["files"] == wanted.find(key).record["files"], key


# ---- who opens a file


def test_a_flipped_byte_of_any_file_is_found_when_the_file_is_opened(copy):
    checked = 0
    for key in list(copy.keys()):
        for path in files_of(copy.root / key):
            checksums.intact(path)
            for position in positions(path):
                flip(path, position)
                with pytest.raises(DamagedArtifact, match=f"{key} is damaged .{path.name} does not match its checksum"):
                    checksums.intact(path)
                assert path.name in copy.verify(key)
                flip(path, position)
                checksums.intact(path)
                checked += 1
    assert checked > 100


@pytest.mark.parametrize("position", [0, 3, 14, 20, 30, 33, 34, 40, -300, -100, -2, -1])
def test_a_flipped_byte_of_a_record_makes_the_artifact_absent(copy, caplog, position):
    key = key_in(copy, "evaluation")
    path = copy.root / key / "record.json"
    flip(path, position % path.stat().st_size)
    assert copy.find(key) is None
    assert f"{key} is damaged (its record is unreadable: " in caplog.text
    assert len(list((copy.root / ".damaged").iterdir())) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_computes_again_what_it_finds_damaged_and_ends_as_if_nothing_had_been(pristine, copy, caplog, kind):
    key = key_in(copy, kind)
    for path in files_of(copy.root / key):
        flip(path, path.stat().st_size // 2)
    remove_readers(copy, graph_of(PAIR), key)
    before = set(copy.keys())
    outcomes = LocalScheduler(copy, execute, StageContext(), lambda event: None).obtain(list(graph_of(PAIR).stages), "test")
    assert results(compute(PAIR, copy)) == results(pristine[1])
    moved = [path.name for path in (copy.root / ".damaged").iterdir()] if (copy.root / ".damaged").exists() else []
    again = before - {name.rpartition(".")[0] for name in moved}
    assert {each["key"] for each in outcomes if each["state"] == "reused"} == again & {each["key"] for each in outcomes}
    if kind == "evaluation":  # whose files nobody reads: the metrics are in the record
        assert not moved
        return
    assert [name.rpartition(".")[0] for name in moved] == [key]
    assert caplog.text.count(f"{key} is damaged (") == 1
    require_equal_stores(copy, pristine[0])


def test_several_damaged_inputs_of_one_stage_are_all_computed_again(pristine, copy):
    for kind in ("images", "teacher", "features", "clusters", "pseudo_labels", "student"):
        for path in files_of(copy.root / key_in(copy, kind)):
            flip(path, 0)
    copy.remove(key_in(copy, "evaluation"))
    assert results(compute(PAIR, copy)) == results(pristine[1])
    student = next(stage.key for stage in graph_of(PAIR).stages if stage.name == "student")
    copy.remove(student)  # reads images, clusters and pseudo-labels
    copy.remove(key_in(copy, "student"))
    assert results(compute(PAIR, copy)) == results(pristine[1])


@pytest.mark.slow
@pytest.mark.parametrize("which", ["first", *OTHERS])
def test_one_flipped_byte_at_any_position_of_any_file_changes_no_result(tmp_path, which):
    pair = {"first": PAIR, **OTHERS}[which]
    store, graph = FileStore(tmp_path / "pristine"), graph_of(pair)
    wanted = results(compute(pair, store))
    missed = []
    for key in list(store.keys()):
        for file in files_of(store.root / key):
            for position in positions(file):
                copied = FileStore(tmp_path / "copy")
                for each in list(store.keys()):
                    shutil.copytree(store.root / each, copied.root / each)
                flip(copied.root / key / file.name, position)
                remove_readers(copied, graph, key)
                assert results(compute(pair, copied)) == wanted, (key, file.name, position)
                if not (copied.root / ".damaged").exists():
                    missed.append((kind_of(key), file.name))
                    assert copied.verify(key), "what nobody has read is still damaged"
                shutil.rmtree(copied.root)
    unread = {name for kind, name in missed if kind != "evaluation"}
    # `cluster_quality` judges the pseudo-labels, so that nobody reads its student.
    expected = (*NOBODY_READS, *(["weights.safetensors"] if which == "cluster_quality" else []))
    assert all(any(word in name for word in expected) for name in unread), unread


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "optimizer.safetensors", "history.parquet", "state.json", "record.json"]
)
def test_a_training_goes_on_from_the_checkpoint_before_a_damaged_one(pristine, copy, name):
    graph = graph_of(PAIR)
    first, last = (stage for stage in graph.stages if stage.name == "student")
    attempt = copy.scratch(last.key, "killed")
    shutil.copytree(copy.root / first.key, attempt / "checkpoint-000001")
    shutil.copytree(copy.root / last.key, attempt / "checkpoint-000002")
    path = attempt / "checkpoint-000002" / name
    flip(path, path.stat().st_size // 2)
    for key in (last.key, first.key, key_in(copy, "evaluation")):
        copy.remove(key)
    context, said = StageContext(), []
    copy.on_damage = said.append
    execute(last, copy, "again", context)
    assert copy.find(last.key).record["started_from"] == "checkpoint-000001"
    assert len(said) == 1
    assert f"{last.key}.killed.checkpoint-000002 is damaged (" in said[0]
    assert copy.find(last.key).record["files"] == pristine[0].find(last.key).record["files"]


def test_a_checkpoint_without_checksums_is_not_used(copy):
    last = [stage for stage in graph_of(PAIR).stages if stage.name == "student"][-1]
    checkpoint = copy.scratch(last.key, "killed") / "checkpoint-000001"
    shutil.copytree(copy.root / last.key, checkpoint)
    (checkpoint / "record.json").unlink()
    for stage in graph_of(PAIR).stages:
        if stage.name in ("student", "evaluation"):
            copy.remove(stage.key)
    said = []
    copy.on_damage = said.append
    assert execute(last, copy, "again", StageContext())[0].record["started_from"] is None
    assert "has no checksums" in said[0]


def test_a_checkpoint_of_a_training_in_progress_has_checksums(tmp_path):
    store = FileStore(tmp_path / "store")
    graph, seen = graph_of(PAIR), []

    def look(values):
        seen.extend(
            sorted(path.name for path in (checkpoint / "record.json").parent.iterdir())
            for stage in graph.stages
            for checkpoint in store.checkpoints(stage.key)
            if checksums.version_of(checkpoint)
        )

    long = toy_pair(**{**SMALL, "student": {**STUDENT, "schedule": {"epochs": 3, "batch_size": 32}}}, teacher=TEACHER)
    graph = build(long, data_identity())
    LocalScheduler(store, execute, StageContext(checkpoint_seconds=0, progress=look), lambda event: None).obtain(
        list(graph.stages), "test"
    )
    assert ["history.parquet", "optimizer.safetensors", "record.json", "state.json", "weights.safetensors"] in seen


# ---- large files


@pytest.fixture
def large(tmp_path):
    """Images in three blocks of a file, with a damaged byte in the second; the directory, the pixels and the damaged row."""
    count, size, out = 9000, 28, tmp_path / "images-000000000000"
    out.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    np.save(out / "train.npy", pixels)
    (out / "splits.json").write_text(json.dumps({"size": size, "streamed": False, "splits": ["train"]}))
    (out / "train.json").write_text(json.dumps({"names": [str(i) for i in range(count)], "classes": []}))
    checksums.seal(out, {})
    row = (checksums.BLOCK_BYTES + 5000) // ROW_BYTES
    flip(out / "train.npy", 128 + row * ROW_BYTES)
    return out, pixels, row


ROW_BYTES = 28 * 28 * 3


def test_a_large_file_is_compared_block_by_block_as_its_rows_are_read(large):
    out, pixels, damaged = large
    read = open_split(out, "train", parse("dataset", DATA)).read
    for rows in ([0, 5], [len(pixels) - 1], [-1], []):
        assert np.array_equal(read(np.array(rows, np.int64)), pixels[rows])
    across = (checksums.BLOCK_BYTES - 128) // ROW_BYTES  # half of this row is in the first block
    for rows in ([damaged], [0, damaged + 10], [across], [across - len(pixels)]):
        with pytest.raises(DamagedArtifact, match=r"train\.npy"):
            read(np.array(rows))
    flip(out / "train.npy", 128 + damaged * ROW_BYTES)
    assert np.array_equal(open_split(out, "train", parse("dataset", DATA)).read(np.arange(len(pixels))), pixels)


def test_pixels_that_another_process_has_computed_again_do_not_vouch_for_those_that_are_open(large, tmp_path):
    out, pixels, damaged = large
    read = open_split(out, "train", parse("dataset", DATA)).read
    shutil.copytree(out, tmp_path / "fresh")
    flip(tmp_path / "fresh" / "train.npy", 128 + damaged * ROW_BYTES)
    out.rename(tmp_path / "aside")
    (tmp_path / "fresh").rename(out)
    assert np.array_equal(open_split(out, "train", parse("dataset", DATA)).read(np.array([damaged])), pixels[[damaged]])
    with pytest.raises(DamagedArtifact):
        read(np.array([damaged]))


def test_a_damaged_header_of_the_pixels_is_found_before_it_is_believed(copy):
    key = key_in(copy, "images")
    flip(copy.root / key / "train.npy", 60)
    with pytest.raises(DamagedArtifact, match=r"train\.npy"):
        open_split(copy.root / key, "train", parse("dataset", DATA))


# ---- records of earlier versions


def as_of_version_0_2(directory):
    """Rewrite a record as ktray 0.2 wrote it: with one sha256 per file, and no checksum of its own."""
    record = checksums.read_json(directory / "record.json")
    record["files"] = {
        name: {"size": entry["size"], "sha256": hashlib.sha256((directory / name).read_bytes()).hexdigest()}
        for name, entry in record["files"].items()
    }
    (directory / "record.json").write_text(json.dumps(record, indent=1, sort_keys=True))


def test_artifacts_of_an_earlier_version_are_used_and_compared_with_their_sha256(pristine, copy):
    for key in list(copy.keys()):
        as_of_version_0_2(copy.root / key)
    for kind in ("pseudo_labels", "evaluation"):
        copy.remove(key_in(copy, kind))
    for stage in graph_of(PAIR).stages:
        if stage.name == "student":
            copy.remove(stage.key)
    assert results(compute(PAIR, copy)) == results(pristine[1])
    assert not (copy.root / ".damaged").exists()
    key = key_in(copy, "features")
    flip(copy.root / key / "features-00000.npy", 5000)
    assert "features-00000.npy" in copy.verify(key)
    with pytest.raises(DamagedArtifact):
        checksums.intact(copy.root / key / "features-00000.npy")


# ---- moving aside


def test_an_artifact_that_was_replaced_since_is_not_moved_aside(copy):
    key = key_in(copy, "features")
    path = copy.root / key / "features-00000.npy"
    flip(path, 500)
    with pytest.raises(DamagedArtifact) as caught:
        checksums.intact(path)
    flip(path, 500)
    shutil.copytree(copy.root / key, copy.root / "fresh")
    shutil.rmtree(copy.root / key)
    (copy.root / "fresh").rename(copy.root / key)  # another process has computed it again
    assert not copy.set_aside(caught.value)
    assert copy.find(key) is not None
    assert not list((copy.root / ".damaged").iterdir())


def test_the_last_few_damaged_artifacts_are_kept_with_what_was_wrong(copy):
    source = copy.root / key_in(copy, "clusters")
    keys = [f"clusters-{number:012x}" for number in range(MAX_DAMAGED + 3)]
    for key in keys:
        shutil.copytree(source, copy.root / key)
        flip(copy.root / key / "centroids.npy", 200)
        with pytest.raises(MissingInput, match=f"{key} was damaged .centroids.npy does not match"):
            intact_file(copy.find(key), "centroids.npy")
    kept = sorted((copy.root / ".damaged").iterdir())
    assert [path.name.rpartition(".")[0] for path in kept] == keys[-MAX_DAMAGED:]
    assert "centroids.npy does not match its checksum" in (kept[0] / "damage.txt").read_text()


def test_a_learning_curve_that_is_damaged_is_not_shown(copy):
    student = copy.find(key_in(copy, "student"))
    assert len(learning_curve(student)) == 2
    flip(student.directory / "history.parquet", 300)
    assert learning_curve(student) == []
    assert copy.find(student.key) is None


def test_a_stage_whose_input_is_moved_while_it_reads_is_no_failure(copy, monkeypatch):
    last = [stage for stage in graph_of(PAIR).stages if stage.name == "evaluation"][-1]
    copy.remove(last.key)
    images = last.inputs["images.target"]

    def moved_by_another_process(*arguments):
        shutil.rmtree(copy.root / images)
        raise FileNotFoundError("train.json")

    monkeypatch.setattr("ktray.stages.images_stage.images.open_split", moved_by_another_process)
    with pytest.raises(MissingInput, match=images):
        execute(last, copy, "a", StageContext())


@pytest.mark.slow
def test_several_processes_that_meet_the_same_damage_all_end_with_the_right_result(pristine, copy):
    program = """
import sys
from tests.test_damage import PAIR, compute, results
from ktray.stores.file import FileStore
print(sorted(results(compute(PAIR, FileStore(sys.argv[1]))).items()))
"""
    for kind in ("images", "features", "pseudo_labels"):
        for path in files_of(copy.root / key_in(copy, kind)):
            flip(path, path.stat().st_size // 2)
    remove_readers(copy, graph_of(PAIR), key_in(copy, "features"))
    program = program.replace("FileStore(sys.argv[1])", "FileStore(__import__('pathlib').Path(sys.argv[1]))")
    command = [sys.executable, "-c", program, str(copy.root)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for child in children:
        out, err = child.communicate(timeout=250)
        assert child.returncode == 0, err
        assert out.strip() == str(sorted(results(pristine[1]).items())), err
    require_equal_stores(copy, pristine[0])


# ---- whoever reads


READERS = {"np.load", "load_file", "safe_open", "parquet.read_table"}
STAGES_READ_IN = ["stages/*.py", "images/reading.py", "training/snapshot.py", "features/extraction.py", "clustering/*.py"]


def test_everything_that_stages_read_passes_through_the_check():
    """Every call that opens a file of an artifact gets its path from `intact`, or compares blocks itself."""
    modules = [path for part in STAGES_READ_IN for path in PACKAGE.glob(part)]
    unchecked, checked = [], 0
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            if not isinstance(node, ast.Call):
                continue
            function = ast.unparse(node.func)
            if function not in READERS and not function.endswith(".read_text"):
                continue
            given = ast.unparse(node.args[0]) if function in READERS else function
            if given.startswith("intact("):
                checked += 1
            else:
                unchecked.append(f"{module.name}:{node.lineno}: {ast.unparse(node)}")
    assert not unchecked, "\n".join(unchecked)
    assert checked > 20


# ---- JSON files


def test_a_json_file_with_any_byte_flipped_is_refused(tmp_path):
    path = tmp_path / "a.json"
    for value in ({}, {"a": 1.5, "b": "ü"}, {"m": {"x": [1, 2, None]}, "checksums": True}):
        checksums.write_json(path, value)
        assert checksums.read_json(path) == value
        content = path.read_bytes()
        assert {**value, "checksum": json.loads(content)["checksum"]} == json.loads(content)  # plain JSON for other programs
        for position in range(len(content)):
            for bit in (0, 5, 7):
                path.write_bytes(content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :])
                with pytest.raises(ValueError):
                    checksums.read_json(path)
    path.write_text('{\n "a": 1\n}')  # of an earlier version
    assert checksums.read_json(path) == {"a": 1}


def flipped(path, position):
    """Flip a bit of a small file; what it was before."""
    content = path.read_bytes()
    path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
    return content


def test_a_journal_with_a_damaged_byte_is_refused_or_loses_its_last_line_but_is_never_believed(tmp_path):
    with Study.open(tmp_path, toy_space(tmp_path), "toy", trials=3) as study:
        drive(study)
    path = journal.study_folder(tmp_path, "toy") / "journal.log"
    whole = journal.read(tmp_path, "toy")
    last = path.read_bytes()[:-1].rfind(b"\n") + 1
    refused = 0
    for position in range(0, path.stat().st_size, 97):
        content = flipped(path, position)
        try:
            found = journal.read(tmp_path, "toy")
        except UserError:
            refused += 1
        else:
            # A byte of the name "checksum" is part of no value.
            assert found == whole or position >= last, position
        path.write_bytes(content)
    assert refused > 100
    assert journal.read(tmp_path, "toy") == whole


def test_a_damaged_journal_is_named_with_its_line_and_what_to_do(tmp_path):
    with Study.open(tmp_path, toy_space(tmp_path), "toy", trials=2) as study:
        drive(study)
    path = journal.study_folder(tmp_path, "toy") / "journal.log"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], lines[4].replace(b"1", b"7"), *lines[5:]]))
    for use in (lambda: journal.read(tmp_path, "toy"), lambda: Study.open(tmp_path, toy_space(tmp_path), "toy").__enter__()):
        with pytest.raises(UserError, match=r"line 5 of .*journal.log is damaged.*under another --name"):
            use()


def test_a_journal_of_an_earlier_version_or_of_optuna_itself_has_no_checksums_and_is_read(tmp_path):
    with Study.open(tmp_path, toy_space(tmp_path), "toy", trials=2) as study:
        drive(study)
    path, whole = journal.study_folder(tmp_path, "toy") / "journal.log", journal.read(tmp_path, "toy")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.pop("checksum") for line in lines)
    path.write_text("".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines))
    assert journal.read(tmp_path, "toy") == whole


@pytest.mark.parametrize(
    ("file", "read", "otherwise"),
    [
        ("references.json", references.read, {}),
        ("events.jsonl", lambda folder: Spool(folder).read(0)[0][0], {}),
        ("position.json", lambda folder: Spool(folder).load_position(), Position()),
    ],
)
def test_other_files_of_a_study_with_a_damaged_byte_count_as_absent(tmp_path, file, read, otherwise):
    spool = Spool(tmp_path)
    spool.append({"do": "metrics", "number": 3, "metrics": {"knn/top1": 0.71}})
    spool.save_position(Position(0, "tracker", {"search": ("run", 12)}))
    checksums.write_json(tmp_path / "references.json", {"random student": {"metrics": {"knn/top1": 0.31}, "keys": {}}})
    path, whole = tmp_path / file, read(tmp_path)
    assert whole != otherwise
    for position in range(path.stat().st_size - 1):
        content = flipped(path, position)
        assert read(tmp_path) == otherwise, position
        path.write_bytes(content)


def test_the_cache_of_file_hashes_with_a_damaged_byte_is_made_anew(tmp_path):
    cache = tmp_path / "hashes.json"
    cache.write_text(checksums.json_text({"/a": [3, 1, 2, "ab" * 32]}))
    assert source._cached_entries(cache) == {"/a": [3, 1, 2, "ab" * 32]}
    for position in range(cache.stat().st_size):
        content = flipped(cache, position)
        assert source._cached_entries(cache) == {}, position
        cache.write_bytes(content)

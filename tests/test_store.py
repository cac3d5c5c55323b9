"""A store publishes complete artifacts once and never returns a damaged one."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from ktray.errors import UserError
from ktray.stores import open_store
from ktray.stores.file import FileStore


@pytest.fixture
def store(tmp_path):
    return FileStore(tmp_path / "store")


def publish(store, key="features-000000000000", content=b"1234", attempt="a"):
    scratch = store.scratch(key, attempt)
    (scratch / "data.bin").write_bytes(content)
    return store.publish(scratch, key, {"stage": "features", "metrics": {"dim": 4.0}, "inputs": {}})


def test_a_published_artifact_is_found_with_its_metrics_and_files(store):
    artifact, published = publish(store)
    assert published
    found = store.find(artifact.key)
    assert found.metrics == {"dim": 4.0}
    assert (found.directory / "data.bin").read_bytes() == b"1234"
    assert list(store.keys()) == [artifact.key]


def test_every_file_is_as_readable_as_the_record(store):
    scratch = store.scratch("features-000000000000", "a")
    (scratch / "images").mkdir()
    for file in (scratch / "weights.safetensors", scratch / "images" / "sheet.png"):
        file.touch(mode=0o600)
    artifact, _ = store.publish(scratch, "features-000000000000", {"stage": "features", "metrics": {}, "inputs": {}})
    modes = {file.stat().st_mode & 0o777 for file in artifact.directory.rglob("*") if file.is_file()}
    assert modes == {(artifact.directory / "record.json").stat().st_mode & 0o777}


def test_the_second_attempt_at_a_published_key_is_discarded(store):
    publish(store, content=b"first", attempt="a")
    second, published = publish(store, content=b"second", attempt="b")
    assert not published
    assert (second.directory / "data.bin").read_bytes() == b"first"


def test_of_two_overlapping_attempts_the_slower_gets_the_artifact_of_the_faster(store):
    key = "features-000000000000"
    faster, slower = (store.scratch(key, attempt) for attempt in "ab")
    for scratch in (faster, slower):
        (scratch / "data.bin").write_bytes(scratch.name.encode())
    assert store.publish(faster, key, {"metrics": {}})[1]
    found, published = store.publish(slower, key, {"metrics": {}})
    assert not published
    assert (found.directory / "data.bin").read_bytes() == faster.name.encode()
    assert store.verify(key) == ""
    assert not list((store.root / ".scratch").iterdir())


def test_a_truncated_file_is_reported_and_never_used(store, caplog):
    artifact, _ = publish(store)
    (artifact.directory / "data.bin").write_bytes(b"12")
    assert store.find(artifact.key) is None
    assert "damaged" in caplog.text
    assert "2 bytes, not 4" in caplog.text
    again, published = publish(store)
    assert published
    assert store.find(again.key) is not None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {"data.bin": {"size": 999}}}', '{"metrics": {}}'])
def test_a_record_that_is_broken_or_wrong_makes_the_artifact_absent(store, text):
    artifact, _ = publish(store)
    (artifact.directory / "record.json").write_text(text)
    assert store.find(artifact.key) is None


def test_a_directory_without_a_record_is_not_an_artifact(store):
    half = store.root / "clusters-aaaaaaaaaaaa"
    half.mkdir()
    (half / "centroids.npy").write_bytes(b"half")
    assert store.find("clusters-aaaaaaaaaaaa") is None
    assert publish(store, "clusters-aaaaaaaaaaaa")[1]


def test_a_fenced_attempt_can_neither_write_nor_publish(store):
    scratch = store.scratch("student-000000000000", "late")
    (scratch / "weights").write_bytes(b"w")
    assert store.fence("student-000000000000", "late")
    with pytest.raises(FileNotFoundError):
        (scratch / "more").write_bytes(b"w")
    with pytest.raises(FileNotFoundError):
        store.publish(scratch, "student-000000000000", {"metrics": {}})
    assert store.find("student-000000000000") is None
    assert not store.fence("student-000000000000", "late")


def test_attempts_are_listed_by_the_prefix_of_their_names(store):
    for key, attempt in (("student-1", "ours-a"), ("student-2", "ours-b"), ("student-1", "theirs-a"), ("student-3", "ours-c")):
        store.scratch(key, attempt)
    store.fence("student-3", "ours-c")
    assert sorted(store.attempts("ours-")) == [("student-1", "ours-a"), ("student-2", "ours-b")]


def test_checkpoints_of_dead_attempts_are_found_newest_first_and_half_written_ones_are_not(store):
    key = "student-000000000000"
    for attempt, epoch in (("a", 3), ("b", 12)):
        (store.scratch(key, attempt) / f"checkpoint-{epoch:06d}").mkdir()
    (store.scratch(key, "c") / "checkpoint-partial").mkdir()
    store.fence(key, "b")
    assert [path.name for path in store.checkpoints(key)] == ["checkpoint-000012", "checkpoint-000003"]
    publish(store, key, attempt="d")
    assert store.checkpoints(key) == []


def test_a_failure_is_kept_until_the_key_is_published(store):
    store.record_failure("clusters-000000000000", {"cause": "ValueError: NaN"})
    assert store.failure("clusters-000000000000")["cause"] == "ValueError: NaN"
    assert store.find("clusters-000000000000") is None
    publish(store, "clusters-000000000000")
    assert store.failure("clusters-000000000000") is None


def test_verify_names_a_file_with_changed_content_of_the_same_size(store):
    artifact, _ = publish(store)
    assert store.verify(artifact.key) == ""
    (artifact.directory / "data.bin").write_bytes(b"4321")
    assert "data.bin" in store.verify(artifact.key)


def test_sweep_keeps_checkpoints_from_which_a_later_attempt_can_resume(store):
    (store.scratch("student-1", "a") / "checkpoint-000004").mkdir()
    store.scratch("student-2", "a")
    assert store.sweep() == 1
    assert len(store.checkpoints("student-1")) == 1


def test_kill_9_at_any_moment_leaves_a_complete_artifact_or_none(tmp_path):
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from ktray.stores.file import FileStore
        store = FileStore(Path(sys.argv[1]))
        for n in range(100000):
            key = f"features-{n:012d}"
            scratch = store.scratch(key, "a")
            for part in range(3):
                (scratch / f"part{part}").write_bytes(b"x" * 5000)
            store.publish(scratch, key, {"metrics": {}})
    """)
    root = tmp_path / "store"
    for moment in (0.25, 0.4, 0.55):
        child = subprocess.Popen([sys.executable, "-c", program, str(root)])
        time.sleep(moment)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        store = FileStore(root)
        for directory in root.iterdir():
            if directory.name.startswith("."):
                continue
            record = json.loads((directory / "record.json").read_text())
            assert store.verify(directory.name) == "", record
            store.remove(directory.name)
        store.sweep()


def test_an_unknown_store_url_is_refused_with_what_works():
    with pytest.raises(UserError, match="file:///"):
        open_store("gopher://somewhere/store")

"""What would fail after hours is said before the first stage."""

import errno
from pathlib import Path

import pytest

from ktray.crew.needs import Needs, Runtime
from ktray.crew.roster import Node, Roster
from ktray.drivers import preflight
from ktray.errors import PreflightFailed
from ktray.stores.file import FileStore

GOOD = {"seen": "ktray", "refused": "", "host": "n1", **preflight._versions()}


def test_a_healthy_place_passes_and_no_probe_is_left(ray_home, tmp_path):
    store = FileStore(tmp_path)
    preflight.preflight(store)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_with_its_number_and_exit_code_4(ray_home, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "LEAST_FREE", 1 << 60)
    with pytest.raises(PreflightFailed, match="MB left") as raised:
        preflight.preflight(FileStore(tmp_path))
    assert raised.value.exit_code == 4


def test_on_a_full_disk_no_node_is_asked_because_not_even_the_question_could_be_written(ray_home, tmp_path, monkeypatch):
    def full(root):
        raise OSError(errno.ENOSPC, "No space left on device", str(root))

    monkeypatch.setattr(preflight, "_nodes", full)
    monkeypatch.setattr(preflight, "LEAST_FREE", 1 << 60)
    with pytest.raises(PreflightFailed, match="MB left"):
        preflight.preflight(FileStore(tmp_path))


def test_a_node_answers_with_what_it_sees_and_leaves_a_file_beside_it(tmp_path):
    probe = tmp_path / ".probe-1"
    probe.write_text("ktray")
    assert preflight._look(str(probe))["seen"] == "ktray"
    assert len(list(tmp_path.iterdir())) == 2
    assert preflight._look(str(tmp_path / "absent"))["seen"] == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seen": ""}, "does not see the store"),
        ({"refused": "Read-only file system"}, "cannot write to the store /store: Read-only file system"),
        ({"ktray": "0.0.1"}, "has ktray 0.0.1, and here"),
        ({"Python": "3.9.1"}, "Python 3.9.1"),
        ({"torch": "1.0.0"}, "has torch 1.0.0, and here"),
        ({"error": "it is dead"}, "it is dead"),
    ],
)
def test_each_thing_that_is_wrong_with_a_node_is_said(changes, said):
    found = preflight._wrong("abcdef0123", {**GOOD, **changes}, Path("/store/.probe"))
    assert said in " ".join(found)
    assert preflight._wrong("abcdef0123", GOOD, Path("/store/.probe")) == []


@pytest.mark.parametrize(
    ("needs", "fits"),
    [
        (Needs(gpus=0.5), True),
        (Needs(gpus=2.0), False),
        (Needs(cpus=3.0), False),
        (Needs(memory_bytes=9 << 30), False),
    ],
)
def test_a_stage_that_no_node_could_ever_run_is_named_before_the_search_begins(needs, fits):
    roster = Roster({"small": Node(2.0, memory=float(4 << 30)), "large": Node(2.0, 1.0, float(8 << 30))})
    found = preflight._needs(Runtime(stages={"student": needs}), roster)
    said = "No node can run student as the runtime file asks; the largest one has 2 CPU, 1 GPU and 8.0 GiB. Ask for less."
    assert found == ([] if fits else [said])

"""Paths as users write them: home folders of users that are known or not, and URLs where only a path can be."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

import ktray
from ktray.cli import main
from ktray.errors import UserError
from ktray.features.precomputed import feature_files
from ktray.fine_tuning.proposals import check_proposals
from ktray.images.data_files import data_folder
from ktray.local_path import expanded, local_path
from ktray.runs.settings import make_settings
from ktray.spec import PrecomputedTeacher
from ktray.training.pretrained import checkpoint_path

URL = "https://someone:hunter2@raw.example/p.yaml?token=ghp_abcdefghij"
HIDDEN = "https://***@raw.example/p.yaml?token=***"


def test_home_folders_are_those_that_the_system_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = pwd.getpwnam("root").pw_dir
    assert expanded("~root/x") == Path(root, "x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [expanded(path) for path in ("~", "~/x", Path("~/x"), "a/~/x")] == [
        tmp_path,
        tmp_path / "x",
        tmp_path / "x",
        Path("a/~/x"),
    ]


def test_a_folder_whose_name_begins_with_a_tilde_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    once = expanded("./~nouser/x")
    assert once == expanded(once) == tmp_path / "~nouser" / "x"


def test_without_a_home_folder_a_tilde_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 987_654_321)
    with pytest.raises(UserError, match=r"data.path: ~/x begins with ~, and this user has no home folder. Write ./~ for"):
        data_folder("~/x")


PLACES = {
    "the data": (data_folder, "data.path"),
    "a checkpoint": (checkpoint_path, "teacher.checkpoint"),
    "features": (lambda path: feature_files(PrecomputedTeacher(features=f"{path}.npy")), "teacher.features"),
    "proposals": (check_proposals, "proposals"),
    "the home": (lambda path: make_settings(path), "--home"),
    "the runtime file": (lambda path: make_settings("home", runtime=path), "--runtime"),
    "a file of a call": (lambda path: ktray.run(path, local=True), "pair"),
    "a space of a call": (lambda path: ktray.search(path), "space"),
}


@pytest.mark.parametrize(("use", "where"), PLACES.values(), ids=PLACES.keys())
def test_an_unknown_user_and_a_url_are_refused_wherever_a_path_is_given(
    use, where, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        use("~nouser/x")
    assert f"{where}: ~nouser/x" in str(caught.value)
    assert "begins with ~nouser, and there is no user of this name. Write ./~nouser for" in str(caught.value)
    with pytest.raises(UserError) as caught:
        use(URL)
    assert str(caught.value).startswith(f"{where}: {HIDDEN}"[: len(where) + 25])
    assert "hunter2" not in str(caught.value)
    assert "ghp_" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("store", ["~nouser/x", "file://~nouser/x"])
def test_the_store_of_an_unknown_user_is_refused(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--store: ~nouser/x begins with ~nouser"):
        make_settings("home", store=store)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("store", ["~/x", "file://~/x"])
def test_a_store_may_lie_in_the_home_folder_of_the_user(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = make_settings(tmp_path / "home", store=store)
    assert settings.open_store().root == tmp_path / "x"


COMMANDS = [
    *(["plan", "{}"], ["run", "{}", "--local"], ["search", "{}"], ["show", "pretext", "--against", "{}"]),
    *(["status", "--home", "{}"], ["run", "x.yaml", "--runtime", "{}"], ["report", "toy", "-o", "{}"], ["export", "toy", "{}"]),
    *(["data", "make-voc", "{}", "--from", "fashion_mnist_mini"], ["plan", "x.yaml", "--store", "{}"]),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command))
@pytest.mark.parametrize(("path", "said"), [(URL, HIDDEN), ("~nouser/x", "~nouser/x begins with ~nouser")], ids=["URL", "user"])
def test_a_command_refuses_it_in_one_sentence_and_makes_nothing(
    command: list[str], path: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([each.format(path) for each in command]) == 2
    out, err = capfd.readouterr()
    assert not out
    assert said in err
    assert "hunter2" not in err
    assert "ghp_" not in err
    assert err.count("\n") == 1
    assert not [file for file in tmp_path.iterdir() if command[0] != "data"]


@pytest.mark.parametrize("path", ["C:/data/x", "a:b/c", "/x/https:/y", "./https:/y", "http", "x.yaml"])
def test_what_is_no_url_is_a_path(path: str) -> None:
    assert local_path(path, "here") == Path(path)

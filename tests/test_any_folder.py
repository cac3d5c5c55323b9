"""Any layout of folders ends in a listing, or in one paragraph: never in a traceback, a hang, or gigabytes of memory."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ktray import images
from ktray.cli import main
from ktray.errors import UserError
from ktray.pool import LocalPool
from tests.child import peak_memory
from tests.pictures import data_spec, listed, noise, png

WORDS = (
    "train",
    "Train",
    "TESTING",
    "val",
    "valid",
    "dev",
    "eval",
    "test",
    "seg_train",
    "mytrain",
    "trainval",
    "cat",
    "dog",
    "Cat",
)
ODD = (
    "[a]",
    "*",
    "?",
    "a b",
    " ",
    "-x",
    "$5",
    "{x}",
    "a\nb",
    "日本",
    "\x1b]0;x",
    "%",
    "~",
    "__MACOSX",
    ".hidden",
    "a" * 255,
    "\udcff",
)
FOLDER = st.sampled_from(WORDS) | st.sampled_from(ODD) | st.text(max_size=8).filter(lambda text: text not in ("", ".", ".."))
FILE = st.sampled_from(
    (
        "0.png",
        "1.JPG",
        "x.jfif",
        "photo.heic",
        "notes.txt",
        "none",
        ".png",
        "x.png~",
        "\udcfe.png",
        "a\tb.gif",
        "9" * 9 + ".1",
        "[x].webp",
    )
)
CONTENT = st.sampled_from(
    ("image", "empty", "html", "cut", "wide", "noise", "link", "self", "up", "elsewhere", "pipe", "folder")
)
PNG = png(noise(9, 7))
WIDE = png(noise(8, 8)[:, :, 0].astype("uint16"))
ENTRY = st.tuples(st.lists(FOLDER, max_size=4), FILE, CONTENT)


def make(root: Path, entries: list[tuple[list[str], str, str]]) -> None:
    """A tree as described; what the file system refuses is left out."""
    for folders, name, content in entries:
        path = root.joinpath(*folders, name)
        try:
            if os.path.lexists(path):  # it may be a pipe, and writing to one waits for a reader
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if content == "folder":
                path.mkdir()
            elif content == "pipe":
                os.mkfifo(path)
            elif content in LINKS:
                path.symlink_to(LINKS[content](root, path))
            elif path.is_file() or not path.exists():  # to write to a pipe would wait for its reader
                path.write_bytes(BYTES[content])
        except (OSError, ValueError):
            continue


LINKS = {
    "link": lambda root, path: root / "nowhere",
    "self": lambda root, path: path,
    "up": lambda root, path: path.parent.parent if path.parent != root else root,
    "elsewhere": lambda root, path: min(root.iterdir(), default=root),
}
BYTES = {"image": PNG, "empty": b"", "html": b"<html>", "cut": PNG[:60], "wide": WIDE, "noise": bytes(range(256))}


def outcome(run: Callable[[], Any], expected: type[Exception]) -> tuple[Any, Any]:
    """What `run` returns, or the error that it raises."""
    try:
        return run(), None
    except expected as error:
        str(error).encode()
        return None, error


def holds(kind: str, entries: list[tuple[list[str], str, str]]) -> None:
    began, before = time.process_time(), peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        root.mkdir()
        make(root, entries)
        spec = data_spec({"kind": kind, "path": str(root), "size": 8, "max_unreadable": 1.0})
        splits, error = outcome(lambda: listed(spec), UserError)
        assert error is None or error.instead
        if splits is not None:
            json.dumps(splits.layout.left_out).encode()
            names = [name for part in (splits.train, splits.val, splits.test) if part for name in part.names]
            assert len(set(names)) == len(names)
            "".join(names).encode()
            written, failure = outcome(lambda: images.write(spec, Path(folder) / "out", LocalPool()), ValueError)
            assert "unreadable" in str(failure) if failure else written["count"] + written["unreadable"] == len(names)
        assert main(["data", "check", f"{kind}:{root}", "--home", f"{folder}/home", "--json"]) in (0, 2)
    assert time.process_time() - began < 10
    assert peak_memory() - before < 2 << 30


@given(kind=st.sampled_from(("folder", "imagefolder")), entries=st.lists(ENTRY, max_size=12))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_layout_ends_in_a_listing_or_a_paragraph(kind, entries) -> None:
    holds(kind, entries)


@pytest.mark.slow
@given(kind=st.sampled_from(("folder", "imagefolder")), entries=st.lists(ENTRY, max_size=25))
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_of_many_layouts_ends_in_a_listing_or_a_paragraph(kind, entries) -> None:
    holds(kind, entries)


TREE = st.lists(
    st.tuples(
        st.lists(st.text("ab-. _/!~".replace("/", ""), min_size=1, max_size=3), min_size=1, max_size=3), st.integers(0, 12)
    )
)


@given(entries=TREE.filter(bool))
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_tree_has_the_order_of_torchvision(entries: list[tuple[list[str], int]]) -> None:
    from torchvision.datasets import ImageFolder

    with tempfile.TemporaryDirectory() as root:
        for folders, number in entries:
            if any(name.startswith(".") for name in folders):
                continue
            path = Path(root).joinpath(*folders, f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PNG)
        if not os.listdir(root):
            return
        oracle = ImageFolder(root, allow_empty=True)
        found = listed({"kind": "imagefolder", "path": root}).train
        assert [os.path.join(root, name) for name in found.names] == [path for path, _ in oracle.samples]
        assert found.labels.tolist() == oracle.targets

"""What reaches a terminal, a log, MLflow and the report: control characters are visible, names are never markup."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import unicodedata
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from ktray.cli import main
from ktray.cli.terminal import print_result, table
from ktray.errors import UserError
from ktray.output import VisibleFormatter, print_err, print_out
from ktray.runs.display import _Live
from ktray.search.study import Study
from ktray.text import counted, cut, first_few, near_word, shown, some_of, visible, visible_name
from ktray.tracking.mlflow_names import markdown_text, params_of, run_name, tags_of, with_links
from tests.reports import OBJECTIVES, REFERENCES, Page, pair, trial
from tests.toy_space import drive, toy_space

HOSTILE = {
    "a title": ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    "a colour": ("\x1b[31mred", r"\x1b[31mred"),
    "the same in one byte": ("\x9b31mred", r"\x9b31mred"),
    "a clear screen": ("\x1bc", r"\x1bc"),
    "a bell": ("a\x07", r"a\x07"),
    "a backspace": ("abc\x08\x08", r"abc\x08\x08"),
    "a carriage return": ("failed\rpassed", r"failed\rpassed"),
    "a line": ("a\nktray: all is well", r"a\nktray: all is well"),
    "a tab": ("a\tb", r"a\tb"),
    "a delete": ("a\x7f", r"a\x7f"),
    "a NUL": ("a\0b", r"a\x00b"),
    "a next line": ("a\x85b", r"a\x85b"),
    "a line separator": ("a\u2028b", r"a\u2028b"),
    "a blank that is no space": ("a\u00a0b\u202fc", r"a\xa0b\u202fc"),
    "a turn to the left": ("exe.\u202egnp", r"exe.\u202egnp"),
    "an isolate": ("\u2067abc\u2069", r"\u2067abc\u2069"),
    "a mark": ("a\u200fb", r"a\u200fb"),
    "nothing to be seen": ("hog\u200b", r"hog\u200b"),
    "a byte order mark": ("\ufeffhog", r"\ufeffhog"),
    "a tag character": ("hog\U000e0041", r"hog\U000e0041"),
    "a byte that is no UTF-8": (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
    "half a surrogate": ("a\ud800", r"a\ud800"),
}
HARMLESS = [
    "hog k=50 -> alexnet w0.25",
    "Käfer",
    "甲虫",
    "甲\u3000虫",
    "жук",
    "חיפושית",
    "خنفساء",
    "می\u200cخواهم",
    "👩\u200d🔬",
    "$x$",
    "[red]",
    "<b>",
    "",
]
MARKUP = [
    "[red]",
    "[/]",
    "[bold]x[/bold]",
    "<b>x</b>",
    ":smile:",
    "[link=http://x]y[/link]",
    "\\[red]",
    "$x_1$",
    "`x`",
    "*x*",
    "_x_",
]


def is_shown(text: str) -> bool:
    """Whether a terminal shows all of a text instead of obeying it."""
    return all(unicodedata.category(char)[0] != "C" or char in "\n\t\u200c\u200d" for char in text)


@pytest.mark.parametrize(("name", "seen"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_name_is_written_so_that_a_terminal_shows_it(name: str, seen: str) -> None:
    assert visible_name(name) == seen
    assert visible_name(seen) == seen
    assert is_shown(seen)


@pytest.mark.parametrize("name", HARMLESS)
def test_a_name_in_any_script_stays_as_it_is(name: str) -> None:
    assert visible_name(name) == visible(name) == name


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    print_err(f"ktray: {name}")
    print_out(f"result {name}")
    print_result(Namespace(json=False), {}, table(["a", "b"], [[name, "1"]]))
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.mark.parametrize(("name", "seen"), HOSTILE.values(), ids=HOSTILE.keys())
def test_whatever_is_printed_is_shown(name: str, seen: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(name, capsys)
    assert is_shown(text)
    assert seen in text  # in the table, which has one line per row
    assert len(table(["a", "b"], [[name, "1"]]).splitlines()) == 3


@pytest.mark.parametrize(("name", "seen"), HOSTILE.values(), ids=HOSTILE.keys())
def test_json_holds_the_name_itself_and_no_control_character(name: str, seen: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_result(Namespace(json=True), {"name": name}, "")
    out = capsys.readouterr().out
    assert is_shown(out)
    assert json.loads(out) == {"name": name}


@pytest.mark.parametrize(("name", "seen"), HOSTILE.values(), ids=HOSTILE.keys())
def test_an_error_is_one_line_whatever_it_names(name: str, seen: str) -> None:
    assert str(UserError(f"there is no class {name}", f"/photos/{name}", f"Rename {name}.")) == (
        f"/photos/{seen}: there is no class {seen}. Rename {seen}."
    )
    many = str(UserError("2 things are wrong", "space.yaml", entries=(f"- {name}", "- b")))
    assert many.splitlines() == ["space.yaml: 2 things are wrong", f"  - {seen}", "  - b"]


@pytest.mark.parametrize(("name", "seen"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_log_record_is_shown(name: str, seen: str) -> None:
    record = logging.LogRecord("ktray", logging.WARNING, "x.py", 1, "no class %s", (name,), None)
    assert is_shown(VisibleFormatter("%(message)s").format(record))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_of_any_encoding_shows_every_character(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    print_out("甲 ü → \ud800")
    sys.stdout.flush()
    assert raw.getvalue().decode(encoding) in (
        "甲 ü → \\ud800\n",
        "\\u7532 ü \\u2192 \\ud800\n",
        "\\u7532 \\xfc \\u2192 \\ud800\n",
    )


def test_a_closed_stderr_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    print_err("ktray: nobody reads this")


@pytest.mark.parametrize("name", [*MARKUP, *(name for name, _ in HOSTILE.values())])
def test_the_live_table_shows_names_as_they_are(name: str, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200, height=40, force_terminal=True, color_system=None)
    live = _Live(toy_space(tmp_path), name, console, lambda key: False)
    status: dict[str, Any] = {
        "workers": [{"state": "stage"}],
        "running": [{"key": name, "worker": name, "since": 0.0, "progress": {name: 1.0}, "helpers": []}],
    }
    with Study.open(tmp_path, live.space) as study:
        live.begin(study)
        drive(study, segments=2)
        live.work([], status)
        with console.capture() as captured:
            console.print(live.render())
            live.say(name)
    text = captured.get()
    assert is_shown(text)
    assert text.count(visible_name(name)) == 3  # the study, the progress of a stage, and what is said


@pytest.mark.parametrize("name", [*MARKUP, *(name for name, _ in HOSTILE.values())])
def test_the_report_shows_names_as_they_are(name: str, tmp_path: Path) -> None:
    from ktray.report import render
    from ktray.stores.file import FileStore

    trials = [trial(0, 0.5, pair=pair(teacher={"descriptor": {"kind": "hog", "layer": name}}))]
    html = render("study", name, OBJECTIVES, trials, REFERENCES, FileStore(tmp_path), {})
    assert is_shown(html.replace("\r\n", "\n"))
    assert visible(name) in "".join(Page(html).texts.values())


@pytest.mark.parametrize("name", [*MARKUP, "a](view) [b", "](trial/7)", "a|b", "~~a~~", "&lt;", "_a", "soft_clusters"])
def test_a_description_in_mlflow_shows_names_as_they_are(name: str) -> None:
    text = with_links(f"1. [0001 {markdown_text(name)}](trial/1): {markdown_text(name)}", lambda target: f"#/{target}")
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    inline = next(token for token in tokens if token.type == "inline")
    assert [child.type for child in inline.children or [] if child.type != "text_special"] in (
        ["link_open", "text", "link_close", "text"],
        ["link_open", "text", "text", "link_close", "text", "text"],
    ) or not {child.type for child in inline.children or []} - {"link_open", "link_close", "text"}
    assert "".join(child.content for child in inline.children or []) == f"0001 {name}: {name}"
    assert [child.attrs["href"] for child in inline.children or [] if child.type == "link_open"] == ["#/trial/1"]


@pytest.mark.parametrize(("name", "seen"), HOSTILE.values(), ids=HOSTILE.keys())
def test_names_and_values_for_mlflow_are_shown(name: str, seen: str) -> None:
    params, _ = params_of({name: name, "list": [name]})
    texts = [run_name(1, name), *params, *params.values(), *tags_of({name: name}), *tags_of({name: name}).values()]
    assert all(map(is_shown, texts))


def test_a_hostile_branch_folder_and_kind_are_shown_by_every_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "ho\x1b[31mme"))
    hostile = "\x1b]0;owned\x07\u202e"
    transfer = {"one_of": {hostile: {"kind": "clusters", "k": 5}, "b": {"kind": hostile}}}
    content = {"study": "t", "objectives": [{"metric": hostile}], "pair": {"data": f"folder:{hostile}", "transfer": transfer}}
    path = tmp_path / f"{hostile}\n.yaml"
    path.write_text(yaml.safe_dump(content))
    for words in (
        ["plan", str(path)],
        ["plan", str(path), "--json"],
        ["plan", str(path), "--set", f"transfer.{hostile}.k={hostile}"],
        ["run", f"{path}x"],
        ["search", str(path), "--name", hostile],
        ["best", hostile],
        ["show", hostile],
        ["data", "check", f"folder:{hostile}"],
        ["data", "check", hostile],
        ["cache", "list"],
        ["plan", str(path), "--runtime", hostile],
        [hostile],
        ["plan", f"--{hostile}"],
    ):
        main(words)
        captured = capsys.readouterr()
        for text in (captured.out, captured.err):
            assert is_shown(text), words
            assert "owned" in text or not text or words[0] in ("cache", "plan"), words


@pytest.mark.parametrize(
    ("count", "words", "text"),
    [
        (0, ("pair",), "0 pairs"),
        (1, ("pair",), "1 pair"),
        (2, ("pair",), "2 pairs"),
        (12_000, ("image",), "12,000 images"),
        (1, ("class", "classes"), "1 class"),
        (10, ("class", "classes"), "10 classes"),
        (1, ("image was", "images were"), "1 image was"),
    ],
)
def test_a_count_has_its_noun(count: int, words: tuple[str, ...], text: str) -> None:
    assert counted(count, *words) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 of 5 images are"), (1, "1 of 5 images is"), (2, "2 of 5 images are")])
def test_a_part_has_its_verb(count: int, text: str) -> None:
    assert some_of(count, 5, "image", ("is", "are")) == text


def test_long_values_are_cut_in_the_middle() -> None:
    assert shown("a" * 1000) == f"'{'a' * 38}…{'a' * 38}'"
    assert cut("abcdef", 5) == "ab…ef"
    assert cut("abcde", 5) == "abcde"
    assert first_few(range(30), limit=3) == "0, 1, 2 and 27 more"
    assert first_few(range(3), limit=3) == "0, 1, 2"
    assert near_word("hgo", ["hog", "knn"]) == "hog"
    assert near_word("h" * 100_000, ["hog"]) is None


@settings(max_examples=20, deadline=None)
@given(st.text())
def test_any_text_is_shown_and_what_was_visible_is_kept(text: str) -> None:
    seen = visible_name(text)
    assert is_shown(seen)
    assert "\n" not in seen
    assert visible_name(seen) == seen
    if text.isprintable():
        assert seen == text

"""Files in YAML: what is read, what is refused with line and column, and the limits. Oracles are PyYAML and json."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ktray.errors import UserError
from ktray.yaml_file import MAX_BYTES, parse_yaml, read_yaml

READ = {
    "a whole number of 64 bits": ("a: 9223372036854775807", 2**63 - 1),
    "a negative one": ("a: -5", -5),
    "a hex number": ("a: 0x1F", 31),
    "digits in groups": ("a: 1_000", 1000),
    "a fraction with digits in groups": ("a: -12_000.5", -12000.5),
    "a number without a point": ("a: 1e3", 1000.0),
    "a number without a sign": ("a: 1.5e3", 1500.0),
    "a number without a fraction": ("a: 1.", 1.0),
    "a number without a zero": ("a: -.5", -0.5),
    "an explicit text": ("a: !!str 5", "5"),
    "an explicit number": ("a: !!float 1", 1.0),
    "a whole number that is called so": ('a: !!int "3"', 3),
    "the same with its whole tag": ("a: !<tag:yaml.org,2002:int> 3", 3),
    "what is called no kind is text": ("a: ! 3", "3"),
    "a list that is called no kind": ("a: ! [3]", [3]),
    "yes": ("a: yes", True),
    "nothing": ("a:", None),
    "a date is text": ("a: 2023-01-05", "2023-01-05"),
    "a date that is none, too": ("a: 2023-13-45", "2023-13-45"),
    "a time of day is text, not 5400 seconds": ("a: 1:30:00", "1:30:00"),
    "an equals sign": ("a: =", "="),
    "half a merge key": ("a: '<<'", "<<"),
    "a pair of surrogates, as JSON has it": ('a: "\\ud83d\\ude00"', "😀"),
    "an escape": ('a: "\\x1b[0m"', "\x1b[0m"),
    "a mark that turns text": ("a: \u202eb", "\u202eb"),
    "a byte order mark": ("\ufeffa: b", "b"),
    "Windows' line ends": ("a: b\r\n# c\r\n", "b"),
    "an alias": ("b: &b [1, 2]\na: *b", [1, 2]),
    "a merge key": ("b: &b {x: 1, y: 2}\na: {<<: *b, x: 3}", {"x": 3, "y": 2}),
    "several, of which the first wins": ("b: &b {x: 1}\na: {<<: [*b, {x: 5, z: 2}]}", {"x": 1, "z": 2}),
    "a merge of a merge": ("q: {deep: &b {<<: {x: 1}, x: 2}}\na: {<<: *b}", {"x": 2}),
    "an anchor that is there twice": ("b: &x 1\nc: &y 2\na: *x", 1),
}


@pytest.mark.parametrize(("text", "value"), READ.values(), ids=READ.keys())
def test_a_value_is_read_as_it_is_meant(text: str, value: Any) -> None:
    found = parse_yaml(text, "it.yaml")["a"]
    assert (found, type(found)) == (value, type(value))


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    return "\n".join(
        lines + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)] + [f"a: *a{levels - 1}"]
    )


def merged_laughs(levels: int) -> str:
    lines = ["a0: &a0 {" + ", ".join(f"k{n}: 1" for n in range(10)) + "}"]
    return "\n".join(lines + [f"a{n}: &a{n} {{x: {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}}}" for n in range(1, levels)])


REFUSED = {
    "a text that is called a number": ("a: !!int abc", "1, column 4", "abc is no whole number"),
    "a text that is called a fraction": ("a: !!float x", "1, column 4", "is no number"),
    "a text that is called true": ("a: !!bool maybe", "1, column 4", "is no bool"),
    "a text that is called null": ("a: !!null x", "1, column 4", "is no null"),
    "a hex number without digits": ("a: 0x", "1, column 4", "is no whole number"),
    "or with a line alone": ("a: 0x_", "1, column 4", "quote it if it is text"),
    "a binary number without digits": ("a: 0b", "1, column 4", "is no whole number"),
    "5,000 digits": (f"a: {'9' * 5000}", "1, column 4", "is too large"),
    "5,000 negative digits": (f"a: -{'9' * 5000}", "1, column 4", "is too large"),
    "5,000 hex digits": (f"a: 0x{'f' * 5000}", "1, column 4", "is too large"),
    "a decimal comma": ("a: {b: 0,05}", "1, column 10", "0,05 has a decimal comma. Write 0.05."),
    "a decimal comma before a digit": ("a: {b: 0,5}", "1, column 10", "0,5 has a decimal comma. Write 0.5."),
    "5,000 zeros": (f"a: {'0' * 5000}", "1, column 4", "versions of YAML read that differently. Write 0;"),
    "65 bits": ("a: 9223372036854775808", "1, column 4", "is too large"),
    "a leading zero": ("a: 010", "1, column 4", "Write 10, or 8 if it is octal"),
    "an underscore within a group of digits": ("a: 1_0", "1, column 4", "Write 10 if that is meant"),
    "an underscore at the end": ("a: 100_", "1, column 4", "Write 100 if that is meant"),
    "a list in itself": ("a: &a [*a]", "1, column 4", "contains itself"),
    "a mapping in itself": ("&a {b: {c: *a}}", "1, column 1", "contains itself"),
    "a merge of itself": ("a: &a {<<: *a}", "1, column 4", "contains itself"),
    "deep lists": ("a: " + "[" * 5000, "1, column 67", "more than 64 mappings and lists are inside each other"),
    "deep mappings": ("".join(" " * n + "a:\n" for n in range(300)), "64, column 64", "inside each other"),
    "deep entries": ("- " * 5000, "1, column 129", "inside each other"),
    "deep keys": ("? " * 500, "1, column 129", "inside each other"),
    "deep by aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [[[*a{n - 1}]]]\n" for n in range(1, 100)),
        "1, column 5",
        "inside each other",
    ),
    "a billion laughs": (laughs(10), "1, column", "more than 10,000 values"),
    "a billion merges": (merged_laughs(12), "2, column", "more than 10,000 values"),
    "long texts by aliases": (
        f"b: &b {'x' * 50_000}\nc: [{', '.join(['*b'] * 100)}]",
        "1, column 4",
        "more than 1,000,000 characters",
    ),
    "many lists": ("[" + "[]," * 30_000 + "]", "1, column", "more than 10,000 values"),
    "a tag": ("a: !foo b", "1, column 4", "the tag !foo is not known here"),
    "bytes": (
        "a: !!binary aGVsbG8=",
        "1, column 4",
        "!!bool, !!null are not known here",
    ),
    "a set": ("a: !!set {b, c}", "1, column 4", "!!bool, !!null are not known here"),
    "pairs": ("a: !!omap [b: c]", "1, column 4", "!!bool, !!null are not known here"),
    "a time": (
        "a: !!timestamp 2023-01-01",
        "1, column 4",
        "!!bool, !!null are not known here",
    ),
    "an object": (
        "a: !!python/name:os.system",
        "1, column 4",
        "!!bool, !!null are not known here",
    ),
    "a no-break space after a colon": ("a:\u00a01\nb: 2", "1, column 3", "U+00A0 (NO-BREAK SPACE) looks like a blank here"),
    "one in the last line": ("b: 2\na:\u00a01", "2, column 3", "U+00A0 (NO-BREAK SPACE) looks like a blank here"),
    "one behind a blank": ("a: \u2009{b: 2", "1, column 4", "U+2009 (THIN SPACE) looks like a blank here"),
    "one as indentation": ("c: 1\n\u3000a: 2\n  b: 3", "2, column 1", "U+3000 (IDEOGRAPHIC SPACE) looks like a blank here"),
    "a blank without width": ("a:\u200b1\nb: 2", "1, column 3", "U+200B (ZERO WIDTH SPACE) looks like a blank here"),
    "a mapping that is called a number": ("a: !!int {b: c}", "1, column 4", "the tag !!int does not fit a list or a mapping"),
    "a list that is called text": (
        "a: !!str [b]",
        "1, column 4",
        "!!bool, !!null are not known here",
    ),
    "a tag that is no UTF-8": ("a: !%ff x", "1, column 5", "not valid YAML"),
    "a NUL": ("b: c\na: \0", "2, column 4", r"it contains the character \x00"),
    "a NUL as an escape": ('a: "\\0"', "1, column 4", "contains a NUL"),
    "an escape sequence": ("a: b\nc: \x1b[31m", "2, column 4", r"it contains the character \x1b"),
    "a lone surrogate": ('a: "\\ud800"', "1, column 4", "half of a surrogate pair"),
    "a lone surrogate in a key": ('"\\udfff": a', "1, column 1", "half of a surrogate pair"),
    "a byte of a command line that is no text": ("a: \udc80", "1, column 4", r"it contains the character \x80"),
    "an escape beyond Unicode": ('a: "\\Uffffffff"', "1, column 7", "stands for nothing"),
    "an unknown escape": ('a: "C:\\q"', "1, column 8", "unknown escape character 'q'"),
    "a version of 5,000 digits": (f"%YAML {'9' * 5000}.1\n---\na: b", "1, column 7", "stands for nothing"),
    "another version": ("%YAML 2.0\n---\na: b", "1, column 1", "incompatible"),
    "a tab": ("a:\n\tb: c", "2, column 1", "Indent with spaces, not with tabs."),
    "a key that is there twice": ("a: 1\nb: 2\n'a': 3", "3, column 1", "the key 'a' is there twice"),
    "a number as a key": ("1: a", "1, column 1", "the key 1 is not text. Quote it: '1'."),
    "yes as a key": ("{on: a}", "1, column 2", "the key on is not text. Quote it: 'on'."),
    "a list as a key": ("? [a]\n: b", "1, column 3", "cannot be a key"),
    "no key": ("{'b': 1, ~: a}", "1, column 10", "not text"),
    "a merge of a number": ("a: {<<: 3}", "1, column 9", "takes over a mapping"),
    "a merge of numbers": ("a: {<<: [3]}", "1, column 9", "takes over a mapping"),
    "two documents": ("a: b\n---\nc: d", "2, column 1", "A file has one document"),
    "an alias of nothing": ("a: *b", "1, column 4", "undefined alias 'b'"),
    "an open bracket": ("a: [b", "1, column 6", "A bracket or a quote is not closed."),
    "an open quote": ('a: "b', "1, column 6", "A bracket or a quote is not closed."),
    "a colon": ("a: b: c", "1, column 5", "Quote the text if it contains a colon"),
    "more than is read": ("a: " + "x" * MAX_BYTES, "", "at most 100,000 are read"),
}


@pytest.mark.parametrize(("text", "place", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_read_is_refused_with_line_and_column(text: str, place: str, said: str) -> None:
    began = time.perf_counter()
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "it.yaml")
    message = str(caught.value)
    assert message.startswith(f"it.yaml, line {place}" if place else "it.yaml: ")
    assert said in message
    assert message.isprintable()
    assert len(message) < 400
    assert time.perf_counter() - began < 10


def test_parts_that_share_an_anchor_are_values_of_their_own() -> None:
    found = parse_yaml("a: &x {k: [1]}\nb: *x\nc: {<<: *x}", "it.yaml")
    found["a"]["k"].append(2)
    assert found["b"] == found["c"] == {"k": [1]}
    found["b"]["k"].append(3)
    assert found["c"] == {"k": [1]}
    assert parse_yaml("a: &x {k: [1]}\nb: *x\nc: {<<: *x}", "it.yaml")["a"] == {"k": [1]}


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
MARKS = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_is_read_in_every_encoding_that_its_first_bytes_name(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "it.yaml"
    path.write_bytes(MARKS.get(encoding, b"") + "a: [Käfer, 甲虫, 😀]\n".encode(encoding))
    assert read_yaml(path) == {"a": ["Käfer", "甲虫", "😀"]}


FILES = {
    "Latin-1": (
        b"a: b\nc: K\xe4fer\n",
        ", line 2, column 5: the file is not text in UTF-8: the byte 0xe4 is none. Save it as UTF-8.",
    ),
    "UTF-16 without a mark": ("a: Käfer".encode("utf-16-le"), ": the file is not text in UTF-8. Save it as UTF-8."),
    "half of UTF-16": (b"\xff\xfea\0:", ": the file is not text in UTF-16. Save it as UTF-8."),
    "an image": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ": the file is not text in UTF-8. Save it as UTF-8."),
    "more than is read": (b"#" * (MAX_BYTES + 1), ": the file has more than 100,000 bytes. Is it the right one?"),
}


@pytest.mark.parametrize(("content", "said"), FILES.values(), ids=FILES.keys())
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "it.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert f"{path}{said}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (".", "this is a folder"),
        ("none.yaml", "No such file or directory"),
        ("a\0b.yaml", "the file cannot be read"),
        ("/dev/zero", "this is no regular file"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_yaml(tmp_path / name)
    assert str(caught.value).isprintable()


def test_a_file_of_a_hundred_terabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.yaml"
    with open(path, "wb") as file:
        file.truncate(10**12)
    with pytest.raises(UserError, match="more than 100,000 bytes"):
        read_yaml(path)


# But for texts such as 0E0, which PyYAML takes for text and does not quote: here they are numbers, as 1e-3 is.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20).filter(
    lambda text: not re.fullmatch(r"[-+]?[0-9]+[eE][-+]?[0-9]+", text)
)
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
)
DOCUMENTS = st.recursive(
    SCALARS, lambda inside: st.lists(inside, max_size=4) | st.dictionaries(TEXTS, inside, max_size=4), max_leaves=12
)


def read_as_json_and_pyyaml_write_it(value: Any) -> None:
    assert parse_yaml(json.dumps(value), "it.json") == value
    assert parse_yaml(yaml.safe_dump(value), "it.yaml") == value
    text = yaml.safe_dump(value, allow_unicode=True, default_flow_style=True)
    if any(char in text for char in "\x85\u2028\u2029"):  # which PyYAML itself does not read back as it wrote them
        with pytest.raises(UserError, match="a line break to one version of YAML"):
            parse_yaml(text, "it.yaml")
    else:
        assert parse_yaml(text, "it.yaml") == value


@pytest.mark.parametrize("char", ["\x85", "\u2028", "\u2029"])
def test_what_versions_of_yaml_take_for_a_line_break_or_a_character_is_refused(char: str) -> None:
    with pytest.raises(UserError, match=r"it.yaml, line 2, column 5: .* is a line break to one version of YAML"):
        parse_yaml(f"a: 1\nb: '{char}'", "it.yaml")


@settings(max_examples=30, deadline=None)
@given(DOCUMENTS)
def test_what_json_and_pyyaml_write_is_read_as_it_was(value: Any) -> None:
    read_as_json_and_pyyaml_write_it(value)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(DOCUMENTS)
def test_what_json_and_pyyaml_write_is_read_as_it_was_a_thousand_times(value: Any) -> None:
    read_as_json_and_pyyaml_write_it(value)

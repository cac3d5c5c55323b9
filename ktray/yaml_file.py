"""Strict YAML: plain values only, no duplicate keys, and 1e-3 is a number. Errors name line, column and remedy.

What two versions of YAML read differently is not guessed: ``010`` is refused, ``2023-01-05`` and ``1:30`` are text. The file
of a search has a few thousand characters, so the limits below are never in the way; they end what would hang.
"""

from __future__ import annotations

import codecs
import re
import stat
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml

from ktray.errors import UserError
from ktray.text import cut, shown, visible_name

MAX_BYTES = 100_000  # of a file; PyYAML reads some 50 kB a second
MAX_DEPTH = 64  # mappings and lists inside each other, with aliases written out
MAX_VALUES = 10_000  # with aliases written out, as the next
MAX_CHARACTERS = 1_000_000
MAX_INTEGER = 2**63 - 1

_TAG = "tag:yaml.org,2002:"
_REMEDIES = {  # what the parser says -> what to do
    "'\\t'": "Indent with spaces, not with tabs.",
    "<stream end>": "A bracket or a quote is not closed.",
    "end of stream": "A bracket or a quote is not closed.",
    "',' or": "A bracket or a comma is missing, here or on the line above.",
    "mapping values are not allowed": "Quote the text if it contains a colon, else check the indentation.",
    "another document": "A file has one document: leave out what follows the line '---'.",
    "undefined alias": "Name the value with & before it is used with *, or quote the text if * belongs to it.",
    "escape sequence": "In double quotes write \\\\ for a backslash, or use single quotes.",
    "could not find expected ':'": "Write name: value, with a blank after the colon.",
}
_TAGS = ("!!str", "!!int", "!!float", "!!bool", "!!null")
_BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
_BOMS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # after UTF-32, whose mark begins like this one


class _Refused(yaml.YAMLError):
    """What is YAML and yet refused."""

    def __init__(self, problem: str, instead: str, mark: yaml.Mark) -> None:
        self.problem, self.instead, self.mark = problem, instead, mark


def _too_deep(mark: yaml.Mark) -> _Refused:
    return _Refused(f"more than {MAX_DEPTH} mappings and lists are inside each other", "Write it flatter.", mark)


def _too_many(mark: yaml.Mark) -> _Refused:
    instead = "Write fewer; aliases (*) count as what they stand for."
    return _Refused(f"there are more than {MAX_VALUES:,} values", instead, mark)


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with limits; of its values only their text is used, and `_Reading` makes plain ones of it."""

    yaml_implicit_resolvers: ClassVar[Any] = {}  # type: ignore[misc]
    depth = 0
    values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth, self.values = self.depth + 1, self.values + 1
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if isinstance(event, yaml.ScalarEvent) and event.tag == "!":
            event.tag = f"{_TAG}str"  # by YAML 1.2, section 6.9.1; PyYAML takes ``! 3`` for a number
        if self.depth > MAX_DEPTH:
            raise _too_deep(mark)
        if self.values > MAX_VALUES:
            raise _too_many(mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _kind, _pattern, _first in (
    ("bool", "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?(0b[01_]*|0x[0-9a-fA-F_]*|[0-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))"
        r"|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", "<<", "<"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def read_yaml(path: Path) -> Any:
    """The value of a YAML file; None if it is empty.

    Raises:
        UserError: as `read_text` and `parse_yaml`.
    """
    return parse_yaml(read_text(path), str(path))


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The text of a file that a user wrote, in UTF-8, or in what the mark at its beginning says (UTF-16 from Windows).

    Raises:
        UserError: it cannot be read, is no file, too large, or no text.
    """
    where = str(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise UserError(f"this is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}", where, "Give a file of text.")
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:  # a ValueError: the path has a NUL
        problem = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"the file cannot be read: {problem}", where) from error
    if len(content) > limit:
        raise UserError(f"the file has more than {limit:,} bytes", where, "Is it the right one? Shorten it if it is.")
    encoding = next((name for mark, name in _BOMS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        wide = encoding != "utf-8" or b"\0" in content
        problem = f"the file is not text in {encoding.upper()}" + (
            "" if wide else f": the byte 0x{content[error.start]:02x} is none"
        )
        raise UserError(problem, where if wide else f"{where}, line {line}, column {column}", "Save it as UTF-8.") from error


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; None if it is empty. It shares nothing: changing one part of it changes no other.

    Args:
        source: name of the text in errors, such as the path of the file.

    Raises:
        UserError: the text is not YAML, has a duplicate key or a key that is no text, or is beyond a limit; it names line and
            column.
    """
    if len(text) > MAX_BYTES:
        raise UserError(
            f"the text has {len(text):,} characters, and at most {MAX_BYTES:,} are read", _cut(source), "Shorten it."
        )
    if breaks := re.search("[\x85\u2028\u2029]", text):
        line = text.count("\n", 0, breaks.start()) + 1
        raise UserError(
            f"{visible_name(breaks[0])} is a line break to one version of YAML and a character to another",
            f"{_cut(source)}, line {line}, column {_column(text, breaks.start())}",
            "Leave it out, or write it as an escape within double quotes.",
        )
    try:
        node = _composed(text)
        return None if node is None else _Reading().plain(node, 1)
    except _Refused as error:
        raise UserError(error.problem, _place(source, error.mark), error.instead) from None
    except yaml.MarkedYAMLError as error:
        message = str(error.problem or error)
        if error.problem_mark and (found := _false_blank(text, error.problem_mark)):
            where, name = found
            problem = f"this is not valid YAML: {name} looks like a blank here, and is none"
            raise UserError(problem, f"{_cut(source)}, {where}", "Write an ordinary blank in its place.") from error
        remedy = next((remedy for words, remedy in _REMEDIES.items() if words in message), "")
        raise UserError(f"this is not valid YAML: {message}", _place(source, error.problem_mark), remedy) from error
    except yaml.reader.ReaderError as error:
        where = f"{_cut(source)}, line {text.count(chr(10), 0, error.position) + 1}, column {_column(text, error.position)}"
        problem = f"this is not valid YAML: it contains the character {visible_name(text[error.position])}"
        raise UserError(problem, where, "Leave it out, or write it as an escape within double quotes.") from error


@lru_cache(maxsize=4)  # a command looks at its file more than once: is it a space? which one?
def _composed(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        node: yaml.Node | None = loader.get_single_node()
        return node
    except (ValueError, OverflowError) as error:  # "\Uffffffff", a tag that is no UTF-8, a version of 5,000 digits
        problem = "this is not valid YAML: an escape or a number stands for nothing"
        raise _Refused(problem, "Leave it out, or use single quotes.", loader.get_mark()) from error
    finally:
        loader.dispose()


def _false_blank(text: str, mark: yaml.Mark) -> tuple[str, str] | None:
    """Place and name of a character that looks like a blank, such as U+00A0, where YAML wants one; None without.

    It is looked for in the line of an error and in the two before it, because a value may go on over lines.
    """
    lines = text.splitlines()
    for number in range(min(mark.line, len(lines) - 1), max(-1, mark.line - 3), -1):
        for found in re.finditer(r"(?:^ *(?:- *)*|[:,\[{-] *)([^\x00-\x7f])", lines[number]):
            if unicodedata.category(found[1]) in ("Zs", "Cf"):
                name = f"U+{ord(found[1]):04X} ({unicodedata.name(found[1], 'without a name')})"
                return f"line {number + 1}, column {found.start(1) + 1}", name
    return None


def _place(source: str, mark: yaml.Mark | None) -> str:
    return f"{_cut(source)}, line {mark.line + 1}, column {mark.column + 1}" if mark else _cut(source)


def _column(text: str, position: int) -> int:
    return position - (text.rfind("\n", 0, position) + 1) + 1


def _cut(source: str) -> str:
    """`source`; that of an override is as long as its value."""
    return cut(source, 200)


class _Reading:
    """One reading of a composed text into plain values, and what it has come to."""

    def __init__(self) -> None:
        self.values = self.characters = 0
        self.open: set[int] = set()

    def plain(self, node: yaml.Node, depth: int) -> Any:
        """The plain value of a node; aliases are written out, so each part is a value of its own."""
        self._count(node, depth)
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if node.tag != _TAG + ("seq" if isinstance(node, yaml.SequenceNode) else "map"):
            _refuse_tag(node)
        if id(node) in self.open:
            raise _Refused("this value contains itself, by an alias (*) inside it", "Write out what is meant.", node.start_mark)
        self.open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            found: Any = self._mapping(node, depth)
        else:
            found = [self.plain(item, depth + 1) for item in node.value]
        self.open.discard(id(node))
        return found

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag == f"{_TAG}merge":
                merged = {**self._merged(value, depth), **merged}
                continue
            name = _key(key)
            if name in own:
                raise _Refused(f"the key {name!r} is there twice", "Leave one of them out.", key.start_mark)
            own[name] = self.plain(value, depth + 1)
        return {**merged, **own}

    def _merged(self, value: yaml.Node, depth: int) -> dict[str, Any]:
        """What ``<<`` takes over from a mapping or from a list of them, of which the first wins."""
        sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
        found: dict[str, Any] = {}
        for source in reversed(sources):
            if not isinstance(source, yaml.MappingNode):
                raise _Refused("'<<' takes over a mapping, and this is none", "Write <<: *name of a mapping.", value.start_mark)
            found |= self.plain(source, depth + 1)
        return found

    def _count(self, node: yaml.Node, depth: int) -> None:
        self.values += 1
        self.characters += len(node.value) if isinstance(node, yaml.ScalarNode) else 1
        if depth > MAX_DEPTH:
            raise _too_deep(node.start_mark)
        if self.values > MAX_VALUES:
            raise _too_many(node.start_mark)
        if self.characters > MAX_CHARACTERS:
            raise _Refused(
                f"with its aliases (*) written out, it has more than {MAX_CHARACTERS:,} characters",
                "Use fewer aliases, or shorter values.",
                node.start_mark,
            )


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise _Refused("a list or a mapping cannot be a key", "A key is text; quote it if it has brackets.", node.start_mark)
    value = _scalar(node)
    if not isinstance(value, str):
        if (comma := _decimal_comma(node)) is not None:
            raise _Refused(f"{comma} has a decimal comma", f"Write {comma.replace(',', '.')}.", node.start_mark)
        problem = "a key is missing" if node.value == "" else f"the key {shown(node.value)[1:-1]} is not text"
        quoted = node.value if len(node.value) < 40 else "..."
        raise _Refused(problem, f"Quote it: '{quoted}'.", node.start_mark)
    return value


def _scalar(node: yaml.ScalarNode) -> Any:
    text, kind = node.value, node.tag.removeprefix(_TAG)
    if kind in ("str", "merge"):
        return _text(node)
    if kind == "null" and text in ("", "~", "null", "Null", "NULL"):
        return None
    if kind == "bool" and text.lower() in ("yes", "true", "on", "no", "false", "off"):
        return text.lower() in ("yes", "true", "on")
    if kind in ("int", "float"):
        return _integer(node) if kind == "int" else _float(node)
    if kind in ("bool", "null"):
        raise _Refused(f"{shown(text)} is no {kind}", "Leave the tag (!) out.", node.start_mark)
    return _refuse_tag(node)


def _decimal_comma(node: yaml.ScalarNode) -> str | None:
    """The number with a decimal comma that ends with this node, such as ``0,05`` between braces; None if there is none."""
    mark = node.start_mark
    before = re.search(r"[-+]?\d+,$", mark.buffer[max(0, mark.pointer - 40) : mark.pointer]) if mark.buffer else None
    return before.group() + node.value if before else None


def _integer(node: yaml.ScalarNode) -> int:
    text, digits = node.value, _without_groups(node).lstrip("+-")
    base = {"0b": 2, "0x": 16}.get(digits[:2].lower(), 10)
    if base == 10 and len(digits) > 1 and digits[0] == "0" and digits.isdecimal():
        if (comma := _decimal_comma(node)) is not None:
            raise _Refused(f"{comma} has a decimal comma", f"Write {comma.replace(',', '.')}.", node.start_mark)
        plain = digits.lstrip("0") or "0"
        octal = f"{int(digits, 8)}" if len(digits) < 20 and set(digits) <= set("01234567") else ""
        instead = f"Write {plain}, or {octal} if it is octal" if octal and octal != plain else f"Write {_shortened(plain)}"
        raise _Refused(
            f"{_shortened(text)} begins with 0, and versions of YAML read that differently",
            f"{instead}; quote it if it is text.",
            node.start_mark,
        )
    if len(digits) > 100:
        raise _too_large(text, node)
    try:
        value = int(digits.removeprefix("0b").removeprefix("0x") if base != 10 else digits, base)
    except ValueError:
        raise _Refused(
            f"{_shortened(text)} is no whole number", "Write it with digits, or quote it if it is text.", node.start_mark
        ) from None
    if value > MAX_INTEGER:
        raise _too_large(text, node)
    return -value if text.startswith("-") else value


def _too_large(text: str, node: yaml.ScalarNode) -> _Refused:
    return _Refused(
        f"{_shortened(text)} is too large: whole numbers go up to {MAX_INTEGER}",
        "Write 1e30 for a fraction, or quote it if it is text.",
        node.start_mark,
    )


def _without_groups(node: yaml.ScalarNode) -> str:
    """The number without the underscores that group its digits in threes; others may be a slip of the finger."""
    text: str = node.value
    if "_" in text and not re.fullmatch(r"[-+]?[0-9]{1,3}(_[0-9]{3})+(\.[0-9]*)?([eE][-+]?[0-9]+)?", text):
        raise _Refused(
            f"{_shortened(text)} has an underscore that does not stand between groups of three digits",
            f"Write {_shortened(text.replace('_', ''))} if that is meant, or quote it if it is text.",
            node.start_mark,
        )
    return text.replace("_", "")


def _float(node: yaml.ScalarNode) -> float:
    text = _without_groups(node)
    try:
        return float(text.replace(".inf", "inf").replace(".nan", "nan") if len(text) < 6 else text)
    except ValueError:
        raise _Refused(
            f"{shown(node.value)} is no number", "Write it with digits, or quote it if it is text.", node.start_mark
        ) from None


def _text(node: yaml.ScalarNode) -> str:
    r"""The text of a scalar. JSON writes a character beyond 16 bits as two escapes, ``\ud83d\ude00``, which are joined."""
    text: str = node.value
    if not text.isascii():
        try:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise _Refused(
                f"{visible_name(shown(text))} has half of a surrogate pair, which is no character",
                "Leave it out.",
                node.start_mark,
            ) from None
    if "\0" in text:
        raise _Refused(f"{shown(text)} contains a NUL, which no name and no path may", "Leave it out.", node.start_mark)
    return text


def _refuse_tag(node: yaml.Node) -> NoReturn:
    tag = node.tag.replace(_TAG, "!!")
    fits = not isinstance(node, yaml.ScalarNode) and tag in _TAGS
    raise _Refused(
        f"the tag {_shortened(tag)} {'does not fit a list or a mapping' if fits else 'is not known here'}",
        f"Leave it out: tags other than {', '.join(_TAGS)} are not known here, and those belong to single values.",
        node.start_mark,
    )


def _shortened(text: str) -> str:
    return shown(text)[1:-1]

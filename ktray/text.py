"""Text for people: counts with their nouns, long values cut short, near words, and control characters made visible."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

MAX_SHOWN = 80  # characters of a value in an error
MAX_WORD = 100  # characters of a word that may be a misspelling; looking for near ones takes the square of the length
_INVISIBLE = frozenset(("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp", "Zs"))
_WRITTEN = " \u3000\u200c\u200d"  # the blanks of Latin and Japanese; the joiners that Persian and emoji are written with
_LAYOUT = "\n"
_PLAIN = re.compile(r"[ -~\n]*")


def visible(text: str, layout: str = _LAYOUT) -> str:
    r"""`text` with everything that a terminal obeys instead of showing it written as an escape: ``\x1b``, ``\u202e``, ``\xa0``.

    These are control characters, marks that turn the direction of text, blanks that look like a space and are another
    character, and half surrogates, which stand for bytes of a file name that are no UTF-8.

    Args:
        layout: characters that stay as they are; "" also writes out line breaks, which a name cannot be allowed.
    """
    if _PLAIN.fullmatch(text) and (layout or "\n" not in text):
        return text
    return "".join(char if char in layout or not _is_hidden(char) else _escape(char) for char in text)


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in _INVISIBLE and char not in _WRITTEN


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(char) or (
        f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    )


def visible_name(name: object) -> str:
    """A name in one line: as `visible`, without line breaks either."""
    return visible(str(name), layout="")


def counted(count: int, one: str, many: str | None = None) -> str:
    """``1 pair``, ``2 pairs``, ``12,000 images``; with `many`, ``2 classes``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def some_of(count: int, total: int, noun: str, verbs: tuple[str, str]) -> str:
    """``1 of 5 images is``, ``2 of 5 images are`` for the verbs ``("is", "are")``."""
    return f"{count:,} of {counted(total, noun)} {verbs[count != 1]}"


def cut(text: str, limit: int) -> str:
    """`text`, its middle replaced by a mark where it is longer than `limit` characters."""
    half = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[:half]}…{text[-half:]}"


def shown(value: Any, limit: int = MAX_SHOWN) -> str:
    """A value as Python writes it, cut in the middle where it is longer than `limit` characters."""
    return cut(repr(value), limit)


def first_few(names: Iterable[object], limit: int = 20) -> str:
    """``a, b, c``; of more than `limit` the first ones and how many more there are."""
    found = [visible_name(name) for name in names]
    more = f" and {len(found) - limit:,} more" if len(found) > limit else ""
    return ", ".join(found[:limit]) + more


def as_read(name: str) -> str:
    """What a person reads in a name: two that differ only in case, blanks, hyphens, Unicode form or in what cannot be seen."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    folded = "".join(char for char in folded if unicodedata.category(char) not in ("Cf", "Cc") or char.isspace())
    return re.sub(r"[\s_-]+", " ", folded).strip()


def written_differently(one: str, other: str) -> str:
    """Why two names that look alike are not the same, as the rest of a sentence with both in ASCII."""
    return f"they look alike, but are written differently, {one!a} and {other!a}"


def near_word(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that `word` may be a misspelling of; None if there is none.

    Args:
        cutoff: how similar they must be, from 0 to 1.
    """
    if len(word) > MAX_WORD:
        return None
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return near[0] if near else None

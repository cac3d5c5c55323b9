"""The split that a file or folder speaks of in its name: `Training`, `mnist_test-0.parquet`, `val2017/0.jpg`.

The words are those of data-set hubs and Kaggle, in any case. A word ends where the letters end (`seg_train`, `test1`), at a
capital (`imagesTrain`, `trainA`), or at a noun such as `set` (`trainset`). Inside another word it counts for nothing: `latest`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from operator import and_

from ktray.errors import UserError

SPLITS = ("train", "val", "test")
_WORDS = {
    "training": "train",
    "train": "train",
    "validation": "val",
    "validate": "val",
    "valid": "val",
    "val": "val",
    "development": "val",
    "dev": "val",
    "testing": "test",
    "test": "test",
    "evaluation": "eval",
    "eval": "eval",
}
_STEM = "|".join(_WORDS)  # longer words first
_NOUN = "sets?|data|datasets?|images?|imgs?|pictures?|pics?|photos?|samples?|splits?|files?|parts?|shards?|batch|fold"
_WORD = re.compile(f"(?:{_STEM})+(?:{_NOUN})?")
_LETTERS = re.compile(r"[^\W\d_]+")
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def split_words(name: str) -> Counter[str]:
    """How often a name or path speaks of ``train``, ``val``, ``test`` and ``eval``, which is one of the latter two."""
    found: Counter[str] = Counter()
    for letters in _LETTERS.findall(unicodedata.normalize("NFKC", name)):
        words = [letters] if _WORD.fullmatch(letters.lower()) else _CAPITAL.split(letters)
        for word in words:
            if _WORD.fullmatch(word.lower()):
                found.update(_WORDS[stem] for stem in re.findall(_STEM, word.lower()))
    return found


def splits_of(names: Sequence[str]) -> dict[str, str | None]:
    """Name -> ``train``, ``val``, ``test``, or None if it has no word of a split.

    A word that all names share, such as that of a common folder, decides nothing where a name has words of several splits.
    `eval` is the test split, as on Hugging Face's hub, or the validation split where other names say test.

    Args:
        names: unique names or relative paths of files or folders.

    Raises:
        UserError: names have words of several splits; the message has the first of them.
    """
    words = {name: split_words(name) for name in names}
    if any(_several(of_name) for of_name in words.values()):
        shared = reduce(and_, words.values())  # of counters: the smaller count of each word
        without = {name: of_name - shared for name, of_name in words.items()}
        unclear = [name for name in names if _several(without[name]) or (words[name] and not without[name])]
        if unclear:
            raise _ambiguous(unclear, words)
        words = without
    chosen = {name: _strongest(of_name) for name, of_name in words.items()}
    evaluation = "val" if "test" in chosen.values() else "test"
    return {name: evaluation if split == "eval" else split for name, split in chosen.items()}


def _several(words: Counter[str]) -> bool:
    return len(words.keys() - {"eval"}) > 1 or words.keys() == {"train", "eval"}


def _strongest(words: Counter[str]) -> str | None:
    """The one split of a name; beside val or test, eval says nothing more."""
    return next((split for split in (*SPLITS, "eval") if words[split]), None)


def _ambiguous(unclear: Sequence[str], words: dict[str, Counter[str]]) -> UserError:
    named = "; ".join(f"{name!r} ({' and '.join(words[name])})" for name in unclear[:3])
    more = f" and {len(unclear) - 3} more" if len(unclear) > 3 else ""
    return UserError(
        f"it is not clear to which split these belong: {named}{more}",
        where="data.path",
        instead="Leave one word of train, val or test in each path, or give the files of one split alone.",
    )

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
from urllib.parse import unquote

from ktray.errors import UserError

SPLITS = ("train", "val", "test")
_WORDS = {
    "trainval": "trainval",
    "training": "train",
    "train": "train",
    "trn": "train",
    "validation": "val",
    "validate": "val",
    "valid": "val",
    "val": "val",
    "development": "val",
    "dev": "val",
    "testing": "test",
    "test": "test",
    "tst": "test",
    "evaluation": "eval",
    "eval": "eval",
    "heldout": "eval",
    "holdout": "eval",
}
_STEM = "|".join(_WORDS)  # longer words first
_NOUN = "sets?|data|datasets?|images?|imgs?|pictures?|pics?|photos?|samples?|splits?|files?|parts?|shards?|batch|fold"
_BEFORE = "mini|tiny|small|sub|full|my|x|y|images?|img|data"
_WORD = re.compile(f"(?:{_BEFORE})?((?:{_STEM})+)(?:{_NOUN})?")
_LETTERS = re.compile(r"[^\W\d_]+")
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_BOTH = re.compile(r"train[ _.+&-]?val(?:id(?:ation)?)?(?![a-z])", re.IGNORECASE)
_NEGATED = re.compile(
    rf"(?<![a-z])(?:non?|not|without)[ _.-]?(?:{_STEM})(?![a-z])"  # not_train
    rf"|(?<![a-z])(?:{_STEM})[a-z0-9_ .-]*=(?:0|f|false|no?)(?![a-z0-9])",  # is_train=0
    re.IGNORECASE,
)


def split_words(name: str) -> Counter[str]:
    """How often a name or path speaks of ``train``, ``val``, ``test``, ``trainval``, and ``eval``, which is val or test."""
    found: Counter[str] = Counter()
    for letters in _LETTERS.findall(_BOTH.sub("trainval", _plain(name))):
        words = [letters] if _WORD.fullmatch(letters.lower()) else _CAPITAL.split(letters)
        for word in words:
            if match := _WORD.fullmatch(word.lower()):
                found.update(_WORDS[stem] for stem in re.findall(_STEM, match[1]))
    return found


def _plain(name: str) -> str:
    """A name without the escapes of addresses (`%2Ftrain`) and without wide letters."""
    return unicodedata.normalize("NFKC", unquote(name))


def splits_of(names: Sequence[str]) -> dict[str, str | None]:
    """Name -> ``train``, ``val``, ``test``, or None if it has no word of a split.

    A word that all names share, such as that of a common folder, decides nothing where a name has words of several splits.
    `eval` is the test split, as on Hugging Face's hub, or the validation split where other names say test; `trainval` is for
    training, unless other names say train or val.

    Args:
        names: unique names or relative paths of files or folders.

    Raises:
        UserError: names have words of several splits, or deny one (`is_train=0`); the message has the first of them.
    """
    words = {name: split_words(name) for name in names}
    negated = [name for name in names if _NEGATED.search(_plain(name))]
    if negated and any(of_name for name, of_name in words.items() if name not in negated):
        raise _ambiguous(negated, words)
    words.update((name, Counter()) for name in negated)
    if any(_several(of_name) for of_name in words.values()):
        shared = reduce(and_, words.values())  # of counters: the smaller count of each word
        without = {name: of_name - shared for name, of_name in words.items()}
        unclear = [name for name in names if _several(without[name]) or (words[name] and not without[name])]
        if unclear:
            raise _ambiguous(unclear, words)
        words = without
    chosen = {name: _strongest(of_name) for name, of_name in words.items()}
    both = [name for name, split in chosen.items() if split == "trainval"]
    if both and not {"train", "val"}.isdisjoint(chosen.values()):
        raise _ambiguous(both, words)
    meant = {"trainval": "train", "eval": "val" if "test" in chosen.values() else "test"}
    return {name: meant.get(split or "", split) for name, split in chosen.items()}


def _several(words: Counter[str]) -> bool:
    return len(words.keys() - {"eval"}) > 1 or ("eval" in words and not words.keys().isdisjoint(("train", "trainval")))


def _strongest(words: Counter[str]) -> str | None:
    """The one split of a name; beside val or test, eval says nothing more."""
    return next((split for split in (*SPLITS, "trainval", "eval") if words[split]), None)


def _ambiguous(unclear: Sequence[str], words: dict[str, Counter[str]]) -> UserError:
    named = "; ".join(f"{name!r} ({' and '.join(words[name])})" for name in unclear[:3])
    more = f" and {len(unclear) - 3} more" if len(unclear) > 3 else ""
    return UserError(
        f"it is not clear to which split these belong: {named}{more}",
        where="data.path",
        instead="Leave one word of train, val or test in each path, or give the files of one split alone.",
    )

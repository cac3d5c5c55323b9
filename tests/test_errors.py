"""A full disk is told from a stage that fails, whatever library met it; a real one is in `test_disk_full`."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from ktray.errors import MissingInput, UserError, disk_is_full
from ktray.scheduler.messages import describe_error

SAFETENSORS = "Error while serializing: I/O error: No space left on device (os error 28)"


def hidden() -> ValueError:
    """An error that names no disk, raised from one that does."""
    error = ValueError("it cannot be saved")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError(SAFETENSORS),
        hidden(),
    ],
    ids=["errno", "quota", "words", "cause"],
)
def test_a_full_disk_is_found_in_numbers_words_and_causes(error: Exception, tmp_path: Path) -> None:
    assert disk_is_full(error, tmp_path)


def test_whatever_fails_while_the_disk_is_full_fails_for_that_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy_says = OSError("2048 requested and 0 written")
    assert not disk_is_full(numpy_says, tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("ktray.errors.shutil.disk_usage", lambda place: usage._replace(free=4096))
    assert disk_is_full(numpy_says, tmp_path)


def test_other_errors_with_room_on_the_disk_are_failures(tmp_path: Path) -> None:
    assert not disk_is_full(ValueError("12 features are NaN"), tmp_path)
    assert not disk_is_full(OSError(errno.ENOENT, "No such file or directory"), tmp_path / "absent")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("every  cluster\nis too small"), "every cluster is too small"),
        (UserError("row 3 is null", "teacher.features", "Leave it out."), "teacher.features: row 3 is null. Leave it out."),
        (MissingInput("images-1", "labels.npy is cut off"), "the artifact images-1 was damaged (labels.npy is cut off)"),
        (KeyError("train"), "KeyError: 'train'"),
        (RuntimeError("shapes do not match"), "RuntimeError: shapes do not match"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "no"), "UnicodeDecodeError: 'utf-8' codec"),
        (ValueError(), "ValueError"),
    ],
    ids=["a sentence", "of the user", "of the store", "a key", "of torch", "of Python", "nothing"],
)
def test_a_sentence_stands_alone_and_what_is_none_has_its_class(error: Exception, said: str) -> None:
    assert describe_error(error).startswith(said)
    assert "\n" not in describe_error(error)

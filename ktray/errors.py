"""What can go wrong, and whose turn it is then."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

FULL = 1 << 20  # bytes that are free where nothing can be done any more


class UserError(Exception):
    """The spec, an argument or the data need a change by the user: exit code 2 and one paragraph, no traceback.

    Args:
        problem: what is wrong, in one sentence, naming values as the user typed them.
        where: file and dotted path, such as ``space.yaml: pair.teacher.hog.cell``.
        instead: what would be right.
    """

    exit_code = 2

    def __init__(self, problem: str, where: str = "", instead: str = "") -> None:
        self.problem, self.where, self.instead = problem, where, instead
        super().__init__(problem, where, instead)

    def __str__(self) -> str:
        text = f"{self.where}: {self.problem}" if self.where else self.problem
        return f"{text.rstrip('.')}. {self.instead}".strip() if self.instead else text


class StageFailed(Exception):
    """A stage raised; the trials that need it fail with this cause, the rest goes on (exit code 3).

    Args:
        stage: readable name of the stage, such as ``clusters-3f9a1c0b2d44``.
        cause: one line, ``ValueError: 12 features are NaN``.
    """

    exit_code = 3

    def __init__(self, stage: str, cause: str) -> None:
        self.stage, self.cause = stage, cause
        super().__init__(stage, cause)

    def __str__(self) -> str:
        return f"{self.stage} failed: {self.cause}"


class PreflightFailed(Exception):
    """The cluster, the store or the disk cannot carry this search (exit code 4)."""

    exit_code = 4


class StoppedEarly(Exception):
    """Nothing is lost and the same command goes on from here (exit code 5): a full disk, ten failures in a row."""

    exit_code = 5


class MissingInput(Exception):
    """A stage was started although an artifact that it reads is absent or damaged.

    Args:
        key: the absent artifact; whoever schedules computes it first and tries again.
    """

    exit_code = 1

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(key)

    def __str__(self) -> str:
        return (
            f"the artifact {self.key} is absent from the store: run the pair that makes it first, "
            "or name the store that has it with --store"
        )


def disk_is_full(error: BaseException, store: Path) -> bool:
    """Whether something failed because nothing more could be written.

    Libraries hide the errno (safetensors says "os error 28", numpy how many bytes it could not write), so what fails while the
    disk of the store is full counts, too.

    Args:
        store: directory of the store.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(os.strerror(number) in str(seen) for number in (errno.ENOSPC, errno.EDQUOT)):
            return True
        seen = seen.__cause__ or seen.__context__
    try:
        return shutil.disk_usage(store).free < FULL
    except OSError:
        return False

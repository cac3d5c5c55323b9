"""The errors of ktray, each with the exit code of the command line."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from ktray.text import cut, visible_name

_LONGEST = 1500  # characters of each part of a message; a name or a value in it may have any number
DISK_FULL_BYTES = 1 << 20  # with less free space than this, the disk counts as full


class UserError(Exception):
    """The user must change the spec, an argument or the data: exit code 2 and a message of one paragraph, without a traceback.

    Args:
        problem: what is wrong, in one sentence, naming values as the user typed them.
        where: file and dotted path, such as ``space.yaml: pair.teacher.hog.cell``.
        instead: what would be right.
        entries: several problems, each shown on a line of its own below.
    """

    exit_code = 2

    def __init__(self, problem: str, where: str = "", instead: str = "", entries: tuple[str, ...] = ()) -> None:
        self.problem, self.where, self.instead, self.entries = problem, where, instead, entries
        super().__init__(problem, where, instead, entries)

    def __str__(self) -> str:
        where, problem, instead = (visible_name(cut(text, _LONGEST)) for text in (self.where, self.problem, self.instead))
        text = f"{where}: {problem}" if where else problem
        text = f"{text.rstrip('.')}. {instead}".strip() if instead else text
        return "\n  ".join([text, *map(visible_name, self.entries)])


class StageFailed(Exception):
    """A stage raised an error: the trials that need it fail, the others go on (exit code 3).

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
    """The cluster, the store or the disk cannot run this search (exit code 4)."""

    exit_code = 4


class SearchStopped(Exception):
    """The search or run stopped before its end, as on a full disk; the same command resumes it (exit code 5)."""

    exit_code = 5


class DamagedArtifact(Exception):
    """A file of an artifact or checkpoint is not as it was written. Nothing of it was used.

    Args:
        directory: of the artifact or checkpoint.
        inode: of that directory; another one may lie in its place by now.
        problem: what is wrong, such as ``labels.npy does not match its checksum``.
    """

    exit_code = 1

    def __init__(self, directory: Path, inode: int, problem: str) -> None:
        self.directory, self.inode, self.problem = directory, inode, problem
        super().__init__(directory, inode, problem)

    def __str__(self) -> str:
        return f"{self.directory.name} is damaged ({self.problem})"


class MissingInput(Exception):
    """An artifact that a stage or a command reads is absent or damaged.

    Args:
        key: of the artifact. The scheduler computes it and then runs the stage again.
        problem: what was wrong with it, if it was damaged; it has been moved aside.
    """

    exit_code = 1

    def __init__(self, key: str, problem: str = "") -> None:
        self.key, self.problem = key, problem
        super().__init__(key, problem)

    def __str__(self) -> str:
        if self.problem:
            return f"the artifact {self.key} was damaged ({self.problem}) and moved aside: run its search or pair again"
        return (
            f"the artifact {self.key} is not in the store: run the pair that makes it first, "
            "or name the store that has it with --store"
        )


def disk_is_full(error: BaseException, store: Path) -> bool:
    """Whether an error arose because the disk is full.

    Some libraries hide the errno: safetensors says "os error 28", numpy only how many bytes it could not write. So while the
    store's disk is full, any error counts.

    Args:
        store: directory of the store.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(os.strerror(number) in str(cause) for number in (errno.ENOSPC, errno.EDQUOT)):
            return True
        cause = cause.__cause__ or cause.__context__
    try:
        return shutil.disk_usage(store).free < DISK_FULL_BYTES
    except OSError:
        return False

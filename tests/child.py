"""A process that runs hostile input: whatever it does, the test sees what became of it, its time and its memory.

Run as a program, it reads one JSON list per line, the arguments of a command of ktray, and answers with one JSON line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_SECONDS = 10.0  # of processor time
MAX_BYTES = 2 << 30
_WAIT = 120.0  # seconds until a child counts as hanging; longer than MAX_SECONDS, for a busy machine


@dataclass(frozen=True)
class Answer:
    """What became of one command.

    Attributes:
        code: its exit code; None if it raised, hung or died.
        out, err: what it printed; err also holds the traceback if it raised.
        seconds: processor time.
        peak_bytes: of memory, of the child since it began.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    peak_bytes: int


class Child:
    """Runs commands of ktray one after the other in one process, which is replaced when it hangs or dies."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._process: subprocess.Popen[str] | None = None

    def run(self, *arguments: str) -> Answer:
        """What becomes of ``ktray ARGUMENTS``."""
        process = self._process = self._process if self._process and self._process.poll() is None else self._started()
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps(arguments) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], _WAIT)[0]:
            self.end()
            return Answer(None, "", "hangs", _WAIT, 0)
        line = process.stdout.readline()
        if not line:
            return Answer(None, "", f"died with {process.wait()}", 0, 0)
        return Answer(**json.loads(line))

    def _started(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "KTRAY_HOME": str(self._home), "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(
            [sys.executable, "-m", "tests.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parent.parent,
        )

    def end(self) -> None:
        """Ends the process."""
        if self._process:
            self._process.kill()
            self._process.communicate()


def require_user_error_or_answer(answer: Answer) -> None:
    """Checks that a command ended in an answer or in one paragraph about a mistake, in time and in little memory."""
    assert answer.code in (0, 2), answer
    assert "Traceback" not in answer.err, answer.err
    assert answer.seconds < MAX_SECONDS, answer
    assert answer.peak_bytes < MAX_BYTES, answer
    for text in (answer.out, answer.err):
        assert all(char.isprintable() or char in "\n\u3000\u200c\u200d" for char in text), text
    if answer.code == 2:
        assert answer.err.startswith("ktray: "), answer.err
        paragraphs = [line for line in answer.err.splitlines() if not line.startswith("  ")]
        assert len(paragraphs) == 1, answer.err
        assert len(answer.err) < 20_000


def peak_memory() -> int:
    """Bytes of memory that this program has used at most; the `ru_maxrss` of a child begins with what its parent had used."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) << 10


def _answer(arguments: list[str]) -> dict[str, Any]:
    from ktray.cli import main

    out, err = io.StringIO(), io.StringIO()
    began = time.process_time()
    code: int | None = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except BaseException:  # noqa: BLE001 - whatever it is, the test must see it
            err.write(traceback.format_exc())
    return {
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "seconds": time.process_time() - began,
        "peak_bytes": peak_memory(),
    }


if __name__ == "__main__":
    answers = sys.stdout
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)

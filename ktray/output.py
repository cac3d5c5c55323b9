"""The one place that prints: results to stdout, messages to stderr, log records. Control characters become visible."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from typing import TextIO

from ktray.redaction import without_secrets
from ktray.text import visible

CURSOR_ON = "\x1b[?25h"


def print_out(text: str) -> None:
    """A result, on stdout."""
    _print(text, sys.stdout)


def write_out(text: str) -> None:
    """Write a part of a text to stdout at once, without a line break of its own."""
    sys.stdout.write(visible(text))
    sys.stdout.flush()


def print_err(text: str) -> None:
    """A message to the user, on stderr, without passwords; nothing where stderr is closed."""
    _print(without_secrets(text), sys.stderr)


def print_at_once(text: str) -> None:
    """A message on stderr, with the cursor that a live table has hidden; past Python's streams, which this may interrupt."""
    with suppress(OSError, AttributeError, ValueError):  # it is closed, or there is none
        descriptor, text = sys.stderr.fileno(), without_secrets(text)
        written = visible(text) if not os.isatty(descriptor) else CURSOR_ON + visible(text)
        os.write(descriptor, written.encode(errors="backslashreplace"))


def _print(text: str, stream: TextIO | None) -> None:
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    written = visible(text, layout="\n\t").encode(encoding, "backslashreplace").decode(encoding)
    print(written, file=stream, flush=True)


def log_to_stderr(level: int) -> None:
    """Send log records to stderr, those of ktray from this level on, of everything else warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(VisibleFormatter("ktray: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("ktray").setLevel(level)
    logging.captureWarnings(True)  # Python's own way prints them as they are


class VisibleFormatter(logging.Formatter):
    """A log record as one line, or more with a traceback, without control characters and passwords."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(without_secrets(super().format(record)), layout="\n\t")

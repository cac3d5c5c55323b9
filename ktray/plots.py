"""Plots beside the results of a stage: one that fails is left out with a line in the log, and names in it are never markup."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ktray.text import cut, visible_name

LABEL_LENGTH = 40  # characters of a name
log = logging.getLogger("ktray")


@contextmanager
def optional_plot(path: Path) -> Iterator[None]:
    """A context that draws the plot `path`. If that fails, the plot is left out and the stage goes on.

    What matplotlib and Pillow warn about, such as characters that no font has, stays off the screen.
    """
    matplotlib = logging.getLogger("matplotlib")
    level = matplotlib.level
    matplotlib.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # noqa: BLE001 - drawing libraries raise many kinds, and no plot is worth a stage
        with suppress(OSError):
            path.unlink(missing_ok=True)
        log.warning("the plot %s is left out: %s: %s", path.name, type(error).__name__, cut(" ".join(str(error).split()), 300))
    finally:
        matplotlib.setLevel(level)


def label_of(name: object) -> str:
    """A name as a label: in one line and cut short. Draw it with ``parse_math=False``, or "$" begins a formula."""
    return cut(visible_name(name), LABEL_LENGTH)

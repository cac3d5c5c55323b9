"""What the processes of a crew inherit from their driver."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ktray


def environment() -> dict[str, str]:
    """Environment of the processes of a crew: where this package is, which plugins are allowed, one thread per library."""
    outside = [entry or os.getcwd() for entry in sys.path if not entry.startswith((sys.prefix, sys.base_prefix))]
    parent = str(Path(ktray.__file__).parent.parent)
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    places = dict.fromkeys(os.path.abspath(place) for place in [parent, *outside, *given] if place)
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    plugins = {name: value for name, value in os.environ.items() if name == "KTRAY_ALLOW_PLUGINS"}
    return {"PYTHONPATH": os.pathsep.join(places), **dict.fromkeys(threads, "1"), **plugins}

"""Values and texts as the report shows them, without absolute paths and without the name of this machine."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ktray.pipeline.naming import pair_name

if TYPE_CHECKING:
    from ktray.search.trial import Trial

Objective = tuple[str, str]
"""(metric, ``max`` or ``min``)."""

_QUOTED_PATH = re.compile(r"""(?P<quote>['"])(?:file:/{0,2})?(?P<path>(?:~?/|[A-Za-z]:\\)[^'"\n]*)(?P=quote)""")
_PATH = re.compile(r"(?:file:/{0,2}(?=/)|(?<![\w./\\<…]))(?P<path>(?:~?/(?!/)|[A-Za-z]:\\)[^\s'\",;:)\]>]+)")
_HOST_OF_URL = re.compile(r"\b(?!file)([a-z][\w+]*)://[^/\s'\"]+")
_ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b")
_KEY = re.compile(r"\b([a-z_]+)-[0-9a-f]{12}\b")


def value_of(trial: Trial, metric: str) -> float | None:
    """Return a trial's finite value of `metric`; None if it has none."""
    value = trial.objectives.get(metric, trial.metrics.get(metric))
    return float(value) if value is not None and math.isfinite(value) else None


def loss_of(mode: str) -> Callable[[float], float]:
    """Return a function from a metric's value to a loss, so that smaller is better whatever the mode."""
    return (lambda value: -value) if mode == "max" else (lambda value: value)


def number(value: float | None) -> str:
    """Format with four decimals up to 1 (so that metrics line up), four digits up to 10,000, no fraction above; NaN: dash."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) <= 1:
        return f"{value:.4f}"
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def finite(metrics: Mapping[str, float], metric: str) -> float | None:
    """Return a finite value of `metric`; None if there is none."""
    value = metrics.get(metric)
    return value if value is not None and math.isfinite(value) else None


def reference_values(references: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Return name -> value of the references that have a finite value of `metric`."""
    values = {name: finite(reference["metrics"], metric) for name, reference in references.items()}
    return {name: float(value) for name, value in values.items() if value is not None}


def measure(metric: str, value: float | None) -> str:
    """Format a metric: as a duration if it is in seconds, as a count if it is a whole number above 1, else as `number` does."""
    if value is None or not math.isfinite(value):
        return "–"
    if metric.endswith("seconds"):
        return duration(value)
    return f"{int(value):,}" if value == int(value) and abs(value) > 1 else number(value)


def param_text(value: Any) -> str:
    """A drawn value: numbers with six digits, so that neighbours stay apart; texts as they are, without absolute paths."""
    return f"{value:.6g}" if isinstance(value, float) else anonymised(str(value))


def duration(seconds: float | None) -> str:
    """``0.42 s``, ``12.3 s``, ``4 min 05 s``, ``3 h 12 min``, ``2 d 05 h``."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def size(count: float) -> str:
    """Bytes as ``1.2 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def listed(parts: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def pair_title(pair: Mapping[str, Any]) -> str:
    """Return the pair's name with a single-character arrow, which no line break can split."""
    return anonymised(pair_name(pair)).replace(" -> ", " → ")


def cause_without_keys(cause: str) -> str:
    """Return a cause of failure without artifact keys, so that trials that failed for one reason have one cause."""
    return _KEY.sub(r"\1", anonymised(cause))


@lru_cache(maxsize=20_000)  # a thousand trials share most of their texts
def anonymised(text: str) -> str:
    """Return `text` with absolute paths cut to their last part, and without IP addresses, URL hosts and this machine's name."""
    text = _HOST_OF_URL.sub(r"\1://…", text)
    text = _QUOTED_PATH.sub(lambda found: f"{found['quote']}{_last_part(found['path'])}{found['quote']}", text)
    text = _PATH.sub(lambda found: _last_part(found["path"]), text)
    text = _ADDRESS.sub("[address]", text)
    host = platform.node().split(".")[0]
    return re.sub(rf"\b{re.escape(host)}(?:\.[\w.-]+)?\b", "[host]", text) if len(host) > 3 else text


def anonymised_data(value: Any) -> Any:
    """Return plain data (dicts, lists, scalars) with `anonymised` applied to every string."""
    if isinstance(value, Mapping):
        return {str(key): anonymised_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [anonymised_data(item) for item in value]
    if isinstance(value, str):
        return _last_part(value) if re.match(r"~?/|[A-Za-z]:\\|file:", value) else anonymised(value)
    return value


def _last_part(path: str) -> str:
    return f"…/{PurePath(path.replace(chr(92), '/').rstrip('/')).name}"

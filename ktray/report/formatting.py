"""Numbers and causes as a person reads them, without naming the machine or the home they come from."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from ktray.pipeline.naming import pair_name

_QUOTED_PATH = re.compile(r"""(?P<quote>['"])(?:file:/{0,2})?(?P<path>(?:~?/|[A-Za-z]:\\)[^'"\n]*)(?P=quote)""")
_PATH = re.compile(r"(?:file:/{0,2}(?=/)|(?<![\w./\\<…]))(?P<path>(?:~?/(?!/)|[A-Za-z]:\\)[^\s'\",;:)\]>]+)")
_HOST_OF_URL = re.compile(r"\b(?!file)([a-z][\w+]*)://[^/\s'\"]+")
_ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b")
_KEY = re.compile(r"\b([a-z_]+)-[0-9a-f]{12}\b")


def number(value: float | None) -> str:
    """Four decimals up to 1 (metrics in [0, 1] line up), four digits to 10,000, then whole; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) <= 1:
        return f"{value:.4f}"
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def measure(metric: str, value: float | None) -> str:
    """A metric's value: a duration if it is measured in seconds, a plain count if it is one, else a number."""
    if value is None or not math.isfinite(value):
        return "–"
    if metric.endswith("seconds"):
        return duration(value)
    return f"{int(value):,}" if value == int(value) and abs(value) > 1 else number(value)


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


def counted(count: int, word: str) -> str:
    """``1 trial``, ``2 trials``."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def listed(parts: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def title_of(pair: Mapping[str, Any]) -> str:
    """The pair's name with an arrow that no line break can cut in two."""
    return without_places(pair_name(pair)).replace(" -> ", " → ")


def kind_of_cause(cause: str) -> str:
    """A cause without the keys in it, so that one cause of many trials is one."""
    return _KEY.sub(r"\1", without_places(cause))


def without_places(text: str) -> str:
    """`text` with absolute paths cut to their last part, and without this machine's name or any IP address."""
    text = _HOST_OF_URL.sub(r"\1://…", text)
    text = _QUOTED_PATH.sub(lambda found: f"{found['quote']}{_last(found['path'])}{found['quote']}", text)
    text = _PATH.sub(lambda found: _last(found["path"]), text)
    text = _ADDRESS.sub("[address]", text)
    host = platform.node().split(".")[0]
    return re.sub(rf"\b{re.escape(host)}(?:\.[\w.-]+)?\b", "[host]", text) if len(host) > 3 else text


def shareable(value: Any) -> Any:
    """Plain data (dicts, lists, scalars) with `without_places` for whole strings that are absolute paths or hold one."""
    if isinstance(value, Mapping):
        return {str(key): shareable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shareable(item) for item in value]
    if isinstance(value, str):
        return _last(value) if re.match(r"~?/|[A-Za-z]:\\|file:", value) else without_places(value)
    return value


def _last(path: str) -> str:
    return f"…/{PurePath(path.replace(chr(92), '/').rstrip('/')).name}"

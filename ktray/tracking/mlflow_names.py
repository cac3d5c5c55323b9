"""Names, values and filters in the form that MLflow accepts. Does not import MLflow."""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Mapping
from typing import Any

from ktray.fingerprint import fingerprint

KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH = 250, 6000, 8000  # characters, of mlflow.utils.validation; the same since MLflow 2.10
EXPERIMENT_TAG_LENGTH = 5000
PARAMS_PER_BATCH, METRICS_PER_BATCH = 100, 500  # MLflow's limit for metrics is 1000, which takes a busy server 1.6 s


def key_of(name: str) -> str:
    """Return `name` as a key: letters, digits and ``_ - . : / space``, a normalised relative path, at most 250 characters.

    Dotted spec paths and ``student/loss`` are unchanged.
    """
    key = posixpath.normpath(re.sub(r"[^\w.\-:/ ]", "_", name)).lstrip("/")
    key = "_" + key[1:] if key.startswith("..") or key == "." else key
    return key if len(key) <= KEY_LENGTH else f"{key[: KEY_LENGTH - 13]}-{fingerprint(name)[:12]}"


def text_of(value: Any) -> str:
    """Return `value` as JSON writes it (``null``, ``true``, ``0.05``, ``[5,13,40]``); a string is returned unquoted."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode().replace("\0", "")


def params_of(params: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Return params for MLflow, and a tag that lists those whose value was cut to 6000 characters."""
    texts = {key_of(name): text_of(value) for name, value in params.items()}
    truncated = sorted(key for key, text in texts.items() if len(text) > PARAM_LENGTH)
    return {key: text[:PARAM_LENGTH] for key, text in texts.items()}, {
        "ktray.truncated": ", ".join(truncated)
    } if truncated else {}


def tags_of(tags: Mapping[str, Any]) -> dict[str, str]:
    """Return tags for MLflow, all under the prefix ``ktray.``."""
    prefixed = {name if name.startswith("ktray.") else f"ktray.{name}": value for name, value in tags.items()}
    return {key_of(name): text_of(value)[:TAG_LENGTH] for name, value in prefixed.items()}


def metrics_of(values: Mapping[str, Any], step: int) -> tuple[dict[str, float], dict[str, str]]:
    """Return finite metrics, and a tag for each one that is not finite: MLflow's charts and comparisons break on NaN."""
    metrics: dict[str, float] = {}
    tags: dict[str, str] = {}
    for name, value in values.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            metrics[key_of(name)] = number
        else:
            tags[key_of(f"ktray.nonfinite.{name}")] = f"{text_of(str(value))[:100]} at step {step}"
    return metrics, tags


def run_name(number: int, name: str) -> str:
    """Return ``0042 rotation-resnet18/layer3 k=500 -> alexnet``, whether or not `name` already begins with the number."""
    head = f"{number:04d}"
    return name if name == head or name.startswith(f"{head} ") else f"{head} {name}".rstrip()


def quoted(text: str) -> str:
    """Return `text` as a string literal of an MLflow filter.

    Raises:
        ValueError: it contains both kinds of quotes, or a backslash; the filter language has no escapes.
    """
    mark = next((mark for mark in "'\"" if mark not in text), None)
    if mark is None or "\\" in text:
        raise ValueError(f"{text!r} cannot be written in an MLflow filter")
    return f"{mark}{text}{mark}"


def without_password(text: str) -> str:
    """Return `text` with user and password of every URL hidden, for logs."""
    return re.sub(r"//[^/@\s'\"]+@", "//***@", text)

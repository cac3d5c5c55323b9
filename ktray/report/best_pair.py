"""The best pair in detail: its clusters as pictures and numbers, and what it takes to make it again."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from ktray.report.formatting import duration, number, shareable, size
from ktray.report.plots import sizes
from ktray.report.stage_reuse import ORDER, Find, needed

if TYPE_CHECKING:
    from ktray.search.trial import Trial

SHEET_WIDTH = 1400  # pixels; a wider one is scaled down
SHEET_BYTES = 600_000
STATISTICS = {
    "clusters/inertia": ("inertia (mean squared distance)", number),
    "clusters/iterations": ("iterations", "{:,.0f}".format),
    "clusters/empty": ("empty clusters of k-means", "{:,.0f}".format),
    "clusters/repaired": ("empty clusters repaired on the way", "{:,.0f}".format),
    "clusters/largest_share": ("share of the largest cluster", number),
    "pseudo_labels/kept": ("share of images kept", number),
    "pseudo_labels/entropy": ("entropy of the pseudo-labels (nats)", number),
    "pseudo_labels/nmi": ("NMI with the labels", number),
}


def sheet(best: Trial, find: Find) -> str | None:
    """The cluster sheet as a data URL, None if the pair or the store has none."""
    key = best.keys.get("pseudo_labels")
    artifact = find(key) if key else None
    path = artifact.directory / "clusters.png" if artifact else None
    return _data_url(path) if path and path.exists() else None


def _data_url(path: Path) -> str:
    """The picture itself, or a smaller one where it is large."""
    from PIL import Image

    with Image.open(path) as image:
        if image.width <= SHEET_WIDTH and path.stat().st_size <= SHEET_BYTES:
            return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        smaller = image.convert("RGB")
    smaller.thumbnail((SHEET_WIDTH, 4 * SHEET_WIDTH))
    buffer = io.BytesIO()
    smaller.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def statistics(best: Trial, find: Find) -> dict[str, Any] | None:
    """Numbers of the clustering and a plot of the sizes; None for a pair without clusters."""
    rows = [(text, write(best.metrics[name])) for name, (text, write) in STATISTICS.items() if name in best.metrics]
    key = best.keys.get("pseudo_labels")
    artifact = find(key) if key else None
    if artifact is None:
        return {"rows": rows, "plot": None} if rows else None
    labels = np.load(artifact.directory / "labels.npy", mmap_mode="r", allow_pickle=False)
    kept = labels[labels >= 0]
    counts = np.bincount(kept, minlength=_clusters(best))
    filled = counts[counts > 0]
    head = [
        ("clusters", f"{len(counts):,}"),
        ("images with a pseudo-label", f"{len(kept):,} of {len(labels):,}"),
        ("clusters without an image left", f"{(counts == 0).sum():,}"),
    ]
    if len(filled):
        head.append(
            ("images per cluster", f"{filled.min():,} smallest, {number(np.median(filled))} median, {filled.max():,} largest")
        )
    images = find(artifact.record.get("inputs", {}).get("images.transfer", ""))
    unreadable = int(images.metrics.get("unreadable", 0)) if images else 0
    if unreadable:
        head.append(("unreadable images, left out", f"{unreadable:,}"))
    return {"rows": head + rows, "plot": sizes(counts.tolist()) if len(filled) else None}


def _clusters(best: Trial) -> int:
    """The number of clusters; of several, the first, whose pseudo-labels are shown."""
    k = best.pair["transfer"].get("k") or 0
    return int(k[0] if isinstance(k, list | tuple) else k)


def reproduction(best: Trial, find: Find) -> dict[str, Any]:
    """Versions, commits, devices and costs from the records of the pair's stages, its seeds, and its spec as YAML."""
    keys = [key for value in best.keys.values() for key in (value.values() if isinstance(value, Mapping) else [value])]
    records = [artifact.record for artifact in needed(keys, find).values()]
    records.sort(key=lambda record: (_place(record["stage"]), record.get("published", "")))
    versions: dict[str, list[str]] = {}
    for record in records:
        for package, version in record.get("versions", {}).items():
            versions.setdefault(package, []).append(version)
    facts = [("commit", _distinct([record["commit"] for record in records if record.get("commit")]))]
    facts += [(package, _distinct(found)) for package, found in versions.items()]
    facts += [("device", _distinct([record["device"] for record in records if record.get("device")]))]
    facts += [("seeds", ", ".join(f"{path} = {value}" for path, value in _seeds(best.pair)))]
    return {
        "facts": [(name, shareable(text)) for name, text in facts if text],
        "stages": [_stage_row(record) for record in records],
        "yaml": yaml.safe_dump(_spec(best.pair), sort_keys=False, allow_unicode=True, default_flow_style=False, width=100),
    }


def _stage_row(record: Mapping[str, Any]) -> list[str]:
    peak = record.get("peak_bytes")
    workers = record.get("workers")
    return [
        str(record["key"]),
        duration(float(record["seconds"])),
        size(peak) if peak else "–",
        str(workers) if workers else "–",
        str(record.get("published", "–"))[:10],
    ]


def _place(stage: str) -> int:
    return ORDER.index(stage) if stage in ORDER else len(ORDER)


def _distinct(values: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _seeds(value: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """(dotted path, value) of every seed in a spec; the data's once if all roles have the same data."""
    if isinstance(value, Mapping):
        for name, item in (_spec(value) if not path else value).items():
            where = f"{path}.{name}" if path else name
            if name == "seed":
                yield where, item
            else:
                yield from _seeds(item, where)


def _spec(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The pair with one data set for all roles where they are equal, as a person would write it, and without places."""
    plain: dict[str, Any] = shareable(pair)
    roles = plain.get("data")
    if isinstance(roles, dict) and "kind" not in roles:
        sets = list(roles.values())
        if sets and all(entry == sets[0] for entry in sets):
            plain["data"] = sets[0]
    return plain

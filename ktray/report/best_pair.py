"""The best pair in detail: images and statistics of its clusters, and how to reproduce it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from ktray.report.figures import size_bars
from ktray.report.formatting import anonymised_data, duration, number, size
from ktray.report.stage_reuse import FindArtifact, stage_position, with_inputs
from ktray.search.trial import keys_in
from ktray.stores import intact_file_or_none

if TYPE_CHECKING:
    from ktray.search.trial import Trial

SHEET_WIDTH = 1400  # pixels; a wider sheet, or one of more bytes, is scaled down and stored as JPEG
SHEET_BYTES = 600_000
CLUSTER_METRICS = {
    "clusters/inertia": ("inertia (mean squared distance)", number),
    "clusters/iterations": ("iterations", "{:,.0f}".format),
    "clusters/empty": ("empty clusters of k-means", "{:,.0f}".format),
    "clusters/repaired": ("empty clusters repaired on the way", "{:,.0f}".format),
    "clusters/largest_share": ("share of the largest cluster", number),
    "pseudo_labels/kept": ("share of images kept", number),
    "pseudo_labels/entropy": ("entropy of the pseudo-labels (nats)", number),
    "pseudo_labels/nmi": ("NMI with the labels", number),
}


def cluster_sheet(best: Trial, find: FindArtifact) -> str | None:
    """Return the sheet of images per cluster as a data URL; None if the pair or the store has none."""
    key = best.keys.get("pseudo_labels")
    artifact = find(key) if key else None
    path = intact_file_or_none(artifact, "clusters.png") if artifact else None
    return _data_url(path) if path else None


EVALUATION_PLOTS = {
    "average_precision.png": "Average precision of each class with a 95 % interval over images; in brackets its objects",
    "precision_recall.png": "Precision and recall of each class",
    "detections.png": "Objects (green, dashed if difficult) and detections with a score of 0.5 or more (red)",
    "segmentation.png": "Images, their label maps and the predicted ones",
    "neighbours.png": "Images and those with the most similar features",
}
"""File that an evaluation may write -> its caption. Some show images of the data."""


def evaluation_plots(best: Trial, find: FindArtifact) -> list[dict[str, str]]:
    """Return the plots of the best pair's evaluations: their `name`, `caption` and `source`, a data URL."""
    found = []
    for name, key in (best.keys.get("evaluation") or {}).items():
        artifact = find(key)
        if artifact is None:
            continue
        for file, caption in EVALUATION_PLOTS.items():
            path = intact_file_or_none(artifact, file)
            if path:
                found.append({"name": str(name), "caption": caption, "source": _data_url(path)})
    return found


def _data_url(path: Path) -> str:
    """Return the picture as a data URL, scaled down if it is large."""
    from PIL import Image

    with Image.open(path) as image:
        if image.width <= SHEET_WIDTH and path.stat().st_size <= SHEET_BYTES:
            return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        smaller = image.convert("RGB")
    smaller.thumbnail((SHEET_WIDTH, 4 * SHEET_WIDTH))
    buffer = io.BytesIO()
    smaller.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def cluster_statistics(best: Trial, find: FindArtifact) -> dict[str, Any] | None:
    """Return statistics of the clustering as rows, and a plot of the cluster sizes; None for a pair without clusters."""
    rows = [
        (label, format_value(best.metrics[name]))
        for name, (label, format_value) in CLUSTER_METRICS.items()
        if name in best.metrics
    ]
    key = best.keys.get("pseudo_labels")
    artifact = find(key) if key else None
    path = intact_file_or_none(artifact, "labels.npy") if artifact else None
    if artifact is None or path is None:
        return {"rows": rows, "plot": None} if rows else None
    labels = np.load(path, mmap_mode="r", allow_pickle=False)
    kept = labels[labels >= 0]
    counts = np.bincount(kept, minlength=_cluster_count(best))
    nonempty = counts[counts > 0]
    what = "image" if labels.ndim == 1 else "position"
    sizes = [
        ("clusters", f"{len(counts):,}"),
        (f"{what}s with a pseudo-label", f"{len(kept):,} of {labels.size:,}"),
        (f"clusters without {'an image' if what == 'image' else 'a position'} left", f"{(counts == 0).sum():,}"),
    ]
    if len(nonempty):
        sizes.append(
            (
                f"{what}s per cluster",
                f"{nonempty.min():,} smallest, {number(np.median(nonempty))} median, {nonempty.max():,} largest",
            )
        )
    images = find(artifact.record.get("inputs", {}).get("images.transfer", ""))
    unreadable = int(images.metrics.get("unreadable", 0)) if images else 0
    if unreadable:
        sizes.append(("unreadable images, left out", f"{unreadable:,}"))
    return {"rows": sizes + rows, "plot": size_bars(counts.tolist()) if len(nonempty) else None}


def _cluster_count(best: Trial) -> int:
    """Return the number of clusters. A transfer with several clusterings shows the pseudo-labels of the first."""
    k = best.pair["transfer"].get("k") or 0
    return int(k[0] if isinstance(k, list | tuple) else k)


def reproduction(best: Trial, find: FindArtifact) -> dict[str, Any]:
    """Return what reproducing the pair takes: versions, commits, devices, costs of its stages, seeds, and its spec as YAML."""
    records = [artifact.record for artifact in with_inputs(keys_in(best.keys), find).values()]
    records.sort(key=lambda record: (stage_position(record["stage"]), record.get("published", "")))
    versions: dict[str, list[str]] = {}
    for record in records:
        for package, version in record.get("versions", {}).items():
            versions.setdefault(package, []).append(version)
    facts = [("commit", _distinct([record["commit"] for record in records if record.get("commit")]))]
    facts += [(package, _distinct(found)) for package, found in versions.items()]
    facts += [("device", _distinct([record["device"] for record in records if record.get("device")]))]
    licences = [f"{record.get('weights', '')}: {record['licence']}" for record in records if record.get("licence")]
    facts += [("licence of pretrained weights", _distinct(licences))]
    facts += [("seeds", ", ".join(f"{path} = {value}" for path, value in _seeds(best.pair)))]
    return {
        "facts": [(name, anonymised_data(text)) for name, text in facts if text],
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


def _distinct(values: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _seeds(value: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Yield (dotted path, value) of every seed in a spec; if all roles have the same data, its seed comes once."""
    if isinstance(value, Mapping):
        for name, item in (_spec(value) if not path else value).items():
            where = f"{path}.{name}" if path else name
            if name == "seed":
                yield where, item
            else:
                yield from _seeds(item, where)


def _spec(pair: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pair as a person would write it: one data set if all roles have the same, and no absolute paths."""
    plain: dict[str, Any] = anonymised_data(pair)
    roles = plain.get("data")
    if isinstance(roles, dict) and "kind" not in roles:
        sets = list(roles.values())
        if sets and all(entry == sets[0] for entry in sets):
            plain["data"] = sets[0]
    return plain

"""Which cheap measures tell early which pair is best? Kendall's tau between them and the judges that decide in the end.

Question: of 40 pairs (ten teachers x four k on CIFAR-10), how does the order by kNN, a ridge probe, effective rank (each of the
teacher, of a student after two epochs, and of the whole student), by the entropy of the pseudo-labels, their agreement with the
classes, or the stability of the clusters agree with the order by linear probe (CIFAR-10), VOC classification and detection?
Command:  the set of `experiments/voc_small.py` and its proposals; then, in their folder,
          ktray run experiments/proxies.py --concurrent 24, on a GPU; then
          python -m experiments.proxies HOME pairs.jsonl, also while it runs: the pairs that are whole so far
Cost:     not measured.
Result:   none yet; it has not been run.

Everything is judged on val, as a search would. An interval is that of a bootstrap over teachers, whose pairs are not
independent of each other. A proxy that needs labels says so: it is no proxy where there are none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.voc_small import ALEXNET, OBJECTS, PROPOSALS, SCHEDULE, VOC, trained
from ktray.artifact import Artifact
from ktray.checksums import intact
from ktray.clustering import pseudo_labelling
from ktray.pipeline import pair_graph, pair_metrics
from ktray.pipeline.identity import data_identity
from ktray.spec import PairSpec
from ktray.stores.file import FileStore

EARLY, LAST = 2, 6  # epochs of the student
VOC_HALVES: dict[str, Any] = {**VOC, "split": {"val": 0.5}}
CLUSTERS = (10, 50, 200, 1000)
TEACHERS: dict[str, dict[str, Any]] = {
    "hog 8": {"descriptor": {"kind": "hog", "cell": 8}},
    "hog 4": {"descriptor": {"kind": "hog", "cell": 4}},
    "colour_histogram": {"descriptor": {"kind": "colour_histogram", "bins": 6, "grid": 2}},
    "raw_pixels": {"descriptor": {"kind": "raw_pixels", "side": 16}},
    "random_network": {
        "descriptor": {"kind": "random_network", "backbone": ALEXNET, "layer": "conv3", "pool": {"grid": 2}},
    },
    **{f"rotation {layer}": trained("rotation", layer, 0) for layer in ("conv3", "conv4", "conv5")},
    **{f"simclr {layer}": trained("simclr", layer, 0) for layer in ("conv4", "conv5")},
}
UNDECAYED = {name: value for name, value in SCHEDULE.items() if name != "decay"}  # so that two epochs are those of six
STUDENT: dict[str, Any] = {"backbone": ALEXNET, "schedule": {**UNDECAYED, "epochs": LAST}, "augment": {"crop": 4, "flip": True}}
DETECTOR: dict[str, Any] = {
    **{"proposals": PROPOSALS, "min_sizes": (96,), "max_size": 144, "steps": 300, "batch_size": 4, "lr": 0.01},
    **{"freeze_layers": 0, "train_batch_norm": True, "width": 256, "per_image": 32},
}
CHEAP: tuple[dict[str, Any], ...] = (
    {"kind": "knn"},
    {"kind": "linear_probe", "name": "ridge", "l2": 0.01, "iterations": 50},
    {"kind": "effective_rank"},
)
ON_OBJECTS: list[dict[str, Any]] = [
    *CHEAP,
    *({**each, "name": f"teacher_{each.get('name', each['kind'])}", "of": "teacher"} for each in CHEAP),
    {"kind": "cluster_quality"},
    {"kind": "linear_probe"},
]
ON_VOC: list[dict[str, Any]] = [
    {"kind": "voc07_cls", "layer": "conv5", "pool": {"grid": 2}},
    {"kind": "voc_det", "layer": "conv5", **DETECTOR},
]

PROXIES = {
    "teacher_knn": "kNN of the teacher (labels)",
    "teacher_ridge": "ridge probe of the teacher (labels)",
    "teacher_rank": "effective rank of the teacher",
    "entropy": "entropy of the pseudo-labels",
    "stability": "stability of the clusters over seeds (NMI)",
    "nmi": "NMI of clusters and classes (labels)",
    "early_knn": f"kNN of the student after {EARLY} epochs (labels)",
    "early_ridge": f"ridge probe after {EARLY} epochs (labels)",
    "early_rank": f"effective rank after {EARLY} epochs",
    "knn": "kNN of the student (labels)",
    "ridge": "ridge probe of the student (labels)",
    "rank": "effective rank of the student",
}
JUDGES = {"linear_probe": "linear probe", "voc_cls": "VOC classification", "voc_det": "VOC detection"}
RESAMPLES = 2000


def pairs() -> dict[str, PairSpec]:
    """``teacher | k | part`` -> pair. The parts of one teacher and k share everything up to their students.

    `whole` judges the student on CIFAR-10 and `voc` the same student on VOC; `early` judges it after two epochs; `again` has
    other clusters for the stability, and a tiny student because a pair has one.
    """
    found = {}
    for teacher, spec in TEACHERS.items():
        for k in CLUSTERS:
            clusters = {"kind": "clusters", "k": k, "pca": 128}
            parts: dict[str, dict[str, Any]] = {
                "whole": {"evals": ON_OBJECTS},
                "early": {"evals": CHEAP, "student": {**STUDENT, "schedule": {**STUDENT["schedule"], "epochs": EARLY}}},
                "voc": {
                    "evals": ON_VOC,
                    "data": {**dict.fromkeys(("pretext", "cluster", "transfer"), OBJECTS), "target": VOC_HALVES},
                },
                "again": {
                    "evals": [{"kind": "cluster_quality"}],
                    "transfer": {**clusters, "seed": 1},
                    "student": {"backbone": {**ALEXNET, "width": 0.125}, "schedule": {**UNDECAYED, "epochs": 1}},
                },
            }
            for part, fields in parts.items():
                plain = {"data": OBJECTS, "teacher": spec, "transfer": clusters, "student": STUDENT, **fields}
                found[f"{teacher} | {k} | {part}"] = PairSpec.model_validate(plain)
    return found


def rows(home: Path) -> list[dict[str, Any]]:
    """One row per teacher and k of which the home's store has all parts: the proxies and the judges."""
    store, identity = FileStore(home / "store"), data_identity(home / "cache")
    parts: dict[tuple[str, int], dict[str, Any]] = {}
    for name, pair in pairs().items():
        teacher, k, part = name.split(" | ")
        graph = pair_graph.build(pair, identity)
        artifacts = pair_metrics.published_artifacts(graph, store)
        if artifacts is not None:
            parts.setdefault((teacher, int(k)), {})[part] = (graph, artifacts)
    return [
        {"teacher": teacher, "k": k, **_values(found)}
        for (teacher, k), found in parts.items()
        if {"whole", "early", "voc", "again"} <= set(found)
    ]


def _values(parts: Mapping[str, tuple[pair_graph.Graph, Mapping[str, Artifact]]]) -> dict[str, Any]:
    whole, early, voc = (pair_metrics.metrics(*parts[part]) for part in ("whole", "early", "voc"))
    labels = [_pseudo_labels(*parts[part]) for part in ("whole", "again")]
    graph, artifacts = parts["voc"]
    return {
        "teacher_knn": whole["teacher_knn/top1"],
        "teacher_ridge": whole["teacher_ridge/top1"],
        "teacher_rank": whole["teacher_effective_rank/rank"],
        "entropy": whole["pseudo_labels/entropy"],
        "stability": pseudo_labelling.nmi(*labels),
        "nmi": whole["cluster_quality/nmi"],
        **{f"early_{name}": early[metric] for name, metric in _CHEAP_METRICS.items()},
        **{name: whole[metric] for name, metric in _CHEAP_METRICS.items()},
        "linear_probe": whole["linear_probe/top1"],
        "voc_cls": voc["voc07_cls/map"],
        "voc_det": voc["voc_det/map"],
        "device": artifacts[graph.keys["evaluation"]["voc_det"]].record["device"],
        "commit": artifacts[graph.keys["evaluation"]["voc_det"]].record["commit"],
    }


_CHEAP_METRICS = {"knn": "knn/top1", "ridge": "ridge/top1", "rank": "effective_rank/rank"}


def _pseudo_labels(graph: pair_graph.Graph, artifacts: Mapping[str, Artifact]) -> NDArray[np.int64]:
    path = intact(artifacts[graph.keys["pseudo_labels"]].directory / "labels.npy")
    labels: NDArray[np.int64] = np.load(path, allow_pickle=False)
    return labels


@dataclass(frozen=True)
class Agreement:
    """Kendall's tau-b of a proxy and a judge, with its 95 % interval over resampled teachers; NaN where one is constant."""

    tau: float
    low: float
    high: float


def agreement(proxy: NDArray[np.float64], judge: NDArray[np.float64], groups: Sequence[str], seed: int = 0) -> Agreement:
    """How far two orders of n pairs agree.

    Args:
        proxy, judge: (n,) values.
        groups: (n,) the teacher of each pair; all its pairs are resampled together.
    """
    names, members = np.unique(groups, return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    counts = np.vstack([np.ones(len(proxy)), drawn[:, members]])  # how often each pair counts; in the first row once
    one, other = (np.sign(values[:, None] - values[None]) for values in (proxy, judge))

    def summed(products: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(((counts @ products) * counts).sum(1))

    with np.errstate(invalid="ignore"):
        taus = summed(one * other) / np.sqrt(summed(one**2) * summed(other**2))
    known = taus[1:][~np.isnan(taus[1:])]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    return Agreement(float(taus[0]), float(low), float(high))


def agreements(found: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Agreement]:
    """(proxy, judge) -> their agreement over all rows, judges among each other included."""
    columns = {name: np.array([row[name] for row in found], np.float64) for name in (*PROXIES, *JUDGES)}
    groups = [str(row["teacher"]) for row in found]
    return {
        (proxy, judge): agreement(columns[proxy], columns[judge], groups)
        for proxy in columns
        for judge in JUDGES
        if proxy != judge
    }


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The agreements as text, a line per proxy and a column per judge."""
    taus = agreements(found)
    cell: Callable[[Agreement], str] = lambda each: f"{each.tau:+.2f} ({each.low:+.2f} to {each.high:+.2f})"  # noqa: E731
    lines = [f"{len(found)} pairs of {len({row['teacher'] for row in found})} teachers: tau (95 % interval over teachers)"]
    lines.append("  ".join(["proxy".ljust(46), *(f"{title:<24}" for title in JUDGES.values())]).rstrip())
    for name, title in {**PROXIES, **JUDGES}.items():
        cells = [cell(taus[name, judge]) if name != judge else "" for judge in JUDGES]
        lines.append("  ".join([title.ljust(46), *(f"{each:<24}" for each in cells)]).rstrip())
    return "\n".join(lines)


def main(home: Path, out: Path) -> None:
    """Write a line of JSON per whole pair, and print the table."""
    found = rows(home)
    out.write_text("".join(f"{json.dumps(row)}\n" for row in found))
    print(table(found) if len(found) > 1 else f"{len(found)} whole pairs: too few for a table")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

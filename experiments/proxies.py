"""Which cheap measures tell early which pair is best? Kendall's tau between them and the judges that decide in the end.

Question: of 40 pairs (ten teachers x four k on CIFAR-10), how does the order by kNN, a ridge probe, effective rank (each of the
teacher, of a student after two epochs, and of the whole student), by the entropy of the pseudo-labels, their agreement with the
classes, or the stability of the clusters agree with the order by linear probe (CIFAR-10), VOC classification and detection?
Command:  the set of `experiments/voc_small.py` and its proposals; then, in their folder,
          ktray run experiments/proxies.py --concurrent 24, on a GPU; then
          python -m experiments.proxies HOME pairs.jsonl, also while it runs: the pairs that are whole so far
          python -m experiments.proxies experiments/tables/cifar10_pairs.parquet, for pairs that were run before
Cost:     in one run with `experiments.voc_small`, which says what it took.
Result:   of the 40 pairs (H200, commit 243d3b5; one student each), tau and the 95 % interval over the ten teachers:

                                                linear probe              VOC classification        VOC detection
    kNN of the teacher                          +0.36 (-0.06 to +0.59)   +0.74 (+0.45 to +0.84)   +0.25 (-0.21 to +0.49)
    ridge probe of the teacher                  +0.29 (-0.15 to +0.63)   +0.60 (+0.30 to +0.75)   +0.20 (-0.26 to +0.55)
    effective rank of the teacher               +0.36 (-0.04 to +0.65)   +0.40 (-0.05 to +0.68)   +0.30 (-0.14 to +0.64)
    entropy of the pseudo-labels                +0.28 (+0.20 to +0.44)   +0.14 (-0.02 to +0.25)   +0.06 (-0.15 to +0.24)
    stability of the clusters over seeds        -0.18 (-0.45 to +0.18)   +0.07 (-0.30 to +0.47)   -0.35 (-0.60 to +0.01)
    NMI of clusters and classes                 +0.53 (+0.14 to +0.74)   +0.69 (+0.47 to +0.78)   +0.24 (-0.28 to +0.55)
    kNN after 2 epochs                          +0.64 (+0.32 to +0.83)   +0.56 (+0.29 to +0.67)   +0.41 (+0.00 to +0.64)
    ridge probe after 2 epochs                  +0.64 (+0.32 to +0.83)   +0.49 (+0.19 to +0.66)   +0.42 (+0.00 to +0.65)
    effective rank after 2 epochs               +0.17 (-0.03 to +0.45)   +0.19 (-0.03 to +0.38)   +0.06 (-0.21 to +0.37)
    kNN of the student                          +0.80 (+0.67 to +0.86)   +0.55 (+0.25 to +0.68)   +0.36 (-0.08 to +0.62)
    ridge probe of the student                  +0.85 (+0.73 to +0.91)   +0.45 (+0.09 to +0.62)   +0.39 (-0.03 to +0.63)
    effective rank of the student               +0.31 (+0.19 to +0.49)   +0.19 (+0.04 to +0.33)   +0.11 (-0.18 to +0.37)

The linear probe agrees with VOC classification by +0.46 (+0.06 to +0.69) and with detection by +0.39 (-0.05 to +0.69): a pair
is chosen by what it is for. kNN and a ridge probe at a third of the epochs order pairs by the linear probe equally well; the
best that needs no student, +0.53, lies within their intervals. For VOC classification kNN of the teacher says most. What needs
no labels is weak: effective rank, entropy and stability are no reason to stop a pair. Detection is foretold by none with
certainty: the 40 values lie between 0.05 and 0.11 with a standard deviation of 0.017, and another seed of a backbone moves such
a value by about 0.01 (`experiments.voc_small`).

Of the 207 in the table (23 teachers and layers x 3 k x 3 students on CIFAR-10, student seed 0, H100), tau with the linear
probe of the student after its nine epochs, and the 95 % interval over teachers:

    kNN of the teacher         +0.53 (+0.32 to +0.70)
    k of the clusters          +0.03 (+0.01 to +0.07)
    kNN after 1 epoch          +0.52 (+0.40 to +0.58)
    kNN after 3 epochs         +0.69 (+0.56 to +0.74)
    kNN after 9 epochs         +0.82 (+0.75 to +0.85)

So a rung at a third of the epochs orders pairs well, and one at a ninth no better than the teacher alone does; the same holds
within each of the three students. The order among the best is partly chance: of the best 21 pairs the probes of student seed 0
agree with those of seeds 1 and 2 by 0.71 and 0.62. `evals: quick`, which has kNN and a ridge probe, stays as it is. So do
the rungs of the spaces that ship, although the first is at an eighth of the epochs: there it is the fifth epoch, here a ninth
is the first.

Everything is judged on val, as a search would. An interval is that of a bootstrap over teachers, whose pairs are not
independent of each other. A proxy that needs labels says so: it is no proxy where there are none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import parquet

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
EARLIER = {
    "teacher_knn": "kNN of the teacher (labels)",
    "k": "k of the clusters",
    "knn_1": "kNN after 1 epoch (labels)",
    "knn_3": "kNN after 3 epochs (labels)",
    "knn_9": "kNN after 9 epochs (labels)",
}
"""Columns of `experiments/tables/cifar10_pairs.parquet`, whose judge is a linear probe after nine epochs."""
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


def table(found: Sequence[Mapping[str, Any]], proxies: Mapping[str, str], judges: Mapping[str, str]) -> str:
    """Agreements over all rows as text: a line per proxy and per judge, a column per judge.

    Args:
        proxies, judges: column -> what the table calls it.
    """
    columns = {name: np.array([row[name] for row in found], np.float64) for name in (*proxies, *judges)}
    groups = [str(row["teacher"]) for row in found]
    lines = [f"{len(found)} pairs of {len(set(groups))} teachers: tau (95 % interval over teachers)"]
    lines.append("  ".join(["proxy".ljust(46), *(f"{title:<24}" for title in judges.values())]).rstrip())
    for name, title in {**proxies, **judges}.items():
        cells = [_cell(agreement(columns[name], columns[judge], groups)) if name != judge else "" for judge in judges]
        lines.append("  ".join([title.ljust(46), *(f"{each:<24}" for each in cells)]).rstrip())
    return "\n".join(lines)


def _cell(found: Agreement) -> str:
    return f"{found.tau:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def earlier_rows(path: Path) -> list[dict[str, Any]]:
    """The pairs of `experiments/tables/cifar10_pairs.parquet` with student seed 0."""
    return [row for row in parquet.read_table(path).to_pylist() if row["seed"] == 0]


def main(source: Path, out: Path | None) -> None:
    """Print the table of a home's whole pairs, or of a parquet file of earlier ones; write a line of JSON per pair to `out`."""
    of_home = source.is_dir()
    found = rows(source) if of_home else earlier_rows(source)
    if out is not None:
        out.write_text("".join(f"{json.dumps(row)}\n" for row in found))
    if len(found) < 2:
        print(f"{len(found)} whole pairs: too few for a table")
    elif of_home:
        print(table(found, PROXIES, JUDGES))
    else:
        print(table(found, EARLIER, {"linear_probe": JUDGES["linear_probe"]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)

"""Lay down what a home's store knows of `experiments/pair_table.py` as one small parquet file.

    python -m experiments.tables.pair_table HOME OUT.parquet

One row per pair that is whole (its students at all rungs and all evaluations), with what a search would see and pay:

    teacher, k, student, seed      the draw
    knn_1, knn_3, knn_9            kNN top1 of the student at each rung, on val
    linear_probe                   top1 at the last rung, on val
    teacher_knn                    kNN top1 of the teacher's features, on val
    key_teacher, key_features,     what pairs share: equal keys are one artifact; empty where a pair has no such stage
      key_clusters
    s_teacher, s_features,         seconds of each stage if it ran alone; `s_student_3` is the training to epoch 3 from scratch,
      s_clusters, s_pseudo_labels,   and `s_evaluation_3` the evaluation there
      s_student_E, s_evaluation_E, s_linear_probe, s_teacher_knn
    device, commit                 of the student at the last rung
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from experiments import pair_table
from ktray.pipeline import pair_graph, pair_metrics
from ktray.pipeline.identity import data_identity
from ktray.stores.file import FileStore


def main(home: Path, out: Path) -> None:
    """Write the rows of all whole pairs, in the order of the experiment."""
    store, identity = FileStore(home / "store"), data_identity(home / "cache")
    found: dict[str, dict[int, tuple[Any, Any]]] = {}
    for name, pair in pair_table.pairs().items():
        place, _, epoch = name.rpartition(" @ ")
        stages = pair_graph.build(pair, identity)
        found.setdefault(place, {})[int(epoch)] = (stages, pair_metrics.published_artifacts(stages, store))
    rows = [_row(place, rungs) for place, rungs in found.items() if all(artifacts for _, artifacts in rungs.values())]
    parquet.write_table(pyarrow.Table.from_pylist(rows), out, compression="zstd")
    print(f"{len(rows)} of {len(found)} pairs, {out.stat().st_size} bytes in {out}")


def _row(place: str, rungs: Mapping[int, tuple[Any, Any]]) -> dict[str, Any]:
    teacher, k, student, seed = place.split(" | ")
    row: dict[str, Any] = {"teacher": teacher, "k": int(k), "student": student, "seed": int(seed)}
    for epoch, (stages, artifacts) in sorted(rungs.items()):
        row[f"knn_{epoch}"] = artifacts[stages.keys["evaluation"]["knn"]].metrics["top1"]
        row[f"s_student_{epoch}"] = artifacts[stages.keys["student"]].record["seconds_alone"]
        row[f"s_evaluation_{epoch}"] = artifacts[stages.keys["evaluation"]["knn"]].record["seconds"]
    stages, artifacts = rungs[max(rungs)]
    for name in ("linear_probe", "teacher_knn"):
        evaluation = artifacts[stages.keys["evaluation"][name]]
        row |= {name: evaluation.metrics["top1"], f"s_{name}": evaluation.record["seconds"]}
    for stage in ("teacher", "features", "clusters", "pseudo_labels"):
        key = stages.keys.get(stage, "")
        row |= {f"key_{stage}": key, f"s_{stage}": artifacts[key].record["seconds_alone"] if key else 0.0}
    last = artifacts[stages.keys["student"]].record
    return row | {"device": last["device"], "commit": last["commit"]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Do the paper's judges rank small backbones as one expects? Classification and detection on a generated VOC set.

Question: backbones learned on CIFAR-10 without labels (HOG clusters, rotation, clusters of rotation, SimCLR), a random one and
one trained on all labels: mAP in classification (fine-tuned, and a linear SVM on frozen features) and in detection, on scenes
composed of CIFAR-10 objects in VOC's layout, judged on test.
Command:  export KTRAY_DATA=/data, the folder with CIFAR-10
          ktray data make-voc voc_small --from cifar10 --images 2400 --size 96
          python -m experiments.voc_small          selective search of all images, once, to voc_small/proposals.npz
          ktray run experiments/voc_small.py --concurrent 24, on a GPU
          python -m experiments.voc_small HOME     the table, also while it runs
Cost:     with the 40 pairs of `experiments.proxies` in one run of 14 workers on one H200 with 16 cores: eleven minutes. Workers
          that take turns on the GPU needed 247 to 293 seconds for a detection (n = 9), and 75 to 77 (n = 4) under NVIDIA's
          Multi-Process Service, which was started halfway. Selective search: 80 seconds of one core.
Result:   H200, commit 243d3b5. mAP in percent, means of three seeds with Student's 95 % interval:

    mAP                 classification, tuned    classification, SVM      detection
    random              35.6 (34.5 to 36.7)      31.0 (28.8 to 33.2)       7.5 ( 5.2 to  9.7)
    hog clusters        36.6 (36.0 to 37.1)      37.7 (36.5 to 38.9)      13.1 (10.1 to 16.1)
    rotation            36.9 (36.2 to 37.6)      39.1 (38.5 to 39.6)      11.0 (10.7 to 11.4)
    rotation clusters   39.5 (38.7 to 40.4)      42.3 (41.3 to 43.3)      16.3 (13.8 to 18.8)
    simclr              36.9 (35.1 to 38.8)      42.9 (41.7 to 44.1)      12.7 (11.3 to 14.0)
    supervised          52.5 (50.2 to 54.7)      51.8 (51.0 to 52.6)      12.4 ( 6.6 to 18.2)

The SVM orders the backbones as one expects: a random one last, labels first, and clusters of rotation above rotation, as in the
paper. Fine-tuned, the same two ends and the same gain by clusters; HOG clusters, rotation and SimCLR cannot be told apart.
Detection agrees on the random one and on the gain by clusters, but supervised is not first. All its values are low: 600 steps
of 4 images are two passes over the training images, in which a new head learns little, and the seeds of supervised have a
standard deviation of 2.3 points, those of the others of about 1. More steps were not tried.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ktray.fine_tuning.proposals import selective_search
from ktray.pipeline import pair_graph
from ktray.pipeline.identity import data_identity
from ktray.spec import PairSpec
from ktray.stores.file import FileStore
from ktray.training.step_training import spread_of

SEEDS = (0, 1, 2)
OBJECTS: dict[str, Any] = {"kind": "cifar10"}
VOC: dict[str, Any] = {"kind": "voc", "path": "voc_small", "size": 64, "split": {"val": 0}}
ALEXNET: dict[str, Any] = {"kind": "alexnet"}
SCHEDULE: dict[str, Any] = {"epochs": 10, "lr": 0.1, "warmup": 1, "decay": 0.3, "batch_size": 256, "precision": "bfloat16"}
CLUSTERS: dict[str, Any] = {"kind": "clusters", "k": 100, "pca": 128}
PROPOSALS = "voc_small/proposals.npz"
NONE: dict[str, Any] = {"kind": "none"}


def trained(pretext: str, layer: str | None, seed: int) -> dict[str, Any]:
    """An AlexNet trained on a pretext task."""
    return {"pretext": pretext, "backbone": ALEXNET, "layer": layer, "pool": {"grid": 2}, "schedule": SCHEDULE, "seed": seed}


def methods(seed: int) -> dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]:
    """Name of a backbone -> its teacher and transfer."""
    return {
        "random": (None, NONE),
        "hog clusters": ({"descriptor": {"kind": "hog", "cell": 8}}, {**CLUSTERS, "seed": seed}),
        "rotation": (trained("rotation", "conv5", seed), NONE),
        "rotation clusters": (trained("rotation", "conv4", seed), {**CLUSTERS, "seed": seed}),
        "simclr": (trained("simclr", "conv5", seed), NONE),
        "supervised": (None, {"kind": "labels"}),
    }


def evals(of: str) -> list[dict[str, Any]]:
    """Fine-tuned classification, a linear SVM on frozen features, and detection; all judged on test."""
    common = {"of": of, "split": "test", "layer": "conv5"}
    tuned = {
        **{
            "steps": 300,
            "halve_every": 120,
            "test_crops": "fixed",
            "batch_size": 32,
            "lr": 0.01,
            "crop": 64,
            "areas": (0.5, 1.0),
        },
        **{"hidden": (512,), "train_batch_norm": True},
    }
    detector = {
        **{"proposals": PROPOSALS, "min_sizes": (96,), "max_size": 144, "steps": 600, "batch_size": 4, "lr": 0.01},
        **{"freeze_layers": 0, "train_batch_norm": True, "width": 256, "per_image": 32},
    }
    return [
        {"kind": "voc07_cls_finetune", **common, **tuned},
        {"kind": "voc07_cls", **common, "pool": {"grid": 2}},
        {"kind": "voc_det", **common, **detector},
    ]


def pairs() -> dict[str, PairSpec]:
    """``backbone | seed`` -> pair; the seed is that of every training."""
    found = {}
    for seed in SEEDS:
        for name, (teacher, transfer) in methods(seed).items():
            of = "teacher" if teacher is not None and transfer == NONE else "student"
            judged = [{**each, **({"seed": seed} if each["kind"] != "voc07_cls" else {})} for each in evals(of)]
            spec = {
                "data": {**dict.fromkeys(("pretext", "cluster", "transfer"), OBJECTS), "target": VOC},
                "teacher": teacher,
                "transfer": transfer,
                "student": {"backbone": ALEXNET, "schedule": SCHEDULE, "augment": {"crop": 4, "flip": True}, "seed": seed},
                "evals": judged,
            }
            found[f"{name} | {seed}"] = PairSpec.model_validate(spec)
    return found


def search(path: Path) -> NDArray[np.float64]:
    """The regions of one image that selective search proposes."""
    return selective_search(np.asarray(Image.open(path).convert("RGB")), most=2000)


def write_proposals(folder: Path) -> None:
    """Write `proposals.npz` into the folder of a generated set."""
    paths = sorted((folder / "VOCdevkit" / "VOC2007" / "JPEGImages").glob("*.jpg"))
    with ProcessPoolExecutor() as workers:
        found = workers.map(search, paths, chunksize=50)
        np.savez_compressed(folder / "proposals.npz", **{path.stem: boxes for path, boxes in zip(paths, found, strict=True)})


JUDGES = {
    "voc07_cls_finetune/map": "classification, tuned",
    "voc07_cls/map": "classification, SVM",
    "voc_det/map": "detection",
}


def results(home: Path) -> dict[str, dict[str, list[float]]]:
    """Backbone -> metric -> its value under each seed of which the home's store has it."""
    store, identity = FileStore(home / "store"), data_identity(home / "cache")
    found: dict[str, dict[str, list[float]]] = {}
    for name, pair in pairs().items():
        for evaluation, key in pair_graph.build(pair, identity).keys["evaluation"].items():
            artifact = store.find(key)
            if artifact is not None:
                of_backbone = found.setdefault(name.partition(" | ")[0], {})
                of_backbone.setdefault(f"{evaluation}/map", []).append(artifact.metrics["map"])
    return found


def table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Means over the seeds in percent, with Student's 95 % interval, as text: a line per backbone, a column per judge."""
    lines = ["  ".join(["mAP".ljust(18), *(f"{title:<30}" for title in JUDGES.values())]).rstrip()]
    for name, metrics in found.items():
        cells = [_cell(metrics[metric]) if metric in metrics else "" for metric in JUDGES]
        lines.append("  ".join([name.ljust(18), *(f"{cell:<30}" for cell in cells)]).rstrip())
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{100 * values[0]:.1f} (n = 1)"
    spread = spread_of([100 * value for value in values])
    return f"{spread.mean:.1f} ({spread.low:.1f} to {spread.high:.1f}, n = {len(values)})"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(table(results(Path(sys.argv[1]))))
    else:
        write_proposals(Path(PROPOSALS).parent)

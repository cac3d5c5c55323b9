"""The paper's own experiment: what do students on ImageNet without labels reach on PASCAL VOC, ImageNet and, frozen, elsewhere?

Question: Tables 3, 4 and 6 of Noroozi, Vinjimoor, Favaro, Pirsiavash (CVPR 2018) for a random network, CC+HOG, CC+Jigsaw++
(AlexNet to AlexNet), CC+vgg-Jigsaw++ (VGG16 to AlexNet) and ImageNet labels.
Command:  ktray plan experiments/paper_voc07.py, then ktray run experiments/paper_voc07.py, in a folder with `imagenet` (train
and
          val, each with one folder per class), `VOCdevkit` (2007 and 2012) and `proposals.npz` (selective search of VOC 2007;
          see ktray/fine_tuning/proposals.py for other forms).
Cost:     `ktray plan` says it, after a dry run or as far as the store has records of such stages. Not run yet: ImageNet and VOC
          were not at hand where this was written; the slow tests run one iteration of every stage on made sets.
Result:   none yet. The paper's (AlexNet): classification 53.3 / 70.2 / 69.9 / 72.5 / 79.9, detection on one scale
          43.4 / 53.2 / 55.0 / 56.5 / 59.1, on several - / 53.5 / 55.8 / 57.2 / 59.8, segmentation 19.8 / 39.2 / 40.0 / 42.6 /
          48.0.

What is the paper's: k = 2000, conv4 of the teacher max-pooled to 5 x 5 x 384 (AlexNet) or 4 x 4 x 512 (VGG16), AlexNet as the
student, trained like AlexNet on ImageNet, and the protocols of `voc07_cls_finetune`, `voc_det` and `nonlinear_probe`. What is
not known of it, and chosen here: the normalisation of features before clustering (none here), the optimiser of the VGG16
teacher (that of the released AlexNet solver: batch 256, learning rate 0.01, 70 epochs), learning rates that fall linearly over
the last half instead of in steps, and the recipe of segmentation. `alexnet` has no fc6 and fc7: the evaluations bring their
own.
"""

from __future__ import annotations

from typing import Any

from ktray.spec import PairSpec

IMAGENET: dict[str, Any] = {"kind": "imagenet", "path": "imagenet", "size": 256, "split": {"val": 0}}
# All of trainval is trained on and test is judged; of 2012, train and val.
VOC07: dict[str, Any] = {"kind": "voc", "path": "VOCdevkit", "year": "2007", "size": 224, "split": {"val": 0}}
VOC12: dict[str, Any] = {**VOC07, "year": "2012", "task": "segmentation"}
PROPOSALS = "proposals.npz"
ALEXNET: dict[str, Any] = {"kind": "alexnet", "form": "grouped"}
TILES: dict[str, Any] = {"kind": "alexnet", "form": "grouped_stride2"}  # for puzzle tiles of 64 px
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
GRIDS = {"conv1": 9, "conv2": 5, "conv3": 4, "conv4": 4, "conv5": 5}  # under 9,000 features each: the paper's rule (Table 4)

PRETEXT_SCHEDULE: dict[str, Any] = {"epochs": 70, "lr": 0.01, "decay": 0.5, "batch_size": 256, "precision": "bfloat16"}
STUDENT: dict[str, Any] = {
    "backbone": ALEXNET,
    "schedule": {"epochs": 90, "lr": 0.01, "decay": 0.5, "batch_size": 256, "precision": "bfloat16"},
    "augment": {"crop": 16, "flip": True},
}
CLUSTERS: dict[str, Any] = {"kind": "clusters", "k": 2000, "l2": False}


def puzzle(backbone: dict[str, Any], layer: str, grid: int) -> dict[str, Any]:
    """A network trained on Jigsaw++, and the layer whose features are clustered."""
    return {
        "pretext": {"kind": "jigsaw_pp", "permutations": 701, "occlusions": 2},
        "backbone": backbone,
        "layer": layer,
        "pool": {"kind": "max", "grid": grid},
        "schedule": PRETEXT_SCHEDULE,
        "dtype": "float16",
    }


TEACHERS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "Random": (None, {"kind": "none"}),
    "CC+HOG": ({"descriptor": {"kind": "bag_of_hog"}}, CLUSTERS),
    "CC+Jigsaw++": (puzzle(TILES, "conv4", 5), CLUSTERS),
    "CC+vgg-Jigsaw++": (puzzle({"kind": "vgg", "depth": 16, "form": "full"}, "block4", 4), CLUSTERS),
    "Supervised": (None, {"kind": "labels"}),
}

ON_VOC07: list[dict[str, Any]] = [
    {"kind": "voc07_cls_finetune", "split": "test"},
    {"kind": "voc_det", "name": "det_single", "proposals": PROPOSALS, "split": "test"},
    {"kind": "voc_det", "name": "det_multi", "proposals": PROPOSALS, "multi_scale": True, "split": "test"},
]
ON_VOC12: list[dict[str, Any]] = [{"kind": "voc12_seg", "split": "test"}]
ON_IMAGENET: list[dict[str, Any]] = [
    *({"kind": "nonlinear_probe", "name": f"nonlinear_{layer}", "layer": layer, "split": "test"} for layer in LAYERS),
    *({"kind": "linear_probe", "name": n, "layer": n, "pool": {"grid": GRIDS[n]}, "split": "test"} for n in LAYERS),
]
TARGETS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "VOC 2007": (VOC07, ON_VOC07),
    "VOC 2012": (VOC12, ON_VOC12),
    "ImageNet": (IMAGENET, ON_IMAGENET),
}


def plain_pairs() -> dict[str, dict[str, Any]]:
    """``method | target`` -> the plain data of its pair; pairs of one method share everything up to the student."""
    found = {}
    for method, (teacher, transfer) in TEACHERS.items():
        for target, (data, evals) in TARGETS.items():
            found[f"{method} | {target}"] = {
                "data": {**dict.fromkeys(("pretext", "cluster", "transfer"), IMAGENET), "target": data},
                "teacher": teacher,
                "transfer": transfer,
                "student": STUDENT,
                "evals": evals,
            }
    return found


def pairs() -> dict[str, PairSpec]:
    """All pairs."""
    return {name: PairSpec.model_validate(plain) for name, plain in plain_pairs().items()}

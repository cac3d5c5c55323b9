"""COCO detection: AP of torchvision's Faster R-CNN that starts from the judged network, computed by pycocotools.

`map` is the mean over overlaps of 0.50 to 0.95; crowds are ignored, and so are difficult objects of other data; 100 detections
of an image count. The sizes of objects are those of their boxes, because a data set here has no areas of masks: `ap_small`,
`ap_medium` and `ap_large` differ a little from COCO's server, the other figures do not.

Source: Lin et al., "Microsoft COCO" (2014), and pycocotools; Ren, He, Girshick and Sun, "Faster R-CNN" (2015). Defaults: the
"1x" schedule of Goyal et al. and of Detectron: 90,000 steps of 16 images, learning rate 0.02, divided by 10 after 60,000 and
80,000, sides of 640 to 800, and 1333 at most; torchvision's regions (512 per image), anchors and suppression (0.5).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import nn

from ktray.checkpoints import Attempt
from ktray.features.judged_network import JudgedNetwork
from ktray.fine_tuning import detection_plots, detector_training
from ktray.fine_tuning.detector_training import DetectorRecipe, annotated, detect, trained_detector
from ktray.fine_tuning.detectors import require_maps
from ktray.images import Images
from ktray.scoring import detection_scores, per_image
from ktray.scoring.detection_scores import coco_judgement, coco_scores_again, rank_all, require_pycocotools
from ktray.spec import Count, EvaluationFields, Seed, Share, refuse_pool
from ktray.training.step_task import Recipe
from ktray.training.step_training import SeedResult, SeedRun, over_seeds, seed_metrics

REVISION = 2
NEEDS_LABELS = False
NEEDS_ANNOTATIONS = ("boxes",)
READS_NETWORK = True
TOOLS = (detector_training, detection_scores)
DIRECTION: dict[str, Literal["max", "min"]] = {
    "map": "max",
    "ap50": "max",
    "ap75": "max",
    "ap_small": "max",
    "ap_medium": "max",
    "ap_large": "max",
    "ar100": "max",
}


class Spec(EvaluationFields):
    """Faster R-CNN on the network's last layer, or on `layer`."""

    kind: Literal["coco_det"] = "coco_det"
    min_sizes: tuple[Count, ...] = Field(
        default=(640, 672, 704, 736, 768, 800), min_length=1, description="shorter side, drawn per step; the last in the test"
    )
    max_size: int = Field(default=1333, ge=32, description="longest side in pixels")
    steps: int = Field(default=90_000, ge=1, description="of the optimiser")
    drops: tuple[Share, ...] = Field(
        default=(6 / 9, 8 / 9), description="shares of the steps after which the rate is divided by 10"
    )
    batch_size: int = Field(default=16, ge=1, description="images")
    lr: float = Field(default=0.02, gt=0)
    warmup: int = Field(default=1000, ge=0, description="steps")
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    freeze_layers: int = Field(default=0, ge=0, description="first layers of the network that stay as they are")
    train_batch_norm: bool = Field(default=False, description="otherwise the network's statistics stay as they are")
    width: int = Field(default=1024, ge=1, description="of the fully connected layers")
    per_image: int = Field(default=512, ge=2, description="regions drawn per training image")
    anchors: tuple[Count, ...] = Field(default=(32, 64, 128, 256, 512), min_length=1, description="sides in pixels")
    seeds: int = Field(default=1, ge=1, le=100, description="trainings")
    seed: Seed = 0
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _pools_nothing(self) -> Spec:
        refuse_pool(self)
        return self


def check(spec: Spec) -> None:
    """Refuse to plan what cannot be scored.

    Raises:
        UserError: pycocotools is not installed.
    """
    require_pycocotools()


def check_network(spec: Spec, network: nn.Module, size: int) -> None:
    """Refuse a network whose layer makes no maps of images of any size.

    Raises:
        UserError: it does not.
    """
    require_maps(network, spec.layer)


def evaluate(
    spec: Spec,
    *,
    features: Callable[[Images], NDArray[np.float32]],
    train: Images,
    judged: Images,
    pseudo_labels: NDArray[np.int64] | None,
    out: Path,
    device: str,
    network: JudgedNetwork,
    attempt: Attempt,
) -> dict[str, float]:
    """COCO's figures on `judged` in [0, 1] (`coco_scores`), means over the seeds; one of a size that no object has is left out.

    With two seeds or more also the standard deviation and a 95 % interval of each (`seed_metrics`). Writes `per_class.json` and
    plots, whose APs are those of VOC's rules; `per_image.parquet` has the detections of each image under each seed, and which
    of them are right at which overlap.

    Raises:
        ValueError: there are no boxes, or the layer makes no maps.
        UserError: pycocotools is not installed.
    """
    learned, held = (annotated(images, None, 0) for images in (train, judged))
    classes = len(train.classes)

    def train_and_judge(run: SeedRun) -> SeedResult:
        detector = trained_detector(network, settings_of(spec), learned, classes, run)
        with network.computing():
            found = detect(detector, held, device, least=0.0, overlap=0.5, most=100)
        if run.is_last:
            detection_plots.draw_all(out, judged.classes, rank_all(held.objects, found, classes), held, found)
        return SeedResult(*coco_judgement(held.objects, found, classes))

    runs = over_seeds(range(spec.seed, spec.seed + spec.seeds), spec.steps, attempt, train_and_judge)
    per_image.write(out, judged.names, per_image.numbered([run.columns for run in runs]))
    return seed_metrics(runs)


def recompute(columns: per_image.Columns, rows: NDArray[np.int64]) -> dict[str, float]:
    """COCO's figures of some of the images, NaN for one of a size that none of their objects has; means over the seeds."""
    return per_image.recomputed_over(columns, rows, coco_scores_again)


def settings_of(spec: Spec) -> DetectorRecipe:
    """The detector and its training that a spec describes."""
    return DetectorRecipe(
        form="faster_rcnn",
        min_sizes=spec.min_sizes,
        max_size=spec.max_size,
        width=spec.width,
        per_image=spec.per_image,
        anchors=spec.anchors,
        freeze_layers=spec.freeze_layers,
        train_batch_norm=spec.train_batch_norm,
        least=0.05,
        overlap=0.5,
        most=100,
        batch_size=spec.batch_size,
        recipe=Recipe(
            steps=spec.steps,
            lr=spec.lr,
            milestones=tuple(round(drop * spec.steps) for drop in spec.drops),
            warmup=spec.warmup,
            momentum=spec.momentum,
            weight_decay=spec.weight_decay,
            precision=spec.precision,
        ),
    )

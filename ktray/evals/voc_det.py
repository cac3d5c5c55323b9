"""PASCAL VOC detection: mAP of a detector that starts from the judged network and is trained on boxes.

In two forms: Fast R-CNN on given proposals, as in the paper, and torchvision's Faster R-CNN, which makes its own. AP is that of
the devkit: an overlap of 0.5 is enough, difficult objects count neither way, eleven recalls (`map`) or the area (`map_area`).

For VOC 2007 as in the paper: data ``{kind: voc, year: 2007, split: {val: 0}}``, so that all of trainval is trained on, and
``split: test`` here.

Source: Noroozi, Vinjimoor, Favaro and Pirsiavash, CVPR 2018, arXiv:1805.00385, Table 3, and its project page: Fast R-CNN,
150,000 steps, learning rate 0.001, divided by 10 every 50,000, single or multi scale. What these do not say is Girshick's "Fast
R-CNN" (2015) and its configuration: 2 images and 128 regions per step, a shorter side of 600 pixels and at most 1000, in multi
scale 480, 576, 688, 864 or 1200 and at most 2000; suppression above an overlap of 0.3; conv1 of AlexNet fixed; weight decay
5e-4. Faster R-CNN: He, Fan, Wu, Xie and Girshick, "Momentum Contrast" (2020), section 4.2: 24,000 steps of 16 images, learning
rate 0.02, divided by 10 after 18,000 and 22,000, sides of 480 to 800 in training and 800 in the test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import nn

from ktray.checkpoints import Attempt
from ktray.errors import UserError
from ktray.features.judged_network import JudgedNetwork
from ktray.fine_tuning import detection_plots, detector_training
from ktray.fine_tuning.detector_training import DetectorRecipe, annotated, detect, trained_detector
from ktray.fine_tuning.detectors import require_maps
from ktray.fine_tuning.proposals import SELECTIVE_SEARCH, check_proposals, require_images
from ktray.images import Images
from ktray.scoring import average_precision, detection_scores, per_image
from ktray.scoring.average_precision import Rule
from ktray.scoring.detection_scores import Ranked, columns_of, rank_all, ranked_again
from ktray.spec import Count, EvaluationFields, Seed, Share, refuse_pool
from ktray.training.step_task import Recipe
from ktray.training.step_training import SeedResult, SeedRun, over_seeds, seed_metrics

REVISION = 2
NEEDS_LABELS = False
NEEDS_ANNOTATIONS = ("boxes",)
READS_NETWORK = True
FILES = ("proposals",)
TOOLS = (detector_training, average_precision, detection_scores)
DIRECTION: dict[str, Literal["max", "min"]] = {"map": "max", "map_area": "max"}

SCALES = (480, 576, 688, 864, 1200)
ANCHORS = (32, 64, 128, 256, 512)
MOST_PROPOSALS = 2000
_FORMS: dict[str, dict[str, Any]] = {
    "fast_rcnn": {
        "min_sizes": (600,),
        "max_size": 1000,
        "steps": 150_000,
        "drops": (1 / 3, 2 / 3),
        "batch_size": 2,
        "lr": 0.001,
        "warmup": 0,
        "weight_decay": 5e-4,
        "freeze_layers": 1,
        "width": 4096,
        "per_image": 64,
        "suppression": 0.3,
    },
    "faster_rcnn": {
        "min_sizes": (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        "max_size": 1333,
        "steps": 24_000,
        "drops": (0.75, 22 / 24),
        "batch_size": 16,
        "lr": 0.02,
        "warmup": 100,
        "weight_decay": 1e-4,
        "freeze_layers": 0,
        "width": 1024,
        "per_image": 512,
        "suppression": 0.5,
    },
}


class Spec(EvaluationFields):
    """A detector on the network's last layer, or on `layer`. The defaults stated are those of `fast_rcnn`."""

    kind: Literal["voc_det"] = "voc_det"
    form: Literal["fast_rcnn", "faster_rcnn"] = "fast_rcnn"
    proposals: str | None = Field(
        default=SELECTIVE_SEARCH, description=f"{SELECTIVE_SEARCH}, or a file .npz, .mat or .json; null for faster_rcnn"
    )
    most_proposals: int = Field(default=MOST_PROPOSALS, ge=1, description="per image, of selective search")
    multi_scale: bool = Field(default=False, description="fast_rcnn: train and test on five scales")
    min_sizes: tuple[Count, ...] = Field(
        default=(600,), min_length=1, description="shorter side in pixels, drawn per step; faster_rcnn: 480 to 800"
    )
    max_size: int = Field(default=1000, ge=32, description="longest side; multi_scale: 2000; faster_rcnn: 1333")
    steps: int = Field(default=150_000, ge=1, description="of the optimiser; faster_rcnn: 24000")
    drops: tuple[Share, ...] = Field(
        default=(1 / 3, 2 / 3),
        description="shares of the steps after which the rate is divided by 10; faster_rcnn: 18 and 22 of 24",
    )
    batch_size: int = Field(default=2, ge=1, description="images; faster_rcnn: 16")
    lr: float = Field(default=0.001, gt=0, description="faster_rcnn: 0.02")
    warmup: int = Field(default=0, ge=0, description="steps; faster_rcnn: 100")
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0, description="faster_rcnn: 1e-4")
    freeze_layers: int = Field(default=1, ge=0, description="first layers of the network that stay; faster_rcnn: 0")
    train_batch_norm: bool = Field(default=False, description="otherwise the network's statistics stay as they are")
    width: int = Field(default=4096, ge=1, description="of the fully connected layers; faster_rcnn: 1024")
    per_image: int = Field(default=64, ge=2, description="regions drawn per training image; faster_rcnn: 512")
    anchors: tuple[Count, ...] = Field(default=ANCHORS, min_length=1, description="sides; faster_rcnn only")
    suppression: float = Field(default=0.3, gt=0, le=1, description="largest overlap of two boxes; faster_rcnn: 0.5")
    least_score: float = Field(default=0.05, ge=0, lt=1)
    most_detections: int = Field(default=100, ge=1, description="per image")
    seeds: int = Field(default=1, ge=1, le=100, description="trainings")
    seed: Seed = 0
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_form(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        form = value.get("form", "fast_rcnn")
        filled = {**_FORMS.get(form, {}), **value}
        if form == "faster_rcnn":
            filled.setdefault("proposals", None)
        elif value.get("multi_scale") is True:
            filled = {**filled, "min_sizes": value.get("min_sizes", SCALES), "max_size": value.get("max_size", 2000)}
        return filled

    @model_validator(mode="after")
    def _only_what_the_form_has(self) -> Spec:
        refuse_pool(self)
        if (self.form == "fast_rcnn") != (self.proposals is not None):
            said = "needs 'proposals'" if self.form == "fast_rcnn" else "makes its own regions; leave 'proposals' out"
            raise ValueError(f"{self.form} {said}")
        if self.multi_scale and self.form != "fast_rcnn":
            raise ValueError("multi_scale is of fast_rcnn; faster_rcnn draws one of its min_sizes per step")
        if self.form == "fast_rcnn" and self.anchors != ANCHORS:
            raise ValueError("anchors are of faster_rcnn; fast_rcnn has its proposals instead")
        if self.proposals != SELECTIVE_SEARCH and self.most_proposals != MOST_PROPOSALS:
            raise ValueError(f"most_proposals limits those of {SELECTIVE_SEARCH}; leave it out")
        return self


def check(spec: Spec) -> None:
    """Refuse proposals that do not exist or cannot be made.

    Raises:
        UserError: as `check_proposals`.
    """
    if spec.proposals is not None:
        check_proposals(spec.proposals)


def check_images(spec: Spec, names: Sequence[str]) -> None:
    """Refuse proposals that lack an image that they are needed for.

    Raises:
        UserError: as `require_images`.
    """
    if spec.proposals is not None:
        require_images(spec.proposals, names)


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
    """`map` and `map_area` in [0, 1] on `judged`, means over the seeds and over the classes that occur there.

    With two seeds or more also the standard deviation and a 95 % interval of each (`seed_metrics`). Writes `per_class.json`
    (APs with intervals over images), `average_precision.png`, `precision_recall.png` and `detections.png`;
    `per_image.parquet` has the detections of each image under each seed, and whether they are right.

    Raises:
        ValueError: there are no boxes, the layer makes no maps, or no judged object that is not difficult.
        UserError: the proposals are not those of these images.
    """
    learned, held = (annotated(images, spec.proposals, spec.most_proposals) for images in (train, judged))
    classes = len(train.classes)
    if not classes or not any((~each.difficult).any() for each in held.objects):
        raise ValueError("detection needs named classes and judged images with objects that are not difficult")
    settings = settings_of(spec)

    def train_and_judge(run: SeedRun) -> SeedResult:
        detector = trained_detector(network, settings, learned, classes, run)
        with network.computing():
            found = detect(detector, held, device, least=spec.least_score, overlap=spec.suppression, most=spec.most_detections)
        ranked = rank_all(held.objects, found, classes)
        if run.is_last:
            detection_plots.draw_all(out, judged.classes, ranked, held, found)
        return SeedResult(mean_aps(ranked), columns_of(ranked))

    runs = over_seeds(range(spec.seed, spec.seed + spec.seeds), spec.steps, attempt, train_and_judge)
    per_image.write(out, judged.names, per_image.numbered([run.columns for run in runs]))
    return seed_metrics(runs)


def recompute(columns: per_image.Columns, rows: NDArray[np.int64]) -> dict[str, float]:
    """`map` and `map_area` of some of the images, over the classes with an object in them; means over the seeds."""
    return per_image.recomputed_over(columns, rows, lambda own, these: mean_aps(ranked_again(own, these)))


def mean_aps(ranked: list[Ranked]) -> dict[str, float]:
    """`map` and `map_area` over the classes with an object to find; NaN if there is none."""
    known = [each for each in ranked if each.positives.any()]
    rules: dict[str, Rule] = {"map": "voc07", "map_area": "area"}
    return {name: float(np.mean([each.ap(rule) for each in known])) if known else float("nan") for name, rule in rules.items()}


def settings_of(spec: Spec) -> DetectorRecipe:
    """The detector and its training that a spec describes.

    Raises:
        UserError: a form that this version does not know.
    """
    if spec.form not in _FORMS:
        raise UserError(f"there is no form {spec.form!r}", "form")
    return DetectorRecipe(
        form=spec.form,
        min_sizes=spec.min_sizes,
        max_size=spec.max_size,
        width=spec.width,
        per_image=spec.per_image,
        anchors=spec.anchors,
        freeze_layers=spec.freeze_layers,
        train_batch_norm=spec.train_batch_norm,
        least=spec.least_score,
        overlap=spec.suppression,
        most=spec.most_detections,
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

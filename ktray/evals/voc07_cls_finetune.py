"""PASCAL VOC 2007 classification by fine-tuning: mAP of the judged network with new fully connected layers and sigmoids.

The maps of the network's last layer, or of `layer`, are averaged in 6 x 6 cells, which fc6 and fc7 with ReLU and dropout and a
linear classifier read; all is trained. An image may show several classes; one that shows a class only as difficult objects
counts for it neither in training nor in the score. `map` is the devkit's of 2007 (eleven recalls), `map_area` that of 2010 and
later, `map_steps` scikit-learn's, which makes no precision monotonic and is what the code of Krähenbühl et al. prints.

For VOC 2007: data ``{kind: voc, year: 2007, split: {val: 0}}``, so that all of trainval is trained on, and ``split: test``
here.

Source: the protocol of the classification column of Noroozi, Vinjimoor, Favaro and Pirsiavash, CVPR 2018, arXiv:1805.00385,
Table 3: Krähenbühl, Doersch, Donahue and Darrell, "Data-dependent Initializations of Convolutional Neural Networks" (2016), and
their code (philkr/voc-classification): 80,000 steps of 16 images, learning rate 0.001 halved every 10,000, momentum 0.9, weight
decay 1e-6, gradients clipped to a norm of 10, scores summed over 10 random crops. Crops are squares of 10 % to 50 % of the
area, as in the port of that code by Caron et al., "Deep Clustering" (2018), eval_voc_classif.py; it keeps the statistics of
batch norm, too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from ktray import progress
from ktray.checkpoints import Attempt
from ktray.errors import UserError
from ktray.features.judged_network import JudgedNetwork
from ktray.fine_tuning import detectors, image_classifier
from ktray.fine_tuning.detectors import LayerMaps, require_maps
from ktray.fine_tuning.whole_images import Reader, whole_of
from ktray.fingerprint import seed_of
from ktray.images import Images
from ktray.scoring import average_precision, per_image
from ktray.scoring.average_precision import classification_ap
from ktray.spec import Count, EvaluationFields, Seed, refuse_pool
from ktray.training import loop, step_training
from ktray.training.step_task import Recipe, StepTask
from ktray.training.step_training import SeedResult, SeedRun, Shuffled, over_seeds, seed_metrics

REVISION = 2
NEEDS_LABELS = False
NEEDS_ANNOTATIONS = ("presence",)
READS_NETWORK = True
TOOLS = (loop, step_training, image_classifier, detectors, average_precision)
DIRECTION: dict[str, Literal["max", "min"]] = {"map": "max", "map_area": "max", "map_steps": "max"}

Area = Annotated[float, Field(gt=0, le=1)]


class Spec(EvaluationFields):
    """A network trained further on all training images, one sigmoid per class."""

    kind: Literal["voc07_cls_finetune"] = "voc07_cls_finetune"
    grid: int | None = Field(
        default=6, ge=1, le=64, description="cells per side that fc6 reads; null: the network's own features"
    )
    hidden: tuple[Count, ...] = Field(default=(4096, 4096), max_length=8, description="widths of the fully connected layers")
    crop: int = Field(default=224, ge=8, description="side of the crops in pixels, after scaling")
    areas: tuple[Area, Area] = Field(default=(0.1, 0.5), description="smallest and largest share of the area in a crop")
    test_crops: Literal["random", "fixed"] = Field(
        default="random",
        description="10 random ones, or the corners and centre of the image at 8/7 of the crop, and mirrored",
    )
    steps: int = Field(default=80_000, ge=1, description="of the optimiser")
    halve_every: int = Field(default=10_000, ge=1, description="steps after which the learning rate is halved, again and again")
    batch_size: int = Field(default=16, ge=2)
    lr: float = Field(default=0.001, gt=0)
    head_factor: float = Field(default=1.0, gt=0, description="learning rate of the new layers, relative to the network's")
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-6, ge=0)
    clip: float | None = Field(default=10.0, gt=0, description="largest norm of the gradient; null: any")
    freeze_layers: int = Field(default=0, ge=0, description="first layers of the network that stay as they are")
    train_batch_norm: bool = Field(default=False, description="otherwise the network's statistics stay as they are")
    seeds: int = Field(default=1, ge=1, le=100, description="trainings")
    seed: Seed = 0
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _areas_ascend_and_maps_have_a_grid(self) -> Spec:
        refuse_pool(self, "write 'grid' instead")
        if self.areas[0] > self.areas[1]:
            raise ValueError("areas are the smallest and the largest share, in this order")
        return self


def check_network(spec: Spec, network: nn.Module, size: int) -> None:
    """Refuse a network whose layer makes no maps of images of any size, or, without `grid`, one that cannot take the crops.

    Raises:
        UserError: it makes no maps, or has fewer layers than are to stay as they are.
        RuntimeError: the network's own, for crops that are too small.
    """
    layers: tuple[str, ...] = network.layers  # type: ignore[assignment]
    if spec.freeze_layers > len(layers):
        raise UserError(f"the network has {len(layers)} layers", "freeze_layers", f"At most {len(layers)}.")
    if spec.grid is not None:
        require_maps(network, spec.layer)
        return
    if spec.layer is not None:
        raise UserError(
            "without 'grid' the network's own features are read, not a layer", "layer", "Leave 'layer' out, or give a grid."
        )
    with torch.inference_mode():
        network(torch.zeros(1, 3, spec.crop, spec.crop))


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
    """`map`, `map_area` and `map_steps` in [0, 1] on `judged`, means over the seeds and the classes that it shows.

    With two seeds or more also the standard deviation and a 95 % interval of each (`seed_metrics`). `per_image.parquet` has
    the scores of each image under each seed.

    Raises:
        ValueError: the images have no lists of classes, or no judged image shows a class.
    """
    if train.presence is None or judged.presence is None or not len(train) or not (judged.presence == 1).any():
        raise ValueError("VOC classification needs images of which several classes are stated, and judged ones that show some")
    read, held = Reader(whole_of(train)), Reader(whole_of(judged))
    presence = torch.from_numpy(train.presence).to(device)
    recipe = recipe_of(spec)

    def batch(step: int, generator: torch.Generator, shuffled: Shuffled) -> tuple[list[Tensor], NDArray[np.int64]]:
        rows = shuffled.of(step)
        return [random_crop(image, spec.areas, generator) for image in read.read_all(rows)], rows

    def terms(model: nn.ModuleDict, given: tuple[list[Tensor], NDArray[np.int64]]) -> dict[str, Tensor]:
        crops, rows = given
        logits = model["head"](model["backbone"](network.inputs(scaled(crops, spec.crop, device)))).float()
        truth = presence[torch.from_numpy(rows).to(presence.device)]
        each = nn.functional.binary_cross_entropy_with_logits(logits, (truth > 0).float(), reduction="none")
        return {"loss": (each * (truth != 0)).sum() / len(rows)}

    def train_and_judge(run: SeedRun) -> SeedResult:
        model, frozen = network_with_head(spec, network, presence.shape[1], run.seed)
        shuffled = Shuffled(np.arange(len(train)), min(spec.batch_size, len(train)), run.seed)
        task = StepTask(lambda step, generator: batch(step, generator, shuffled), terms, frozen)
        loop.fit_steps(model, task, recipe, run.seed, device=device, start=run.start, on_report=run.on_report)
        assert judged.presence is not None
        found = scores(spec, network, model, held, len(judged), device, run.seed)
        return SeedResult(mean_aps(found, judged.presence), {"scores": found})

    runs = over_seeds(range(spec.seed, spec.seed + spec.seeds), spec.steps, attempt, train_and_judge)
    columns = per_image.numbered([run.columns for run in runs], {"presence": judged.presence})
    per_image.write(out, judged.names, columns)
    return seed_metrics(runs)


def recompute(columns: per_image.Columns, rows: NDArray[np.int64]) -> dict[str, float]:
    """The mean APs of some of the images, over those classes that they show; means over the seeds."""
    return per_image.recomputed_over(columns, rows, lambda own, these: mean_aps(own["scores"][these], own["presence"][these]))


def recipe_of(spec: Spec) -> Recipe:
    """SGD with the learning rate halved after every `halve_every` steps."""
    return Recipe(
        steps=spec.steps,
        lr=spec.lr,
        milestones=tuple(range(spec.halve_every, spec.steps, spec.halve_every)),
        factor=0.5,
        momentum=spec.momentum,
        weight_decay=spec.weight_decay,
        head_factor=spec.head_factor,
        clip=spec.clip,
        precision=spec.precision,
    )


class _Cells(nn.Module):
    """Means of maps (B, C, h, w) in a grid of cells, flattened: (B, C * grid * grid)."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, maps: Tensor) -> Tensor:
        return detectors.cell_means(maps, self.grid).flatten(1)


def network_with_head(spec: Spec, network: JudgedNetwork, classes: int, seed: int) -> tuple[nn.ModuleDict, list[nn.Module]]:
    """The judged network with its new layers, and its modules that are not trained."""
    built = network.build()
    if spec.grid is None:
        head: nn.Module = image_classifier.classifier(int(built.feature_dim), classes, spec.hidden, seed)  # type: ignore[arg-type]
        layers: tuple[str, ...] = built.layers  # type: ignore[assignment]
        frozen = image_classifier.modules_up_to(built, layers[spec.freeze_layers - 1], spec.crop) if spec.freeze_layers else []
        backbone = built
    else:
        backbone = maps = LayerMaps(built, network.layer)
        width = maps.out_channels * spec.grid**2
        head = nn.Sequential(_Cells(spec.grid), image_classifier.classifier(width, classes, spec.hidden, seed))
        frozen = detectors.first_layers(maps, spec.freeze_layers)
    if not spec.train_batch_norm:
        frozen += detectors.batch_norms(backbone)
    return nn.ModuleDict({"backbone": backbone, "head": head.to(network.device)}), frozen


def random_crop(pixels: NDArray[np.uint8], areas: tuple[float, float], generator: torch.Generator) -> Tensor:
    """A random square (s, s, 3) uint8 of an image (h, w, 3), mirrored with probability one half.

    Its area is a random share of the image's, within `areas`; it is no larger than the shorter side.
    """
    height, width = pixels.shape[:2]
    draws = torch.rand(4, generator=generator).tolist()
    side = round(((areas[0] + draws[0] * (areas[1] - areas[0])) * height * width) ** 0.5)
    side = min(max(1, side), height, width)
    y, x = int(draws[1] * (height - side + 1)), int(draws[2] * (width - side + 1))
    crop = torch.from_numpy(np.array(pixels[y : y + side, x : x + side]))
    return crop.flip(1) if draws[3] < 0.5 else crop


def scaled(crops: list[Tensor], side: int, device: str) -> Tensor:
    """Crops (h, w, 3) of any size, scaled by antialiased bilinear interpolation: (B, side, side, 3) uint8 on `device`."""
    seen = []
    for crop in crops:
        image = crop.to(device, non_blocking=True).permute(2, 0, 1)[None].float()
        image = nn.functional.interpolate(image, (side, side), mode="bilinear", align_corners=False, antialias=True)
        seen.append(image[0].round().clamp(0, 255).byte().permute(1, 2, 0))
    return torch.stack(seen)


def scores(
    spec: Spec, network: JudgedNetwork, model: nn.ModuleDict, reader: Reader, count: int, device: str, seed: int
) -> NDArray[np.float64]:
    """Logits (N, C) of the images, averaged over 10 crops."""
    model.eval()
    found = []
    with torch.inference_mode(), network.computing():
        for index in range(count):
            if spec.test_crops == "random":
                generator = torch.Generator().manual_seed(seed_of(seed, "crops", index))
                crops = [random_crop(reader.read(index), spec.areas, generator) for _ in range(10)]
                seen = scaled(crops, spec.crop, device)
            else:
                seen = fixed_crops(reader.read(index), spec.crop, device)
            logits = model["head"](model["backbone"](network.inputs(seen)))
            found.append(logits.double().mean(0).cpu().numpy())
            progress.advance("judged")
    return np.stack(found)


def fixed_crops(pixels: NDArray[np.uint8], side: int, device: str) -> Tensor:
    """Corners, centre and their mirror images, of an image with a shorter side of 8/7 of `side`: (10, side, side, 3)."""
    height, width = pixels.shape[:2]
    factor = round(side * 8 / 7) / min(height, width)
    size = (max(side, round(height * factor)), max(side, round(width * factor)))
    image = torch.from_numpy(np.array(pixels)).to(device).permute(2, 0, 1)[None].float()
    image = nn.functional.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True).round().clamp(0, 255)
    whole = image[0].byte().permute(1, 2, 0)
    ends = [(0, 0), (0, size[1] - side), (size[0] - side, 0), (size[0] - side, size[1] - side)]
    places = [*ends, ((size[0] - side) // 2, (size[1] - side) // 2)]
    crops = [whole[y : y + side, x : x + side] for y, x in places]
    return torch.stack([*crops, *(crop.flip(1) for crop in crops)])


def mean_aps(logits: NDArray[np.float64], presence: NDArray[np.int8]) -> dict[str, float]:
    """`map`, `map_area` and `map_steps` over the classes that an image shows; NaN if none shows any.

    Raises:
        ValueError: a score is not a number.
    """
    from sklearn.metrics import average_precision_score

    shown = np.flatnonzero((presence == 1).any(0))
    if not len(shown):
        return dict.fromkeys(DIRECTION, float("nan"))
    steps = []
    for class_ in shown:
        counted = presence[:, class_] != 0
        steps.append(average_precision_score(presence[counted, class_] == 1, logits[counted, class_]))
    return {
        "map": float(np.mean([classification_ap(logits[:, class_], presence[:, class_], "voc07") for class_ in shown])),
        "map_area": float(np.mean([classification_ap(logits[:, class_], presence[:, class_], "area") for class_ in shown])),
        "map_steps": float(np.mean(steps)),
    }

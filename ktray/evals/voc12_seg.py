"""PASCAL VOC segmentation: mean IoU of a fully convolutional head on the judged network, trained on label maps.

The maps of the network's last layer, or of `layer`, go through torchvision's FCN head and are enlarged to the image. Void
pixels (255) are neither trained on nor judged. The mean is over the background and all classes that occur in the judged images
or were predicted there; the intersection and union of a class are those of all images together.

For VOC 2012: data ``{kind: voc, year: 2012, task: segmentation, split: {val: 0}}`` and ``split: test`` here, which is the list
val.

Source: Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation" (2015). The paper's recipe for its
segmentation column (Table 3) is not known; the defaults are those of He, Fan, Wu, Xie and Girshick, "Momentum Contrast" (2020),
appendix, for VOC: 30,000 steps of 16 images, scaled by 0.5 to 2, cut to 513 pixels and mirrored; learning rate 0.003, divided
by 10 after 70 % and 90 %; weight decay 1e-4; judged at the image's own size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from ktray import progress
from ktray.checkpoints import Attempt
from ktray.features.judged_network import JudgedNetwork
from ktray.fine_tuning import detectors
from ktray.fine_tuning.detectors import LayerMaps, require_maps
from ktray.fine_tuning.image_classifier import seeded
from ktray.fine_tuning.whole_images import Reader, whole_of
from ktray.images import VOID, Images
from ktray.plots import label_of, optional_plot
from ktray.scoring import label_maps, per_image
from ktray.scoring.label_maps import confusion, ious_of
from ktray.spec import EvaluationFields, Seed, Share, refuse_pool
from ktray.training import loop, step_training
from ktray.training.step_task import Recipe, StepTask
from ktray.training.step_training import SeedResult, SeedRun, Shuffled, over_seeds, seed_metrics

REVISION = 2
NEEDS_LABELS = False
NEEDS_ANNOTATIONS = ("mask",)
READS_NETWORK = True
TOOLS = (loop, step_training, detectors, label_maps)
DIRECTION: dict[str, Literal["max", "min"]] = {"miou": "max", "pixel_accuracy": "max"}

SHEET = 4  # images that are drawn
MULTIPLE = 32  # to which a judged image is padded

Factor = Annotated[float, Field(ge=0.01, le=100)]


class Spec(EvaluationFields):
    """A fully convolutional head on the network's last layer, or on `layer`."""

    kind: Literal["voc12_seg"] = "voc12_seg"
    crop: int = Field(default=513, ge=32, description="side of the training images in pixels")
    scales: tuple[Factor, Factor] = Field(default=(0.5, 2.0), description="smallest and largest factor on a training image")
    steps: int = Field(default=30_000, ge=1, description="of the optimiser")
    drops: tuple[Share, ...] = Field(
        default=(0.7, 0.9), description="shares of the steps after which the rate is divided by 10"
    )
    batch_size: int = Field(default=16, ge=2, description="images")
    lr: float = Field(default=0.003, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    train_batch_norm: bool = Field(default=True, description="of the network; otherwise its statistics stay as they are")
    seeds: int = Field(default=1, ge=1, le=100, description="trainings")
    seed: Seed = 0
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _scales_ascend_and_nothing_is_pooled(self) -> Spec:
        refuse_pool(self)
        if self.scales[0] > self.scales[1]:
            raise ValueError("scales are the smallest and the largest factor, in this order")
        return self


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
    """`miou` and `pixel_accuracy` in [0, 1] on `judged`, void left out; means over the seeds.

    With two seeds or more also the standard deviation and a 95 % interval of each (`seed_metrics`). Writes `per_class.json`,
    `segmentation.png` (images, their true and their predicted label maps), and the pixels of each class in each image under
    each seed as `per_image.parquet`.

    Raises:
        ValueError: there are no masks, the layer makes no maps, or all judged pixels are void.
    """
    learned, held = Reader(whole_of(train)), Reader(whole_of(judged))
    if learned.whole.mask is None or held.whole.mask is None:
        raise ValueError("segmentation needs images with masks")
    classes = 1 + len(train.classes)
    recipe = recipe_of(spec)

    def train_and_judge(run: SeedRun) -> SeedResult:
        model, frozen = segmenter(network, classes, run.seed, spec.train_batch_norm)
        task = StepTask(_batches(spec, learned, len(train), run.seed), _terms(network), frozen)
        loop.fit_steps(model, task, recipe, run.seed, device=device, start=run.start, on_report=run.on_report)
        columns = judge(network, model, held, len(judged), classes)
        if not columns["truth"].sum():
            raise ValueError("all pixels of the judged images are void")
        if run.is_last:
            _write_plots(out, network, model, held, len(judged), train.classes, columns)
        return SeedResult(_metrics(columns), columns)

    runs = over_seeds(range(spec.seed, spec.seed + spec.seeds), spec.steps, attempt, train_and_judge)
    per_image.write(out, judged.names, per_image.numbered([run.columns for run in runs]))
    return seed_metrics(runs)


def recompute(columns: per_image.Columns, rows: NDArray[np.int64]) -> dict[str, float]:
    """`miou` and `pixel_accuracy` of some of the images; means over the seeds."""
    return per_image.recomputed_over(
        columns, rows, lambda own, these: _metrics({name: values[these] for name, values in own.items()})
    )


def _metrics(columns: per_image.Columns) -> dict[str, float]:
    """Of all images together, whose pixels `judge` has counted; NaN if all of them are void."""
    right, truth, predicted = (columns[name].sum(0) for name in ("right", "truth", "predicted"))
    if not truth.sum():
        return dict.fromkeys(DIRECTION, float("nan"))
    return {
        "miou": float(np.nanmean(ious_of(right, truth, predicted))),
        "pixel_accuracy": float(right.sum() / truth.sum()),
    }


def recipe_of(spec: Spec) -> Recipe:
    """SGD with the learning rate divided by 10 after each of `drops`."""
    return Recipe(
        steps=spec.steps,
        lr=spec.lr,
        milestones=tuple(round(drop * spec.steps) for drop in spec.drops),
        momentum=spec.momentum,
        weight_decay=spec.weight_decay,
        precision=spec.precision,
    )


def segmenter(network: JudgedNetwork, classes: int, seed: int, train_batch_norm: bool) -> tuple[nn.ModuleDict, list[nn.Module]]:
    """The judged network with torchvision's FCN head (`classes` with the background), and its modules that are not trained."""
    from torchvision.models.segmentation.fcn import FCNHead

    maps = LayerMaps(network.build(), network.layer)
    with seeded(seed, "segmentation"):
        head = FCNHead(maps.out_channels, classes)
    model = nn.ModuleDict({"backbone": maps, "head": head.to(network.device)})
    return model, [] if train_batch_norm else detectors.batch_norms(maps)


Batch = tuple[Tensor, Tensor]
"""Pixels (B, s, s, 3) uint8 and label maps (B, s, s) uint8."""


def _batches(spec: Spec, reader: Reader, count: int, seed: int) -> Callable[[int, torch.Generator], Batch]:
    shuffled = Shuffled(np.arange(count), min(spec.batch_size, max(2, count)), seed)

    def batch(step: int, generator: torch.Generator) -> Batch:
        rows = shuffled.of(step)
        images = reader.read_all(rows)
        assert reader.whole.mask is not None
        seen = [
            augmented(image, reader.whole.mask(int(row)), spec.crop, spec.scales, generator)
            for row, image in zip(rows, images, strict=True)
        ]
        return torch.stack([pixels for pixels, _ in seen]), torch.stack([labels for _, labels in seen])

    return batch


def augmented(
    pixels: NDArray[np.uint8], mask: NDArray[np.uint8], side: int, scales: tuple[float, float], generator: torch.Generator
) -> Batch:
    """An image and its label map, scaled, cut or padded (with grey and void) to a square of `side`, and mirrored at random.

    Args:
        pixels: (h, w, 3).
        mask: (h, w).
    """
    draws = torch.rand(4, generator=generator).tolist()
    scale = scales[0] + draws[0] * (scales[1] - scales[0])
    size = [max(1, round(length * scale)) for length in mask.shape]
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float()
    image = nn.functional.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True).round()
    labels = torch.from_numpy(np.array(mask))[None, None].float()
    labels = nn.functional.interpolate(labels, size, mode="nearest-exact")
    missing = [max(0, side - length) for length in size]
    image = nn.functional.pad(image, (0, missing[1], 0, missing[0]), value=127.0)
    labels = nn.functional.pad(labels, (0, missing[1], 0, missing[0]), value=float(VOID))
    y, x = (int(draw * (length - side + 1)) for draw, length in zip(draws[1:3], image.shape[2:], strict=True))
    window = (0, slice(None), slice(y, y + side), slice(x, x + side))
    seen, truth = image[window].byte().permute(1, 2, 0), labels[window][0].byte()
    return (seen.flip(1), truth.flip(1)) if draws[3] < 0.5 else (seen, truth)


def _terms(network: JudgedNetwork) -> Callable[[nn.ModuleDict, Batch], dict[str, Tensor]]:
    def terms(model: nn.ModuleDict, given: Batch) -> dict[str, Tensor]:
        seen, truth = (part.to(network.device, non_blocking=True) for part in given)
        scores = enlarged(model["head"](model["backbone"](network.inputs(seen))).float(), truth.shape[1:])
        known = (truth != VOID).sum().clamp(min=1)
        total = nn.functional.cross_entropy(scores, truth.long(), ignore_index=VOID, reduction="sum")
        return {"loss": total / known}

    return terms


def enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, C, h, w) enlarged to (B, C, H, W) by bilinear interpolation, as two matrix products.

    Their gradients are the same in every run, unlike those of PyTorch's own kernel on a GPU; the values are equal.
    """
    rows, columns = (_weights(length, cells, maps.device) for length, cells in zip(size, maps.shape[2:], strict=True))
    return torch.einsum("yh,bchw,xw->bcyx", rows, maps, columns)


def _weights(length: int, cells: int, device: torch.device) -> Tensor:
    points = ((torch.arange(length, device=device) + 0.5) * (cells / length) - 0.5).clamp(0, cells - 1)
    return (1 - (points[:, None] - torch.arange(cells, device=device)).abs()).clamp(min=0)


def predicted_map(network: JudgedNetwork, model: nn.ModuleDict, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The class (h, w) of each pixel of an image, 0 = background."""
    height, width = pixels.shape[:2]
    padded = [-(-length // MULTIPLE) * MULTIPLE for length in (height, width)]
    image = np.full((1, *padded, 3), 127, np.uint8)
    image[0, :height, :width] = pixels
    with torch.inference_mode(), network.computing():
        maps = model["head"](model["backbone"](network.inputs(torch.from_numpy(image).to(network.device))))
        scores = enlarged(maps.float(), padded)[0, :, :height, :width]
    found: NDArray[np.int64] = scores.argmax(0).cpu().numpy()
    return found


def judge(network: JudgedNetwork, model: nn.ModuleDict, reader: Reader, count: int, classes: int) -> per_image.Columns:
    """Pixels (N, C) of each class in each image, void left out: those that are right, of the class, and predicted as it."""
    model.eval()
    assert reader.whole.mask is not None
    columns = {name: np.zeros((count, classes), np.int64) for name in ("right", "truth", "predicted")}
    for index in range(count):
        pixels = confusion(reader.whole.mask(index), predicted_map(network, model, reader.read(index)), classes)
        for name, values in (("right", np.diag(pixels)), ("truth", pixels.sum(1)), ("predicted", pixels.sum(0))):
            columns[name][index] = values
        progress.advance("judged")
    return columns


def _write_plots(
    out: Path,
    network: JudgedNetwork,
    model: nn.ModuleDict,
    reader: Reader,
    count: int,
    classes: Sequence[str],
    columns: per_image.Columns,
) -> None:
    names = ["background", *classes]
    right, truth, predicted_as = (columns[name].sum(0) for name in ("right", "truth", "predicted"))
    found = zip(names, ious_of(right, truth, predicted_as), truth, strict=True)
    rows = [{"class": name, "iou": None if math.isnan(iou) else iou, "pixels": int(of_class)} for name, iou, of_class in found]
    (out / "per_class.json").write_text(json.dumps(rows, indent=1))
    chosen = np.linspace(0, count - 1, min(SHEET, count)).astype(int)
    with optional_plot(out / "segmentation.png"):
        from matplotlib import style

        with style.context("default"):
            predicted = [predicted_map(network, model, reader.read(int(index))) for index in chosen]
            _draw(out / "segmentation.png", reader, chosen, predicted, names)


def _draw(path: Path, reader: Reader, chosen: NDArray[np.int64], predicted: list[NDArray[np.int64]], names: list[str]) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    assert reader.whole.mask is not None
    palette = np.array([(0, 0, 0), *(colormaps["tab20"](index % 20)[:3] for index in range(len(names) - 1))]) * 255
    figure = Figure(figsize=(9, 2.6 * len(chosen) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    seen: set[int] = set()
    for row, (index, guess) in enumerate(zip(chosen, predicted, strict=True)):
        pixels, truth = reader.read(int(index)), reader.whole.mask(int(index))
        seen |= {*np.unique(truth[truth != VOID]).tolist(), *np.unique(guess).tolist()}
        shown: list[tuple[str, Any]] = [("image", pixels), ("truth (void white)", truth), ("predicted", guess)]
        for column, (title, values) in enumerate(shown):
            axes = figure.add_subplot(len(chosen), 3, 3 * row + column + 1)
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=9)
            if column:
                colours = palette[np.where(values == VOID, 0, values)]
                mixed = np.where((values == 0)[..., None], 0.55 * pixels, 0.3 * pixels + 0.7 * colours)
                values = np.where((values == VOID)[..., None], 255, mixed).astype(np.uint8)
            axes.imshow(values)
    handles = [Patch(color=palette[each] / 255, label=label_of(names[each])) for each in sorted(seen) if each]
    if handles:
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)
    figure.savefig(path, dpi=100, metadata={"Software": None})

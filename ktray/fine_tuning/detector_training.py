"""Training of a detector on images of different sizes, and its detections in the images that are judged.

Objects that are difficult or a crowd are not trained on, nor are images without any other object.

Legend: N images, R regions of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ktray import progress
from ktray.features.judged_network import JudgedNetwork
from ktray.fine_tuning import detectors, proposals
from ktray.fine_tuning.detectors import FastRCNN, LayerMaps
from ktray.fine_tuning.image_classifier import seeded
from ktray.fine_tuning.proposals import proposals_of
from ktray.fine_tuning.whole_images import Reader, objects_of, whole_of
from ktray.images import Images
from ktray.scoring import detection_scores
from ktray.scoring.detection_scores import Detections, Objects, overlaps
from ktray.training import loop, step_training
from ktray.training.step_task import Recipe, StepTask
from ktray.training.step_training import SeedRun, Shuffled

IDENTITY, REVISION = "detector_training", 1
TOOLS = (loop, step_training, detectors, proposals, detection_scores)

BACKGROUND = 0.1  # least overlap of a region that is trained on as background: Fast R-CNN, section 2.3


@dataclass(frozen=True)
class Annotated:
    """Images with their objects and, for Fast R-CNN, their proposals.

    Attributes:
        reader: of their pixels.
        objects: of each image.
        proposals: (R, 4) float64 of each image, or None.
    """

    reader: Reader
    objects: Sequence[Objects]
    proposals: Sequence[NDArray[np.float64]] | None = None

    def __len__(self) -> int:
        return len(self.objects)


def trained_objects(objects: Objects) -> NDArray[np.bool_]:
    """Which objects of an image a detector learns from."""
    known = ~objects.difficult
    return known if objects.crowd is None else known & ~objects.crowd


def train(
    detector: nn.Module,
    images: Annotated,
    recipe: Recipe,
    run: SeedRun,
    *,
    batch_size: int,
    frozen: Sequence[nn.Module],
    device: str,
) -> None:
    """Train a detector in place; each image is mirrored with probability one half.

    Raises:
        ValueError: no image has an object to learn from.
    """
    usable = np.array([index for index, each in enumerate(images.objects) if trained_objects(each).any()], np.int64)
    if not len(usable):
        raise ValueError("no training image has an object that is not difficult")
    shuffled = Shuffled(usable, batch_size, run.seed)

    def batch(step: int, generator: torch.Generator) -> list[tuple[Any, ...]]:
        rows = shuffled.of(step)
        mirrored = torch.rand(len(rows), generator=generator) < 0.5
        pixels = images.reader.read_all(rows)
        return [
            _training_image(images, int(row), image, bool(flip))
            for row, image, flip in zip(rows, pixels, mirrored, strict=True)
        ]

    def terms(model: nn.ModuleDict, given: list[tuple[Any, ...]]) -> dict[str, Tensor]:
        found = [as_image(pixels, device) for pixels, *_ in given]
        targets = [{"boxes": boxes.to(device), "labels": labels.to(device)} for _, boxes, labels, _ in given]
        if images.proposals is None:
            return dict(model["backbone"](found, targets))
        return dict(model["backbone"](found, targets, [regions.to(device) for *_, regions in given]))

    model, task = nn.ModuleDict({"backbone": detector}), StepTask(batch, terms, frozen)
    loop.fit_steps(model, task, recipe, run.seed, device=device, start=run.start, on_report=run.on_report)


def as_image(pixels: NDArray[np.uint8] | Tensor, device: str) -> Tensor:
    """(3, h, w) float32 in [0, 1] on `device`."""
    tensor = pixels if isinstance(pixels, Tensor) else torch.from_numpy(np.array(pixels))
    return tensor.to(device, non_blocking=True).permute(2, 0, 1).float().div_(255)


def _training_image(
    images: Annotated, row: int, pixels: NDArray[np.uint8], mirrored: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels, boxes, labels from 1, and proposals: those that overlap no object by `BACKGROUND` are left out."""
    objects = images.objects[row]
    known = trained_objects(objects)
    boxes, regions = objects.boxes[known], np.zeros((0, 4))
    if images.proposals is not None:
        near = images.proposals[row]
        regions = near[overlaps(near, boxes).max(1, initial=0.0) >= BACKGROUND]
    seen = torch.from_numpy(np.array(pixels))
    if mirrored:
        seen, boxes, regions = seen.flip(1), _mirrored(boxes, seen.shape[1]), _mirrored(regions, seen.shape[1])
    labels = torch.from_numpy(objects.classes[known] + 1)
    return seen, torch.from_numpy(boxes).float(), labels, torch.from_numpy(regions).float()


def _mirrored(boxes: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)


def detect(
    detector: nn.Module,
    images: Annotated,
    device: str,
    *,
    least: float,
    overlap: float,
    most: int,
) -> list[Detections]:
    """What a detector finds in each image, in its own pixels.

    Args:
        least: smallest score, for Fast R-CNN; Faster R-CNN was built with its own values of all three.
        overlap: of boxes of one class, above which the lower score is dropped.
        most: detections per image.
    """
    detector.eval()
    found = []
    with torch.inference_mode():
        for index in range(len(images)):
            image = as_image(images.reader.read(index), device)
            if isinstance(detector, FastRCNN):
                assert images.proposals is not None
                regions = torch.from_numpy(images.proposals[index]).float().to(device)
                one = detector.detect(image, regions, least, overlap, most)
            else:
                (one,) = detector([image])
            found.append(
                Detections(
                    one["boxes"].double().cpu().numpy(),
                    one["labels"].cpu().numpy().astype(np.int64) - 1,
                    one["scores"].double().cpu().numpy(),
                )
            )
            progress.advance("judged")
    return found


@dataclass(frozen=True)
class DetectorRecipe:
    """A detector and its training, as the specs of evaluations state them.

    Attributes:
        form: "fast_rcnn" or "faster_rcnn".
        min_sizes, max_size: sides of the scaled images; see `detectors.FastRCNN`.
        width: of the fully connected layers.
        per_image: regions drawn per training image.
        anchors: of Faster R-CNN.
        freeze_layers: how many of the network's first layers are not trained.
        train_batch_norm: whether the network's batch norms are.
        least, overlap, most: of detections; see `detect`.
        batch_size: images.
        recipe: the steps.
    """

    form: str
    min_sizes: tuple[int, ...]
    max_size: int
    width: int
    per_image: int
    anchors: tuple[int, ...]
    freeze_layers: int
    train_batch_norm: bool
    least: float
    overlap: float
    most: int
    batch_size: int
    recipe: Recipe


def untrained_detector(
    network: JudgedNetwork, settings: DetectorRecipe, classes: int, seed: int
) -> tuple[nn.Module, list[nn.Module]]:
    """A detector on the maps of the judged network (its `layer`, or the last), and its modules that are not trained.

    Raises:
        ValueError: the layer makes no maps.
    """
    common: dict[str, Any] = {
        "width": settings.width,
        "min_sizes": settings.min_sizes,
        "max_size": settings.max_size,
        "normalize": network.normalize,
        "per_image": settings.per_image,
    }
    with seeded(seed, "detector"):
        maps = LayerMaps(network.build(), network.layer)
        if settings.form == "fast_rcnn":
            detector: nn.Module = FastRCNN(maps, classes, **common)
        else:
            limits: dict[str, Any] = {"least": settings.least, "overlap": settings.overlap, "most": settings.most}
            detector = detectors.faster_rcnn(maps, classes, anchors=settings.anchors, **common, **limits)
    frozen = detectors.first_layers(maps, settings.freeze_layers)
    return detector, frozen if settings.train_batch_norm else [*frozen, *detectors.batch_norms(maps)]


def trained_detector(
    network: JudgedNetwork, settings: DetectorRecipe, images: Annotated, classes: int, run: SeedRun
) -> nn.Module:
    """A detector on the maps of the judged network, trained on `images`.

    Raises:
        ValueError: the layer makes no maps, or no image has an object to learn from.
    """
    detector, frozen = untrained_detector(network, settings, classes, run.seed)
    train(detector, images, settings.recipe, run, batch_size=settings.batch_size, frozen=frozen, device=network.device)
    return detector


def annotated(images: Images, proposals: str | None, most: int) -> Annotated:
    """The whole images with their objects and, unless `proposals` is None, their proposals (`proposals_of`).

    Raises:
        ValueError: there are no boxes.
        UserError: the proposals are not those of these images.
    """
    whole = whole_of(images)
    reader, objects = Reader(whole), objects_of(whole, len(images))
    regions = None if proposals is None else proposals_of(proposals, images.names, reader.read, most)
    return Annotated(reader, objects, regions)

"""Detectors on the feature maps of a judged network: Fast R-CNN on given proposals, and torchvision's Faster R-CNN.

torchvision has the transform, the matching and sampling of boxes, the losses, the region proposal network and the suppression
of overlapping boxes. What is here is what it lacks: maps of any network up to a layer, proposals that are given, a test on
several scales, and RoIAlign as matrix products, whose gradients are the same in every run (torchvision's add atomically on a
GPU).

Source: Girshick, "Fast R-CNN" (2015); Ren, He, Girshick and Sun, "Faster R-CNN" (2015); He, Gkioxari, Dollár and Girshick,
"Mask R-CNN" (2017), section 3, for RoIAlign.

Legend: C classes without the background, R regions of one image, K regions of a batch, S bins per side of a region.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ktray.errors import UserError
from ktray.fine_tuning import image_classifier
from ktray.fine_tuning.image_classifier import LayerReached, modules_up_to
from ktray.ops import augmentation
from ktray.spec import ChannelStatistics, Normalization

IDENTITY, REVISION = "detectors", 1
TOOLS = (image_classifier, augmentation)

SAMPLES = 2  # points per bin and axis, as in Detectron


class LayerMaps(nn.Module):
    """The maps (B, out_channels, h, w) of one layer; layers after it do not run, and are not trained.

    Args:
        network: with `layers`; it becomes a part of this module.
        layer: None for the last of them.

    Raises:
        ValueError: the layer makes no maps, or takes images of one size alone.
    """

    def __init__(self, network: nn.Module, layer: str | None) -> None:
        super().__init__()
        self.network = network
        layers: tuple[str, ...] = network.layers  # type: ignore[assignment]
        self.layer = layer or layers[-1]
        self._found: list[Tensor] = []
        network.get_submodule(self.layer).register_forward_hook(self._stop)
        with torch.no_grad():
            shape = self._probe()
        self.out_channels = shape[1]

    def _probe(self) -> torch.Size:
        device = next(self.network.parameters()).device
        shapes: list[torch.Size] = []
        for height, width in ((128, 160), (96, 128)):
            try:
                shapes.append(self(torch.zeros(1, 3, height, width, device=device)).shape)
            except (RuntimeError, ValueError, AssertionError) as error:  # networks for one size raise various errors
                raise ValueError(f"the network takes images of one size alone: {str(error).splitlines()[0]}") from error
        if any(len(shape) != 4 for shape in shapes) or shapes[0][2:] == shapes[1][2:]:
            raise ValueError(f"the layer {self.layer!r} makes no maps that grow with the image, but {tuple(shapes[0])}")
        return shapes[0]

    def _stop(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self._found.append(output)
        raise LayerReached

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32 -> maps."""
        self._found.clear()
        try:
            self.network(images)
        except LayerReached:
            return self._found.pop()
        raise ValueError(f"the forward pass never runs the layer {self.layer!r}")


def require_maps(network: nn.Module, layer: str | None) -> None:
    """Raise unless `layer`, or the last, makes maps of images of any size.

    Raises:
        UserError: it does not.
    """
    try:
        LayerMaps(network, layer)
    except ValueError as error:
        raise UserError(str(error), "layer", "Judge a convolutional network, or a layer of it that makes maps.") from error


class RoiAlign(nn.Module):
    """RoIAlign: bilinear samples of a map, averaged in S x S bins of each region: maps -> (K, channels, S, S).

    A bilinear sample is a product of one along each axis, so the mean over a bin is ``rows @ map @ columns``, where each row
    has the weights of the map's lines in one line of bins. Equal to torchvision's ``roi_align(aligned=True,
    sampling_ratio=2)``.

    Attributes:
        output_size: S, S, as torchvision reads it from its own pooling.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.output_size = (side, side)

    def forward(self, maps: dict[str, Tensor], regions: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Args: `maps` of one entry (B, channels, h, w); `regions` (R, 4) of each image; `image_shapes` before padding."""
        (found,) = maps.values()
        pooled = []
        with torch.autocast(found.device.type, enabled=False):
            for image, boxes in zip(found.float(), regions, strict=True):
                # Padded images are a multiple of 32 pixels, so that the stride of the maps is exact for strides up to 32.
                stride = self.strides(found, image_shapes)
                rows = _axis_weights(boxes[:, 1], boxes[:, 3], stride[0], image.shape[1], self.output_size[0])
                columns = _axis_weights(boxes[:, 0], boxes[:, 2], stride[1], image.shape[2], self.output_size[1])
                lines = torch.einsum("rsh,chw->rcsw", rows, image)
                pooled.append(torch.einsum("rcsw,rtw->rcst", lines, columns))
        return torch.cat(pooled)

    def strides(self, maps: Tensor, image_shapes: Sequence[tuple[int, int]]) -> tuple[float, float]:
        """Pixels per cell along each axis: the power of two nearest to the ratio of the largest image and the maps."""
        found = []
        for axis in (0, 1):
            largest = max(shape[axis] for shape in image_shapes)
            ratio = torch.tensor(largest / maps.shape[2 + axis])
            found.append(2.0 ** round(float(ratio.log2())))
        return found[0], found[1]


def _axis_weights(low: Tensor, high: Tensor, stride: float, cells: int, bins: int) -> Tensor:
    """Weights (R, bins, cells) of a map's cells along one axis in the mean of each bin of the regions from `low` to `high`."""
    start, length = low / stride - 0.5, (high - low) / stride
    steps = (torch.arange(bins * SAMPLES, device=low.device) + 0.5) / (bins * SAMPLES)
    points = start[:, None] + length[:, None] * steps
    inside = (points >= -1) & (points <= cells)
    nearby = points.clamp(0, cells - 1)
    weights = (1 - (nearby[..., None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0)
    sampled: Tensor = (weights * inside[..., None]).unflatten(1, (bins, SAMPLES))
    return sampled.mean(2)


def box_head(channels: int, side: int, width: int) -> nn.Sequential:
    """fc6 and fc7 with ReLU and dropout, on the S x S bins of a region: AlexNet's, which Fast R-CNN uses."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(channels * side**2, width), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        *(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Dropout(0.5)),
    )


class FastRCNN(nn.Module):
    """Fast R-CNN: regions that are given, classified and refined.

    Args:
        maps: the network.
        classes: C.
        side: S.
        width: of fc6 and fc7.
        min_sizes: shorter side of an image in pixels; one is drawn per training batch, a test uses all.
        max_size: longest side.
        normalize: the pixel normalisation that the weights expect.
        per_image: regions drawn per training image, a quarter of them objects (overlap of 0.5 or more).
    """

    def __init__(
        self,
        maps: LayerMaps,
        classes: int,
        *,
        side: int = 6,
        width: int = 4096,
        min_sizes: Sequence[int] = (600,),
        max_size: int = 1000,
        normalize: Normalization | ChannelStatistics = "ktray",
        per_image: int = 64,
    ) -> None:
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
        from torchvision.models.detection.roi_heads import RoIHeads
        from torchvision.models.detection.transform import GeneralizedRCNNTransform

        super().__init__()
        mean, std = augmentation.mean_and_std(normalize)
        self.maps, self.min_sizes = maps, tuple(min_sizes)
        self.transform = GeneralizedRCNNTransform(list(min_sizes), max_size, list(mean), list(std))
        self.regions = RoIHeads(
            RoiAlign(side),
            box_head(maps.out_channels, side, width),
            FastRCNNPredictor(width, classes + 1),
            *(0.5, 0.5, per_image, 0.25, None),
            *(0.0, 0.3, 100),
        )

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]], proposals: list[Tensor]) -> dict[str, Tensor]:
        """Losses of a training batch: images (3, h, w) in [0, 1], targets as torchvision's, proposals (R, 4) in pixels."""
        before = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        batch, targets = self.transform(images, targets)
        scaled = _resized(proposals, before, batch.image_sizes)
        found = OrderedDict([("0", self.maps(batch.tensors))])
        _, losses = self.regions(found, scaled, batch.image_sizes, targets)
        return dict(losses)

    def detect(self, image: Tensor, proposals: Tensor, least: float, overlap: float, most: int) -> dict[str, Tensor]:
        """Boxes, labels and scores in one image, in its own pixels.

        On several scales, each region is judged at the scale that brings its area nearest to 224 x 224.

        Args:
            least: smallest score.
            overlap: of boxes of one class, above which the one of the lower score is dropped.
            most: detections that are kept.

        Source: He, Zhang, Ren and Sun, "Spatial Pyramid Pooling" (2015), section 4.1, for the choice of the scale.
        """
        chosen = self._nearest_scale(image, proposals)
        scores, boxes = [], []
        for index in range(len(self.min_sizes)):
            own = proposals[chosen == index]
            if len(own):
                found = self._judge(image, own, self.min_sizes[index])
                scores.append(found[0])
                boxes.append(found[1])
        if not scores:
            nothing = proposals.new_zeros(0)
            return {"boxes": proposals.new_zeros(0, 4), "labels": nothing.long(), "scores": nothing}
        return suppressed(torch.cat(scores), torch.cat(boxes), image.shape[1:], least, overlap, most)

    def _nearest_scale(self, image: Tensor, proposals: Tensor) -> Tensor:
        shorter, longer = sorted(image.shape[1:])
        factors = [min(size / shorter, self.transform.max_size / longer) for size in self.min_sizes]
        sides = (proposals[:, 2:] - proposals[:, :2]).prod(1).clamp(min=0).sqrt()
        scaled = sides[:, None] * sides.new_tensor(factors)
        return (scaled.square() - 224.0**2).abs().argmin(1)

    def _judge(self, image: Tensor, proposals: Tensor, min_size: int) -> tuple[Tensor, Tensor]:
        """Probabilities (R, C + 1) of the regions, and their refined boxes (R, C + 1, 4) in pixels of `image`."""
        self.transform.min_size = (min_size,)
        batch, _ = self.transform([image])
        before = [(int(image.shape[1]), int(image.shape[2]))]
        scaled = _resized([proposals], before, batch.image_sizes)
        found = OrderedDict([("0", self.maps(batch.tensors))])
        pooled = self.regions.box_roi_pool(found, scaled, batch.image_sizes)
        logits, changes = self.regions.box_predictor(self.regions.box_head(pooled))
        self.transform.min_size = self.min_sizes
        decoded = self.regions.box_coder.decode(changes.float(), [proposals])
        return logits.float().softmax(-1), decoded


def _resized(boxes: Sequence[Tensor], before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]]) -> list[Tensor]:
    from torchvision.models.detection.transform import resize_boxes

    return [
        resize_boxes(each, list(old), list(new)) if len(each) else each
        for each, old, new in zip(boxes, before, after, strict=True)
    ]


def suppressed(
    scores: Tensor, boxes: Tensor, size: Sequence[int], least: float, overlap: float, most: int
) -> dict[str, Tensor]:
    """Detections from probabilities (R, C + 1) and boxes (R, C + 1, 4): clipped, suppressed per class, the best `most`."""
    from torchvision.ops import batched_nms, clip_boxes_to_image

    boxes = clip_boxes_to_image(boxes, (int(size[0]), int(size[1])))[:, 1:]
    region, class_ = torch.nonzero(scores[:, 1:] > least, as_tuple=True)
    kept_scores, kept_boxes = scores[region, class_ + 1], boxes[region, class_]
    real = (kept_boxes[:, 2] > kept_boxes[:, 0]) & (kept_boxes[:, 3] > kept_boxes[:, 1])
    kept_scores, kept_boxes, class_ = kept_scores[real], kept_boxes[real], class_[real]
    chosen = batched_nms(kept_boxes, kept_scores, class_, overlap)[:most]
    return {"boxes": kept_boxes[chosen], "labels": class_[chosen] + 1, "scores": kept_scores[chosen]}


def faster_rcnn(
    maps: LayerMaps,
    classes: int,
    *,
    anchors: Sequence[int],
    side: int = 7,
    width: int = 1024,
    min_sizes: Sequence[int] = (800,),
    max_size: int = 1333,
    normalize: Normalization | ChannelStatistics = "ktray",
    per_image: int = 512,
    least: float = 0.05,
    overlap: float = 0.5,
    most: int = 100,
) -> nn.Module:
    """torchvision's Faster R-CNN on the maps of one layer: forward (images, targets) -> losses, (images) -> detections.

    Args:
        anchors: sides of the anchors in pixels of the scaled image, each with the ratios 1:2, 1:1 and 2:1.
        per_image: regions drawn per training image.
        least, overlap, most: as in `FastRCNN.detect`.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.faster_rcnn import TwoMLPHead
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    mean, std = augmentation.mean_and_std(normalize)
    detector: Any = FasterRCNN(
        maps,
        min_size=list(min_sizes),
        max_size=max_size,
        image_mean=list(mean),
        image_std=list(std),
        rpn_anchor_generator=AnchorGenerator((tuple(anchors),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], side, SAMPLES),  # no other class is taken here; replaced below
        box_head=TwoMLPHead(maps.out_channels * side**2, width),
        box_predictor=_predictor(width, classes),
        box_batch_size_per_image=per_image,
        box_score_thresh=least,
        box_nms_thresh=overlap,
        box_detections_per_img=most,
    )
    detector.roi_heads.box_roi_pool = RoiAlign(side)
    found: nn.Module = detector
    return found


def _predictor(width: int, classes: int) -> nn.Module:
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    found: nn.Module = FastRCNNPredictor(width, classes + 1)
    return found


def first_layers(maps: LayerMaps, count: int) -> list[nn.Module]:
    """The modules of the first `count` layers of a network, and those before them, in the order in which they run."""
    layers: Sequence[str] = maps.network.layers  # type: ignore[assignment]
    if count == 0:
        return []
    with_hook = layers[min(count, len(layers)) - 1]
    return modules_up_to(maps.network, with_hook, 128)


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The batch norms in a module, to be kept as they are: a batch of two images says too little."""
    return [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]


def cell_means(maps: Tensor, grid: int) -> Tensor:
    """Means of maps (B, channels, h, w) in grid x grid cells, as matrix products: (B, channels, grid, grid)."""
    ends = maps.new_tensor([[0.0], [1.0]])
    rows, columns = (_axis_weights(ends[0], ends[1] * cells, 1.0, cells, grid)[0] for cells in maps.shape[2:])
    return torch.einsum("gh,bchw,kw->bcgk", rows.to(maps.dtype), maps, columns.to(maps.dtype))

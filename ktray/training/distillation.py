"""Parts shared by transfers that read the teacher's features: an MLP head on the student, and targets for each image.

Source: Navaneet, Koohpayegani, Tejankar, Pirsiavash, "SimReg", BMVC 2021, arXiv:2201.05131: regression only works with a
multi-layer head, which is discarded after training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ktray.ops import augmentation
from ktray.ops.random_draws import Draws
from ktray.spec import Augment
from ktray.training.task import Features

IDENTITY, REVISION = "distillation", 1
TOOLS = (augmentation,)

Draw = Callable[[Tensor, torch.Generator], Draws]
Batch = Callable[[Tensor, Tensor, Draws], tuple[Tensor, Tensor]]
_ROWS = 4096  # read at once by `feature_moments`


def mlp_head(width: int, hidden: Sequence[int], out: int) -> nn.Sequential:
    """(M, width) -> (M, out): linear layers with batch norm and ReLU in between; a single linear layer if `hidden` is empty."""
    layers: list[nn.Module] = []
    for inner in hidden:
        layers += [nn.Linear(width, inner), nn.BatchNorm1d(inner), nn.ReLU(inplace=True)]
        width = inner
    return nn.Sequential(*layers, nn.Linear(width, out))


def feature_batch(features: Features, augment: Augment, prepare: Callable[[Tensor], Tensor]) -> tuple[Draw, Batch]:
    """`draw` and `batch` of a Task: a random view of each image, and the target that `prepare` makes of the teacher's features.

    The teacher saw the original image; the student sees a random view of it.

    Args:
        features: (N, D) of the images that the student is trained on.
        prepare: (B, D) float32 on the device of the images -> (B, D') float32, the values that the head has to predict.

    Returns:
        `draw`, which also reads the rows of features too large for a device; and `batch`: images (B, H, W, 3) uint8, their
        indices (B,) int64 in [0, N), and these draws -> (B, 3, H, W) float32 and (B, D') float32.
    """

    def draw(indices: Tensor, generator: torch.Generator) -> Draws:
        views = augmentation.draw_views(len(indices), augment, generator)
        if features.fit_on_a_device:
            return {"views": views}
        return {"views": views, "rows": torch.from_numpy(features.read(indices.numpy()))}

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        seen = augmentation.to_float(augmentation.random_views(images, augment, draws["views"]))
        return seen, prepare(draws["rows"] if "rows" in draws else features.rows_on(images.device, indices))

    return draw, batch


def feature_moments(features: Features) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation (D,) float32 over all images, from float64 sums in a fixed order; deviation 1 if constant."""
    count, total = len(features), np.zeros(features.width)
    pieces = [np.arange(start, min(start + _ROWS, count), dtype=np.int64) for start in range(0, count, _ROWS)]
    for piece in pieces:
        total += features.read(piece).sum(axis=0, dtype=np.float64)
    mean = total / count
    squares = np.zeros(features.width)
    for piece in pieces:
        squares += np.square(features.read(piece) - mean).sum(axis=0)
    deviation = np.sqrt(squares / count)
    flat = deviation <= 1e-6 * np.abs(mean)  # constant up to float32 rounding
    return mean.astype(np.float32), np.where(flat, 1, deviation).astype(np.float32)


def divergence(student: Tensor, teacher: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean Kullback-Leibler divergence of softmax(student) from softmax(teacher), in nats, and {"nearest"} in [0, 1].

    Args:
        student, teacher: (B, A) float logits.
    """
    target = nn.functional.log_softmax(teacher, dim=1)
    predicted = nn.functional.log_softmax(student, dim=1)
    same = student.detach().max(1).indices == teacher.max(1).indices
    return nn.functional.kl_div(predicted, target, reduction="batchmean", log_target=True), {"nearest": same.float().mean()}

"""Non-linear probe: a network frozen up to a layer, all later layers trained anew with labels, judged on ten crops.

The layers up to and including `layer` keep the judged weights and their statistics of batch norm; the layers after it start
from random weights, followed by fully connected layers and a classifier. Without a `layer` the whole network is frozen.

Source: Noroozi, Vinjimoor, Favaro and Pirsiavash, CVPR 2018, arXiv:1805.00385, Table 6 (frozen up to a layer, the rest trained
again, ten crops); its recipe is not known. Defaults: crops of 7/8 of the side (227 of 256), batches of 256, momentum 0.9,
weight decay 5e-4, learning rate 0.01, of Krizhevsky, Sutskever and Hinton, NeurIPS 2012; fc6 and fc7 of 4096 with dropout as
there. The schedule of 450,000 steps at batch 256 with drops by 10 every 100,000 is stated in epochs: 90, drops after each 20.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from ktray.checkpoints import Attempt
from ktray.features.judged_network import JudgedNetwork
from ktray.fine_tuning import image_classifier
from ktray.images import Images
from ktray.scoring import per_image
from ktray.spec import Count, EvaluationFields, Seed, refuse_pool
from ktray.training.step_task import Recipe
from ktray.training.step_training import SeedResult, SeedRun, over_seeds, seed_metrics

REVISION = 2
NEEDS_LABELS = True
READS_NETWORK = True
TOOLS = (image_classifier,)
DIRECTION: dict[str, Literal["max", "min"]] = {"top1": "max", "loss": "min"}


class Spec(EvaluationFields):
    """A classifier of several layers on a frozen part of a network."""

    kind: Literal["nonlinear_probe"] = "nonlinear_probe"
    layer: str | None = Field(default=None, description="last frozen layer; null: the whole network is frozen")
    hidden: tuple[Count, ...] = Field(default=(4096, 4096), max_length=8, description="widths of the fully connected layers")
    epochs: int = Field(default=90, ge=1)
    drop_every: int = Field(
        default=20, ge=1, description="epochs after which the learning rate is divided by 10, again and again"
    )
    batch_size: int = Field(default=256, ge=2)
    lr: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    crop: float = Field(default=0.875, gt=0, le=1, description="side of the crops, relative to the image")
    test_crops: Literal[1, 10] = Field(default=10, description="10: corners and centre, and their mirror images")
    seeds: int = Field(default=1, ge=1, le=100, description="trainings")
    seed: Seed = 0
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _pools_nothing(self) -> Spec:
        refuse_pool(self)
        return self


def check_network(spec: Spec, network: nn.Module, size: int) -> None:
    """Refuse crops that are too small for the network, whose own error is raised then."""
    side = max(1, round(spec.crop * size))
    with torch.inference_mode():
        network(torch.zeros(1, 3, side, side))


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
    """`top1` in [0, 1] and `loss` (nats) on `judged`, of the probabilities averaged over crops, means over the seeds.

    With two seeds or more also the standard deviation and a 95 % interval of each (`seed_metrics`). `per_image.parquet` has
    both for each image, means over the seeds.

    Raises:
        ValueError: labels are missing, `train` or `judged` is empty, or a loss is not finite.
    """
    if train.labels is None or judged.labels is None or not len(train) or not len(judged):
        raise ValueError("a non-linear probe needs labelled training images and labelled images to judge")
    classes = 1 + max(int(train.labels.max()), int(judged.labels.max()), len(train.classes) - 1)
    side = max(1, round(spec.crop * train.size))
    recipe = recipe_of(spec, len(train))
    read, read_judged = image_classifier.pixels_of(train), image_classifier.pixels_of(judged)
    labels, truth = torch.from_numpy(train.labels).to(device), torch.from_numpy(judged.labels)
    crops = image_classifier.ten_crops if spec.test_crops == 10 else image_classifier.centre_crop

    def loss(logits: Tensor, indices: NDArray[np.int64]) -> Tensor:
        return nn.functional.cross_entropy(logits, labels[torch.from_numpy(indices).to(labels.device)])

    def train_and_judge(run: SeedRun) -> SeedResult:
        model, frozen = untrained_model(spec, network, classes, side, run.seed)
        image_classifier.train(
            network,
            model,
            recipe,
            run,
            rows=np.arange(len(train)),
            batch_size=min(spec.batch_size, len(train)),
            views=lambda indices, generator: image_classifier.shifted_crops(read(indices), side, generator),
            loss=loss,
            frozen=frozen,
        )
        shares = image_classifier.scores(
            network, model, len(judged), lambda rows: crops(read_judged(rows), side), lambda logits: logits.softmax(1)
        )
        return image_classifier.result_of(torch.from_numpy(shares).clamp_min(1e-300).log(), truth)

    runs = over_seeds(range(spec.seed, spec.seed + spec.seeds), recipe.steps, attempt, train_and_judge)
    per_image.write(out, judged.names, per_image.means_of([run.columns for run in runs]))
    return seed_metrics(runs)


def untrained_model(
    spec: Spec, network: JudgedNetwork, classes: int, side: int, seed: int
) -> tuple[nn.ModuleDict, list[nn.Module]]:
    """The network with new weights after the frozen layer and its new head, and its frozen modules."""
    if spec.layer is None:
        backbone = network.build()
        frozen: list[nn.Module] = [backbone]
    else:
        backbone, frozen = image_classifier.retrained_after(network, spec.layer, side, seed)
    head = image_classifier.classifier(int(backbone.feature_dim), classes, spec.hidden, seed)  # type: ignore[arg-type]
    return nn.ModuleDict({"backbone": backbone, "head": head.to(network.device)}), frozen


def recipe_of(spec: Spec, count: int) -> Recipe:
    """SGD for `spec.epochs` passes over `count` images, the learning rate divided by 10 after every `drop_every` of them."""
    in_epoch = count / min(spec.batch_size, count)
    return Recipe(
        steps=max(1, round(spec.epochs * in_epoch)),
        lr=spec.lr,
        milestones=tuple(round(epoch * in_epoch) for epoch in range(spec.drop_every, spec.epochs, spec.drop_every)),
        momentum=spec.momentum,
        weight_decay=spec.weight_decay,
        precision=spec.precision,
    )

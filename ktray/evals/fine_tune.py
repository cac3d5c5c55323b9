"""Fine-tuning on few labels: the accuracy of the whole network, trained further with a share of the training labels.

Each class gives the same number of images, drawn by the seed; every seed draws anew and trains anew. The network starts from
the judged weights and a new linear classifier, whose learning rate may be higher. Training images are random crops and
mirrored; judged images are seen whole.

Source: Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning" (SimCLR, 2020), section 4.3: 1 % and
10 % of the labels, class balanced, random crops and flips alone. The default learning rates (0.01, times 20 for the classifier)
and their drops by 5 after 60 % and 80 % are those of Caron et al., "Unsupervised Learning of Visual Features by Contrasting
Cluster Assignments" (SwAV, 2020), appendix, for 1 %; 20 epochs as there, but at least `min_steps`, as 1 % of a small set is
few.
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
from ktray.fingerprint import seed_of
from ktray.images import Images
from ktray.scoring import per_image
from ktray.spec import EvaluationFields, Seed, refuse_pool
from ktray.training.step_task import Recipe
from ktray.training.step_training import SeedResult, SeedRun, over_seeds, seed_metrics

REVISION = 2
NEEDS_LABELS = True
READS_NETWORK = True
TOOLS = (image_classifier,)
DIRECTION: dict[str, Literal["max", "min"]] = {"top1": "max", "loss": "min"}


class Spec(EvaluationFields):
    """A network trained further on a share of the labels."""

    kind: Literal["fine_tune"] = "fine_tune"
    layer: None = Field(default=None, description="always null: the whole network is trained")
    share: float = Field(default=0.01, gt=0, le=1, description="of the training labels: 0.01, 0.1 and 1 are usual")
    seeds: int = Field(default=3, ge=1, le=100, description="draws of the labels, and trainings")
    seed: Seed = 0
    epochs: int = Field(default=20, ge=1, description="passes over the drawn images")
    min_steps: int = Field(default=500, ge=1, description="fewest steps of the optimiser")
    batch_size: int = Field(default=256, ge=2)
    lr: float = Field(default=0.01, gt=0)
    head_factor: float = Field(default=20.0, gt=0, description="learning rate of the classifier, relative to the network's")
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    crop: float = Field(default=0.08, gt=0, le=1, description="smallest share of the area in a random crop")
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _pools_nothing(self) -> Spec:
        refuse_pool(self)
        return self


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
    """`top1` in [0, 1] and `loss` (nats) on `judged`, means over the seeds; `labels`, how many each training used.

    With two seeds or more also the standard deviation and a 95 % interval of each (`seed_metrics`). `per_image.parquet` has
    both for each image, means over the seeds.

    Raises:
        ValueError: labels are missing, `train` or `judged` is empty, or a loss is not finite.
    """
    if train.labels is None or judged.labels is None or not len(train) or not len(judged):
        raise ValueError("fine-tuning needs labelled training images and labelled images to judge")
    classes = 1 + max(int(train.labels.max()), int(judged.labels.max()), len(train.classes) - 1)
    drawn = {seed: balanced_draw(train.labels, spec.share, seed) for seed in range(spec.seed, spec.seed + spec.seeds)}
    steps = steps_of(spec, len(drawn[spec.seed]))
    read, read_judged = image_classifier.pixels_of(train), image_classifier.pixels_of(judged)
    labels, truth = torch.from_numpy(train.labels).to(device), torch.from_numpy(judged.labels)

    def loss(logits: Tensor, indices: NDArray[np.int64]) -> Tensor:
        return nn.functional.cross_entropy(logits, labels[torch.from_numpy(indices).to(labels.device)])

    def train_and_judge(run: SeedRun) -> SeedResult:
        backbone = network.build()
        head = image_classifier.classifier(int(backbone.feature_dim), classes, (), run.seed)  # type: ignore[arg-type]
        model = nn.ModuleDict({"backbone": backbone, "head": head.to(device)})
        image_classifier.train(
            network,
            model,
            recipe_of(spec, steps),
            run,
            rows=drawn[run.seed],
            batch_size=min(spec.batch_size, len(drawn[run.seed])),
            views=lambda indices, generator: image_classifier.resized_crops(read(indices), spec.crop, generator),
            loss=loss,
        )
        whole = image_classifier.scores(
            network, model, len(judged), lambda rows: read_judged(rows)[:, None], lambda logits: logits.log_softmax(1)
        )
        return image_classifier.result_of(torch.from_numpy(whole), truth)

    runs = over_seeds(list(drawn), steps, attempt, train_and_judge)
    per_image.write(out, judged.names, per_image.means_of([run.columns for run in runs]))
    return {**seed_metrics(runs), "labels": float(len(drawn[spec.seed]))}


def balanced_draw(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Ascending indices of `share` of the images, as many of each class as possible; at least one of each.

    A class with fewer images than its part gives all that it has. With the same seed a larger share includes a smaller one.
    """
    if share == 1:
        return np.arange(len(labels))
    present = np.unique(labels)
    each = max(1, round(share * len(labels) / len(present)))
    order = np.random.default_rng(seed_of(seed, "labels", len(labels))).permutation(len(labels))
    return np.sort(np.concatenate([order[labels[order] == label][:each] for label in present]))


def steps_of(spec: Spec, count: int) -> int:
    """Optimiser steps of a training on `count` images."""
    return max(spec.min_steps, round(spec.epochs * count / min(spec.batch_size, count)))


def recipe_of(spec: Spec, steps: int) -> Recipe:
    """SGD with the learning rate divided by 5 after 60 % and after 80 % of the steps."""
    return Recipe(
        steps=steps,
        lr=spec.lr,
        milestones=(round(0.6 * steps), round(0.8 * steps)),
        factor=0.2,
        momentum=spec.momentum,
        weight_decay=spec.weight_decay,
        head_factor=spec.head_factor,
        precision=spec.precision,
    )

"""Cluster classification: the student learns to predict the cluster of each image's teacher features.

A list of k gives the student one head per k, which teaches it several granularities of the same features. With several teachers
it has one head per teacher and k. Cluster numbers have no scale, so the heads need no balancing, unlike regressions.

Source: Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385 (figure 2; k = 2000 on ImageNet, with little change
from 500 to 10,000 in table 1). The paper does not give its normalisation and number of iterations; L2 and 20 iterations are
common practice. Merging small clusters: Zhan, Xie, Liu, Ong, Loy, "Online Deep Clustering", CVPR 2020, arXiv:2006.10645.
Uniform sampling: see `ktray.training.sampling`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ktray.errors import UserError
from ktray.spec import KMEANS_FIELDS, Augment, KMeansFields
from ktray.strict import added_field
from ktray.text import counted
from ktray.training import classification, sampling
from ktray.training.task import Targets, Task, require_images

REVISION = 2
TOOLS = (classification, sampling)

MIXES_IMAGES = True
SEVERAL_TEACHERS = True
NEEDS: dict[str, tuple[str, ...]] = {
    "clusters": KMEANS_FIELDS,
    "pseudo_labels": ("min_size", "small"),
}


class Spec(KMeansFields):
    """k-means on the teacher's features, after the optional steps L2, PCA, whitening and L2, in this order."""

    kind: Literal["clusters"] = "clusters"
    k: int | tuple[int, ...] = Field(
        default=500, description="number of clusters; a list: one head per entry, with averaged losses"
    )
    min_size: int = Field(default=2, ge=1, description="clusters with fewer images are small")
    small: Literal["drop", "merge"] = Field(
        default="drop", description="drop images of small clusters, or merge them into the nearest cluster that is not small"
    )
    sampling: Literal["none", "uniform"] = Field(
        default="none", description="uniform: an epoch shows every cluster equally often, instead of every image once"
    )

    label_smoothing: float = added_field(
        0.0, ge=0, lt=1, description="share of each target that is spread over all clusters of its head"
    )

    @field_validator("k", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        is_list = isinstance(value, list | tuple)
        entries = list(value) if is_list else [value]
        if not entries or any(isinstance(k, bool) or not isinstance(k, int | float) or k % 1 != 0 for k in entries):
            raise ValueError(f"k is {value!r} and should be a whole number, or a list of whole numbers")
        if min(entries) < 2:
            raise ValueError(f"k is {value!r} and should be at least 2")
        if len(set(entries)) < len(entries):
            raise ValueError(f"k is {value!r}: a repeated number would train the same head twice")
        if is_list and len(entries) == 1:
            raise ValueError(f"k is {value!r}, a list with one entry; write {entries[0]}")
        return tuple(map(int, entries)) if is_list else int(entries[0])

    @model_validator(mode="after")
    def _something_to_merge(self) -> Spec:
        if self.small == "merge" and self.min_size == 1:
            raise ValueError("no cluster has fewer than min_size=1 images, so small=merge merges nothing; raise min_size")
        return self


def check(spec: Spec, count: int, clustered: int) -> None:
    """Refuse a minimum cluster size that no cluster can reach, and more clusters than images.

    Args:
        count: number of images that the student is trained on.
        clustered: number of images whose features are clustered.

    Raises:
        UserError: there are too few images.
    """
    if spec.min_size > max(1, count):
        raise UserError(
            f"no cluster of {counted(count, 'image')} has min_size={spec.min_size}: nothing is left to learn from",
            "min_size",
            "Use a few images, such as 2.",
        )
    require_images(max(spec.k) if isinstance(spec.k, tuple) else spec.k, clustered)


def task(spec: Spec, targets: Targets, augment: Augment) -> Task:
    """Classification of pseudo-labels by one linear head per k.

    Raises:
        ValueError: a pseudo-label lies outside [-1, K) of its head.
    """
    joint = classification.joint_task(targets.heads, augment, spec.label_smoothing)
    if spec.sampling == "uniform":
        return dataclasses.replace(joint, order=sampling.uniform_over_clusters([head.of_image for head in targets.heads]))
    return joint

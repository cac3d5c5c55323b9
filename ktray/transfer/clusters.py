"""Cluster classification: the student learns to predict the cluster of each image's teacher features.

Several k at once are several heads on one student, as several granularities of the same features.

Source: Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385 (figure 2; k = 2000 on ImageNet, flat from 500 to
10,000 in table 1). Its normalisation and iterations are not known; L2 and 20 iterations are common practice. Small clusters
merged: Zhan, Xie, Liu, Ong, Loy, "Online Deep Clustering", CVPR 2020, arXiv:2006.10645.
Uniform sampling: `ktray.training.sampling`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ktray.errors import UserError
from ktray.spec import Augment, Seed
from ktray.strict import StrictSpec
from ktray.training import classification, sampling
from ktray.training.targets import Targets, require_images
from ktray.training.task import Task

REVISION = 2
TOOLS = (classification, sampling)

NEEDS: dict[str, tuple[str, ...]] = {
    "clusters": ("k", "l2", "pca", "whiten", "l2_after", "iterations", "seed"),
    "pseudo_labels": ("min_size", "small"),
}


class Spec(StrictSpec):
    """k-means on the teacher's features, projected in a fixed order with each step optional: L2, PCA, whiten, L2."""

    kind: Literal["clusters"] = "clusters"
    k: int | tuple[int, ...] = Field(default=500, description="clusters; a list: one head per entry, the losses averaged")
    l2: bool = Field(default=True, description="features to length 1 first")
    pca: int | None = Field(default=None, ge=1, description="components kept; null: no PCA")
    whiten: bool = Field(default=False, description="components to unit variance")
    l2_after: bool = Field(default=False, description="to length 1 again at the end")
    iterations: int = Field(default=20, ge=1, le=1000)
    min_size: int = Field(default=2, ge=1, description="a cluster with fewer images is small")
    small: Literal["drop", "merge"] = Field(
        default="drop", description="images of small clusters are left out, or join the nearest cluster that is not small"
    )
    sampling: Literal["none", "uniform"] = Field(
        default="none", description="uniform: an epoch shows every cluster equally often, not every image once"
    )
    seed: Seed = 0

    @field_validator("k", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        several = isinstance(value, list | tuple)
        entries = list(value) if several else [value]
        if not entries or any(isinstance(k, bool) or not isinstance(k, int | float) or k % 1 != 0 for k in entries):
            raise ValueError(f"k is {value!r} and should be a whole number, or a list of such")
        if min(entries) < 2:
            raise ValueError(f"k is {value!r} and should be at least 2")
        if len(set(entries)) < len(entries):
            raise ValueError(f"k is {value!r}: the same number twice would be the same head twice")
        if several and len(entries) == 1:
            raise ValueError(f"k is {value!r}, a list of one; write {entries[0]}")
        return tuple(map(int, entries)) if several else int(entries[0])

    @model_validator(mode="after")
    def _something_to_merge(self) -> Spec:
        if self.small == "merge" and self.min_size == 1:
            raise ValueError("no cluster has fewer than min_size=1 images, so small=merge merges nothing; raise min_size")
        return self


def check(spec: Spec, count: int, clustered: int) -> None:
    """Refuse a cluster size that no cluster can have, and more clusters than images.

    Args:
        count: number of images that the student is trained on.
        clustered: number of images whose features are clustered.

    Raises:
        UserError: there are too few images.
    """
    if spec.min_size > max(1, count):
        raise UserError(
            f"no cluster of {count} images has min_size={spec.min_size}: nothing is left to learn from",
            "min_size",
            "Use a few images, such as 2.",
        )
    require_images(max(spec.k) if isinstance(spec.k, tuple) else spec.k, clustered)


def task(spec: Spec, targets: Targets, augment: Augment) -> Task:
    """Classification of pseudo-labels by one linear head per k.

    Raises:
        ValueError: a pseudo-label is outside of [-1, K) of its head.
    """
    stated = classification.joint_task(targets.heads, augment)
    if spec.sampling == "uniform":
        return dataclasses.replace(stated, order=sampling.uniform([head.of_image for head in targets.heads]))
    return stated

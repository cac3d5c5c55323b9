"""Linear classifiers on frozen features: multinomial logistic regression under several penalties, and one-against-all machines.

Both losses are convex, so their minima have no learning rate, number of epochs or random start to choose. All penalties are
fitted together, on the device of the features.

Source: Böhning, "Multinomial logistic regression algorithm" (1992), for the Hessian that all classes share, which here
preconditions L-BFGS; Fan et al., "LIBLINEAR" (2008), section 2, for the L2-regularised machine with squared hinge loss.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktray import fingerprint
from ktray.classifiers import minimisation
from ktray.classifiers.minimisation import minimise

IDENTITY, REVISION = "linear_classifiers", 1
TOOLS = (minimisation,)

BLOCK = 1 << 16  # rows whose moments are summed at a time
SCORES = 1 << 26  # most scores of images under all classifiers that are held at once: 256 MiB in float32
COLUMNS = 1 << 12  # most classes times penalties that are fitted together
MAX_WIDTH = 2048  # features up to which their second moments precondition the fit; the factors take width^3 steps
log = logging.getLogger("ktray")


# --- features


@dataclass(frozen=True)
class Scaling:
    """Mean and standard deviation (D,) float64 of the training features, which `apply` takes out of any features."""

    mean: Tensor
    deviation: Tensor

    def apply(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """(rows - mean) / deviation, (N, D) in `dtype`; computed in float64, block by block."""
        result = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        for start in range(0, len(rows), BLOCK):
            result[start : start + BLOCK] = (rows[start : start + BLOCK].double() - self.mean) / self.deviation
        return result


def scaling_of(rows: Tensor) -> Scaling:
    """The scaling that standardises these features (N, D).

    A feature that is constant up to rounding gets the deviation 1, so that its rounding noise is not amplified.
    """
    mean, squares = (torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device) for _ in range(2))
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    for block in blocks:
        mean += block.sum(0, dtype=torch.float64) / len(rows)
    for block in blocks:
        squares += (block.double() - mean).square().sum(0)
    deviation = (squares / len(rows)).sqrt()
    constant = deviation <= 1e-6 * mean.abs() + torch.finfo(torch.float32).tiny
    return Scaling(mean, torch.where(constant, 1.0, deviation))


def on_device(rows: NDArray[np.float32], device: str) -> Tensor:
    """Features (N, D) as a tensor on the device.

    Raises:
        ValueError: some are not finite.
    """
    found = torch.from_numpy(np.array(rows, np.float32)).to(device)
    finite = torch.isfinite(found).all(1)
    if not bool(finite.all()):
        raise ValueError(f"{int((~finite).sum())} of {len(rows)} features are not finite")
    return found


def unit(rows: Tensor) -> Tensor:
    """Features (N, D) scaled to length 1; a row of zeros stays one."""
    return torch.nn.functional.normalize(rows, dim=1)


def subset_per_class(labels: NDArray[np.int64], per_class: int | None, seed: int) -> NDArray[np.int64]:
    """Ascending indices (n,) of up to `per_class` random images of each class; of all images if that is None.

    With the same seed, a larger `per_class` includes the images of a smaller one.
    """
    order = np.random.default_rng(fingerprint.seed_of(seed, "labels", len(labels))).permutation(len(labels))
    kept = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(kept))


def held_out_rows(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """(N,) whether a labelled image is held out: about the share of each class, at random, and one at least.

    Each class keeps an image, so that of a class with a single one none is held out.
    """
    order = np.random.default_rng(fingerprint.seed_of(seed, "held out", len(labels))).permutation(len(labels))
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        held[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return held


# --- multinomial logistic regression


@dataclass(frozen=True)
class Classifiers:
    """P linear classifiers: `weights` (P, D, C) and `biases` (P, C), float64, on the device of the features.

    Attributes:
        converged: (P,) whether each fit reached its minimum.
        evaluations: how many losses and gradients were computed, summed over the classifiers.
    """

    weights: Tensor
    biases: Tensor
    converged: tuple[bool, ...]
    evaluations: int

    def scores(self, rows: Tensor, index: int) -> Tensor:
        """(N, C) in the type of the features (N, D), of classifier `index`."""
        return torch.addmm(self.biases[index].to(rows), rows, self.weights[index].to(rows))


def logistic_regressions(
    rows: Tensor,
    labels: Tensor,
    classes: int,
    penalties: Sequence[float],
    *,
    iterations: int,
    start: Tensor | None = None,
    tolerance: float = 1e-5,
) -> Classifiers:
    """The minimum of mean cross-entropy + penalty / 2 * sum of squared weights, for each penalty. Biases are not penalised.

    Strong penalties come first; where not all fit together, weaker ones start from the minimum before them. Where a fit has not
    converged after `iterations`, its last point is used and a warning is logged.

    Args:
        rows: (N, D), standardised. Products are computed in its dtype and on its device, losses are summed in float64.
        labels: (N,) int64 in [0, classes), on the same device.
        start: (D + 1, C) weights and biases to start from; None for zeros.
        tolerance: of the loss, relative.
    """
    order = sorted(range(len(penalties)), key=lambda index: -penalties[index])
    size = max(1, COLUMNS // classes)
    width = rows.shape[1] + 1
    found = torch.zeros(len(penalties), width, classes, dtype=torch.float64, device=rows.device)
    latest = found[0] if start is None else start.double()
    converged, evaluations, moments = [True] * len(penalties), 0, _second_moments(rows)
    for at in range(0, len(order), size):
        group = order[at : at + size]
        values = torch.tensor([penalties[index] for index in group], dtype=torch.float64, device=rows.device)
        problem = _Multinomial(rows, labels, classes, values, moments)
        minima = minimise(
            problem.loss_and_gradient,
            latest.reshape(1, -1).repeat(len(group), 1),
            problem.precondition,
            tolerance=tolerance,
            rounding=torch.finfo(rows.dtype).eps,
            iterations=iterations,
        )
        found[group] = minima.points.view(len(group), width, classes)
        latest, evaluations = found[group[-1]], evaluations + minima.evaluations
        for index, reached in zip(group, minima.converged.tolist(), strict=True):
            converged[index] = reached
    missed = [penalties[index] for index in order if not converged[index]]
    if missed:
        log.warning(
            "%d of %d logistic regressions did not converge within %d iterations, that with l2=%.3g among them",
            *(len(missed), len(penalties), iterations, missed[-1]),
        )
    return Classifiers(found[:, :-1], found[:, -1], tuple(converged), evaluations)


def _second_moments(rows: Tensor) -> Tensor | None:
    """Mean products (D, D) float64 of the features; None where there are too many features."""
    if rows.shape[1] > MAX_WIDTH:
        return None
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        total += block.T @ block
    return total / len(rows)


class _Multinomial:
    """The losses of one classifier under A penalties; a point is its weights and biases (D + 1, C), flattened."""

    def __init__(self, rows: Tensor, labels: Tensor, classes: int, penalties: Tensor, moments: Tensor | None) -> None:
        self.rows, self.labels, self.classes, self.penalties = rows, labels, classes, penalties
        # With all classes equally likely, the Hessian is that of 1 / C times the second moments, for every class alike.
        self.inverse = None if moments is None else _inverses(moments / classes, penalties).to(rows.dtype)

    def loss_and_gradient(self, points: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """As `minimisation.LossAndGradient`."""
        count, width, classes = len(points), self.rows.shape[1] + 1, self.classes
        weights = points.view(count, width, classes)
        together = weights.transpose(0, 1).reshape(width, count * classes).to(self.rows.dtype)
        losses = points.new_zeros(count)
        gradient = points.new_zeros(width, count * classes)
        size = max(256, SCORES // (count * classes))
        for start in range(0, len(self.rows), size):
            block, truth = self.rows[start : start + size], self.labels[start : start + size]
            scores = torch.addmm(together[-1], block, together[:-1]).view(len(block), count, classes)
            shares = scores.log_softmax(2)
            index = truth[:, None, None].expand(-1, count, 1)
            losses -= shares.gather(2, index).sum(0, dtype=torch.float64)[:, 0]
            error = shares.exp_().scatter_add_(2, index, shares.new_full((1, 1, 1), -1.0).expand(index.shape))
            error = error.view(len(block), count * classes)
            gradient[:-1] += block.T @ error
            gradient[-1] += error.sum(0)
        penalties = self.penalties[numbers][:, None, None]
        gradients = gradient.view(width, count, classes).transpose(0, 1) / len(self.rows)
        gradients[:, :-1] += penalties * weights[:, :-1]
        losses = losses / len(self.rows) + (penalties / 2 * weights[:, :-1].square()).sum((1, 2))
        return losses, gradients.reshape(count, -1)

    def precondition(self, gradients: Tensor, numbers: Tensor) -> Tensor:
        """As `minimisation.Precondition`."""
        each = gradients.view(len(gradients), -1, self.classes)
        if self.inverse is None:
            scaled = each[:, :-1] / (self.penalties[numbers][:, None, None] + 1 / self.classes)
        else:
            scaled = (self.inverse[numbers] @ each[:, :-1].to(self.inverse)).double()
        return torch.cat([scaled, each[:, -1:] * self.classes], 1).reshape(gradients.shape)


def _inverses(moments: Tensor, penalties: Tensor) -> Tensor:
    """Inverse (A, D, D) of the moments plus each penalty on the diagonal; a little more, so that it exists.

    The products of fewer images than features have no full rank, and rounding then makes some eigenvalues negative. How much is
    added changes how quickly a minimum is found, not the minimum.
    """
    unit_matrix = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    scale = moments.diagonal().mean().clamp(min=1e-30)
    for added in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        factors, failures = torch.linalg.cholesky_ex(moments + (penalties + added * scale)[:, None, None] * unit_matrix)
        if not bool(failures.any()):
            return torch.cholesky_inverse(factors)
    return unit_matrix / (scale + penalties)[:, None, None]


# --- one-against-all machines


@dataclass(frozen=True)
class Problem:
    """One machine to be fitted: a class, its cost C, and the images that it learns from."""

    of: int
    cost: float
    images: int


def linear_machines(
    rows: Tensor,
    targets: Tensor,
    learned_from: Tensor,
    problems: Sequence[Problem],
    *,
    loss: Literal["squared_hinge", "log"] = "squared_hinge",
    positive_weight: float = 1.0,
    iterations: int = 500,
    tolerance: float = 1e-6,
) -> Tensor:
    """Weights (D + 1, P) float64 of linear machines; the last row is the bias, penalised like the rest.

    Each minimises |w|^2 / 2 + C * sum of weight * loss(target * score), as scikit-learn's LinearSVC does, whose
    ``class_weight={1: positive_weight, -1: 1}`` is the weight here. The loss is max(0, 1 - m)^2 or log(1 + exp(-m)).

    Args:
        rows: (N, D).
        targets: (N, K) int8 per class: 1 positive, -1 negative, 0 left out.
        learned_from: (M, N) bool, sets of images; `Problem.images` is the number of one.
        problems: P machines.
    """
    basis = _basis(_with_ones(rows))
    turned = _with_ones(rows) @ basis.to(rows.dtype)
    squares = turned.double().square().mean(0)
    size = max(1, SCORES // 16 // max(turned.shape[1], 1))
    found = []
    for at in range(0, len(problems), size):
        machines = _Machines(turned, targets, learned_from, problems[at : at + size], loss, positive_weight, squares)
        start = torch.zeros(len(machines.costs), turned.shape[1], dtype=torch.float64, device=rows.device)
        minima = minimise(
            machines.loss_and_gradient,
            start,
            machines.precondition,
            tolerance=tolerance,
            rounding=torch.finfo(rows.dtype).eps,
            iterations=iterations,
        )
        if not bool(minima.converged.all()):
            missed = int((~minima.converged).sum())
            log.warning("%d of %d machines did not converge within %d iterations", missed, len(start), iterations)
        found.append(basis @ minima.points.T)
    return torch.cat(found, 1)


def machine_scores(rows: Tensor, weights: Tensor) -> Tensor:
    """Scores (N, P) of features (N, D) under machines (D + 1, P), in the type of the features."""
    matrix = weights.to(rows)
    return torch.addmm(matrix[-1], rows, matrix[:-1])


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def _basis(rows: Tensor) -> Tensor:
    """Orthonormal directions (F, R) float64 of the rows (N, F), in which their products are uncorrelated; R <= min(N, F)."""
    exact = rows.double()
    if len(rows) >= rows.shape[1]:
        values, vectors = torch.linalg.eigh(exact.T @ exact)
        kept_of: Tensor = vectors[:, values > 1e-12 * values[-1]]
        return kept_of
    values, vectors = torch.linalg.eigh(exact @ exact.T)
    kept = values > 1e-12 * values[-1]
    directions: Tensor = (exact.T @ vectors[:, kept]) / values[kept].sqrt()
    return directions


class _Machines:
    """The losses of P machines; a point is the weights of one, in the basis of `linear_machines`."""

    def __init__(
        self,
        rows: Tensor,
        targets: Tensor,
        learned_from: Tensor,
        problems: Sequence[Problem],
        loss: Literal["squared_hinge", "log"],
        positive_weight: float,
        squares: Tensor,
    ) -> None:
        self.rows, self.targets, self.learned_from, self.positive_weight = rows, targets, learned_from, positive_weight
        self.loss = loss
        self.classes = torch.tensor([each.of for each in problems], device=rows.device)
        self.images = torch.tensor([each.images for each in problems], device=rows.device)
        self.costs = torch.tensor([each.cost for each in problems], dtype=torch.float64, device=rows.device)
        counts = learned_from.sum(1)[self.images].double()
        # Before the first step, all images have the second derivative of the loss at 0.
        self.curvature = 1 + (2 if loss == "squared_hinge" else 0.25) * (self.costs * counts)[:, None] * squares

    def loss_and_gradient(self, points: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """As `minimisation.LossAndGradient`."""
        weights, losses, gradients = points.T.to(self.rows.dtype), points.square().sum(1) / 2, points.clone()
        size = max(256, SCORES // 4 // len(points))
        classes, images = self.classes[numbers], self.images[numbers]
        for start in range(0, len(self.rows), size):
            block = self.rows[start : start + size]
            signs = self.targets[start : start + size][:, classes].to(block)
            counted = self.learned_from[:, start : start + size][images].T.to(block) * signs.square()
            counted = torch.where(signs > 0, counted * self.positive_weight, counted)
            margins = signs * (block @ weights)
            if self.loss == "squared_hinge":
                missing = (1 - margins).clamp_(min=0)
                each, pull = missing.square(), 2 * missing
            else:
                each, pull = torch.nn.functional.softplus(-margins), torch.sigmoid(-margins)
            losses = losses + self.costs[numbers] * (counted * each).sum(0, dtype=torch.float64)
            gradients -= self.costs[numbers][:, None] * ((counted * pull * signs).T @ block)
        return losses, gradients

    def precondition(self, gradients: Tensor, numbers: Tensor) -> Tensor:
        """As `minimisation.Precondition`."""
        return gradients / self.curvature[numbers]

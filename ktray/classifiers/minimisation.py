"""L-BFGS for many smooth convex problems of one size at once, such as one classifier under several penalties.

All problems advance in the same operations on one device, so that a GPU is not kept waiting by small ones; there, a step is a
CUDA graph. A problem that has converged leaves the batch, on a GPU only once more than three quarters of them have, because a
graph is captured for one number of problems.

Source: Byrd, Nocedal and Schnabel, "Representations of Quasi-Newton Matrices and Their Use in Limited Memory Methods" (1994),
theorem 2.2, for the product of the inverse Hessian and a gradient as a few matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ktray import progress
from ktray.training.cuda_graph import Graphs, own_stream

IDENTITY, REVISION = "minimisation", 2

PAIRS = 10  # of steps and changes of the gradient that are remembered
SUFFICIENT = 1e-4  # share of the expected decrease that a step must bring (Armijo)
REJECTIONS = 12  # in a row, each halving the step, after which rounding allows no more progress

LossAndGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(points (A, F) float64, numbers (A,) of their problems) -> losses (A,) and gradients (A, F), float64.

It is captured on a GPU, so it must not wait for a result there."""
Precondition = Callable[[Tensor, Tensor], Tensor]
"""(gradients (A, F) float64, numbers (A,) of their problems) -> gradients times an estimate of the inverse Hessian. Linear."""


@dataclass(frozen=True)
class Minima:
    """What `minimise` found.

    Attributes:
        points: (P, F) float64.
        iterations: how many there were.
        converged: (P,) bool on the CPU; False where the iterations were used up.
        evaluations: how many losses and gradients were computed, summed over the problems.
    """

    points: Tensor
    iterations: int
    converged: Tensor
    evaluations: int


def minimise(
    loss_and_gradient: LossAndGradient,
    start: Tensor,
    precondition: Precondition,
    *,
    tolerance: float,
    rounding: float,
    iterations: int,
) -> Minima:
    """Minima of P convex functions of F variables.

    A problem has converged once half the decrease that its quadratic model predicts is below `tolerance` times its loss, twice
    in a row. A step that does not bring enough is halved; its change of the gradient is remembered all the same, because it is
    true curvature of a convex function.

    Args:
        start: (P, F) float64.
        precondition: the better its estimate, the fewer iterations.
        tolerance: relative to the loss.
        rounding: relative error of a computed loss; a step may raise the loss by that.
        iterations: the most of them.
    """
    with own_stream(start.device):
        return _minimise(_State(start, loss_and_gradient, precondition), tolerance, rounding, iterations)


def _minimise(state: _State, tolerance: float, rounding: float, iterations: int) -> Minima:
    found, converged = state.points.clone(), torch.zeros(len(state.points), dtype=torch.bool)
    on_gpu = found.is_cuda
    every, leaving = (4, 0.75) if on_gpu else (1, 0.0)  # to look whether one has converged makes a GPU wait
    graphs = Graphs(on_gpu, eager_calls=1)
    evaluations, done = len(found), 0

    def step(_: int) -> None:
        state.advance(tolerance, rounding)

    for done in range(1, iterations + 1):
        evaluations += len(state.active)
        graphs.call(step, len(state.active))
        progress.advance("iterations")
        if done % every and done < iterations:
            continue
        active = state.active.cpu()
        ended = ((state.calm >= 2) | (state.rejected >= REJECTIONS)).cpu()
        new = ended & ~converged[active]
        if new.any():
            found[active[new]] = state.points[new.to(found.device)]
            converged[active[new]] = True
        left = converged[active]
        if left.all():
            return Minima(found, done, converged, evaluations)
        if left.float().mean() > leaving:
            state.keep(~left)
    unfinished = ~converged[state.active.cpu()].to(found.device)
    found[state.active[unfinished]] = state.points[unfinished]
    return Minima(found, done, converged, evaluations)


class _State:
    """The problems that have not converged: points, losses, gradients, and the pairs that approximate their Hessians.

    Steps s and changes of the gradient y are (A, PAIRS, F), the newest last. A pair that is absent, or whose product is not
    clearly positive because of rounding, is zero and has no effect. `advance` changes all of them in place.
    """

    def __init__(self, start: Tensor, loss_and_gradient: LossAndGradient, precondition: Precondition) -> None:
        self.loss_and_gradient, self.precondition = loss_and_gradient, precondition
        self.active = torch.arange(len(start), device=start.device)
        self.points = start.clone()
        self.losses, self.gradients = loss_and_gradient(self.points, self.active)
        self.scaled = precondition(self.gradients, self.active)
        self.s = start.new_zeros(len(start), PAIRS, start.shape[1])
        self.y, self.scaled_y = torch.zeros_like(self.s), torch.zeros_like(self.s)
        self.factor = start.new_ones(len(start), 1)  # of the estimated inverse Hessian
        self.length = start.new_ones(len(start), 1)  # of the next step
        self.calm = torch.zeros(len(start), dtype=torch.int64, device=start.device)
        self.rejected = torch.zeros_like(self.calm)

    def advance(self, tolerance: float, rounding: float) -> None:
        """Try one step of every problem."""
        direction = -self._times_inverse_hessian()
        slope = (direction * self.gradients).sum(1, keepdim=True)
        step = self.length * direction
        losses, gradients = self.loss_and_gradient(self.points + step, self.active)
        scaled = self.precondition(gradients, self.active)
        allowed = self.losses + rounding * self.losses.abs() + SUFFICIENT * (self.length * slope)[:, 0]
        accepted = losses <= allowed
        calm = -slope[:, 0] / 2 <= tolerance * self.losses.abs()
        self.calm.copy_(torch.where(calm & accepted, self.calm + 1, 0))
        self.rejected.copy_(torch.where(accepted, 0, self.rejected + 1))
        self._remember(step, gradients - self.gradients, scaled - self.scaled)
        self.length.copy_(torch.where(accepted[:, None], (2 * self.length).clamp(max=1), self.length / 2))
        self.losses.copy_(torch.where(accepted, losses, self.losses))
        for held, new in ((self.points, self.points + step), (self.gradients, gradients), (self.scaled, scaled)):
            held.copy_(torch.where(accepted[:, None], new, held))

    def _remember(self, s: Tensor, y: Tensor, scaled_y: Tensor) -> None:
        product, norm = (s * y).sum(1, keepdim=True), (y * scaled_y).sum(1, keepdim=True)
        valid = (product > 1e-12 * (s.norm(dim=1) * y.norm(dim=1))[:, None]) & (norm > 0)
        self.factor.copy_(torch.where(valid, product / norm.clamp(min=torch.finfo(norm.dtype).tiny), self.factor))
        for pairs, new in ((self.s, s), (self.y, y), (self.scaled_y, scaled_y)):
            pairs.copy_(torch.cat([pairs[:, 1:], torch.where(valid, new, 0)[:, None]], 1))

    def _times_inverse_hessian(self) -> Tensor:
        """The gradients times the estimated inverse Hessians, (A, F)."""
        factor = self.factor[:, :, None]
        products = self.s @ self.y.mT  # (A, PAIRS, PAIRS)
        on_diagonal = products.diagonal(dim1=1, dim2=2)
        upper = products.triu() + torch.diag_embed((on_diagonal == 0).to(products))
        middle = torch.diag_embed(on_diagonal) + factor * (self.y @ self.scaled_y.mT)
        scaled = factor * self.scaled[:, :, None]  # (A, F, 1)
        p = torch.linalg.solve_triangular(upper, self.s @ self.gradients[:, :, None], upper=True)
        q = torch.linalg.solve_triangular(upper.mT, middle @ p - self.y @ scaled, upper=False)
        product: Tensor = scaled + self.s.mT @ q - factor * (self.scaled_y.mT @ p)
        return product[:, :, 0]

    def keep(self, kept: Tensor) -> None:
        """Drop all problems but these."""
        rows = kept.to(self.active.device).nonzero()[:, 0]
        for name in ("active", "points", "losses", "gradients", "scaled", "s", "y", "scaled_y", "factor", "length"):
            setattr(self, name, getattr(self, name)[rows])
        self.calm, self.rejected = self.calm[rows], self.rejected[rows]

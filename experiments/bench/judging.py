"""How fast is the linear probe? Ten penalties on 45,000 x 512 features, beside its own matrix products and two rivals.

Rivals: SciPy's L-BFGS with losses and gradients on the same device, one penalty after the other, which was ktray's probe until
0.2; and scikit-learn's LogisticRegression on the CPU. All minimise the same losses; the accuracy of each penalty's classifier
on other images says how far they agree. Contenders alternate; each line of JSON is one of them: median seconds of n, ratio to
the products alone, and accuracies.

    python experiments/bench/judging.py --device cuda:0

Result on one H200 (n = 5, ten penalties from 3e-6 to 0.1): products alone 0.0174 s; ktray, whose steps are CUDA graphs, 0.081 s
(4.7 times these); the same solver without graphs 0.174 s (10.0 times); SciPy 2.06 s (n = 1). scikit-learn took 7.2 s for one
penalty, 1e-3, on 16 cores (n = 1). Accuracies of ktray and SciPy differ by at most 0.03 points.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ktray.classifiers import linear_classifiers

CLASSES = 10


def features(count: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated rectified features (N, D) of ten overlapping classes, and labels (N,)."""
    shared, random = np.random.default_rng(99), np.random.default_rng(seed)
    centres, mixing = 1.1 * shared.normal(size=(CLASSES, 64)), shared.normal(size=(64, width)) / 8
    labels = random.integers(0, CLASSES, count)
    hidden = centres[labels] + 2.5 * random.normal(size=(count, 64))
    noise = 0.3 * random.normal(size=(count, width))
    return np.maximum(hidden @ mixing + noise, 0).astype(np.float32), labels.astype(np.int64)


def fit_all(rows: Tensor, labels: Tensor, penalties: list[float]) -> Tensor:
    """ktray's weights (P, D + 1, C)."""
    found = linear_classifiers.logistic_regressions(rows, labels, CLASSES, penalties, iterations=500)
    return torch.cat([found.weights, found.biases[:, None]], 1)


def columns_per_evaluation(rows: Tensor, labels: Tensor, penalties: list[float]) -> list[int]:
    """Number of columns of each loss and gradient that `fit_all` computes."""
    counts: list[int] = []
    problem = linear_classifiers._Multinomial
    original = problem.loss_and_gradient

    def counted(self: Any, points: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        counts.append(len(points) * CLASSES)
        return original(self, points, numbers)

    problem.loss_and_gradient = counted  # type: ignore[method-assign]
    try:
        fit_all(rows, labels, penalties)
    finally:
        problem.loss_and_gradient = original  # type: ignore[method-assign]
    return counts


def products(rows: Tensor, counts: list[int]) -> None:
    """The matrix products of these losses and gradients, and nothing else."""
    weights, errors = rows.new_zeros(rows.shape[1], max(counts)), rows.new_zeros(len(rows), max(counts))
    for count in counts:
        rows @ weights[:, :count]
        rows.T @ errors[:, :count]


def one_after_the_other(rows: Tensor, labels: Tensor, penalties: list[float]) -> Tensor:
    """SciPy's L-BFGS-B for each penalty, with ktray's loss and gradient of one."""
    from scipy.optimize import minimize

    found = []
    for penalty in penalties:
        values = torch.tensor([penalty], dtype=torch.float64, device=rows.device)
        problem, number = (
            linear_classifiers._Multinomial(rows, labels, CLASSES, values, None),
            torch.tensor([0], device=rows.device),
        )

        def loss_and_gradient(flat: np.ndarray, problem: Any = problem, number: Tensor = number) -> tuple[float, np.ndarray]:
            loss, gradient = problem.loss_and_gradient(torch.from_numpy(flat)[None].to(rows.device), number)
            return float(loss), gradient[0].cpu().numpy()

        options = {"maxiter": 300, "maxfun": 1200, "ftol": 1e-10, "gtol": 1e-6}
        start = np.zeros((rows.shape[1] + 1) * CLASSES)
        answer = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
        found.append(torch.from_numpy(answer.x).view(-1, CLASSES))
    return torch.stack(found)


def of_scikit_learn(rows: Tensor, labels: Tensor, penalties: list[float]) -> Tensor:
    """LogisticRegression for each penalty."""
    from sklearn.linear_model import LogisticRegression

    given, truth, found = rows.double().cpu().numpy(), labels.cpu().numpy(), []
    for penalty in penalties:
        model = LogisticRegression(C=1 / (penalty * len(given)), tol=1e-4, max_iter=1000).fit(given, truth)
        found.append(torch.from_numpy(np.concatenate([model.coef_.T, model.intercept_[None]])))
    return torch.stack(found)


def main() -> None:
    """Measure, and print one line of JSON per contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=45_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--without-scikit-learn", action="store_true")
    args = parser.parse_args()
    raw, labels = features(args.rows, args.width)
    given = linear_classifiers.on_device(raw, args.device)
    scaling = linear_classifiers.scaling_of(given)
    rows, targets = scaling.apply(given, torch.float32), torch.from_numpy(labels).to(args.device)
    others, truth = features(10_000, args.width, seed=1)
    queries = scaling.apply(linear_classifiers.on_device(others, args.device), torch.float32).double().cpu()
    penalties = [10.0 ** (-5.5 + index / 2) for index in range(10)]
    counts = columns_per_evaluation(rows, targets, penalties)
    contenders: dict[str, Callable[[], Any]] = {
        "products alone": lambda: products(rows, counts),
        "ktray, ten penalties at once": lambda: fit_all(rows, targets, penalties),
        "SciPy, one penalty after the other": lambda: one_after_the_other(rows, targets, penalties),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    answers: dict[str, Any] = {}
    for _ in range(args.repetitions):
        for name, run in contenders.items():
            began = time.perf_counter()
            answers[name] = run()
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    if not args.without_scikit_learn:
        name, began = "scikit-learn, one penalty after the other, CPU", time.perf_counter()
        answers[name] = of_scikit_learn(rows, targets, penalties)
        seconds[name] = [time.perf_counter() - began]
    base = float(np.median(seconds["products alone"]))
    where = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "cpu"
    for name, times in seconds.items():
        line: dict[str, Any] = {"contender": name, "device": where, "n": len(times), "seconds": float(np.median(times))}
        line |= {"times_products": line["seconds"] / base, "evaluations": len(counts), "columns": sum(counts)}
        if answers[name] is not None:
            scores = [queries @ weights[:-1] + weights[-1] for weights in answers[name].double().cpu()]
            line["top1"] = [round(float((each.argmax(1).numpy() == truth).mean()), 4) for each in scores]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

"""How fast does ktray train on a GPU, against the loops that one would write by hand for the same arithmetic?

    python -m experiments.bench.training --cases alexnet-128 resnet18-512 simclr-512 --repeats 3
    python -m experiments.bench.training --together 1 2 4 8          (several small students at once, in one process)

The contenders take turns. One JSON line each: median images per second with n, the ratio to the plain loop, and the device.

- `ktray`: `loop.fit` as a stage calls it, with its draws from the CPU, its metrics and its epochs.
- `ktray, compiled`: the same, compiled at once instead of only where the length pays.
- `plain`: PyTorch's eager loop with bfloat16 autocast and channels-last, its images and draws on the GPU before it starts.
- `graph`: the same step, captured by hand; `compiled + graph`: after torch.compile.

The hand-written loops get their draws and orders for nothing: they were made before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ktray import plugins
from ktray.images import Images
from ktray.ops.random_draws import map_draws
from ktray.pretext import simclr
from ktray.spec import Augment, Schedule
from ktray.training import classification, compilation, loop
from ktray.training.task import Task

COUNT, SIDE, CLASSES = 45_000, 32, 500
DRAWN = 32  # steps whose draws the hand-written loops repeat


@dataclass(frozen=True)
class Case:
    """A network, a task for it, and the size of a batch."""

    backbone: dict[str, Any]
    task: Callable[[], Task]
    batch_size: int


def _pixels() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8), random.integers(0, CLASSES, COUNT)


PIXELS, LABELS = _pixels()
IMAGES = Images(count=COUNT, size=SIDE, read=lambda indices: PIXELS[indices], labels=LABELS)


def pseudo_labels() -> Task:
    """A student's task: 500 classes from random crops."""
    return classification.task(LABELS, CLASSES, Augment(crop=2))


def two_views() -> Task:
    """SimCLR with its default distortions."""
    return simclr.task(simclr.Spec(), SIDE)


ALEXNET, RESNET = {"kind": "alexnet"}, {"kind": "resnet"}
CASES = {
    "alexnet-128": Case(ALEXNET, pseudo_labels, 128),
    "alexnet-512": Case(ALEXNET, pseudo_labels, 512),
    "resnet18-128": Case(RESNET, pseudo_labels, 128),
    "resnet18-512": Case(RESNET, pseudo_labels, 512),
    "simclr-512": Case(RESNET, two_views, 512),
}


def ktray(case: Case, precision: str, epochs: int, *, compiled: bool = False) -> float:
    """Images per second of `loop.fit`, over the epochs after the second."""
    moments = []
    schedule = Schedule(kind="constant", epochs=epochs, lr=0.01, batch_size=case.batch_size, precision=precision)  # type: ignore[arg-type]
    seconds, compilation.SECONDS = compilation.SECONDS, 0.0 if compiled else 1e9
    try:
        with tempfile.TemporaryDirectory() as folder:
            loop.fit(
                loop.untrained_backbone(plugins.parse("backbone", case.backbone), 0),
                case.task(),
                IMAGES,
                schedule,
                0,
                out=Path(folder) / "out",
                until=epochs,
                device="cuda:0",
                on_epoch=lambda *_: moments.append(time.perf_counter()),
            )
    finally:
        compilation.SECONDS = seconds
    return COUNT / statistics.median(after - before for before, after in pairwise(moments[1:]))


class ByHand:
    """A step with everything on the GPU before it starts, in bfloat16 and channels-last, with a fused SGD."""

    def __init__(self, case: Case, *, compiled: bool = False, fused: bool = True) -> None:
        device = torch.device("cuda:0")
        self.task, self.size = case.task(), case.batch_size
        backbone: Any = loop.untrained_backbone(plugins.parse("backbone", case.backbone), 0)
        self.model = nn.ModuleDict({"backbone": backbone, "head": self.task.head(backbone.feature_dim)}).to(device)
        self.model.to(memory_format=torch.channels_last)
        self.optimiser = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=fused)
        self.images = torch.from_numpy(PIXELS).to(device)
        generator = torch.Generator().manual_seed(0)
        self.orders = [torch.randperm(COUNT, generator=generator)[: self.size] for _ in range(DRAWN)]
        drawn = [self.task.draw(order, generator) for order in self.orders]
        self.orders = [order.to(device) for order in self.orders]
        self.drawn = [map_draws(lambda each: each.to(device), each) for each in drawn]
        self.loss = torch.compile(self._loss, dynamic=False) if compiled else self._loss
        self.sum = torch.zeros((), device=device)

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return self.task.loss(self.model["head"](self.model["backbone"](inputs)), targets)[0]

    def step(self, order: Tensor, draws: Any) -> None:
        """One optimiser step."""
        inputs, targets = self.task.batch(self.images.index_select(0, order), order, draws)
        self.optimiser.zero_grad()
        loss = self.loss(inputs, targets)
        loss.backward()
        self.optimiser.step()
        self.sum += loss.detach()

    def capture(self, stream: torch.cuda.Stream) -> Callable[[int], None]:
        """A function: number of a step -> take it, as the replay of a graph on `stream`."""
        order, draws = self.orders[0].clone(), map_draws(torch.clone, self.drawn[0])
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step(order, draws)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self.step(order, draws)
        held = _leaves(draws)

        def take(number: int) -> None:
            with torch.cuda.stream(stream):
                order.copy_(self.orders[number % DRAWN])
                for mine, given in zip(held, _leaves(self.drawn[number % DRAWN]), strict=True):
                    mine.copy_(given)
                graph.replay()

        return take


def _leaves(draws: Any) -> list[Tensor]:
    return [draws] if isinstance(draws, Tensor) else [leaf for value in draws.values() for leaf in _leaves(value)]


def by_hand(case: Case, how: str, steps: int) -> float:
    """Images per second of `steps` steps of a hand-written loop, after 20 that do not count."""
    made = ByHand(case, compiled=how == "compiled + graph", fused=how != "plain")
    take = made.capture(torch.cuda.Stream()) if how != "plain" else None
    for number in range(20 + steps):
        if number == 20:
            torch.cuda.synchronize()
            began = time.perf_counter()
        if take:
            take(number)
        else:
            made.step(made.orders[number % DRAWN], made.drawn[number % DRAWN])
    torch.cuda.synchronize()
    return steps * case.batch_size / (time.perf_counter() - began)


def together(case: Case, students: int, steps: int) -> float:
    """Images per second of several captured students, all together, each on a stream of its own."""
    takes = [ByHand(case).capture(torch.cuda.Stream()) for _ in range(students)]
    for number in range(20 + steps):
        if number == 20:
            torch.cuda.synchronize()
            began = time.perf_counter()
        for take in takes:
            take(number)
    torch.cuda.synchronize()
    return steps * students * case.batch_size / (time.perf_counter() - began)


def contenders(name: str, steps: int, epochs: int) -> dict[str, Callable[[], float]]:
    """Name of each contender in a case -> one measurement."""
    case = CASES[name]
    made: dict[str, Callable[[], float]] = {}
    for how in ("plain", "graph", "compiled + graph"):
        made[how] = partial(by_hand, case, how, steps)
    for precision in ("bfloat16", "tf32", "float32"):
        made[f"ktray {precision}"] = partial(ktray, case, precision, epochs)
    made["ktray bfloat16, compiled"] = partial(ktray, case, "bfloat16", epochs + 1, compiled=True)
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--contenders", nargs="+", help="all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of the hand-written loops")
    parser.add_argument("--epochs", type=int, default=5, help="of ktray, of which the last ones count")
    parser.add_argument("--together", nargs="+", type=int, help="numbers of students at once, instead of the cases' contenders")
    options = parser.parse_args()
    for name in options.cases:
        if options.together:
            made = {str(n): partial(together, CASES[name], n, options.steps) for n in options.together}
        else:
            made = contenders(name, options.steps, options.epochs)
            made = {who: run for who, run in made.items() if not options.contenders or who in options.contenders}
        rates: dict[str, list[float]] = {who: [] for who in made}
        for _ in range(options.repeats):
            for who, run in made.items():
                rates[who].append(run())
                torch.cuda.empty_cache()
        against = statistics.median(next(iter(rates.values())))
        for who, found in rates.items():
            line = {
                "case": name,
                ("students" if options.together else "contender"): who,
                "images_per_s": round(statistics.median(found)),
            }
            line |= {"n": len(found), "lowest": round(min(found)), "highest": round(max(found))}
            line |= {"ratio_to_first": round(statistics.median(found) / against, 3), "device": torch.cuda.get_device_name(0)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

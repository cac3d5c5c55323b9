"""A judged network, and attempts that are killed, for tests of evaluations that train."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ktray import plugins
from ktray.checkpoints import Attempt
from ktray.checksums import seal
from ktray.features.judged_network import JudgedNetwork
from ktray.images import Images
from ktray.spec import Pooling
from ktray.training import loop


def judged_network(backbone: dict[str, Any] | None = None, seed: int = 0, device: str = "cpu") -> JudgedNetwork:
    """An untrained network as what is judged."""
    spec = plugins.parse("backbone", backbone or {"kind": "alexnet", "width": 0.125})

    def build() -> nn.Module:
        return loop.untrained_backbone(spec, seed).to(device).eval()

    def features(images: Images, views: object) -> list[np.ndarray]:
        raise AssertionError("an evaluation that trains read features")

    return JudgedNetwork(spec, None, Pooling(), "ktray", "float32", device, None, build, features)


class Killed(BaseException):
    """Raised where an attempt is killed."""


def attempt(folder: Path, start: Path | None = None, kill_at: int | None = None) -> Attempt:
    """An attempt that saves every checkpoint that it is asked for, and is killed after the first at `kill_at` or later."""

    def save(step: int, write: Callable[[Path], None]) -> None:
        directory = folder / f"checkpoint-{step:06d}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        write(directory)
        seal(directory, {"step": step, "seconds": 0.0})
        if kill_at is not None and step >= kill_at:
            raise Killed(str(directory))

    return Attempt(start, 0, save, lambda values: None)


def run_whole_and_killed(evaluate: Callable[[Attempt], dict[str, float]], folder: Path, kill_at: int):
    """The metrics of an evaluation that runs through, and those of one that is killed and continued."""
    whole = evaluate(attempt(folder / "whole"))
    try:
        evaluate(attempt(folder / "killed", kill_at=kill_at))
    except Killed as killed:
        start = Path(str(killed))
        return whole, evaluate(attempt(folder / "again", start=start))
    raise AssertionError("the evaluation asked for no checkpoint after the step at which it was to be killed")

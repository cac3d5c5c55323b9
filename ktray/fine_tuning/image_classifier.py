"""Fine-tuning of a judged network as a classifier: its new head, views of its training images, and its scores on several crops.

Legend: B batch size, C classes, V views (crops) of one image, S side of the images, s side of the crops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ktray import progress
from ktray.features.judged_network import JudgedNetwork
from ktray.fingerprint import seed_of
from ktray.images import Images
from ktray.training import loop, step_training
from ktray.training.step_task import Recipe, StepTask
from ktray.training.step_training import SeedResult, SeedRun, Shuffled

IDENTITY, REVISION = "image_classifier", 1
TOOLS = (loop, step_training)

TEST_BATCH = 128  # crops that are judged at once
RESIDENT_BYTES = 4 << 30  # up to this size all pixels stay in memory, as uint8


@contextmanager
def seeded(seed: int, *names: str) -> Iterator[None]:
    """Within a `with`, new weights are drawn from (seed, names); the caller's random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, *names))
        yield


def classifier(width: int, classes: int, hidden: Sequence[int], seed: int) -> nn.Sequential:
    """Fully connected layers of `hidden` widths with ReLU and dropout, as fc6 and fc7 of AlexNet, and a linear classifier."""
    with seeded(seed, "head"):
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU(inplace=True), nn.Dropout(0.5)]
            width = size
        return nn.Sequential(*layers, nn.Linear(width, classes))


class LayerReached(Exception):
    """Raised by a hook to end a forward pass at a layer."""


def modules_up_to(network: nn.Module, layer: str, size: int) -> list[nn.Module]:
    """The modules that run up to the end of `layer`, those that contain others only if they have weights of their own.

    Found by a forward pass of one grey image of `size` pixels, so the order in which a network states its modules is no matter.
    """
    begun: list[nn.Module] = []

    def stop(*_: object) -> None:
        raise LayerReached

    handles = [module.register_forward_pre_hook(lambda own, _: begun.append(own)) for module in network.modules()]
    handles.append(network.get_submodule(layer).register_forward_hook(stop))
    device = next(network.parameters()).device
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, size, size, device=device))
    except LayerReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [m for m in dict.fromkeys(begun) if not list(m.children()) or list(m.parameters(recurse=False))]


def retrained_after(network: JudgedNetwork, layer: str, size: int, seed: int) -> tuple[nn.Module, list[nn.Module]]:
    """A network whose modules up to the end of `layer` have the judged weights and all later ones new weights; the former."""
    known = network.build()
    fresh = loop.untrained_backbone(network.backbone, seed).to(network.device).eval()
    names = {module: name for name, module in known.named_modules()}
    frozen = []
    with torch.no_grad():
        for module in modules_up_to(known, layer, size):
            twin = fresh.get_submodule(names[module])
            own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
            for name, value in own.items():
                getattr(twin, name).copy_(value)
            if not list(twin.children()):
                frozen.append(twin)
            else:  # its other parts may be trained
                for parameter in twin.parameters(recurse=False):
                    parameter.requires_grad_(False)
    return fresh, frozen


def pixels_of(images: Images) -> Callable[[NDArray[np.int64]], Tensor]:
    """A function: indices (B,) -> pixels (B, S, S, 3) uint8. Images that fit in memory are read once."""
    if len(images) * images.size**2 * 3 <= RESIDENT_BYTES:
        held = torch.from_numpy(images.read(np.arange(len(images))))
        return lambda indices: held[torch.from_numpy(indices)]
    return lambda indices: torch.from_numpy(images.read(indices))


def shifted_crops(pixels: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A random crop (B, s, s, 3) of each image (B, S, S, 3) at its own scale, mirrored with probability one half."""
    room = pixels.shape[1] - side
    corners = torch.randint(room + 1, (len(pixels), 2), generator=generator)
    mirrored = torch.rand(len(pixels), generator=generator) < 0.5
    crops = [image[y : y + side, x : x + side] for image, (y, x) in zip(pixels, corners.tolist(), strict=True)]
    seen = torch.stack(crops)
    return torch.where(mirrored[:, None, None, None], seen.flip(2), seen)


def resized_crops(pixels: Tensor, least: float, generator: torch.Generator) -> Tensor:
    """A random crop of each image (B, S, S, 3), enlarged to S, mirrored with probability one half; uint8.

    Source: Szegedy et al., "Going deeper with convolutions" (2015), section 6: `least` to 1 of the area, sides 3:4 to 4:3.
    """
    count, size = len(pixels), pixels.shape[1]
    area = torch.empty(count).uniform_(least, 1.0, generator=generator)
    ratio = torch.empty(count).uniform_(-1.0, 1.0, generator=generator).mul(np.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    place = torch.rand(2, count, generator=generator) * 2 - 1
    sign = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    zero = torch.zeros(count)
    rows = [
        torch.stack([width * sign, zero, place[0] * (1 - width)], 1),
        torch.stack([zero, height, place[1] * (1 - height)], 1),
    ]
    grid = nn.functional.affine_grid(torch.stack(rows, 1), [count, 3, size, size], align_corners=False)
    seen = nn.functional.grid_sample(
        pixels.permute(0, 3, 1, 2).float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return seen.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def ten_crops(pixels: Tensor, side: int) -> Tensor:
    """The four corners and the centre of each image, and their mirror images: (B, 10, s, s, 3).

    Source: Krizhevsky, Sutskever and Hinton, NeurIPS 2012, section 4.1.
    """
    room = pixels.shape[1] - side
    corners = [(0, 0), (0, room), (room, 0), (room, room), (room // 2, room // 2)]
    crops = [pixels[:, y : y + side, x : x + side] for y, x in corners]
    return torch.stack([*crops, *(crop.flip(2) for crop in crops)], 1)


def centre_crop(pixels: Tensor, side: int) -> Tensor:
    """The centre of each image: (B, 1, s, s, 3)."""
    start = (pixels.shape[1] - side) // 2
    return pixels[:, None, start : start + side, start : start + side]


def train(
    network: JudgedNetwork,
    model: nn.ModuleDict,
    recipe: Recipe,
    run: SeedRun,
    *,
    rows: NDArray[np.int64],
    batch_size: int,
    views: Callable[[NDArray[np.int64], torch.Generator], Tensor],
    loss: Callable[[Tensor, NDArray[np.int64]], Tensor],
    frozen: Sequence[nn.Module] = (),
) -> None:
    """Train `model` in place as a classifier.

    Args:
        rows: images to train on.
        views: (indices (B,), a CPU generator) -> one random view of each (B, s, s, 3) uint8.
        loss: (logits (B, C), indices (B,)) -> mean loss.
    """
    shuffled = Shuffled(rows, batch_size, run.seed)

    def batch(step: int, generator: torch.Generator) -> tuple[Tensor, NDArray[np.int64]]:
        indices = shuffled.of(step)
        return views(indices, generator), indices

    def terms(model: nn.ModuleDict, given: tuple[Tensor, NDArray[np.int64]]) -> dict[str, Tensor]:
        seen, indices = given
        logits = model["head"](model["backbone"](network.inputs(seen.to(network.device, non_blocking=True))))
        return {"loss": loss(logits.float(), indices)}

    task = StepTask(batch, terms, frozen)
    loop.fit_steps(model, task, recipe, run.seed, device=network.device, start=run.start, on_report=run.on_report)


def scores(
    network: JudgedNetwork,
    model: nn.ModuleDict,
    count: int,
    crops: Callable[[NDArray[np.int64]], Tensor],
    combine: Callable[[Tensor], Tensor],
) -> NDArray[np.float64]:
    """Scores (N, C) of images: `combine` of their logits, averaged over crops.

    Args:
        crops: indices (B,) -> (B, V, s, s, 3) uint8.
        combine: logits -> what is averaged, such as probabilities.
    """
    model.eval()
    found = []
    views = crops(np.arange(min(1, count))).shape[1]
    size = max(1, TEST_BATCH // views)
    with torch.inference_mode():
        for start in range(0, count, size):
            seen = crops(np.arange(start, min(start + size, count)))
            flat = network.inputs(seen.flatten(0, 1).to(network.device))
            with network.computing():
                logits = model["head"](model["backbone"](flat))
            averaged = combine(logits.double()).unflatten(0, seen.shape[:2]).mean(1)
            found.append(averaged.cpu().numpy())
            progress.advance("judged", len(seen))
    return np.concatenate(found)


def result_of(log_shares: Tensor, truth: Tensor) -> SeedResult:
    """`top1` and `loss` (nats) of judged images, on average and of each.

    Args:
        log_shares: (N, C) float64 on the CPU, logarithms of the probabilities of the classes.
        truth: (N,) int64, the right ones.
    """
    right = (log_shares.argmax(1) == truth).double()
    losses = nn.functional.nll_loss(log_shares, truth, reduction="none")
    metrics = {"top1": float(right.mean()), "loss": float(nn.functional.nll_loss(log_shares, truth))}
    return SeedResult(metrics, {"top1": right.numpy(), "loss": losses.numpy()})

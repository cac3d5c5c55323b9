"""The batches of a training: which images each step sees, their pixels, and the draws of each step, uploaded ahead of it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktray.fingerprint import seed_of
from ktray.images import Images
from ktray.ops import resizing
from ktray.ops.random_draws import Draws
from ktray.training.task import Task

# Up to this size all pixels are held as one tensor; beyond it, each batch is read while the previous one trains.
RESIDENT_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}

_STORED_BYTES = 1 << 28  # of images that go to the device at once to be resized there
_FIRST_BLOCK, _LARGEST_BLOCK = 4, 64  # steps whose draws are uploaded together: few at first, because the GPU waits for them
_BLOCK_BYTES = 64 << 20
_THREADED_BYTES = 1 << 18  # draws of a step from which on several threads make those of several steps
_THREADS = min(8, os.cpu_count() or 1)


class Batches:
    """Shuffled batches of the kept images.

    The last batch of an epoch may be smaller; a last batch of one image is dropped, because batch norm cannot use it.

    Raises:
        ValueError: fewer than two images are kept.
    """

    def __init__(self, images: Images, task: Task, size: int, seed: int, device: torch.device) -> None:
        self.images, self.task, self.size, self.seed, self.device = images, task, size, seed, device
        self.kept = torch.arange(len(images)) if task.keep is None else task.keep
        if len(self.kept) < 2:
            raise ValueError(f"training needs two images or more, and {len(self.kept)} of {len(images)} are kept")
        self.steps = len(self.kept) // size + (len(self.kept) % size > 1)
        self._layouts: dict[int, RowLayout] = {}

    @functools.cached_property
    def resident(self) -> Tensor | None:
        """The pixels of all kept images on the device, if they fit there."""
        if len(self.kept) * self.images.size**2 * 3 > RESIDENT_BYTES.get(self.device.type, 0):
            return None
        if self.images.stored is None:
            return torch.from_numpy(self.images.read(self.kept.numpy())).to(self.device)
        parts = self.kept.split(max(1, _STORED_BYTES // (self.images.stored.size**2 * 3)))
        return torch.cat([self._resized(self._read(part).to(self.device)) for part in parts])

    def _resized(self, pixels: Tensor) -> Tensor:
        """Pixels on the device at the size of the images, if they were read as they are stored."""
        return pixels if self.images.stored is None else resizing.resized(pixels, self.images.size)

    @functools.cached_property
    def kept_on_device(self) -> Tensor:
        """Positions among the kept images -> indices of the images, on the device."""
        return self.kept.to(self.device)

    def made_for_each_step(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Draws]]:
        """(pixels, indices, draws) of each step on the CPU, made when they are needed."""
        parts = self.order(epoch)
        for step, (pixels, positions) in enumerate(zip(self.pixels(parts), parts, strict=True)):
            indices = self.kept[positions]
            yield pixels, indices, self.task.draw(indices, self._generator(epoch, step))

    def uploaded_ahead(self, epoch: int, lrs: Sequence[float]) -> Iterator[tuple[RowLayout, Tensor, list[Tensor]]]:
        """The layout of the row, the row of bytes, and the pixels if they are not resident, of each step, on the device.

        A row holds the `positions` of the images among the kept ones, the learning rate `lr` and the `draws`. Those of several
        steps are made and uploaded together, while the device still works on the steps before.

        Args:
            lrs: the learning rate of each step.
        """
        parts = self.order(epoch)
        pixels = iter(()) if self.resident is not None else self.pixels(parts)
        start, length = 0, _FIRST_BLOCK
        while start < len(parts):
            layout = self._layout(len(parts[start]))
            length = max(1, min(length, _BLOCK_BYTES // layout.width))
            block = [step for step in range(start, min(start + length, len(parts))) if len(parts[step]) == layout.count]
            for row in self._upload(layout, block, lambda step: self._row(epoch, step, parts[step], lrs[step])):
                yield layout, row, [] if self.resident is not None else [next(pixels)]
            start, length = start + len(block), min(2 * length, _LARGEST_BLOCK)

    def _row(self, epoch: int, step: int, positions: Tensor, lr: float) -> Draws:
        draws = self.task.draw(self.kept[positions], self._generator(epoch, step))
        return {"positions": positions, "lr": torch.tensor(lr), "draws": draws}

    def _generator(self, epoch: int, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.seed, "batch", epoch, step))

    def _layout(self, count: int) -> RowLayout:
        if count not in self._layouts:
            self._layouts[count] = RowLayout(count, self._row(0, 0, torch.arange(count), 0.0))
        return self._layouts[count]

    def _upload(self, layout: RowLayout, steps: list[int], made: Callable[[int], Draws]) -> Tensor:
        """Rows (steps, width) uint8 on the device."""
        rows = torch.empty(len(steps), layout.width, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

        def put(number: int) -> None:
            layout.pack(rows[number], made(steps[number]))

        if layout.width < _THREADED_BYTES:
            for number in range(len(steps)):
                put(number)
        else:
            list(self._threads.map(put, range(len(steps))))
        return rows.to(self.device, non_blocking=True)

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_THREADS)

    def order(self, epoch: int) -> list[Tensor]:
        """Positions among the kept images of each batch of one epoch."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "shuffle", epoch))
        if self.task.order is None:
            positions = torch.randperm(len(self.kept), generator=generator)
        else:
            ordered = self.task.order(generator)
            positions = torch.searchsorted(self.kept, ordered).clamp_(max=len(self.kept) - 1)
            if len(ordered) != len(self.kept) or not torch.equal(self.kept[positions], ordered):
                raise ValueError(
                    f"the order of the task must name {len(self.kept)} of the {len(self.kept)} images that it keeps"
                )
        return list(positions.split(self.size)[: self.steps])

    def pixels(self, parts: list[Tensor]) -> Iterator[Tensor]:
        """The pixels of each batch on the device; those that are not resident are read one batch ahead."""
        if self.resident is not None:
            for positions in parts:
                yield self.resident.index_select(0, positions.to(self.device, non_blocking=True))
            return
        with ThreadPoolExecutor(1) as reader:
            pending = reader.submit(self._read, self.kept[parts[0]])
            for positions in parts[1:]:
                read, pending = pending.result(), reader.submit(self._read, self.kept[positions])
                yield self._resized(read.to(self.device, non_blocking=True))
            yield self._resized(pending.result().to(self.device, non_blocking=True))

    def _read(self, indices: Tensor) -> Tensor:
        """The pixels of images as they are stored, on the CPU."""
        pixels = torch.from_numpy((self.images.stored or self.images).read(indices.numpy()))
        return pixels.pin_memory() if self.device.type == "cuda" else pixels


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in a row."""

    offset: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class RowLayout:
    """Where the tensors of a step lie in one row of bytes, so that a single copy uploads all of them.

    Args:
        count: B, images in the batch.
        example: tensors as every step of this size has them.
    """

    def __init__(self, count: int, example: Draws) -> None:
        self.count, self.width = count, 0
        self._slots = self._place(example)

    def _place(self, tensors: Draws) -> dict[str, Any]:
        slots: dict[str, Any] = {}
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                slots[name] = self._place(value)
                continue
            slots[name] = _Slot(self.width, self.width + value.nbytes, tuple(value.shape), value.dtype)
            self.width += -(-value.nbytes // 16) * 16  # a view as another type must begin at a multiple of its size
        return slots

    def pack(self, row: Tensor, tensors: Draws) -> None:
        """Write `tensors` into a row (width,) uint8 on the CPU.

        Raises:
            ValueError: they are not those of the example in name, shape or type.
        """
        _pack(self._slots, row, tensors)

    def unpack(self, row: Tensor) -> dict[str, Any]:
        """The tensors in a row (width,) uint8, as views of it."""
        return _unpack(self._slots, row)


def _pack(slots: dict[str, Any], row: Tensor, tensors: Draws) -> None:
    if slots.keys() != tensors.keys():
        raise ValueError(f"the task drew {sorted(tensors)} in one step and {sorted(slots)} in another of the same size")
    for name, slot in slots.items():
        value = tensors[name]
        if not isinstance(slot, _Slot):
            _pack(slot, row, value)
            continue
        if (tuple(value.shape), value.dtype) != (slot.shape, slot.dtype):
            raise ValueError(f"the draw {name!r} is {value.dtype} {tuple(value.shape)} in one step and {slot} in another")
        row[slot.offset : slot.end] = value.contiguous().view(-1).view(torch.uint8)


def _unpack(slots: dict[str, Any], row: Tensor) -> dict[str, Any]:
    return {
        name: row[slot.offset : slot.end].view(slot.dtype).view(slot.shape) if isinstance(slot, _Slot) else _unpack(slot, row)
        for name, slot in slots.items()
    }

"""A network's forward pass over many images on a GPU: a CUDA graph, while the next batches are read and copied.

All batches have one size, and the last is filled up, so the features of an image do not depend on how many there are.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktray.images import Images

Forward = Callable[[Tensor], list[Tensor]]
"""(B, H, W, 3) uint8 on the device -> the features (B, D) float32 of each view; the same tensor operations for every batch."""

PIXEL_BYTES = 1024  # of all activations that live at once, per pixel of the image: a VGG's first layers, the widest there are
SHARE_OF_MEMORY = 1 / 8  # of the GPU, for these activations
MAX_BATCH, MAX_PIXELS = 2048, 1 << 24  # images and pixels of a batch; more make no GPU faster
_READERS, _SLOTS, _IN_FLIGHT = 2, 4, 2  # threads that read; batches that are read, copied or computed; of these, on the GPU

log = logging.getLogger("ktray")


def batch_size(side: int, device_bytes: int) -> int:
    """Images per batch on a GPU, a power of two that depends on nothing else, since it changes the last bits of features.

    Args:
        side: of the images, in pixels.
        device_bytes: total memory of the GPU.
    """
    fitting = min(SHARE_OF_MEMORY * device_bytes / (PIXEL_BYTES * side**2), MAX_PIXELS / side**2, MAX_BATCH)
    return 1 << max(0, int(fitting).bit_length() - 1)


@dataclass(frozen=True)
class _Slot:
    """Buffers of one batch on its way: read into `pinned`, copied to `pixels`, computed into `rows`, copied to `host`."""

    pinned: Tensor
    pixels: Tensor
    rows: tuple[Tensor, ...]
    host: tuple[Tensor, ...]
    arrived: torch.cuda.Event
    computed: torch.cuda.Event
    done: torch.cuda.Event


class GraphedPass:
    """A forward pass, captured for batches of `size` images of one side; kernel by kernel where it cannot be captured.

    The graph reads the network's weights where they are, so weights that are copied into the same tensors count. A compiled
    program may have copies of its own.

    Attributes:
        graphed: whether it is a CUDA graph.
        compiled: whether torch has compiled it, which changes the last bits of features.
        activation_bytes: most memory that its activations may take, by `batch_size`.
        device_bytes: total memory of the GPU.
    """

    def __init__(
        self,
        forward: Forward,
        size: int,
        side: int,
        device: str,
        computing: Callable[[], AbstractContextManager[None]],
        compiled: bool = False,
    ) -> None:
        """Warm up and capture.

        Args:
            forward: see `Forward`; its precision is that of `computing`.
            computing: a context in which `forward` runs.
            compiled: compile it first, which takes from several seconds to a minute.

        Raises:
            torch.OutOfMemoryError: a batch does not fit.
            Exception: what `forward` raises.
        """
        self.size, self.device, self.computing = size, torch.device(device), computing
        self.activation_bytes = PIXEL_BYTES * side**2 * size
        self.device_bytes = torch.cuda.get_device_properties(device).total_memory
        self.static = torch.zeros(size, side, side, 3, dtype=torch.uint8, device=device)
        self.compute, self.inwards, self.outwards = (torch.cuda.Stream(device) for _ in range(3))
        self.forward, self.compiled = forward, False
        torch.cuda.synchronize(device)
        with torch.cuda.device(device), torch.no_grad():
            if compiled:
                self._compile()
            with torch.cuda.stream(self.compute):
                for _ in range(2):
                    self.outputs = self._run()
            self.compute.synchronize()
            self.graph = self._captured()
            self.slots = [self._slot(side) for _ in range(_SLOTS)]
        torch.cuda.synchronize(device)
        self.graphed = self.graph is not None

    def _run(self) -> list[Tensor]:
        """One pass. Autocast keeps rounded copies of the weights until its context ends: a graph must not read those of another
        pass, which are freed, and would be of the weights that were there at the time."""
        with self.computing():
            return self.forward(self.static)

    def _compile(self) -> None:
        """Replace `forward` by a compiled one; where that fails, leave it and say so."""
        from torch.fx.experimental.proxy_tensor import make_fx

        try:
            # The traced program has the tensor operations alone: hooks on layers and the end at the last one leave no trace.
            with self.computing():
                traced = make_fx(self.forward)(self.static)
            program: Any = torch.compile(traced, dynamic=False)

            def compiled(images: Tensor) -> list[Tensor]:
                with torch.autocast(images.device.type, enabled=False):  # its casts are part of the program
                    found: list[Tensor] = program(images)
                    return found

            with self.computing():
                compiled(self.static)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - compilers raise many kinds, and the features do not need one
            log.warning("features are extracted without compiling the network: %s: %s", type(error).__name__, str(error)[:300])
            return
        self.forward, self.compiled = compiled, True

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.compute):
                self.outputs = self._run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # it synchronises, or allocates in a way that a graph cannot
            torch.cuda.synchronize(self.device)
            log.info("features are extracted kernel by kernel: %s", str(error)[:300])
            return None
        return graph

    def _slot(self, side: int) -> _Slot:
        host = tuple(torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True) for rows in self.outputs)
        pinned = torch.zeros(self.size, side, side, 3, dtype=torch.uint8, pin_memory=True)
        rows = tuple(torch.empty_like(each, memory_format=torch.contiguous_format) for each in self.outputs)
        events = (torch.cuda.Event() for _ in range(3))
        return _Slot(pinned, torch.empty_like(self.static), rows, host, *events)

    def batches(self, images: Images, start: int, stop: int) -> Iterator[tuple[int, list[NDArray[np.float32]]]]:
        """The index of the first image, and the features (n, D) of each view, of one batch after the other.

        The arrays are overwritten once the next one is asked for.
        """
        starts = iter(range(start, stop, self.size))
        free, reading, running = deque(self.slots), deque[Any](), deque[Any]()
        with ThreadPoolExecutor(_READERS, thread_name_prefix="ktray-read") as readers:

            def read_ahead() -> None:
                while free and (at := next(starts, None)) is not None:
                    slot, count = free.popleft(), min(self.size, stop - at)
                    reading.append((slot, at, count, readers.submit(_read, images, at, count, slot.pinned)))

            try:
                read_ahead()
                while reading or running:
                    if reading and len(running) < _IN_FLIGHT:
                        slot, at, count, pixels = reading.popleft()
                        pixels.result()
                        self._launch(slot)
                        running.append((slot, at, count))
                        continue
                    slot, at, count = running.popleft()
                    slot.done.synchronize()
                    yield at, [rows[:count].numpy() for rows in slot.host]
                    free.append(slot)
                    read_ahead()
            finally:
                for *_, pixels in reading:
                    pixels.cancel()
                torch.cuda.synchronize(self.device)

    def _launch(self, slot: _Slot) -> None:
        """Start copying, computing and copying back a batch that was read, each on a stream of its own."""
        with torch.cuda.device(self.device), torch.no_grad():
            with torch.cuda.stream(self.inwards):
                slot.pixels.copy_(slot.pinned, non_blocking=True)
                slot.arrived.record()
            with torch.cuda.stream(self.compute):
                slot.arrived.wait()
                self.static.copy_(slot.pixels)
                if self.graph is not None:
                    self.graph.replay()
                else:
                    self.outputs = self._run()
                for rows, output in zip(slot.rows, self.outputs, strict=True):
                    rows.copy_(output)
                slot.computed.record()
            with torch.cuda.stream(self.outwards):
                slot.computed.wait()
                for host, rows in zip(slot.host, slot.rows, strict=True):
                    host.copy_(rows, non_blocking=True)
                slot.done.record()


def _read(images: Images, at: int, count: int, pinned: Tensor) -> None:
    """Read a batch into a buffer; rows beyond its images become black."""
    pinned[:count].copy_(torch.from_numpy(images.read(np.arange(at, at + count, dtype=np.int64))))
    pinned[count:].zero_()

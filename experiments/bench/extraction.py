"""How fast are features extracted, against a bare loop, a compiled loop and a tuned DataLoader, in one run?

    python -m experiments.bench.extraction --device cuda --cases resnet18-32 alexnet-32 resnet50-224 jpeg-224
    python -m experiments.bench.extraction --cases alexnet-32 jpeg-64 --images 2000 --threads 1

The contenders take turns, so that all meet the same load. One JSON line each: median images per second, the ratio to a rival,
the seconds of its first run (loading, capturing, compiling), device and n. ktray's images are in host memory, and its
features end there, as float32. The loops of the cases without files have their images on the device and leave the features
there, which is the most that a loop can do. In the cases of JPEGs all contenders decode the same files of 500 x 375 pixels;
`decoding` reads them and computes nothing, `computing` has them decoded.

What was seen: on one H200, ktray compiled has 0.87 (ResNet-18 at 32 px) and 0.91 (ResNet-50 at 224 px) of the rate of the
compiled loop, and the bits of its graph are those of the eager pass in every precision; see README.md in this folder.
On two busy CPU cores, images per second of processor time, AlexNet at 32 px: with 256 images (n = 2) ktray 306, bare loop
357, simple loop 343; with 768 (n = 1) ktray 326, bare loop 337. ktray loads the network and lays out its weights once per
extraction.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ktray import images as image_sets
from ktray import plugins
from ktray.features import extraction
from ktray.images import Images
from ktray.ops import augmentation, precision
from ktray.spec import Pooling
from ktray.training import loop

RESNET_18 = {"kind": "resnet", "depth": 18}
RESNET_50 = {"kind": "resnet", "depth": 50, "form": "full"}
ALEXNET = {"kind": "alexnet"}
CASES: dict[str, tuple[dict[str, Any], int, int]] = {  # network, side of the images, images per second of an H200, roughly
    "resnet18-32": (RESNET_18, 32, 150_000),
    "alexnet-32": (ALEXNET, 32, 300_000),
    "resnet50-224": (RESNET_50, 224, 15_000),
    "jpeg-224": (RESNET_50, 224, 4_000),
    "jpeg-64": (ALEXNET, 64, 6_000),
}
ENCODED = (500, 375)  # width and height of the JPEG files, as of ImageNet


@dataclass(frozen=True)
class Case:
    """Images, a network with weights, and where it runs."""

    images: Images
    files: list[Path]
    backbone: Any
    weights: Path
    side: int
    device: str
    batch: int


Contender = Callable[[Case], Callable[[], int]]
"""A case -> a function that extracts the features of all images once and returns their number."""


def ktray(computed_in: str, compiled: bool = False) -> Contender:
    """What a stage calls. `compiled`: as for so many images that compiling the network pays."""

    def prepare(case: Case) -> Callable[[], int]:
        view = extraction.network_view(case.backbone, None, Pooling(), computed_in=computed_in)  # type: ignore[arg-type]
        expected = 10**9 if compiled else None

        def run() -> int:
            (rows,) = extraction.extract_views([view], case.weights, None, case.images, case.device, expected=expected)
            assert rows is not None
            return len(rows)

        return run

    return prepare


def network_of(case: Case) -> nn.Module:
    """The network on the device, ready to run."""
    network = extraction.trained_network(case.backbone, case.weights).to(case.device).eval()
    return network.to(memory_format=torch.channels_last)


def resident_loop(computed_in: str, compiled: bool = False) -> Contender:
    """A loop over images that are on the device, as one would write it in a notebook."""

    def prepare(case: Case) -> Callable[[], int]:
        network = network_of(case)
        forward: Any = torch.compile(lambda pixels: network(augmentation.to_float(pixels))) if compiled else None
        pixels = torch.from_numpy(case.images.read(np.arange(len(case.images)))).to(case.device)
        length = len(pixels) // case.batch * case.batch or len(pixels)  # whole batches: a compiled program has one shape

        @torch.no_grad()
        def run() -> int:
            with precision.computing_in(computed_in, case.device):
                for part in pixels[:length].split(case.batch):
                    (forward or (lambda batch: network(augmentation.to_float(batch))))(part)
            _wait(case.device)
            return length

        return run

    return prepare


def simple_loop(case: Case) -> Callable[[], int]:
    """Read, copy, compute and copy back, one batch of 256 after the other, in float32."""
    network = network_of(case)

    @torch.inference_mode()
    def run() -> int:
        found = []
        for at in range(0, len(case.images), 256):
            pixels = case.images.read(np.arange(at, min(at + 256, len(case.images))))
            found.append(network(augmentation.to_float(torch.from_numpy(pixels).to(case.device))).cpu())
        return len(torch.cat(found))

    return run


class _Files(torch.utils.data.Dataset[Tensor]):
    """JPEG files, decoded and resized by Pillow as torchvision's transforms do it."""

    def __init__(self, files: list[Path], side: int) -> None:
        from torchvision.transforms import v2

        self.files = files
        self.transform = v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as image:
            found: Tensor = self.transform(image.convert("RGB"))
            return found


def data_loader(case: Case) -> Callable[[], int]:
    """A tuned DataLoader: a process per core that stays, pinned memory, uint8 until the device, and a bfloat16 network."""
    network, cores = network_of(case), len(os.sched_getaffinity(0))
    on_gpu = case.device != "cpu"
    loader = torch.utils.data.DataLoader(
        _Files(case.files, case.side),
        batch_size=case.batch,
        num_workers=cores,
        pin_memory=on_gpu,
        persistent_workers=True,
        prefetch_factor=4,
    )

    @torch.no_grad()
    def run() -> int:
        count = 0
        with precision.computing_in("bfloat16" if on_gpu else "float32", case.device):
            for pixels in loader:
                count += len(
                    network(augmentation.to_float(pixels.to(case.device, non_blocking=True).permute(0, 2, 3, 1))).cpu()
                )
        return count

    return run


def decoding(case: Case) -> Callable[[], int]:
    """Reading alone: no contender can be faster than this with ktray's decoder."""

    def run() -> int:
        for at in range(0, len(case.images), case.batch):
            case.images.read(np.arange(at, min(at + case.batch, len(case.images))))
        return len(case.images)

    return run


def contenders(name: str, device: str) -> dict[str, Contender]:
    """The contenders of a case on a device."""
    if name.startswith("jpeg"):
        fast = "bfloat16" if device != "cpu" else "float32"
        return {"ktray": ktray(fast), "tuned DataLoader": data_loader, "decoding": decoding, "computing": resident_loop(fast)}
    if device == "cpu":
        return {"ktray": ktray("float32"), "bare loop": resident_loop("float32"), "simple loop": simple_loop}
    return {
        "ktray bfloat16": ktray("bfloat16"),
        "ktray bfloat16, compiled": ktray("bfloat16", compiled=True),
        "ktray float32": ktray("float32"),
        "bare loop bfloat16": resident_loop("bfloat16"),
        "compiled loop bfloat16": resident_loop("bfloat16", compiled=True),
        "simple loop": simple_loop,
    }


class _Threads:
    """A pool of threads, in which Pillow decodes."""

    workers = worked = len(os.sched_getaffinity(0))

    def map(self, function: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any = None) -> list[Any]:
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(lambda item: function(item, shared), items))


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _pixels(count: int, side: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """Smooth images with noise, (height, width, 3), which take as long to decode as photographs."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(side, Image.Resampling.BICUBIC)
        yield np.clip(np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (*side[::-1], 3)), 0, 255).astype(np.uint8)


def case_of(name: str, folder: Path, count: int, device: str, batch: int) -> Case:
    """The case, with its data set written as a stage writes it."""
    network, side, _ = CASES[name]
    backbone = plugins.parse("backbone", network)
    model = loop.untrained_backbone(backbone, 0)
    weights = folder / "weights"
    weights.mkdir(parents=True)
    save_file(
        {f"backbone.{key}": value.contiguous() for key, value in model.state_dict().items()}, weights / "weights.safetensors"
    )
    files: list[Path] = []
    some = list(_pixels(64, ENCODED if name.startswith("jpeg") else (side, side)))
    if name.startswith("jpeg"):
        (folder / "files").mkdir()
        for index in range(count):
            files.append(folder / "files" / f"{index:06d}.jpg")
            if index < len(some):
                Image.fromarray(some[index]).save(files[-1], quality=90)
            else:
                files[-1].write_bytes(files[index % len(some)].read_bytes())
        spec = plugins.parse("dataset", {"kind": "folder", "path": str(folder / "files"), "size": side, "split": {"val": 0}})
        image_sets.write(spec, folder / "images", _Threads(), memmap_bytes=0)
        opened = image_sets.open_split(folder / "images", "train", spec)
    else:
        repeated = np.resize(np.stack(some), (count, side, side, 3))
        opened = Images(count, side, lambda rows: np.take(repeated, rows, axis=0))
    return Case(opened, files, backbone, weights, side, device, batch)


def measure(name: str, args: argparse.Namespace, folder: Path) -> None:
    """Run the contenders of a case in turn and print a JSON line for each."""
    count = args.images or int(CASES[name][2] * args.seconds)
    case = case_of(name, folder / name, count, args.device, args.batch or (2048 if CASES[name][1] < 64 else 256))
    runs, starts, rates, captured = {}, {}, {}, {}
    for contender, prepare in contenders(name, args.device).items():
        if args.contenders and contender not in args.contenders:
            continue
        began = time.perf_counter()
        runs[contender] = prepare(case)
        runs[contender]()
        starts[contender], rates[contender] = time.perf_counter() - began, []
        captured[contender] = extraction._kept[:]  # a worker has one network at a time; here they take turns
    for _ in range(args.repeats):
        for contender, run in runs.items():
            extraction._kept[:] = captured[contender]
            began = time.perf_counter()
            done = run()
            rates[contender].append(done / (time.perf_counter() - began))
    if not args.repeats:
        return
    rival = next(each for each in ("tuned DataLoader", "compiled loop bfloat16", "bare loop") if each in rates)
    reference = statistics.median(rates[rival])
    device = torch.cuda.get_device_name() if args.device != "cpu" else f"{os.cpu_count()} cores"
    for contender, found in rates.items():
        rate = statistics.median(found)
        line = {
            "case": name,
            "contender": contender,
            "images_per_s": round(rate),
            "ratio": round(rate / reference, 3),
            "to": rival,
        }
        line |= {"spread": [round(min(found)), round(max(found))], "n": len(found), "images": count, "batch": case.batch}
        print(json.dumps({**line, "first_run_s": round(starts[contender], 2), "device": device}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--contenders", nargs="+", help="names as printed; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, help="per case; by default as many as --seconds of an H200")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--batch", type=int, help="of the loops; by default 2048, or 256 at 224 px")
    parser.add_argument(
        "--repeats", type=int, default=3, help="0 only prepares, which leaves compiled programs in torch's cache"
    )
    parser.add_argument("--threads", type=int, help="of torch; by default its own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.cases:
            measure(name, args, Path(folder))


if __name__ == "__main__":
    main()

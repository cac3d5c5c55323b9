"""Are the clusters of 200,000 real features the same bits, whatever computes them?

    python -m experiments.same_clusters /tmp/features --images DIR          features of Fashion-MNIST, then all configurations
    python -m experiments.same_clusters /tmp/features --only cpu --jobs 4   on CPUs alone, four configurations at a time

The features (200,000 x 512) are those of a network with random weights, of the images of Fashion-MNIST, mirrored and shifted.
The network computes with whole numbers, so that its features, too, are the same bits on every machine. k = 1000, 20
iterations. Configurations: 1, 2, 3 and 7 worker processes; the kernels of four processors in OpenBLAS; products in float32 and
bfloat16, of rows and of their leading directions, and those of faiss; on a GPU float32, TF32, float16 and bfloat16, and rows
that are read again in each iteration; the stage as a search runs it, by two Ray actors on CPUs and by one on a GPU beside them;
and a clustering that two processes begin and a GPU ends. One JSON line for the features and for each configuration, with the
sha256 of labels and centroids; the last line says whether all are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.bench.kmeans import stages_on_ray
from ktray.clustering import gpu_kmeans, grid, kmeans, lower_bounds, nearest_centroids, pseudo_labelling
from ktray.clustering.grid import Codebook
from ktray.scheduler.resources import SPLITTABLE, ResourceRequest, RuntimeSettings

ROWS, SHARD_ROWS = 200_000, 8192
KERNELS = ("Haswell", "Zen", "SkylakeX", "Sandybridge")


def configurations(device: str) -> list[dict[str, Any]]:
    """What may not matter: `workers`, `kernels`, and for the product its `type` and whether it takes `directions`."""
    found: list[dict[str, Any]] = []
    if device in ("cpu", "all"):
        found += [{"workers": number} for number in (1, 2, 3, 7)]
        found += [{"kernels": name, "type": "float32", "directions": False} for name in KERNELS]
        found += [{"type": name, "directions": True} for name in ("float32", "bfloat16")]
        found += [{"type": "bfloat16", "directions": False}, {"type": "float32", "directions": False, "faiss": True}]
        found += [{"ray": 2, "device": "cpu"}]
    if device in ("cuda", "all") and torch.cuda.is_available():
        found += [{"device": "cuda", "screener": name} for name in gpu_kmeans.SCREENERS]
        found += [{"device": "cuda", "screener": "float16", "budget": 900 << 20}]
        found += [{"ray": 2, "device": "cuda"}, {"device": "cuda", "begun_by": 2}]
    return found


class Processes:
    """A pool of processes, each of which gets the same items in every call."""

    def __init__(self, count: int, begin: Callable[[], None]) -> None:
        self.worker_count = count
        self._processes = [ProcessPoolExecutor(1, initializer=begin) for _ in range(count)]

    def map(self, function: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any = None) -> list[Any]:
        size = -(-len(items) // self.worker_count)
        waiting = [self._processes[place // size].submit(function, item, shared) for place, item in enumerate(items)]
        return [each.result() for each in waiting]


def choose_product(name: str | None, directions: bool | None, by_faiss: bool) -> None:
    """Set what this process multiplies; None leaves the choice to ktray."""
    torch.set_num_threads(1)
    if by_faiss:
        nearest_centroids.search_among = search_by_faiss
    if name:
        dtype = getattr(torch, name)
        lower_bounds.product_type = lambda: dtype  # type: ignore[assignment]
    if directions is not None:
        lower_bounds.basis_may_pay = lambda width, k: directions  # type: ignore[assignment]
        lower_bounds.Search.basis_pays = lambda self: directions  # type: ignore[method-assign]


def search_by_faiss(codebook: Codebook) -> nearest_centroids.Search:
    """As `nearest_centroids.search_among` for one centroid: faiss finds two; where their order is not certain, D decides."""
    import faiss

    faiss.omp_set_num_threads(1)
    points = codebook.centroid_rows
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(points.astype(np.float32))
    largest = (points**2).sum(axis=1).max()

    def search(rows: NDArray[np.float32], m: int = 1) -> tuple[NDArray[np.int64], int]:
        scores, numbers = index.search(rows, 2)
        # Twice the error of a float32 sum of d products and two squares, and of rounding the centroids (docs/clustering.md).
        error = 4 * (points.shape[1] + 16) * 2.0**-24 * ((rows.astype(np.float64) ** 2).sum(axis=1) + 2 * largest)
        unclear = np.flatnonzero(~(scores[:, 1] - scores[:, 0] > error))
        labels = numbers[:, 0].copy()
        for row in unclear:
            pairs = np.zeros(len(points), np.int64), np.arange(len(points))
            high, low = grid.squared_distances(rows[row : row + 1], codebook, *pairs)
            labels[row] = np.lexsort((pairs[1], low, high))[0]
        return labels[:, None], len(unclear)

    return search


def run(folder: Path, configuration: dict[str, Any], k: int, iterations: int) -> dict[str, Any]:
    """The digests of labels and centroids of one configuration, in this process."""
    given = dict(configuration)
    if "ray" in given:
        return {**configuration, **by_ray(folder, given["ray"], given["device"] == "cuda", k, iterations)}
    begin = partial(choose_product, given.get("type"), given.get("directions"), given.get("faiss", False))
    begin()
    device = given.get("device", "cpu")
    if "screener" in given:
        gpu_kmeans.Engine = partial(  # type: ignore[assignment,misc]
            gpu_kmeans.Engine, screener=given["screener"], budget=given.get("budget")
        )
    pool = Processes(given.get("workers", 1), begin)
    shards = sorted(folder.glob("features-*.npy"))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        start = begin_clustering(shards, k, Processes(given["begun_by"], begin), Path(scratch)) if "begun_by" in given else None
        found = kmeans.fit(shards, k, seed=0, iterations=iterations, projection={}, pool=pool, device=device, start=start)
    seconds = time.perf_counter() - began
    labels = pseudo_labelling.assign(shards, found.codebook, {}, pool)
    assert (labels == found.labels).all()
    return {
        **configuration,
        **digests(labels, found.codebook),
        "inertia": found.inertia[-1],
        "decided_again": found.decided_again,
        "seconds": round(seconds, 2),
    }


def digests(labels: NDArray[np.int64], codebook: Codebook) -> dict[str, str]:
    """sha256 hex digests of both."""
    arrays = {"labels": labels, "centroids": codebook.points}
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}


def by_ray(folder: Path, workers: int, on_gpu: bool, k: int, iterations: int) -> dict[str, Any]:
    """The clusters of the stage, as a search runs it; on CPUs if a GPU is there, too, unless it is asked for."""
    settings = RuntimeSettings(cpus=workers)
    if not on_gpu:
        settings = RuntimeSettings(cpus=workers, stages={**SPLITTABLE, "clusters": ResourceRequest(gpus=0, helpers=workers)})
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, stages_on_ray(Path(scratch), settings) as cluster:
        made = cluster(sorted(folder.glob("features-*.npy")), k, iterations)
        codebook = Codebook.load(made.directory / "codebook.npz")
        found = digests(np.load(made.directory / "labels.npy").astype(np.int64), codebook)
    record = made.record
    says = {"inertia": record["metrics"]["inertia"], "made_on": record["device"], "made_by": record["workers"]}
    return {**found, **says, "decided_again": record["metrics"]["decided_again"], "seconds": record["seconds"]}


def begin_clustering(shards: list[Path], k: int, pool: Processes, folder: Path) -> Path:
    """The state of a clustering on CPUs after a third of the iterations, from which another device may go on."""

    def keep(updates: int, write: Callable[[Path], None]) -> None:
        if updates == 7:
            write(folder / "state.npz")

    kmeans.fit(shards, k, seed=0, iterations=7, projection={}, pool=pool, save=keep)
    return folder / "state.npz"


def run_apart(folder: Path, configuration: dict[str, Any], k: int, iterations: int) -> dict[str, Any]:
    """As `run`, in a process of its own, whose OpenBLAS uses the kernels that are asked for."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if "kernels" in configuration:
        environment["OPENBLAS_CORETYPE"] = configuration["kernels"]
    arguments = [str(folder), "--k", str(k), "--iterations", str(iterations), "--one", json.dumps(configuration)]
    command = [sys.executable, "-m", "experiments.same_clusters", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {**configuration, "failed": done.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def write_features(folder: Path, images: Path, count: int = ROWS) -> None:
    """Write features of Fashion-MNIST, mirrored and shifted, as shards of float32.

    They are those of a network of three convolutions whose random weights are whole numbers. All sums stay below 2^24, so
    float32 holds them exactly in any order, and the features are the same bits on every processor and device.
    """
    from ktray.datasets import fashion_mnist

    folder.mkdir(parents=True, exist_ok=True)
    train = fashion_mnist.load(fashion_mnist.Spec(path=str(images))).train
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels = torch.from_numpy(np.stack([train.read(place)[:, :, 0] for place in range(len(train.names))]))
    views = [(False, (0, 0)), (True, (-2, 2)), (False, (2, -2)), (True, (2, 2))]
    layers = [layer.to(device) for layer in _layers()]
    with torch.inference_mode():
        for start in range(0, count, SHARD_ROWS):
            numbers = torch.arange(start, min(start + SHARD_ROWS, count))
            mirrored, shift = views[int(numbers[0]) // len(pixels) % len(views)]
            batch = torch.roll(pixels[numbers % len(pixels)], shift, (1, 2))[:, None].float()
            batch = batch.flip(3) if mirrored else batch
            parts = [_features(part.to(device), layers).cpu().numpy() for part in batch.split(256)]
            np.save(folder / f"features-{start // SHARD_ROWS:05d}.npy", np.concatenate(parts))


def _layers() -> list[torch.Tensor]:
    """Weights (outputs, inputs * 9), whole numbers from -2 to 2."""
    rng, widths = np.random.default_rng(0), (1, 32, 128, 512)
    return [torch.from_numpy(rng.integers(-2, 3, (out, width * 9)).astype(np.float32)) for width, out in pairwise(widths)]


def _features(pixels: torch.Tensor, layers: list[torch.Tensor]) -> torch.Tensor:
    """Features (n, 512) of images (n, 1, 28, 28): three convolutions with ReLU, the first two rounded to eight bits."""
    values = pixels
    for weights in layers:
        side = (values.shape[2] + 1) // 2
        patches = torch.nn.functional.unfold(values, 3, padding=1, stride=2)
        values = (weights @ patches).view(len(values), len(weights), side, side).clamp(min=0)
        if weights is not layers[-1]:
            shift = ((2 * weights.shape[1]).bit_length() - 1) // 2  # about the growth by weights of variance 2
            values = torch.floor(values * 2.0**-shift).clamp(max=255)
    return values.sum(dim=(2, 3))  # at most 16 * 1152 * 2 * 255 < 2^24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the features; made if there are none")
    parser.add_argument("--images", type=Path, help="folder of Fashion-MNIST")
    parser.add_argument("--only", choices=["cpu", "cuda", "all"], default="all")
    parser.add_argument("--jobs", type=int, default=1, help="configurations at a time")
    parser.add_argument("--k", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(run(arguments.folder, arguments.one, arguments.k, arguments.iterations)))
        return 0
    if not list(arguments.folder.glob("features-*.npy")):
        write_features(arguments.folder, arguments.images)
    digest = hashlib.sha256(b"".join(np.load(shard).tobytes() for shard in sorted(arguments.folder.glob("features-*.npy"))))
    print(json.dumps({"features": digest.hexdigest()}), flush=True)
    results = []
    with ThreadPoolExecutor(arguments.jobs) as jobs:
        chosen = configurations(arguments.only)
        for found in jobs.map(lambda each: run_apart(arguments.folder, each, arguments.k, arguments.iterations), chosen):
            print(json.dumps(found), flush=True)
            results.append(found)
    digests = {(each.get("labels"), each.get("centroids")) for each in results}
    print(json.dumps({"configurations": len(results), "all_equal": len(digests) == 1 and None not in next(iter(digests))}))
    return 0 if len(digests) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())

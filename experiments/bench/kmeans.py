"""How fast is ktray's exact k-means against others on the same data, from the same seeds, in one run?

    python -m experiments.bench.kmeans --rows 50000 --width 512 --k 1000 --iterations 20 --repeats 5
    python -m experiments.bench.kmeans --features FILE.npy --k 1000 --contenders ktray faiss scikit-learn
    python -m experiments.bench.kmeans --device cuda --rows 1281167 --width 2048 --k 2000
    python -m experiments.bench.kmeans --ray 2 --features FILE.npy --k 1000     the whole stage by two Ray workers, and faiss

The contenders take turns, so that all meet the same load. One JSON line each: median milliseconds per iteration, the ratio to
ktray, the fraction of the machine's measured matrix-product peak, inertia after the iterations, and the share of labels that
differ from the exact ones for the same centroids. ktray's line also has the share of rows that it decided again. Contenders
that are not installed say so. On CPUs every library uses the threads that its environment allows: for one thread each, set
OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1.

With `--ray N` the stage of clusters runs as in a search, from features in a store to an artifact there, by N warm workers, and
faiss has as many threads and an array. Wall and processor seconds of whole runs, of which the first of each does not count.

README.md beside this file has the results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from ktray.artifact import Artifact
from ktray.clustering import gpu_kmeans, kmeans, projection
from ktray.clustering.grid import Codebook, Grid
from ktray.pool import LocalPool
from ktray.scheduler.resources import SPLITTABLE, ResourceRequest, RuntimeSettings

SHARD_ROWS = 4096  # as the stage of features writes them
PART_ROWS = 65536  # made or judged at a time


@dataclass(frozen=True)
class Problem:
    """Rows (N, d) on disk, in memory and, for contenders on a GPU, on the device; seeds (k, d) are some of the rows."""

    shards: list[Path]
    rows: NDArray[np.float32]
    seeds: NDArray[np.float32]
    k: int
    iterations: int
    device: str


@dataclass(frozen=True)
class Run:
    """The iterations of one contender: seconds of each, centroids (k, d), and what else it has to say."""

    seconds: float
    centroids: NDArray[np.float32]
    extra: dict[str, float]


def ktray(problem: Problem) -> Run:
    """ktray's iterations, on the CPU or on the device; reading the rows does not count, as for all others.

    On the CPU that is all but the first assignment. `with_reading_ms` is the whole call by the number of iterations, with
    reading and what is prepared for the products.
    """
    if problem.device != "cpu":
        return ktray_on_device(problem)
    began, moments = time.perf_counter(), []
    common: dict[str, Any] = {"seed": 0, "iterations": problem.iterations, "projection": {}, "pool": LocalPool()}
    common["on_iteration"] = lambda *_: moments.append(time.perf_counter())
    found = kmeans.fit(problem.shards, problem.k, device=problem.device, **common)
    between = [after - before for before, after in pairwise(moments)]
    whole = 1000 * (time.perf_counter() - began) / max(1, found.iterations)
    extra = {"decided_again": found.decided_again, "exact_inertia": found.inertia[-1], "with_reading_ms": round(whole, 3)}
    return Run(statistics.mean(between), found.centroids, extra)


def ktray_on_device(problem: Problem) -> Run:
    """All assignments and updates, of rows that are on the device and on their grid; the last assignment counts, too."""
    counts = projection.row_counts(problem.shards)
    engine = gpu_kmeans.Engine(problem.shards, counts, projection.finite_rows, problem.device)
    around = projection.centre_and_radius(problem.shards, {}, LocalPool(), engine.largest_distance)
    grid = Grid.around(*around, len(problem.rows))
    engine.place(grid)
    initial = grid.whole(grid.rows(problem.seeds))
    torch.cuda.synchronize()
    began = time.perf_counter()
    found = gpu_kmeans.iterate(engine, initial, grid, problem.iterations, kmeans.plan_repairs)
    seconds = (time.perf_counter() - began) / len(found.inertia)
    extra = {"decided_again": found.decided_again, "exact_inertia": found.inertia[-1], "assignments": len(found.inertia)}
    return Run(seconds, Codebook(grid, found.points).centroids, extra)


def faiss_kmeans(problem: Problem) -> Run:
    """`faiss.Kmeans` on all points."""
    import faiss

    n, d = problem.rows.shape
    made = faiss.Kmeans(d, problem.k, niter=problem.iterations, min_points_per_centroid=1, max_points_per_centroid=n)
    began = time.perf_counter()
    made.train(problem.rows, init_centroids=problem.seeds)
    return Run((time.perf_counter() - began) / problem.iterations, made.centroids, {})


def scikit_learn(problem: Problem) -> Run:
    """`sklearn.cluster.KMeans`, algorithm lloyd."""
    from sklearn.cluster import KMeans

    made = KMeans(problem.k, init=problem.seeds, n_init=1, algorithm="lloyd", tol=0, max_iter=problem.iterations)
    began = time.perf_counter()
    made.fit(problem.rows)
    return Run((time.perf_counter() - began) / made.n_iter_, made.cluster_centers_, {})


def torch_kmeans(problem: Problem, dtype: torch.dtype = torch.float32) -> Run:
    """Ten lines of torch: a matrix of scores for some rows at a time, their minima, and `index_add_`."""
    rows = torch.from_numpy(problem.rows).to(problem.device, dtype)
    centroids = torch.from_numpy(problem.seeds).to(problem.device)
    step = max(1, (1 << 28) // problem.k) if problem.device != "cpu" else 1024

    def iterate() -> None:
        sums = torch.zeros_like(centroids)
        sizes = torch.zeros(problem.k, device=problem.device)
        squares, turned = centroids.square().sum(dim=1), (-2 * centroids.T).to(dtype)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            labels = (part @ turned + squares.to(dtype)).min(dim=1)[1]
            sums.index_add_(0, labels, part.float())
            sizes += torch.bincount(labels, minlength=problem.k)
        torch.where(sizes[:, None] > 0, sums / sizes[:, None], centroids, out=centroids)

    return Run(_timed(iterate, problem), centroids.cpu().numpy(), {})


def _timed(iterate: Callable[[], None], problem: Problem) -> float:
    """Mean seconds of an iteration, until the device has finished."""
    began = time.perf_counter()
    for _ in range(problem.iterations):
        iterate()
    if problem.device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / problem.iterations


def flash(problem: Problem, library: str) -> Run:
    """flash-kmeans or flashlib with half-precision rows that are on the device already."""
    if library == "flashlib":
        from flashlib.primitives.kmeans.triton.kmeans import batch_kmeans_Euclid
    else:
        from flash_kmeans import batch_kmeans_Euclid
    rows = torch.from_numpy(problem.rows).to(problem.device)
    rows = (rows - rows.mean(dim=0)).half()[None]
    seeds = torch.from_numpy(problem.seeds).to(problem.device)
    seeds = (seeds - torch.from_numpy(problem.rows).to(problem.device).mean(dim=0)).half()[None]
    batch_kmeans_Euclid(rows, problem.k, max_iters=1, tol=-1.0, init_centroids=seeds)
    torch.cuda.synchronize()
    began = time.perf_counter()
    _, centroids, done = batch_kmeans_Euclid(rows, problem.k, max_iters=problem.iterations, tol=-1.0, init_centroids=seeds)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / int(done)
    mean = torch.from_numpy(problem.rows).to(problem.device).mean(dim=0)
    labels = batch_kmeans_Euclid(rows, problem.k, max_iters=1, tol=-1.0, init_centroids=centroids)[0][0]
    exact = _exact_labels(rows[0].double(), centroids[0].double())
    wrong = float((labels.long() != exact).double().mean())
    return Run(seconds, (centroids[0].float() + mean).cpu().numpy(), {"labels_differ_from_its_exact": wrong})


def _exact_labels(rows: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Nearest centroids (N,) in float64."""
    squares, found = centroids.square().sum(dim=1), []
    step = max(1, (1 << 26) // len(centroids))
    for start in range(0, len(rows), step):
        found.append(torch.addmm(squares, rows[start : start + step], centroids.T, alpha=-2).argmin(dim=1))
    return torch.cat(found)


CONTENDERS: dict[str, tuple[str, str, Callable[[Problem], Run]]] = {  # name -> module that it needs, devices, function
    "ktray": ("ktray", "cpu cuda", ktray),
    "faiss": ("faiss", "cpu", faiss_kmeans),
    "scikit-learn": ("sklearn", "cpu", scikit_learn),
    "torch float32": ("torch", "cpu cuda", torch_kmeans),
    "torch float16": ("torch", "cuda", lambda problem: torch_kmeans(problem, torch.float16)),
    "flash-kmeans": ("flash_kmeans", "cuda", lambda problem: flash(problem, "flash_kmeans")),
    "flashlib": ("flashlib", "cuda", lambda problem: flash(problem, "flashlib")),
}


def peak(device: str) -> float:
    """Measured floating-point operations per second of a large matrix product: float16 on a GPU, float32 on CPUs."""
    side, dtype = (8192, torch.float16) if device != "cpu" else (2048, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(5):
        if device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / 10)
    return 2 * side**3 / best


def mixture(count: int, width: int, device: str) -> NDArray[np.float32]:
    """Rows around 1,500 centres, with a spectrum that falls like that of features; half of the variance is between centres."""
    generator = torch.Generator(device).manual_seed(0)
    spectrum = torch.arange(1, width + 1, device=device) ** -0.25
    centres = torch.randn(1500, width, device=device, generator=generator) * spectrum
    rows = np.empty((count, width), np.float32)
    for start in range(0, count, PART_ROWS):
        part = rows[start : start + PART_ROWS]
        chosen = torch.randint(0, 1500, (len(part),), device=device, generator=generator)
        noise = torch.randn(len(part), width, device=device, generator=generator)
        part[:] = (noise * spectrum + centres[chosen]).cpu().numpy()
    return rows


def write_shards(rows: NDArray[np.float32], folder: Path) -> list[Path]:
    """The rows as files, as the stage of features writes them."""
    shards = []
    for start in range(0, len(rows), SHARD_ROWS):
        shards.append(folder / f"features-{start // SHARD_ROWS:05d}.npy")
        np.save(shards[-1], rows[start : start + SHARD_ROWS])
    return shards


def inertia(rows: NDArray[np.float32], centroids: NDArray[np.float32], device: str) -> float:
    """Mean squared distance to the nearest centroid, in float64 for the labels that float64 gives."""
    total, wide = 0.0, torch.from_numpy(centroids.astype(np.float64)).to(device)
    for start in range(0, len(rows), PART_ROWS):
        part = torch.from_numpy(rows[start : start + PART_ROWS]).to(device).double()
        total += float((part - wide[_exact_labels(part, wide)]).square().sum())
    return total / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, help="rows (N, d) float32 in an .npy file, instead of a mixture")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--ray", type=int, metavar="N", help="the whole stage through Ray, by N workers")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    arguments = parser.parse_args()
    if arguments.features:
        rows = np.load(arguments.features).astype(np.float32)
    else:
        rows = mixture(arguments.rows, arguments.width, arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        seeds = rows[kmeans.seed_rows(len(rows), arguments.k, 0)]
        shards = write_shards(rows, Path(folder))
        problem = Problem(shards, rows, seeds, arguments.k, arguments.iterations, arguments.device)
        if arguments.ray:
            compare_whole_runs(problem, arguments.ray, arguments.repeats, Path(folder))
        else:
            compare(problem, arguments.contenders, arguments.repeats)


Cluster = Callable[[Sequence[Path], int, int], Artifact]


@contextmanager
def stages_on_ray(folder: Path, runtime: RuntimeSettings) -> Iterator[Cluster]:
    """Ray with a store in `folder`, and what clusters by it: (shards, k, iterations) -> the artifact of the stage.

    Each call publishes the shards as features of a new key, so that nothing is known of them.
    """
    from ktray.pipeline.execute import execute
    from ktray.scheduler import client, ray_session
    from ktray.stages import clusters_stage
    from ktray.stores.file import FileStore
    from ktray.transfer import clusters

    session = ray_session.start(folder / "home", None, runtime)
    numbers = count()
    try:
        scheduler, store = client.connect(session, f"file://{folder}/store", execute), FileStore(folder / "store")

        def cluster(shards: Sequence[Path], k: int, iterations: int) -> Artifact:
            features = f"features-{next(numbers):012x}"
            scratch = store.scratch(features, "bench")
            for shard in shards:
                os.link(shard, scratch / shard.name)
            store.publish(scratch, features, {"key": features, "metrics": {}, "seconds": 0.0, "attempt": "bench"})
            transfer = clusters.Spec(k=k, iterations=iterations, l2=False)
            (clustering,) = clusters_stage.clusterings(transfer)
            stage = clusters_stage.stage_of(transfer, clustering, features)
            scheduler.obtain([stage], "bench")
            made = store.find(stage.key)
            assert made, stage.key
            return made

        yield cluster
        scheduler.shut_down_for_all_drivers()
    finally:
        ray_session.stop(session)


def compare_whole_runs(problem: Problem, workers: int, repeats: int, folder: Path) -> None:
    """Print one JSON line for the stage of clusters through Ray, and one for faiss with as many threads."""
    import faiss

    faiss.omp_set_num_threads(workers)
    shape = {"rows": len(problem.rows), "width": problem.rows.shape[1], "k": problem.k, "iterations": problem.iterations}
    found: dict[str, list[dict[str, float]]] = {"ktray through Ray": [], "faiss": []}
    on_cpus = {**SPLITTABLE, "clusters": ResourceRequest(gpus=0, helpers=workers)}
    with stages_on_ray(folder, RuntimeSettings(cpus=workers, stages=on_cpus)) as cluster:
        for repeat in range(repeats + 1):
            before, began = _processor_seconds(), time.perf_counter()
            made = cluster(problem.shards, problem.k, problem.iterations).record
            seconds, spent = time.perf_counter() - began, _processor_seconds() - before
            own = time.process_time()
            run = faiss_kmeans(problem)
            if repeat:
                ours = {"seconds": seconds, "processor_seconds": spent, "of_stage": made["seconds"], "workers": made["workers"]}
                found["ktray through Ray"].append({**ours, "updates": made["metrics"]["iterations"]})
                theirs = {"seconds": run.seconds * problem.iterations, "processor_seconds": time.process_time() - own}
                found["faiss"].append(theirs)
    for name, runs in found.items():
        medians = {field: round(statistics.median(run[field] for run in runs), 3) for field in runs[0]}
        print(json.dumps({"contender": name, **shape, "threads": workers, "n": len(runs), **medians}), flush=True)


def _processor_seconds() -> float:
    """Of the processes that this one has started, such as Ray's workers."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return total


def compare(problem: Problem, contenders: list[str], repeats: int) -> None:
    """Print one JSON line for the machine and one for each contender."""
    n, d = problem.rows.shape
    best = peak(problem.device)
    shape = {"rows": n, "width": d, "k": problem.k, "iterations": problem.iterations, "device": problem.device}
    print(json.dumps({**shape, "peak_tflops": round(best / 1e12, 2), "threads": torch.get_num_threads()}), flush=True)
    runs: dict[str, list[Run]] = {}
    for repeat in range(repeats + (problem.device != "cpu")):  # on a GPU the first round compiles kernels
        for name in contenders:
            module, devices, function = CONTENDERS[name]
            if problem.device.split(":")[0] not in devices.split():
                continue
            if find_spec(module) is None:
                if not repeat:
                    print(json.dumps({"contender": name, "missing": module}), flush=True)
                continue
            run = function(problem)
            if repeat or problem.device == "cpu":
                runs.setdefault(name, []).append(run)
    of_ktray = statistics.median(run.seconds for run in runs["ktray"]) if "ktray" in runs else math.nan
    for name, made in runs.items():
        seconds = statistics.median(run.seconds for run in made)
        line = {
            "contender": name,
            "n": len(made),
            "ms": round(1000 * seconds, 3),
            "ms_min": round(1000 * min(run.seconds for run in made), 3),
            "ratio_to_ktray": round(seconds / of_ktray, 3),
            "of_peak": round(2 * n * d * problem.k / seconds / best, 3),
            "inertia": inertia(problem.rows, made[-1].centroids, problem.device),
            **made[-1].extra,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

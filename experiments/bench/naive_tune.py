"""What does sharing save in CPU time? ktray against the same stage functions as one opaque trainable under Ray Tune.

Command:  python experiments/bench/naive_tune.py list     32 distinct pairs over 4 teachers, no early stopping on either side
          python experiments/bench/naive_tune.py search   whole searches: sampler, rungs and duplicates against Optuna and ASHA
Result:   n = 1 each, 2 quiet cores of an EPYC Milan, commit 960b177. list: ktray 171.9 CPU s (stages 152.5, of which teachers
39 and students 91), naive 447.4 (stages 427.9); ktray / ideal = 1.13 (wanted: at most 1.18), naive / ktray = 2.60.
search of teachers.yaml, 72 trials: naive / ktray = 4.95 (wanted: 4; at earlier commits 4.78 and 4.44). ktray 653 CPU s, of
which stages 584 (students 437, evaluations 83, teachers 59; both reference lines are in it), naive 3,235, of which stages 2,920
(teachers 2,156, students 521, evaluations 121). ktray pays for each teacher once, so the ratio grows with the number of trials:
earlier commits had 3.37 after 24 and 3.70 after 48.
Best linear probe with `seed:` 0 to 4: ktray 0.833 and 0.837 (two runs), 0.837, 0.832, 0.840, 0.837, naive 0.838, 0.837, 0.832,
0.837, 0.835, both 0.836 on average (600 images: one standard error of one is 0.015; seeds 1 to 4 on 16 Xeon cores, where the
other side shared a store to save time). Of 72 the luckiest wins: with eight more student seeds each, the pairs of seeds 1 to 4
have 0.818 (ktray) and 0.822 (standard error of the difference 0.003).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from ktray.artifact import Artifact, Stage
from ktray.pool import StageContext
from ktray.spec import PairSpec
from ktray.stores import Store, open_store

CONCURRENT = 2
LOG = "KTRAY_BENCH_LOG"
POLL_SECONDS = 0.25


def pairs() -> dict[str, PairSpec]:
    """32 distinct pairs over 4 rotation teachers: two layers, two cluster counts, two students each."""
    found: dict[str, PairSpec] = {}
    for width, teacher_seed in ((0.125, 0), (0.125, 1), (0.25, 0), (0.25, 1)):
        teacher = {
            "pretext": {"kind": "rotation", "rotations": "one"},
            "backbone": {"kind": "alexnet", "width": width},
            "schedule": {"epochs": 4, "lr": 0.05, "batch_size": 64},
            "seed": teacher_seed,
        }
        for layer in ("conv3", "conv4"):
            for k in (50, 100):
                for seed in (0, 1):
                    spec = {
                        "data": "fashion_mnist_mini",
                        "teacher": {**teacher, "layer": layer},
                        "transfer": {"kind": "clusters", "k": k},
                        "student": {
                            "backbone": {"kind": "alexnet", "width": 0.125},
                            "schedule": {"epochs": 2, "lr": 0.05, "batch_size": 64},
                            "seed": seed,
                        },
                        "evals": [{"kind": "knn"}],
                    }
                    found[f"w{width:g} {teacher_seed} {layer} k={k} student {seed}"] = PairSpec.model_validate(spec)
    return found


# ---- the stage functions, the same on both sides


def measured(stage: Stage, store: Store, attempt: str, context: StageContext) -> tuple[Artifact, bool]:
    """Calls `execute` and logs the CPU time of this process meanwhile, without that of workers that helped."""
    from ktray.pipeline import execute

    began = time.process_time()
    artifact, published = execute.execute(stage, store, attempt, context)
    line = {"key": stage.key, "stage": stage.name, "cpu": time.process_time() - began, "wall": artifact.record["seconds"]}
    if published:
        with open(os.environ[LOG], "a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
    return artifact, published


def ktray_runs(folder: Path, arguments: list[str]) -> None:
    """A command of ktray whose stages are measured, with as many CPUs as the other side has."""
    from ktray.cli import main
    from ktray.pipeline import worker_entry

    worker_entry.run_stage = measured  # workers get `measured` by value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runtime.yaml").write_text(f"cpus: {CONCURRENT}\n")
    code = main([*arguments, "--runtime", str(folder / "runtime.yaml")])
    assert code == 0, code


# ---- the other side


def run_stages(
    pair: PairSpec, store: Store, epoch: int | None = None, evaluations: list[str] | None = None
) -> dict[str, float]:
    """Metrics of a pair, computed here from what the store has."""
    from ktray.pipeline import pair_graph, pair_metrics
    from ktray.pipeline.identity import data_identity

    built = pair_graph.build(
        pair, data_identity(Path(store.url.removeprefix("file://")) / "cache"), epoch=epoch, evaluations=evaluations
    )
    for stage in built.stages:
        measured(stage, store, "naive", StageContext())
    artifacts = pair_metrics.published_artifacts(built, store)
    assert artifacts is not None
    return pair_metrics.metrics(built, artifacts)


def whole_pair(config: Mapping[str, Any]) -> None:
    """A trainable: one pair from its images to its judgement, in a folder of its own."""
    from ray import tune

    folder = tempfile.mkdtemp()
    metrics = run_stages(PairSpec.model_validate(config["pair"]), open_store(f"file://{folder}"))
    shutil.rmtree(folder)
    tune.report({"top1": metrics["knn/top1"]})


def stopped_pair(config: Mapping[str, Any]) -> None:
    """A trainable for ASHA: reports at every rung of its student, at the last with a linear probe."""
    from ray import tune

    from ktray.search import space

    params = {name: value for name, value in config.items() if name != "space"}
    searched = space.load(Path(config["space"]), [])
    pair, folder = searched.pair(params), tempfile.mkdtemp()
    store = open_store(f"file://{folder}")
    try:
        for epoch in searched.early_stop.rungs:
            last = epoch == searched.early_stop.rungs[-1]
            metrics = run_stages(pair, store, epoch, None if last else ["knn"])
            probe = {"probe": metrics["linear_probe/top1"]} if last else {}
            tune.report({"top1": metrics["knn/top1"], "epoch": epoch, **probe})
    finally:
        shutil.rmtree(folder)


def drawn(file: str, trial: Any) -> dict[str, Any]:
    """One draw of a space by Optuna. Ray saves its searcher with pickle, so this is a function of the module."""
    from ktray.search import space, space_tree

    def ask(parameter: space_tree.Parameter) -> Any:
        if isinstance(parameter, space_tree.Choice):
            return trial.suggest_categorical(parameter.name, parameter.labels)
        return trial.suggest_float(parameter.name, parameter.low, parameter.high, log=parameter.log)

    space.load(Path(file), []).build_draw(ask)
    return {"space": file}


def start_ray() -> None:
    """Ray as a user starts it, without its dashboard."""
    import ray

    os.environ.update(RAY_AUTH_MODE="disabled", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_USAGE_STATS_ENABLED="0")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    ray.init(
        address="local",
        num_cpus=CONCURRENT,
        include_dashboard=False,
        object_store_memory=1 << 30,
        _temp_dir=tempfile.mkdtemp(prefix="naive-", dir="/tmp"),
        log_to_driver=False,
        runtime_env={"env_vars": threads},
    )


def tune_list(folder: Path, chosen: list[str]) -> None:
    """The list under plain Ray Tune; processes are reused, so that imports are paid once as by ktray."""
    from ray import tune

    start_ray()
    wanted = {name: pair.model_dump(mode="json") for name, pair in pairs().items() if name in chosen}
    results = tune.Tuner(
        tune.with_resources(whole_pair, {"cpu": 1}),
        param_space={"pair": tune.grid_search(list(wanted.values()))},
        tune_config=tune.TuneConfig(max_concurrent_trials=CONCURRENT, reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
    ).fit()
    assert not results.errors, results.errors
    print(json.dumps({"trials": len(results)}))


def tune_search(folder: Path, file: Path, trials: int) -> None:
    """The space under Ray Tune with OptunaSearch and ASHA."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    from ktray.search import space

    searched = space.load(file, [])
    start_ray()
    stop = searched.early_stop
    results = tune.Tuner(
        tune.with_resources(stopped_pair, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            num_samples=trials,
            max_concurrent_trials=CONCURRENT,
            search_alg=OptunaSearch(space=functools.partial(drawn, str(file)), metric="top1", mode="max", seed=searched.seed),
            scheduler=ASHAScheduler(
                "epoch", "top1", "max", max_t=stop.rungs[-1], grace_period=stop.rungs[0], reduction_factor=2
            ),
        ),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
    ).fit()
    assert not results.errors, results.errors
    best = max(result.metrics.get("probe", 0.0) for result in results)
    print(json.dumps({"trials": len(results), "probe": best}))


# ---- measuring


def cpu_seconds(command: list[str], environment: Mapping[str, str]) -> tuple[dict[str, float], float, str]:
    """CPU seconds of a command and all processes that descend from it, by name of the process; its wall seconds; its last line.

    What a process spends between the last look at it and its end, a quarter of a second at most, is not seen.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        root = subprocess.Popen(command, env={**os.environ, **environment}, stdout=said)
        spent: dict[tuple[int, float], tuple[str, float]] = {}
        while root.poll() is None:
            for process, name, seconds in _family(root.pid, {pid for pid, _ in spent}):
                spent[process] = (name, seconds)
            time.sleep(POLL_SECONDS)
        assert root.returncode == 0, root.returncode
        said.seek(0)
        lines = said.read().strip().splitlines()
    by_name: dict[str, float] = {}
    for name, seconds in spent.values():
        by_name[name] = by_name.get(name, 0.0) + seconds
    return by_name, time.monotonic() - began, lines[-1] if lines else ""


def _family(root: int, known: set[int]) -> Iterator[tuple[tuple[int, float], str, float]]:
    """(pid, creation time), name and CPU seconds of `root`, of its descendants, and of `known` ones whose parent is gone."""
    table = {each.pid: each.info for each in psutil.process_iter(["ppid", "name", "create_time", "cpu_times"])}
    children: dict[int, list[int]] = {}
    for pid, info in table.items():
        children.setdefault(info["ppid"], []).append(pid)
    waiting, seen = [root, *known], set[int]()
    while waiting:
        pid = waiting.pop()
        if pid in seen or pid not in table:
            continue
        seen.add(pid)
        waiting += children.get(pid, [])
        times = table[pid]["cpu_times"]
        if times is not None:
            yield (pid, table[pid]["create_time"]), table[pid]["name"], times.user + times.system


def side(name: str, folder: Path, *more: str) -> tuple[float, str, list[dict[str, Any]]]:
    """Run one side; CPU seconds, what it said last, and the lines of its stages."""
    log = folder / f"{name}.jsonl"
    command = [sys.executable, __file__, name, "--folder", str(folder / name), *more]
    by_name, wall, said = cpu_seconds(command, {LOG: str(log), "KTRAY_HOME": str(folder / name / "home")})
    stages = [json.loads(line) for line in log.read_text().splitlines()]
    by_stage: dict[str, float] = {}
    for stage in stages:
        by_stage[stage["stage"]] = by_stage.get(stage["stage"], 0.0) + stage["cpu"]
    spent = sum(by_name.values())
    print(f"{name}: {spent:.1f} CPU s, {wall:.1f} s; {len(stages)} stages of {sum(by_stage.values()):.1f} CPU s")
    print(f"  stages: {_said(by_stage)}\n  processes: {_said(by_name)}", flush=True)
    return spent, said, stages


def _said(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {spent:.1f}" for name, spent in sorted(seconds.items(), key=lambda each: -each[1]))


def compare_lists(folder: Path, count: int) -> None:
    """Compares both sides on the fixed list."""
    spent, _, stages = side("ktray-list", folder, "--count", str(count))
    naive, _, opaque = side("naive-list", folder, "--count", str(count))
    ideal = sum(stage["cpu"] for stage in stages)
    alone = sum(stage["cpu"] for stage in opaque)
    assert len({stage["key"] for stage in stages}) == len(stages)
    print(f"ktray / ideal = {spent / ideal:.3f} (at most {1 / 0.85:.3f}); naive / ktray = {naive / spent:.2f};", end=" ")
    print(f"naive / ideal, stages alone = {alone / ideal:.2f}")


def compare_searches(folder: Path, file: Path, trials: int) -> None:
    """Compares both sides on a whole search."""
    more = ["--trials", str(trials), "--space", str(file.absolute())]
    spent, answer, _ = side("ktray-search", folder, *more)
    naive, naive_answer, _ = side("naive-search", folder, *more)
    print(f"ktray {answer}; naive {naive_answer}; naive / ktray = {naive / spent:.2f}")


def main() -> None:
    """Runs the requested comparison, or one side of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sides: dict[str, Callable[[argparse.Namespace], None]] = {
        "list": lambda given: compare_lists(given.folder, given.count),
        "search": lambda given: compare_searches(given.folder, given.space, given.trials),
        "ktray-list": _ktray_list,
        "naive-list": lambda given: tune_list(given.folder, list(pairs())[: given.count]),
        "ktray-search": _ktray_search,
        "naive-search": lambda given: tune_search(given.folder, given.space, given.trials),
    }
    parser.add_argument("what", choices=sides)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--space", type=Path, default=Path(__file__).with_name("teachers.yaml"))
    given = parser.parse_args()
    temporary = given.folder is None
    given.folder = Path(tempfile.mkdtemp()) if temporary else given.folder
    given.folder.mkdir(parents=True, exist_ok=True)
    try:
        sides[given.what](given)
    finally:
        if temporary:
            shutil.rmtree(given.folder, ignore_errors=True)


def _ktray_list(given: argparse.Namespace) -> None:
    only = [f"--only={name}" for name in list(pairs())[: given.count]]
    ktray_runs(given.folder, ["run", __file__, "--concurrent", str(CONCURRENT), *only])


def _ktray_search(given: argparse.Namespace) -> None:
    from ktray import cli

    ktray_runs(given.folder, ["search", str(given.space), "--name", "bench", "--trials", str(given.trials)])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        cli.main(["best", "bench", "--json"])
    best = json.loads(said.getvalue())
    print(json.dumps({"trials": given.trials, "probe": best[0]["metrics"]["linear_probe/top1"]}))


if __name__ == "__main__":
    main()

"""How long does a search take beside its stages? Phases of one search, overheads of cached trials and of empty stages.

Command:  python experiments/bench/search.py               all four, one JSON line each; CIFAR-10 in --data, or --space
          python experiments/bench/search.py whole         one search: command -> space checked -> Ray up -> first stage ->
                                                           last stage -> table, and how busy the GPUs were in between
          python experiments/bench/search.py cached        a study of 64 trials whose stages are all in the store
          python experiments/bench/search.py stage         a stage that computes nothing, through the scheduler
          python experiments/bench/search.py tune          the rival: Ray's OptunaSearch with 64 trials that return at once
Result:   see README.md in this folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ktray.artifact import Artifact, Stage
from ktray.pool import StageContext
from ktray.stores import Store

ROOT = Path(__file__).parent.parent.parent
CACHED_TRIALS = 64
EMPTY_STAGES = 100
CONCURRENT = 8


def short_space(space: Path, trials: int, folder: Path) -> Path:
    """A copy of a space with short schedules: teachers of 3 or 6 epochs, students of 10 that are judged after 2, 5 and 10."""
    content = yaml.safe_load(space.read_text())
    content["budget"] = {"trials": trials, "concurrent": CONCURRENT}
    content["early_stop"]["rungs"] = [2, 5, 10]
    content["pair"]["student"]["schedule"]["epochs"] = 10
    for teacher in content["pair"]["teacher"]["one_of"].values():
        if "schedule" in teacher:
            teacher["schedule"]["epochs"] = {"choice": [3, 6]}
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def tiny_space(folder: Path) -> Path:
    """A space whose 64 trials take a fraction of a second each."""
    content = {
        "study": "tiny",
        "objectives": [{"metric": "knn/top1", "mode": "max"}],
        "budget": {"trials": CACHED_TRIALS, "concurrent": CONCURRENT},
        "sampler": "random",  # so that a study of another name draws the same, whichever trial ends first
        "pair": {
            "data": {"kind": "synthetic", "count": 240, "size": 28},
            "teacher": {"descriptor": {"kind": "hog", "cell": {"choice": [4, 7]}}},
            "transfer": {"kind": "clusters", "k": {"choice": [5, 10]}, "iterations": 5},
            "student": {
                "backbone": {"kind": "alexnet", "width": 0.125},
                "schedule": {"epochs": 1, "lr": {"log_float": [0.01, 0.1]}, "batch_size": 64},
            },
            "evals": [{"kind": "knn"}],
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def ktray(*arguments: str, prints: str = "") -> float:
    """Run a command of ktray that must print `prints`; its seconds from the start of the process to its end."""
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run([sys.executable, "-m", "ktray", *arguments], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, f"{arguments}: {ended.returncode}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    assert prints in ended.stdout + ended.stderr, f"{arguments} did not print {prints!r}:\n{ended.stdout[-2000:]}"
    return time.monotonic() - began


def say(contender: str, what: str, n: int, **found: Any) -> None:
    """One JSON line."""
    print(json.dumps({"contender": contender, "what": what, "n": n, "device": device(), **found}), flush=True)


def device() -> str:
    """The GPUs of this machine, or its processor."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        said = subprocess.run([program, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True).stdout
        return ", ".join(said.split("\n")).strip(", ")
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"


def whole(given: argparse.Namespace, folder: Path) -> None:
    """One search, from the command to its table, by phase. Its files were read once before: they are in the page cache."""
    space = short_space(given.space, given.trials, folder) if given.short else given.space
    arguments = ["search", str(space), "--home", str(folder / "home"), "--trials", str(given.trials), "--timeline"]
    for each in given.warm:
        ktray("plan", str(space), "--home", str(folder / f"plan-{each}"))
    seconds = ktray(*arguments)
    (written,) = (folder / "home" / "profiles").glob("*/timeline.json")
    timeline = json.loads(written.read_text())
    if given.keep is not None:
        shutil.copytree(written.parent, given.keep, dirs_exist_ok=True)
    at = {phase["name"]: phase["at"] for phase in timeline["phases"]}
    found = timeline["summary"]
    say(
        "ktray",
        f"search of {given.trials} trials, {given.space.stem}{', short schedules' if given.short else ''}",
        1,
        space_checked=at["space checked"],
        ray_up=at["Ray up"],
        first_stage=found["first_stage"],
        last_stage=found["last_stage"],
        table=at["table"],
        exit=round(seconds, 2),
        gpu_percent=found["gpu_percent"],
        gpu_idle_samples=found["gpu_idle_samples"],
        gpu_samples=found["gpu_samples"],
        stages=found["stages"],
    )


def cached(given: argparse.Namespace, folder: Path) -> None:
    """A second study with the draws of the first one: nothing to compute, no Ray."""
    space, home = tiny_space(folder), str(folder / "tiny-home")
    ktray("search", str(space), "--home", home)
    empty = [ktray("show", "--home", home, "kinds") for _ in range(given.repeats)]
    again = ("search", str(space), "--home", home, "--name")
    spent = [ktray(*again, f"again-{number}", prints=" 0 stages computed") for number in range(given.repeats)]
    middle = median(spent)
    say(
        "ktray",
        f"{CACHED_TRIALS} cached trials, whole command",
        given.repeats,
        seconds=round(middle, 2),
        seconds_per_trial=round(middle / CACHED_TRIALS, 4),
        beside_an_empty_command=round((middle - median(empty)) / CACHED_TRIALS, 4),
    )


def nothing(stage: Stage, store: Store, attempt: str, context: StageContext) -> tuple[Artifact, bool]:
    """A stage that publishes an empty directory."""
    record = {"key": stage.key, "metrics": {}, "seconds": 0.0, "attempt": attempt}
    return store.publish(store.scratch(stage.key, attempt), stage.key, record)


def empty_stages(given: argparse.Namespace, folder: Path) -> None:
    """Empty stages one after the other, each waited for, and all at once."""
    from ktray.scheduler import client, ray_session
    from ktray.scheduler.resources import RuntimeSettings

    began = time.monotonic()
    session = ray_session.start(folder / "stage-home", None, RuntimeSettings(cpus=given.cpus))
    up = time.monotonic()
    try:
        scheduler = client.connect(session, f"file://{folder}/stage-store", nothing)
        scheduler.obtain([Stage("images", {"number": -1}, {})], "first")
        first = time.monotonic()
        one_by_one = []
        for number in range(EMPTY_STAGES):
            started = time.monotonic()
            scheduler.obtain([Stage("images", {"number": number}, {})], "bench")
            one_by_one.append(time.monotonic() - started)
        started = time.monotonic()
        scheduler.obtain([Stage("images", {"number": number}, {}) for number in range(1000, 1000 + EMPTY_STAGES)], "bench")
        together = (time.monotonic() - started) / EMPTY_STAGES
    finally:
        ray_session.stop(session)
    say(
        "ktray",
        "empty stage",
        EMPTY_STAGES,
        milliseconds=round(1000 * median(one_by_one), 2),
        milliseconds_at_once=round(1000 * together, 2),
        ray_start=round(up - began, 2),
        first_stage_after_ray=round(first - up, 2),
    )


def tune(given: argparse.Namespace, folder: Path) -> None:
    """The rival: Tune with OptunaSearch, function trainables that report once, processes reused. In a process of its own."""
    for _ in range(1):
        ended = subprocess.run(
            [sys.executable, __file__, "tune-here", "--cpus", str(given.cpus)], capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        print(ended.stdout.strip().splitlines()[-1], flush=True)


def tune_here(given: argparse.Namespace, folder: Path) -> None:
    """`tune`, in this process."""
    began = time.monotonic()
    import ray
    from ray import tune as ray_tune
    from ray.tune.search.optuna import OptunaSearch

    os.environ.update(RAY_AUTH_MODE="disabled", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_USAGE_STATS_ENABLED="0")
    ray.init(
        address="local",
        num_cpus=given.cpus,
        include_dashboard=False,
        object_store_memory=1 << 30,
        _temp_dir=tempfile.mkdtemp(prefix="tune-", dir="/tmp"),
        log_to_driver=False,
    )
    up = time.monotonic()
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(at_once, {"cpu": given.cpus / CONCURRENT}),
        param_space={"lr": ray_tune.loguniform(0.01, 0.1)},
        tune_config=ray_tune.TuneConfig(
            search_alg=OptunaSearch(metric="score", mode="max"),
            num_samples=CACHED_TRIALS,
            max_concurrent_trials=CONCURRENT,
            reuse_actors=True,
        ),
        run_config=ray_tune.RunConfig(storage_path=str(folder), verbose=0),
    )
    tuner.fit()
    spent = time.monotonic() - up
    say(
        "Ray Tune, OptunaSearch",
        f"{CACHED_TRIALS} trials that return at once",
        1,
        seconds=round(spent, 2),
        seconds_per_trial=round(spent / CACHED_TRIALS, 4),
        ray_start=round(up - began, 2),
    )


def at_once(config: Mapping[str, float]) -> None:
    """A trainable that knows its result."""
    from ray import tune as ray_tune

    ray_tune.report({"score": config["lr"]})


def median(values: list[float]) -> float:
    """The middle one, or the mean of the two in the middle."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def main() -> None:
    """Runs the requested measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sides: dict[str, Callable[[argparse.Namespace, Path], None]] = {
        "whole": whole,
        "cached": cached,
        "stage": empty_stages,
        "tune": tune,
        "tune-here": tune_here,
    }
    parser.add_argument("what", nargs="*", choices=[*sides, []], help="all but tune-here by default")
    parser.add_argument("--space", type=Path, default=ROOT / "search_spaces" / "cifar10_teachers.yaml")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--short", action=argparse.BooleanOptionalAction, default=True, help="short schedules")
    parser.add_argument("--warm", type=int, default=1, help="plans of the space before, which read its files")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=os.cpu_count())
    parser.add_argument("--keep", type=Path, default=None, help="folder for the timeline of `whole`")
    given = parser.parse_args()
    given.warm = range(given.warm)
    with tempfile.TemporaryDirectory(prefix="bench-search-") as folder:
        for name in given.what or ["whole", "cached", "stage", "tune"]:
            (Path(folder) / name).mkdir()
            sides[name](given, Path(folder) / name)


if __name__ == "__main__":
    main()

"""What users get wrong in a file, on the command line or with their data: one sentence each, and nothing is lost."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file

from ktray.cli import main
from ktray.plugins import parse
from ktray.training import loop
from tests.pictures import noise
from tests.toy_space import content
from tests.toys import HOG, toy_spec

JARGON = ("Traceback", "Error:", "Input should", "dictionary", "tuple", "instance of", "None", "validation error", "pydantic")
ALEXNET = {"kind": "alexnet", "width": 0.125}
ROTATION = "pair.teacher.one_of.rotation"


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets one entry of a space's content."""

    def change(found: dict[str, Any]) -> None:
        *places, last = path.split(".")
        for place in places:
            found = found[place]
        found[last] = value

    return change


SPACES = {
    "HOG with a schedule": (
        put("pair.teacher.one_of.hog.schedule", {"epochs": 3}),
        "pair.teacher.hog.schedule",
        "Leave it out",
    ),
    "a misspelt kind": (put(f"{ROTATION}.pretext", "rotatoin"), "pair.teacher.rotation.pretext", "Did you mean 'rotation'?"),
    "a misspelt backbone": (put("pair.student.backbone", "alexnett"), "pair.student.backbone", "Did you mean 'alexnet'?"),
    "a misspelt evaluation": (put("pair.evals", ["knn", "linear_prob"]), "pair.evals.1", "Did you mean 'linear_probe'?"),
    "no kind at all": (put("pair.student.backbone", 5), "pair.student.backbone", "this is 5"),
    "k above the images": (put("pair.transfer.k", {"choice": [5, 1000]}), "pair.transfer.k", "Use at most 216"),
    "an empty range": (put("pair.student.schedule.lr", {"log_float": [0.1, 0.01]}), "pair.student.schedule.lr", "[0.01, 0.1]"),
    "an unknown folder": (put("pair.data", "folder:/no/such"), "pair.data.path", "Give the folder of the images"),
    "an unknown file": (put("pair.data", "parquet:/no/such?label=y"), "pair.data.path", "Give a file"),
    "a misspelt data set": (put("pair.data", "cifar_10"), "pair.data", "Did you mean 'cifar10'?"),
    "a misspelt field of the data": (put("pair.data.sizee", 28), "pair.data.sizee", "Did you mean 'size'?"),
    "no data": (put("pair.data", []), "pair.data", "a kind's name"),
    "an unknown top-level field": (put("buget", {"trials": 3}), "buget", "Did you mean 'budget'?"),
    "an unknown metric": (put("objectives", [{"metric": "knn/top5"}]), "objectives.0", "Did you mean 'knn/top1'?"),
    "an objective that is no mapping": (put("objectives", ["knn/top1"]), "objectives.0", "a mapping (name: value)"),
    "a wrong mode": (put("objectives", [{"metric": "knn/top1", "mode": "best"}]), "objectives.0.mode", "one of max, min"),
    "rungs beyond the epochs": (put("early_stop.rungs", [1, 30]), "early_stop.rungs", "write [1, 9]"),
    "a first draw of nonsense": (put("start_with", [{"nonsense": 1}]), "start_with.0.nonsense", "Parameters: teacher"),
    "a text for a number": (put("pair.student.schedule.epochs", "nine"), "pair.student.schedule.epochs", "a whole number"),
    "a number below its limit": (put("budget.trials", 0), "budget.trials", "at least 1"),
    "an absent layer": (put(f"{ROTATION}.layer", "conv9"), "pair.teacher.rotation.layer", "It has conv1"),
    "evals that are no list": (put("pair.evals", {"kind": "knn"}), "pair.evals", "a list"),
    "evals that are one kind": (put("pair.evals", "knn"), "pair", "evals is 'knn', which is neither a list nor a preset"),
    "a misspelt preset": (put("pair.evals", "papr"), "pair", "did you mean 'paper'?"),
    "no neighbours": (
        put("pair.evals", [{"kind": "knn", "k": 0}]),
        "pair.evals.0.k",
        "k is 0 and should be at least 1, or a list",
    ),
    "neighbours in words": (
        put("pair.evals", [{"kind": "knn", "k": None}]),
        "pair.evals.0.k",
        "k is null and should be a whole number, or a list",
    ),
    "an empty list of neighbours": (
        put("pair.evals", [{"kind": "knn", "k": []}]),
        "pair.evals.0.k",
        "k is a list and should be a whole number, or a list of at least 1",
    ),
    "a penalty of no kind": (
        put("pair.evals", [{"kind": "linear_probe", "l2": "x"}]),
        "pair.evals.0.l2",
        "l2 is 'x' and should be a finite number, or a list, or path or dinov2",
    ),
    "a field that is always one": (
        put("pair.evals", [{"kind": "cost", "split": "test"}]),
        "pair.evals.0.split",
        "It is always val: leave it out",
    ),
    "a layer of the whole network": (
        put("pair.evals", [{"kind": "cost", "layer": "conv1"}]),
        "pair.evals.0.layer",
        "layer is 'conv1' and should be left out",
    ),
    "an evaluation without a name": (
        put("pair.evals", [{"kind": "knn", "name": ""}]),
        "pair.evals.0.name",
        "of at least 1 character",
    ),
    "a range of one number": (
        put("pair.data", {"kind": "folder", "path": "/x", "range": [1]}),
        "pair.data.range.1",
        "entry 1 is missing",
    ),
}


def is_one_paragraph(err: str) -> bool:
    """One sentence or two, in words of the user."""
    return err.startswith("ktray: ") and err.count("\n") == 1 and not any(word in err for word in JARGON)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(("change", "place", "right"), SPACES.values(), ids=SPACES.keys())
def test_a_mistake_in_a_space_is_told_with_its_place_and_what_would_be_right(
    change: Callable[[dict[str, Any]], None], place: str, right: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    space = copy.deepcopy(content())
    change(space)
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(space, sort_keys=False))
    assert main(["plan", str(path)]) == 2
    err = capsys.readouterr().err
    assert is_one_paragraph(err), err
    assert f"space.yaml: {place}: " in err
    assert right in err


TEXTS = {
    "broken": ("study: t\npair: {data: [\n", "line 3, column 1: this is not valid YAML", "A bracket or a quote is not closed."),
    "tabs": ("study: t\npair:\n\tdata: x\n", "line 3, column 1: this is not valid YAML", "Indent with spaces"),
    "twice": ("study: t\npair: {}\nstudy: u\n", "line 3, column 1: the key 'study' is there twice", "Leave one of them out."),
    "tag": (
        "study: !!python/object/apply:os.getcwd []\n",
        "line 1, column 8: the tag !!python/",
        "Leave it out: tags other than !!str, !!int, ",
    ),
    "empty": ("", "the file is empty", "quickstart.yaml"),
    "list": ("- a\n", "the file has no fields", "quickstart.yaml"),
}


@pytest.mark.parametrize(("text", "problem", "right"), TEXTS.values(), ids=TEXTS.keys())
def test_a_file_that_is_no_space_is_told_with_its_line(
    text: str, problem: str, right: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    assert main(["plan", str(path)]) == 2
    err = capsys.readouterr().err
    assert is_one_paragraph(err), err
    assert f"space.yaml{', ' if problem.startswith('line') else ': '}{problem}" in err
    assert right in err


EXPERIMENTS = {
    "raises": ("def pairs():\n    return 1 / 0\n", "line 2: the experiment raised ZeroDivisionError"),
    "is no Python": ("def pairs(:\n", "line 1: the experiment raised SyntaxError"),
    "has no pairs": ("x = 1\n", "has no function pairs()"),
    "ends Python": ("import sys\nsys.exit(0)\n", "line 2: the experiment raised SystemExit: 0"),
    "names a pair by a number": ("def pairs():\n    return {1: 2}\n", "names a pair 1, which is not text"),
    "gives more pairs than are read": (
        "def pairs():\n    return {str(n): None for n in range(3001)}\n",
        "gives 3,001 pairs, and at most 3,000 are read",
    ),
    "gives no specs": ("def pairs():\n    return {'a': 1}\n", "pairs()['a'] is no PairSpec"),
    "lacks fields": (
        "from ktray.spec import PairSpec\ndef pairs():\n    return {'a': PairSpec.model_validate({'data': 'cifar10'})}\n",
        "line 3: transfer: 'transfer' is missing; student: 'student' is missing",
    ),
}


@pytest.mark.parametrize(("text", "said"), EXPERIMENTS.values(), ids=EXPERIMENTS.keys())
def test_an_experiment_that_cannot_be_read_is_told_with_its_line(
    text: str, said: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "experiment.py"
    path.write_text(text)
    assert main(["run", str(path), "--local"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ktray: ")
    assert said in err
    assert "Traceback" not in err


def test_an_address_of_ray_is_not_given_to_a_run_without_ray(home: Path, tmp_path: Path, capsys: Any) -> None:
    pair = tmp_path / "pair.yaml"
    pair.write_text(yaml.safe_dump(toy_spec()))
    assert main(["run", str(pair), "--local", "--address", "auto"]) == 2
    assert "--local runs without Ray" in capsys.readouterr().err


def test_a_pair_for_a_space_and_a_space_for_a_pair_name_the_right_verb(home: Path, tmp_path: Path, capsys: Any) -> None:
    pair, space = tmp_path / "pair.yaml", tmp_path / "space.yaml"
    pair.write_text(yaml.safe_dump(toy_spec()))
    space.write_text(yaml.safe_dump(content()))
    assert main(["search", str(pair)]) == 2
    assert f"Use ktray run {pair}." in capsys.readouterr().err
    assert main(["run", str(space)]) == 2
    assert f"Use ktray search {space}." in capsys.readouterr().err


ARGUMENTS = {
    "a wrong path": (["--set", "transfer.q=3"], "there is no field 'q'"),
    "no value": (["--set", "transfer.k"], "Write --set transfer.k=500."),
    "too deep": (["--set", "transfer.k.x=3"], "transfer.k is 5 and has no 'x'"),
    "a wrong path below the pair": (["--set", "pair.transfer.q=3"], "pair.yaml: transfer.q: there is no field 'q'"),
    "a field of a space": (["--set", "budget.trials=3"], "--set budget.trials: the file is a pair, and 'budget' is a field of"),
    "an absent runtime file": (["--runtime", "no.yaml"], "no.yaml: the file cannot be read"),
    "an unknown runtime field": (["--runtime", "RUNTIME:cpuss: 2"], "Did you mean cpus?"),
    "an unknown stage": (["--runtime", "RUNTIME:stages: {teachr: {cpus: 1}}"], "Did you mean teacher?"),
    "a remote store": (["--store", "s3://bucket"], "Use file:///path"),
    "a store without a path": (["--store", "file://"], "names no path. Use file:///path, with three slashes"),
    "a store on a host": (["--store", "file://localhost/store"], "names the host 'localhost'"),
    "a home without a name": (["--home", ""], "an argument that is a path is empty"),
    "a home that is a file": (["--home", "FILE"], "a file is in its place"),
    "a home below a file": (["--home", "FILE/home"], "a file is in its place"),
    "a store that is a file": (["--store", "FILE"], "cannot be created: a file is in its place. Choose another with --store."),
    "a store where none can be": (["--store", "file:///proc/store"], "the store file:///proc/store cannot be created: "),
}


@pytest.mark.parametrize(("words", "said"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_a_wrong_argument_is_told_before_anything_runs(
    words: list[str], said: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    pair = tmp_path / "pair.yaml"
    pair.write_text(yaml.safe_dump(toy_spec()))
    (tmp_path / "file").touch()
    if words[1].startswith("RUNTIME:"):
        (tmp_path / "runtime.yaml").write_text(words[1].removeprefix("RUNTIME:"))
        words = [words[0], str(tmp_path / "runtime.yaml")]
    words = [word.replace("FILE", str(tmp_path / "file")) for word in words]
    for verb in (["run", str(pair), "--local"], ["plan", str(pair)]):
        assert main([*verb, *words]) == 2
        err = capsys.readouterr().err
        assert is_one_paragraph(err), err
        assert said in err
    assert not list(home.glob("store/*-*"))


@pytest.mark.parametrize("words", [["--trials", "abc"], ["--trials", "0"], ["--concurrent", "0"], ["--name", "a/b"]])
def test_a_search_with_a_wrong_argument_begins_no_study(words: list[str], home: Path, tmp_path: Path, capsys: Any) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump(content()))
    assert main(["search", str(space), *words]) == 2
    err = capsys.readouterr().err
    assert is_one_paragraph(err), err
    assert words[1] in err
    assert not list(home.glob("studies/*/journal.log"))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:10001"])
def test_an_address_where_nothing_answers_is_told_at_once(address: str, tmp_path: Path) -> None:
    from ktray.errors import UserError
    from ktray.scheduler.ray_session import start
    from ktray.scheduler.resources import RuntimeSettings

    with pytest.raises(UserError, match=r"--address: .*HOST:PORT"):
        start(tmp_path, address, RuntimeSettings())


def folder(root: Path, images: int, broken: int = 0, side: int = 32, colour: int | None = None) -> dict[str, Any]:
    root.mkdir()
    for i in range(images):
        pixels = noise(side, side, seed=i) if colour is None else noise(side, side) * 0 + colour
        Image.fromarray(pixels).save(root / f"{i:03}.png")
    for i in range(broken):
        (root / f"broken{i}.png").write_bytes(b"no image")
    return {"kind": "folder", "path": str(root), "size": 28, "max_unreadable": 0.9}


def checkpoint(path: Path, backbone: dict[str, Any], value: float) -> dict[str, Any]:
    weights = loop.untrained_backbone(parse("backbone", backbone), 0).state_dict()
    save_file({name: tensor * value if tensor.is_floating_point() else tensor for name, tensor in weights.items()}, path)
    return {"checkpoint": str(path), "backbone": ALEXNET}


CLUSTERS = {"kind": "clusters", "k": 5}
DATA = {  # what is wrong -> (changes of the pair, what is said, exit code)
    "more clusters than readable images": (
        lambda at: {"data": folder(at / "x", 30, broken=30), "transfer": {"kind": "clusters", "k": 40}},
        "k = 40 clusters need at least as many rows; the features have ",
        3,
    ),
    "nothing but broken images": (
        lambda at: {"data": {**folder(at / "x", 0, broken=20), "max_unreadable": 1}},
        "20 of 20 images are unreadable",
        3,
    ),
    "one colour": (lambda at: {"data": folder(at / "x", 30, colour=9)}, "all 27 rows of the features are equal", 3),
    "too few to hold some out": (
        lambda at: {"data": folder(at / "x", 4), "transfer": {"kind": "clusters", "k": 2}},
        "no val",
        2,
    ),
    "smaller than the descriptor's cells": (
        lambda at: {"data": {**folder(at / "x", 30, side=8), "size": 8}},
        "images of 8 x 8 px are too small for a block of 2 x 2 cells of 7 px",
        2,
    ),
    "weights that are not numbers": (
        lambda at: {"data": folder(at / "x", 30), "teacher": checkpoint(at / "nan.safetensors", ALEXNET, float("nan"))},
        "nan.safetensors has weights that are not finite",
        2,
    ),
    "weights of another architecture": (
        lambda at: {
            "data": folder(at / "x", 30),
            "teacher": checkpoint(at / "r.safetensors", {"kind": "resnet", "depth": 18}, 0),
        },
        "Give the backbone",
        2,
    ),
    "no such checkpoint": (
        lambda at: {"data": folder(at / "x", 30), "teacher": {"checkpoint": str(at / "no.pt"), "backbone": ALEXNET}},
        "teacher.checkpoint: there is no",
        2,
    ),
}


@pytest.mark.parametrize(("changes", "said", "code"), DATA.values(), ids=DATA.keys())
def test_data_that_cannot_work_are_told_in_one_sentence(
    changes: Callable[[Path], dict[str, Any]], said: str, code: int, home: Path, tmp_path: Path, capsys: Any
) -> None:
    spec = toy_spec(**{"evals": ["effective_rank"], "transfer": CLUSTERS, "teacher": HOG, **changes(tmp_path)})
    pair = tmp_path / "pair.yaml"
    pair.write_text(yaml.safe_dump(spec))
    assert main(["run", str(pair), "--local", "--quiet"]) == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.startswith("ktray: ")
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err


def as_user(*command: object) -> subprocess.CompletedProcess[str]:
    """`ktray` in a process for which rights count; root's exceptions from them are taken away."""
    words = [sys.executable, "-m", "ktray", *map(str, command)]
    if os.geteuid() == 0:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root may do everything here")
        words = [setpriv, "--bounding-set", "-dac_override,-dac_read_search", *words]
    return subprocess.run(words, capture_output=True, text=True)


def test_a_home_that_may_not_be_written_and_a_folder_that_may_not_be_read_are_named(tmp_path: Path) -> None:
    pair, closed, photos = tmp_path / "pair.yaml", tmp_path / "closed", folder(tmp_path / "photos", 20)
    closed.mkdir()
    closed.chmod(0o555)
    pair.write_text(yaml.safe_dump(toy_spec(data=photos, evals=["effective_rank"])))
    done = as_user("run", pair, "--local", "--home", closed)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ktray: {closed}/")
    assert "Permission denied. Change its rights, or choose another place with --home" in done.stderr
    Path(photos["path"]).chmod(0)
    done = as_user("run", pair, "--local", "--home", tmp_path / "home")
    Path(photos["path"]).chmod(0o755)
    assert done.returncode == 2
    assert f"data.path: the folder {photos['path']} cannot be read: Permission denied" in done.stderr


@pytest.mark.slow
def test_a_full_disk_loses_nothing_and_the_same_command_goes_on(tmp_path: Path) -> None:
    pair, disk = tmp_path / "pair.yaml", tmp_path / "disk"
    disk.mkdir()
    pair.write_text(yaml.safe_dump(toy_spec(data=folder(tmp_path / "photos", 60), evals=["effective_rank"])))
    run = f"{sys.executable} -m ktray run {pair} --local --home {disk}/home"
    script = f"mount -t tmpfs -o size=300k tmpfs {disk} || exit 77; {run}; code=$?; ls {disk}/home/store; "
    script += f"mount -o remount,size=20m {disk}; {run} --json && ls -a {disk}/home/store/.scratch; exit $code"
    if shutil.which("unshare") is None:
        pytest.skip("no disk can be mounted here")
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode in (1, 77) and "disk is full" not in done.stderr:
        pytest.skip("no disk can be mounted here")
    assert done.returncode == 5, done.stderr
    assert "the disk is full" in done.stderr
    assert "features-" in done.stdout.partition("[")[0], "what was published stays"
    assert '"features": 1' in done.stdout.partition('"reused"')[2]
    assert done.stdout.endswith(".\n..\n"), "and nothing of the failed attempt is left"

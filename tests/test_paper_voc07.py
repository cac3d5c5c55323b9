"""The paper's experiment runs: one iteration of every stage of every pair, on made sets in the real layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments import paper_voc07
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_check import check_pair, data_loader
from ktray.pipeline.pair_graph import build
from ktray.plugins import parse
from ktray.pool import StageContext
from ktray.runs.voc_composition import compose
from ktray.spec import PairSpec
from ktray.stores.file import FileStore

COLOURS = {"n01440764": (230, 160, 30), "n01443537": (40, 60, 220), "n01484850": (40, 210, 210), "n01491361": (40, 180, 60)}
SMALL = {
    **{"steps": 1, "epochs": 1, "seeds": 1, "min_steps": 1, "hidden": [8], "width": 8, "min_sizes": [96], "max_size": 160},
    **{"batch_size": 2, "crop": 96},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with `imagenet`, `VOCdevkit` and `proposals.npz`, all made."""
    folder, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name, colour in COLOURS.items():
            (folder / "imagenet" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(rng.normal(colour, 40, (160, 160, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "imagenet" / split / name / f"{index}.jpg")
    labelled = parse("dataset", {"kind": "imagefolder", "path": str(folder / "imagenet")})
    compose(labelled, folder, images=16, size=96)
    names = [path.stem for path in (folder / "VOCdevkit" / "VOC2007" / "JPEGImages").glob("*.jpg")]
    corner = rng.integers(0, 30, (20, 2))
    boxes = np.hstack([corner, corner + rng.integers(16, 34, (20, 2))])
    np.savez(folder / "proposals.npz", **dict.fromkeys(names, boxes))
    return folder


def smallest(plain: dict[str, Any], root: Path) -> PairSpec:
    """A pair of the experiment on the made sets, with narrow networks and one iteration of everything."""
    imagenet = {**paper_voc07.IMAGENET, "path": str(root / "imagenet"), "size": 160}
    data = {role: imagenet for role in ("pretext", "cluster", "transfer")}
    target = plain["data"]["target"]
    if target["kind"] == "voc":
        target = {**target, "path": str(root / "VOCdevkit"), "year": "2007", "size": 96}
        target |= {"train": "trainval", "test": "test"}
    else:
        target = imagenet
    shorter = {"epochs": 1, "batch_size": 8, "precision": "float32"}
    teacher, student, transfer = plain["teacher"], plain["student"], dict(plain["transfer"])
    if teacher and "pretext" in teacher:
        schedule = {**teacher["schedule"], **shorter}
        pretext = {**teacher["pretext"], "permutations": 10, "hidden": 8}
        teacher = {**teacher, "pretext": pretext, "schedule": schedule, "backbone": {**teacher["backbone"], "width": 0.125}}
    elif teacher:
        teacher = {"descriptor": {**teacher["descriptor"], "words": 8}}
    if "k" in transfer:
        transfer["k"] = 4
    student = {**student, "schedule": {**student["schedule"], **shorter}, "backbone": {**student["backbone"], "width": 0.125}}
    evals = []
    for spec in plain["evals"]:
        own = parse("evaluation", spec)
        few = {name: value for name, value in SMALL.items() if name in type(own).model_fields}
        if spec["kind"] == "nonlinear_probe":
            few["crop"] = 0.875
        if spec["kind"] == "linear_probe":
            few["pool"] = {"grid": 1}
        if spec["kind"] == "voc_det":
            few["proposals"] = str(root / "proposals.npz")
        evals.append({**spec, **few})
    return PairSpec.model_validate(
        {"data": {**data, "target": target}, "teacher": teacher, "transfer": transfer, "student": student, "evals": evals}
    )


def test_the_pairs_of_the_paper_are_valid_and_share_the_student_of_a_method() -> None:
    pairs = paper_voc07.pairs()
    assert len(pairs) == len(paper_voc07.TEACHERS) * len(paper_voc07.TARGETS)
    on_voc = {name: pair for name, pair in pairs.items() if "VOC" in name}
    for pair in on_voc.values():
        assert {spec.split for spec in pair.evals} == {"test"}
    one, other = (on_voc[f"CC+HOG | {target}"].model_copy(update={"evals": ()}) for target in ("VOC 2007", "VOC 2012"))
    keys = [build(pair, lambda data: data.kind).keys["student"] for pair in (one, other)]
    assert keys[0] == keys[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", paper_voc07.plain_pairs())
def test_one_iteration_of_every_stage_runs_on_made_sets(name: str, root: Path, tmp_path: Path) -> None:
    pair = smallest(paper_voc07.plain_pairs()[name], root)
    check_pair(pair, data_loader())
    store = FileStore(root / "store")
    graph = build(pair, data_identity())
    for stage in graph.stages:
        artifact, _ = execute(stage, store, "a", StageContext())
        assert artifact.directory.exists()
    assert set(graph.keys["evaluation"]) == {
        spec.get("name", spec["kind"]) for spec in paper_voc07.plain_pairs()[name]["evals"]
    }

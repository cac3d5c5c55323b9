"""A first space for the user's own images: k, sizes, schedules, trials and tolerances that fit them, this machine and a time.

`draft_for` makes the choices, `render` writes them as a commented YAML file, and `fitted` changes them until the search takes
about the time that there is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ktray.errors import UserError
from ktray.runs.machine import Machine
from ktray.spec import DataSpec
from ktray.text import counted, first_few, visible_name

FEWEST_IMAGES = 40
STEPS, FEWEST_STEPS, MOST_STEPS = 400, 120, 4000  # of a student's optimiser
FEWEST_TRIALS, TRIALS, MOST_TRIALS = 8, 14, 200
MOST_EPOCHS = 200
MOST_CONCURRENT = 8
_TRIAL_BYTES = 1 << 30  # of memory per trial that runs: a worker with torch, and the process that waits
_BATCH = {False: 64, True: 256}  # with a GPU?
_SIDES = {False: (64, 48, 32), True: (128, 96, 64, 32)}  # of images, the preferred one first
_IMAGES_PER_CLUSTER = 20
_FEWEST_PER_CLUSTER = 8
_VAL_IMAGES = 500
_REDUCTION = 2


@dataclass(frozen=True)
class Judges:
    """What judges students: the objective, the quick metric at rungs, the evaluations, and why, as a comment."""

    objective: str
    at_rungs: str
    evals: str
    comment: str


JUDGES = {
    "labels": Judges(
        "linear_probe/top1",
        "knn/top1",
        "[{kind: linear_probe}, {kind: knn}]",
        "Judged by a linear classifier on the student's frozen features. No label is used for training, but labels of the\n"
        "# training images and of val choose between pairs.",
    ),
    "presence": Judges(
        "voc07_cls/map",
        "voc07_cls/map",
        "[{kind: voc07_cls}]",
        "Judged by linear classifiers, one per class, on the student's frozen features. Labels choose between pairs.",
    ),
    "none": Judges(
        "effective_rank/rank",
        "effective_rank/rank",
        "[{kind: effective_rank}]",
        "There are no labels, so students are judged by how many dimensions their features use (RankMe). That\n"
        "# compares students of one architecture only, so there is one. Labels, as folders of classes, allow a better judge.",
    ),
}


@dataclass(frozen=True)
class Draft:
    """The choices of a space.

    Attributes:
        data: fields of the data set that are written, `kind` first.
        images: training images after the hold-out, those that can be read.
        judges: key of `JUDGES`.
        unreadable: comment about the unreadable images; empty without any.
        classes: number of classes; 0 without labels.
        ks: numbers of clusters.
        batch, epochs, teacher_epochs: of the trainings.
        gpu: whether there is one.
    """

    study: str
    data: dict[str, Any]
    images: int
    judges: str
    unreadable: str
    classes: int
    ks: tuple[int, ...]
    batch: int
    epochs: int
    teacher_epochs: int
    trials: int
    concurrent: int
    gpu: bool

    @property
    def steps(self) -> int:
        """Steps of a student's optimiser."""
        return max(1, self.images // self.batch) * self.epochs


def draft_for(spec: DataSpec, found: dict[str, Any], machine: Machine, study: str) -> Draft:
    """The first choices, before anything is measured.

    Args:
        found: what `data_check.describe` says of the data set, all images decoded.

    Raises:
        UserError: there are too few images, or most of them cannot be read.
    """
    train, decoded = found["splits"]["train"], found["decoded"]
    unreadable = len(decoded["unreadable"]) if decoded else 0
    total = sum(split["images"] for split in found["splits"].values())
    if unreadable > total / 2:
        name, why = next(iter(decoded["unreadable"].items()))
        raise UserError(f"{unreadable} of {total} images cannot be read, such as {name}: {why}", "FOLDER", "Repair them first.")
    readable = train["images"] - unreadable
    if readable < FEWEST_IMAGES:
        raise UserError(f"{counted(readable, 'image')} are too few to learn from", "FOLDER", f"Give {FEWEST_IMAGES} or more.")
    share = round(min(0.2, max(0.1, _VAL_IMAGES / readable)), 2)
    held_out = "val" not in found["splits"]
    images = round(readable * (1 - share)) if held_out else readable
    gpu = bool(machine.gpus)
    data = {"kind": spec.kind, **_stated(spec), "size": _side(decoded, spec, gpu)}
    if held_out and share != spec.split.val:
        data["split"] = {"val": share}
    comment = ""
    if unreadable:
        if unreadable > spec.max_unreadable * total:
            data["max_unreadable"] = math.ceil(100 * unreadable / total + 0.5) / 100
        names = first_few(decoded["unreadable"], 5)
        comment = f"{unreadable} of {total} images cannot be read and are left out: {names}"
    classes = train["classes"] if train["labelled"] or train["several_labels"] else 0
    judges = "labels" if train["labelled"] and classes > 1 else "presence" if train["several_labels"] else "none"
    batch = min(_BATCH[gpu], max(16, 2 ** int(math.log2(images / 4))))
    concurrent = max(2, min(MOST_CONCURRENT, 2 * max(machine.cores, len(machine.gpus)), machine.memory_bytes // _TRIAL_BYTES))
    draft = Draft(
        study, data, images, judges, comment, classes, _cluster_numbers(images, classes), batch, 0, 0, TRIALS, concurrent, gpu
    )
    return with_epochs(draft, STEPS / max(1, images // batch))


def _stated(spec: DataSpec) -> dict[str, Any]:
    """The fields of a data set that were given, without those that a draft chooses."""
    given = spec.model_dump(mode="json", exclude={"kind", "size", "split", "max_unreadable"})
    defaults = {name: field.default for name, field in type(spec).model_fields.items()}  # type: ignore[attr-defined]
    return {name: value for name, value in given.items() if value != defaults[name]}


def _side(decoded: dict[str, Any] | None, spec: DataSpec, gpu: bool) -> int:
    """The side to which images are resized: not larger than most of them are."""
    if decoded is None or decoded["median_side"] is None:
        return spec.size
    side = int(decoded["median_side"])
    return next((each for each in _SIDES[gpu] if each <= side), max(8, side))


def _cluster_numbers(images: int, classes: int) -> tuple[int, ...]:
    """Up to three numbers of clusters: from about the number of classes, if there are any, to 20 images per cluster."""
    most = max(2, images // _FEWEST_PER_CLUSTER)
    fine = _rounded(min(1000, images / _IMAGES_PER_CLUSTER))
    wanted = {classes, _rounded(3 * classes), fine} if classes > 1 else {fine, _rounded(fine / 3), _rounded(fine / 10)}
    found = sorted({k for k in wanted if 2 <= k <= most}) or [2]
    return tuple(found[-3:])


def _rounded(number: float) -> int:
    """To one digit: 1, 2, 3, 5 and so on, times a power of ten."""
    if number < 10:
        return max(1, round(number))
    scale = 10 ** int(math.log10(number))
    return int(min((1, 1.5, 2, 3, 5, 7, 10), key=lambda each: abs(each - number / scale)) * scale)


def with_epochs(draft: Draft, epochs: float) -> Draft:
    """The draft with about so many epochs: a multiple of four, for the rungs, within bounds of epochs and of steps."""
    per_epoch = max(1, draft.images // draft.batch)
    low, high = FEWEST_STEPS / per_epoch, min(MOST_EPOCHS, MOST_STEPS / per_epoch)
    whole = max(4, 4 * round(max(low, min(high, epochs)) / 4))
    return replace(draft, epochs=whole, teacher_epochs=max(2, whole // 2))


def fitted(draft: Draft, seconds: float, forecast: Callable[[Draft], float]) -> Draft:
    """The draft changed until its search takes about as long as there is time, by `forecast`; shorter where nothing would help.

    Too long: first fewer epochs, then fewer trials. Too short: first longer trainings, then more trials.
    """
    while forecast(draft) > seconds:
        shorter = with_epochs(draft, draft.epochs / 1.5)
        if shorter.epochs == draft.epochs:
            shorter = replace(draft, trials=max(FEWEST_TRIALS, draft.trials - 2))
        if shorter == draft:
            break
        draft = shorter
    while draft.trials < MOST_TRIALS:
        longer = with_epochs(draft, draft.epochs * 1.5) if draft.steps < 4 * STEPS else draft
        if longer.epochs == draft.epochs:
            longer = replace(draft, trials=min(MOST_TRIALS, round(draft.trials * 1.3)))
        if forecast(longer) > 0.9 * seconds:
            break
        draft = longer
    return draft


def study_name(path: Path) -> str:
    """A study's name from that of a folder or file: ``my-photos``."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem if path.is_file() else path.name).strip(".-")
    return plain[:60] or "images"


def render(draft: Draft, header: str) -> str:
    """The space as a YAML file with comments.

    Args:
        header: lines that begin the file, without ``#``.
    """
    import yaml

    side, judges = int(draft.data["size"]), JUDGES[draft.judges]
    data = yaml.safe_dump(draft.data, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True).strip()
    cells = sorted({max(2, side // 8), max(3, side // 4)})
    width, student = ("1.0", "{kind: alexnet}") if draft.gpu else ("0.25", "{kind: alexnet, width: 0.25}")
    if draft.judges != "none":
        student = (
            "{choice: [alexnet, {kind: resnet, depth: 18}]}" if draft.gpu else "{kind: alexnet, width: {choice: [0.125, 0.25]}}"
        )
    rungs = [draft.epochs // 4, draft.epochs // 2, draft.epochs]
    unreadable = f"  # {visible_name(draft.unreadable)}.\n" if draft.unreadable else ""
    return f"""{"".join(f"# {visible_name(line)}".rstrip() + chr(10) for line in header.splitlines())}
study: {draft.study}

# {judges.comment}
objectives: [{{metric: {judges.objective}, mode: max}}]

# More trials later go on with the same search: ktray search FILE --trials +10
budget: {{trials: {draft.trials}, concurrent: {draft.concurrent}}}

# Every student trains {rungs[0]} epochs; the better half goes on to {rungs[1]}, the better half of these to {rungs[2]}.
early_stop: {{metric: {judges.at_rungs}, rungs: {rungs}, reduction: {_REDUCTION}}}

pair:
{unreadable}  # Images become squares of {side} px: the shorter side is resized, the middle of the longer one is kept.
  data: {data}

  # A teacher only has to sort images into groups. `ktray show kinds` lists what else can teach.
  teacher:
    one_of:
      hog:  # gradients by hand: no training at all
        descriptor: {{kind: hog, cell: {{choice: {cells}}}}}
      random:  # the control: is training a teacher worth anything?
        descriptor: {{kind: random_network, backbone: {{kind: alexnet, width: {width}}}, layer: {{choice: [conv3, conv5]}}}}
      rotation:  # a network that learned to tell which way up an image is
        pretext: {{kind: rotation}}
        backbone: {{kind: alexnet, width: {width}}}
        layer: {{choice: [conv3, conv4]}}
        schedule: {{epochs: {draft.teacher_epochs}, lr: 0.05, batch_size: {draft.batch}}}

  # k-means on the teacher's features; the student learns to predict each image's cluster. {draft.images:,} images learn.
  transfer: {{kind: clusters, k: {{choice: {list(draft.ks)}}}}}

  student:
    backbone: {student}
    schedule: {{epochs: {draft.epochs}, lr: {{log_float: [0.01, 0.2]}}, batch_size: {draft.batch}}}
    augment: {{crop: {max(2, side // 16)}, flip: true}}

  evals: {judges.evals}

# The first draws, one per teacher; what they leave open is drawn.
start_with: [{{teacher: hog}}, {{teacher: random}}, {{teacher: rotation}}]
"""

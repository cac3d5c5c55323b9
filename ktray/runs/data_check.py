"""What a data set holds, decoding it into the store, and whether a study's images are still those it was begun with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np

from ktray import plugins
from ktray.checksums import read_json, write_json
from ktray.errors import UserError
from ktray.features import precomputed
from ktray.fingerprint import canonical
from ktray.images import Properties, Source, Splits
from ktray.images.inspection import InspectedImage, inspect
from ktray.pipeline.pair_graph import Identity, generations
from ktray.runs.machine import cores
from ktray.runs.repeated_images import repeated_images, warnings_about
from ktray.runs.settings import Settings
from ktray.search.space import Space
from ktray.search.trial import Trial
from ktray.spec import DataRoles, DataSpec, PairSpec, PrecomputedTeacher, teachers_of, without_max_unreadable
from ktray.text import as_read, counted, shown, some_of, visible_name
from ktray.yaml_file import parse_yaml

FILE = "data.json"


def parse_data(text: str) -> DataSpec:
    """The spec of a data set given as text: ``folder:/photos``, ``parquet:/p?label=label``, or a mapping in YAML.

    Raises:
        UserError: no such kind, or a field is wrong.
    """
    from pydantic import TypeAdapter, ValidationError

    from ktray.search import spec_errors

    value = parse_yaml(text, "the data set") if text.startswith("{") else text
    named = value.get("kind") if isinstance(value, dict) else text.partition("?")[0].partition(":")[0]
    if not isinstance(named, str) or not named:
        raise UserError(f"{shown(text)} names no kind of data set", "DATA", "Write such as folder:/photos or cifar10.")
    kind = plugins.module("dataset", named).Spec
    try:
        data: DataSpec = TypeAdapter(DataSpec).validate_python(value)
        return data
    except ValidationError as error:
        spec_errors.raise_if_any(
            spec_errors.problems_from_validation(error, kind, {}, lambda path: ".".join(map(str, path))), text
        )
        raise AssertionError("unreachable: a validation error has problems") from error


def describe(
    spec: DataSpec, sample: int | None = None, report: Callable[[int, int], None] = lambda done, of: None
) -> dict[str, Any]:
    """What a data set holds and what was assumed about it, as docs/json.md describes the answer of `ktray data check`.

    Args:
        sample: number of images, spread over all splits, that are decoded; None for all.
        report: called with the numbers of images that are decoded and that will be.

    Raises:
        UserError: there is no such data set, or it cannot be read.
    """
    from ktray.images import split_rows

    splits = plugins.module_of("dataset", spec).load(spec)
    present = _present(splits)
    layout, held_out = splits.layout, split_rows(splits, spec.split).get("val")
    found = list(inspect(present, spec, cores(), sample, compare=True, report=report))
    decoded, repeated = _decoded(found, spec, sample is not None), repeated_images(found, splits, spec.split)
    return {
        "kind": spec.kind,
        "size": spec.size,
        "splits": {name: _split(part, dict(layout.read_from.get(name, {}))) for name, part in present.items()},
        "held_out": {"images": len(held_out[1]), "share": spec.split.val, "seed": spec.split.seed}
        if held_out and splits.val is None
        else None,
        "classes_from": layout.classes,
        "annotations": layout.annotations,
        "order": layout.order,
        "left_out": dict(layout.left_out),
        "decoded": decoded,
        "repeated": repeated,
        "warnings": [*layout.warnings, *_suspicious(present), *_suspicious_pixels(decoded), *warnings_about(repeated)],
    }


def notes_about(pairs: Iterable[PairSpec], load: Callable[[DataSpec], Splits]) -> list[str]:
    """Sentences about what looks wrong in the data of pairs, and in which order rows without paths belong to images.

    Args:
        load: lists a data set.
    """
    specs, ordered = {}, {}
    for pair in (each for outer in pairs for each in generations(outer)):
        for role in DataRoles.model_fields:
            spec = getattr(pair.data, role)
            specs[canonical(spec.model_dump(mode="json"))] = spec
        for teacher in teachers_of(pair):
            if isinstance(teacher, PrecomputedTeacher) and precomputed.matched_by_row(teacher):
                ordered[teacher.features] = load(pair.data.cluster)
    found = []
    for spec in specs.values():
        present = _present(splits := load(spec))
        warnings = [*splits.layout.warnings, *_suspicious(present)]
        warnings += _suspicious_pixels(_decoded(list(inspect(present, spec, 1, _FEW)), spec, is_sample=True))
        found += [f"{spec.kind}{':' * bool(path := getattr(spec, 'path', None))}{path or ''}: {each}" for each in warnings]
    for features, splits in ordered.items():
        names, order = splits.train.names, splits.layout.order
        found.append(
            f"row i of {features} belongs to the i-th training image, {f'ordered {order}, ' if order else ''}"
            f"from {names[0]} to {names[-1]}"
        )
    return list(dict.fromkeys(map(visible_name, found)))


_FEW = 8  # images that a plan decodes


def _present(splits: Splits) -> dict[str, Source]:
    return {name: part for name in ("train", "val", "test") if (part := getattr(splits, name)) is not None}


def _split(part: Source, read_from: dict[str, int]) -> dict[str, Any]:
    counts = None
    if part.labels is not None:
        counts = dict(zip(part.classes, np.bincount(part.labels, minlength=len(part.classes)).tolist(), strict=True))
    elif part.presence is not None:
        counts = dict(zip(part.classes, (part.presence == 1).sum(axis=0).tolist(), strict=True))
    return {
        "images": len(part.names),
        "classes": len(part.classes),
        "labelled": part.labels is not None,
        "images_of_class": counts,
        "several_labels": part.presence is not None,
        "boxes": None if part.boxes is None else _boxes(part),
        "masks": part.mask is not None,
        "read_from": read_from,
    }


def _boxes(part: Source) -> dict[str, int]:
    """How many boxes there are, how many of them have each flag, and how many images have none."""
    assert part.boxes is not None
    flags = np.concatenate(part.box_flags or [np.zeros((0, 3), np.bool_)]).sum(axis=0).tolist()
    return {
        "count": sum(map(len, part.boxes)),
        **dict(zip(("difficult", "truncated", "crowd"), flags, strict=True)),
        "images_without": sum(not len(of_image) for of_image in part.boxes),
    }


def _suspicious(splits: dict[str, Source]) -> list[str]:
    """Sentences about labels that look wrong, for data sets of any kind."""
    found = []
    labelled = {name: part.labels for name, part in splits.items() if part.labels is not None}
    for name, labels in labelled.items():
        part, present = splits[name], set(labels.tolist())
        if len(present) == 1 and len(part.names) > 1:
            found.append(
                f"all images of {name} have the class {part.classes[min(present)]!r}, so that any classifier is always right"
            )
        found += _alike([part.classes[number] for number in sorted(present)], name)
        absent = [label for number, label in enumerate(part.classes) if number not in present]
        if absent and len(present) > 1:
            found.append(f"{name} has no image of {_some(absent, 'class', 'classes')}")
    for name, part in splits.items():
        if part.presence is not None:
            occurring = (part.presence == 1).any(axis=0)
            absent = [label for label, seen in zip(part.classes, occurring, strict=True) if not seen]
            found += [f"{name} has no image of {_some(absent, 'class', 'classes')}"] if absent else []
    if "train" in labelled:
        found += [f"{name} has no labels, although train has" for name in splits if name not in labelled]
    return found


def _alike(classes: Sequence[str], split: str) -> list[str]:
    """A sentence for each group of classes that a person would read as one, such as `café` with one or two characters for é."""
    groups: dict[str, list[str]] = {}
    for label in classes:
        groups.setdefault(as_read(label), []).append(label)
    return [
        f"{_some(names, 'class', 'classes')} of {split} differ only in case, blanks, hyphens or the encoding of a letter"
        for names in groups.values()
        if len(names) > 1
    ]


def _decoded(images: Sequence[InspectedImage], spec: DataSpec, is_sample: bool) -> dict[str, Any] | None:
    """What the decoded images are; None for a data set whose images are not encoded."""
    found = [each.properties for each in images if each.properties is not None]
    unreadable = {each.name: each.why for each in images if each.why}
    if not found and not unreadable:
        return None
    wide = [each for each in found if each.bits > 8]
    return {
        "images": len(images),
        "sample": is_sample,
        "formats": dict(Counter(each.format for each in found).most_common()),
        "modes": dict(Counter(each.mode for each in found).most_common()),
        "sides": [min(min(e.width, e.height) for e in found), max(max(e.width, e.height) for e in found)] if found else None,
        "median_side": int(np.median([min(each.width, each.height) for each in found])) if found else None,
        "unreadable": unreadable,
        "turned": sum(each.turned for each in found),
        "several_frames": sum(each.frames > 1 for each in found),
        "unused_bands": sum(each.unused_bands > 0 for each in found),
        "wide": {
            "images": len(wide),
            "grey": all(len(each.mode) == 1 or each.mode.startswith("I") for each in wide),
            "bits": max(each.bits for each in wide),
            "low": min(each.low for each in wide),
            "high": max(each.high for each in wide),
            "range": getattr(spec, "range", None),
            "kinds": _kinds_of_wide(wide),
        }
        if wide
        else None,
        "brightest": max((each.high for each in found if each.bits == 8), default=None),
    }


def _kinds_of_wide(wide: list[Properties]) -> list[dict[str, Any]]:
    """Images of more than 8 bits by format and by what is white in their files without a range, each with its largest value,
    and the one that half of the images do not exceed."""
    kinds: dict[tuple[str, int | None, bool], list[float]] = {}
    for each in wide:
        grey = len(each.mode) == 1 or each.mode.startswith("I")
        kinds.setdefault((each.format, each.limit, grey), []).append(each.high)
    return [
        {"format": name, "limit": limit, "grey": grey, "images": len(found), "high": max(found), "usual": median_low(found)}
        for (name, limit, grey), found in kinds.items()
    ]


def _unused_bits(wide: dict[str, Any]) -> list[str]:
    """A sentence about each kind of images with more than 8 bits that uses less than half of the values up to white."""
    if wide["range"] is not None:
        return []
    found, kinds = [], wide["kinds"]
    for kind in kinds:
        limit, high = kind["limit"], int(kind["high"])
        if limit is None or high > limit // 2:
            found += _few_brighter(kind) if limit is not None and kind["grey"] else []
            continue
        bits = max(1, high.bit_length())
        top = (1 << bits) - 1
        # A range applies to all grey images of the data set, so it must be that of the other kinds, too.
        fits = all(_range_fits(other, top) for other in kinds if other["grey"])
        remedy = f"write range: [0, {top}] in the data set" if kind["grey"] and fits else "convert them to 8 bits"
        remedy = remedy if kind["grey"] else "convert the colours to 8 bits"
        others = f" in {kind['format']} files" if len(kinds) > 1 else ""
        found.append(
            f"images of {limit.bit_length()} bits{others} use only {bits} of them: their largest value is {high}, "
            f"so that {high * 256 // (limit + 1) + 1} of 256 levels are left; {remedy}"
        )
    return found


def _few_brighter(kind: dict[str, Any]) -> list[str]:
    """A sentence if half of the images use less than an eighth of the values, which saturated pixels of a few others hide."""
    limit, usual = kind["limit"], int(kind.get("usual", kind["high"]))  # older records have no usual value
    if usual > limit // 8:
        return []
    top = (1 << max(1, usual.bit_length())) - 1
    return [
        f"half of the images of {limit.bit_length()} bits have no value above {usual}, and others reach {int(kind['high'])}; "
        f"if these are faults of the camera, write range: [0, {top}] in the data set"
    ]


def _range_fits(kind: dict[str, Any], top: int) -> bool:
    """Whether a range that ends at `top` suits a kind of images, which may use most of the values up to white as it is."""
    limit, high = kind["limit"], kind["high"]
    if limit is not None and high > limit // 2:
        return bool(limit == top)
    return bool(top // 2 < high <= top)


_DARK = 15  # of 255


def _suspicious_pixels(decoded: dict[str, Any] | None) -> list[str]:
    """Sentences about decoded images: unreadable, of several frames, or using few of the values that they could."""
    if decoded is None:
        return []
    found, tried, noun = [], decoded["images"], "sampled image" if decoded["sample"] else "image"
    if decoded["unreadable"]:
        name, why = next(iter(decoded["unreadable"].items()))
        found.append(f"{some_of(len(decoded['unreadable']), tried, noun, ('cannot', 'cannot'))} be read, such as {name}: {why}")
    if decoded["several_frames"]:
        found.append(
            f"{some_of(decoded['several_frames'], tried, noun, ('has', 'have'))} several frames or pages; "
            "only the first is used"
        )
    if decoded["unused_bands"]:
        found.append(
            f"{some_of(decoded['unused_bands'], tried, noun, ('has', 'have'))} more than three bands; "
            "only the first three are used"
        )
    wide = decoded["wide"]
    if wide:
        found += _unused_bits(wide)
    if decoded["brightest"] is not None and decoded["brightest"] <= _DARK and not wide:
        found.append(f"no pixel of {counted(tried, noun)} is brighter than {decoded['brightest']:.0f} of 255")
    return found


def _some(names: Sequence[str], one: str, many: str) -> str:
    """``the class 'a'`` or ``3 classes: 'a', 'b', 'c'``, at most five of them."""
    listed = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
    return f"the {one} {listed}" if len(names) == 1 else f"{len(names)} {many}: {listed}"


def import_images(spec: Any, settings: Settings) -> dict[str, float]:
    """Decode a data set into the store, in this process; the metrics of its stage."""
    from ktray.pipeline.execute import execute
    from ktray.pipeline.identity import data_identity
    from ktray.pool import StageContext
    from ktray.scheduler.local_scheduler import LocalScheduler
    from ktray.stages.images_stage import stage_of

    stage = stage_of(spec, data_identity(settings.cache)(spec))
    scheduler = LocalScheduler(settings.open_store(), execute, StageContext(), lambda event: None)
    metrics: dict[str, float] = scheduler.obtain([stage], "data import")[0]["metrics"]
    return metrics


def refuse_changed_data(space: Space, trials: Iterable[Trial], identity: Identity, folder: Path) -> None:
    """Note the content of a space's data when its study begins; later, refuse other content under the same spec.

    The trials of a study are compared with each other, so they must all have seen the same images.

    Args:
        trials: the study's. Until one of them has a result, the data may still be corrected.
        folder: the study's.

    Raises:
        UserError: it names the data that have changed.
    """
    specs = {canonical(without_max_unreadable(spec).model_dump(mode="json")): spec for spec in _data_specs(space)}
    found = {name: identity(spec) for name, spec in specs.items()}
    file = folder / FILE
    has_results = any(trial.state not in ("failed", "duplicate") for trial in trials)
    try:
        noted = read_json(file) if file.exists() and has_results else {}
    except ValueError as error:
        raise UserError(
            f"{file} is damaged, which says with which images the study {folder.name!r} was begun",
            instead="Delete this file if they are still the same, or give this search another --name.",
        ) from error
    noted = {_with_default_tolerance(name): content for name, content in noted.items()}
    changed = [name for name, content in found.items() if noted.get(name, content) != content]
    if changed:
        spec = specs[changed[0]]
        path = getattr(spec, "path", None)
        location = f" in {path}" if path else f" of {spec.kind}"
        raise UserError(
            f"the images{location} are no longer those that the study {folder.name!r} was begun with, so that new trials "
            "could not be compared with its own",
            space.source,
            "Give this search another --name, or put the old images back.",
        )
    if found != noted:
        write_json(file, found)


def _with_default_tolerance(name: str) -> str:
    """The name of noted data, whatever tolerance they were noted with: studies of earlier versions named it."""
    plain = json.loads(name)
    return canonical(without_max_unreadable(plugins.parse("dataset", plain)).model_dump(mode="json"))


def _data_specs(space: Space) -> Iterator[DataSpec]:
    """The data of every role in every branch, of all generations of a chain."""
    for _, params in space.boundary_draws():
        for pair in generations(space.pair(params)):
            for role in DataRoles.model_fields:
                yield getattr(pair.data, role)

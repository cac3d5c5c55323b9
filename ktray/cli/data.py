"""Look at a data set before using it, or decode it into the store."""

from __future__ import annotations

import argparse
from typing import Any

from ktray.cli.settings import settings

HELP = "check or import a data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("action", choices=["check", "import"])
    parser.add_argument("data", metavar="DATA", help="such as fashion_mnist_mini, folder:/photos or parquet:/p?label=label")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from ktray import plugins

    options = settings(args)
    spec = _spec(args.data)
    splits = plugins.module_of("dataset", spec).load(spec)
    parts = {
        name: {"images": len(part.names), "classes": len(part.classes), "labelled": part.labels is not None}
        for name in ("train", "val", "test")
        if (part := getattr(splits, name)) is not None
    }
    answer: dict[str, Any] = {"kind": spec.kind, "size": spec.size, "splits": parts}
    lines = [f"{name}: {part['images']} images, {_labels(part)}" for name, part in parts.items()]
    if "val" not in parts:
        lines.append(f"val: {spec.split.val:.0%} of train, drawn with seed {spec.split.seed}")
    if args.action == "import":
        answer["images"] = _import(spec, options)
        lines.append(f"decoded: {answer['images']['count']:.0f} images, {answer['images']['unreadable']:.0f} unreadable")
    options.answer(answer, "\n".join(lines))
    return 0


def _spec(text: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    from ktray import plugins
    from ktray.search import spec_errors
    from ktray.spec import DataSpec

    kind = plugins.module("dataset", text.partition("?")[0].partition(":")[0]).Spec
    try:
        return TypeAdapter(DataSpec).validate_python(text)
    except ValidationError as error:
        spec_errors.raise_if_any(spec_errors.from_validation(error, kind, {}, lambda path: ".".join(map(str, path))), text)
        raise AssertionError("unreachable: a validation error has problems") from error


def _labels(part: dict[str, Any]) -> str:
    return f"{part['classes']} classes" if part["labelled"] else "no labels"


def _import(spec: Any, options: Any) -> dict[str, float]:
    from ktray.pipeline.execute import execute
    from ktray.pipeline.identity import data_identity
    from ktray.pool import StageContext
    from ktray.scheduler.local_scheduler import LocalScheduler
    from ktray.stages.images_stage import stage_of

    stage = stage_of(spec, data_identity(options.cache)(spec))
    scheduler = LocalScheduler(options.open_store(), execute, StageContext(), lambda event: None)
    metrics: dict[str, float] = scheduler.obtain([stage], "data import")[0]["metrics"]
    return metrics

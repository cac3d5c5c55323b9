"""Look at a data set before using it, or decode it into the store."""

from __future__ import annotations

import argparse
from typing import Any

from ktray.cli.terminal import print_result, settings_of
from ktray.text import counted, visible_name

HELP = "check or import a data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("action", choices=["check", "import"])
    parser.add_argument("data", metavar="DATA", help="such as fashion_mnist_mini, folder:/photos or parquet:/p?label=label")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: there is no such data set, or it cannot be read.
    """
    from ktray.runs.data_check import describe, import_images, parse_data

    settings = settings_of(args)
    spec = parse_data(args.data)
    answer = describe(spec)
    lines = _lines(answer)
    if args.action == "import":
        answer["images"] = import_images(spec, settings)
        lines.append(
            f"decoded: {counted(int(answer['images']['count']), 'image')}, {answer['images']['unreadable']:.0f} unreadable"
        )
    print_result(args, answer, "\n".join(lines))
    return 0


def _lines(answer: dict[str, Any]) -> list[str]:
    """What a person reads: each split, what was assumed, what was left out, what looks wrong."""
    lines = []
    for name, split in answer["splits"].items():
        read_from = f", from {_counted(split['read_from'])}" if split["read_from"] else ""
        lines.append(f"{name}: {counted(split['images'], 'image')}, {_labels(split)}{read_from}")
    held_out = answer["held_out"]
    if held_out:
        lines.append(f"val: {held_out['images']} of train ({held_out['share']:.0%}), drawn with seed {held_out['seed']}")
    assumed = {
        "classes": answer["classes_from"],
        "order": answer["order"],
        "left out": _counted(answer["left_out"], first=False),
    }
    lines += [f"{what}: {text}" for what, text in assumed.items() if text]
    sample = answer["sample"]
    if sample and sample["sides"]:
        low, high = sample["sides"]
        sides = f"sides of {low} px" if low == high else f"sides of {low} to {high} px"
        lines.append(f"sample: {sample['images']} images: {_counted(sample['formats'])}; {_counted(sample['modes'])}; {sides}")
    return [visible_name(line) for line in (*lines, *(f"warning: {sentence}" for sentence in answer["warnings"]))]


def _labels(split: dict[str, Any]) -> str:
    """``3 classes (cat 10, dog 10, emu 2)``."""
    if not split["labelled"]:
        return "no labels"
    return f"{split['classes']} class{'es' * (split['classes'] != 1)} ({_counted(split['images_of_class'], first=False)})"


_SHOWN = 20


def _counted(counts: dict[str, int], first: bool = True) -> str:
    """``3 .heic, 1 .txt``, or ``.heic 3, .txt 1``; of many, the first few and the smallest and largest."""

    def one(name: str) -> str:
        return f"{counts[name]} {name}" if first else f"{name} {counts[name]}"

    if len(counts) <= _SHOWN:
        return ", ".join(map(one, counts))
    few, least, most = list(counts)[: _SHOWN // 2], min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    rest = f"and {len(counts) - len(few)} more; the fewest: {one(least)}, the most: {one(most)}"
    return f"{', '.join(map(one, few))} {rest}"

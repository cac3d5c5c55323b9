"""Look at a data set before using it, decode it into the store, or compose one in VOC's layout from labelled images."""

from __future__ import annotations

import argparse
from typing import Any

from ktray.cli.terminal import counting_on_stderr, positive_int, print_result, settings_of
from ktray.errors import UserError
from ktray.local_path import local_path
from ktray.text import counted, visible_name

HELP = "check, import or compose a data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("action", choices=["check", "import", "make-voc"])
    parser.add_argument(
        "data",
        metavar="DATA",
        help="such as fashion_mnist_mini, folder:/photos or parquet:/p?label=label; with make-voc the folder to write to",
    )
    parser.add_argument(
        "--sample", type=positive_int, default=None, metavar="N", help="check: decode N images instead of all of them"
    )
    composed = parser.add_argument_group("make-voc: scenes of labelled images as VOCdevkit/VOC2007, with boxes and masks")
    composed.add_argument("--from", dest="labelled", metavar="DATA", help="such as cifar10 or imagefolder:/photos")
    composed.add_argument("--images", type=int, help="number of images: a quarter each for train and val, half for test (2000)")
    composed.add_argument("--size", type=int, help="longer side of an image in pixels (160)")
    composed.add_argument("--seed", type=int, help="the same seed gives the same images (0)")
    composed.add_argument("--coco", action="store_true", help="write the same images in COCO's layout, too")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: there is no such data set, or it cannot be read.
    """
    from ktray.runs.data_check import describe, import_images, parse_data

    options = {name: getattr(args, name) for name in ("images", "size", "seed") if getattr(args, name) is not None}
    if args.action == "make-voc":
        return _make_voc(args, options)
    if args.labelled is not None or options or args.coco:
        raise UserError(f"--from, --images, --size, --seed and --coco belong to make-voc, not to {args.action}", "data")
    settings = settings_of(args)
    spec = parse_data(args.data)
    # An import decodes everything by itself.
    sample = args.sample or (_FEW if args.action == "import" else None)
    with counting_on_stderr(settings, "decoded") as report:
        answer = describe(spec, sample, report)
    lines = description(answer)
    if args.action == "import":
        answer["images"] = import_images(spec, settings)
        lines.append(
            f"decoded: {counted(int(answer['images']['count']), 'image')}, {answer['images']['unreadable']:.0f} unreadable"
        )
    print_result(args, answer, "\n".join(lines))
    return 0


def _make_voc(args: argparse.Namespace, options: dict[str, int]) -> int:
    """Compose a data set in VOC's layout; the exit code."""
    from ktray.runs.data_check import parse_data
    from ktray.runs.voc_composition import compose

    if args.labelled is None:
        raise UserError("make-voc composes labelled images, and none are named", "--from", "Add --from cifar10, for example.")
    out = local_path(args.data, "make-voc").absolute()
    made = compose(parse_data(args.labelled), out, coco=args.coco, **options)
    answer = {**made, "voc": f"voc:{out}", "coco": f"coco:{out / 'coco'}?train=train&test=test" if args.coco else None}
    lines = [
        f"{_counted(made['images'])} images; {counted(made['objects'], 'object')} of {len(made['classes'])} classes, "
        f"{made['difficult']} of them difficult and {made['truncated']} truncated",
        f"as data: {answer['voc']}, {answer['voc']}?task=segmentation{', ' + answer['coco'] if answer['coco'] else ''}",
    ]
    print_result(args, answer, "\n".join(map(visible_name, lines)))
    return 0


def description(answer: dict[str, Any]) -> list[str]:
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
        "annotations": answer["annotations"],
        "order": answer["order"],
        "left out": _counted(answer["left_out"], first=False),
    }
    lines += [f"{what}: {text}" for what, text in assumed.items() if text]
    decoded = answer["decoded"]
    if decoded and decoded["sides"]:
        low, high = decoded["sides"]
        sides = f"sides of {low} px" if low == high else f"sides of {low} to {high} px"
        turned = f"; {decoded['turned']} turned upright by EXIF" if decoded["turned"] else ""
        what = f"a sample of {decoded['images']:,}" if decoded["sample"] else f"all {decoded['images']:,}"
        lines.append(f"decoded: {what} images: {_counted(decoded['formats'])}; {_counted(decoded['modes'])}; {sides}{turned}")
        lines += [f"unreadable: {name}: {why}" for name, why in list(decoded["unreadable"].items())[:_SHOWN]]
    return [visible_name(line) for line in (*lines, *(f"warning: {sentence}" for sentence in answer["warnings"]))]


_FEW = 64  # images that an import looks at before it decodes all of them


def _labels(split: dict[str, Any]) -> str:
    """``3 classes (cat 10, dog 10, emu 2)``, and what was drawn on the images."""
    classes = f"{split['classes']} class{'es' * (split['classes'] != 1)}"
    found = []
    if split["labelled"]:
        found.append(f"{classes} ({_counted(split['images_of_class'], first=False)})")
    elif split["several_labels"]:
        found.append(f"{classes}, several in an image ({_counted(split['images_of_class'], first=False)})")
    if (boxes := split["boxes"]) is not None:
        flags = {name: boxes[name] for name in ("difficult", "truncated", "crowd") if boxes[name]}
        found.append(f"{counted(boxes['count'], 'box', 'boxes')}{f' ({_counted(flags)})' if flags else ''}")
        if boxes["images_without"]:
            found.append(f"{counted(boxes['images_without'], 'image')} without any")
    if split["masks"]:
        found.append(f"masks of {classes}")
    return ", ".join(found) or "no labels"


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

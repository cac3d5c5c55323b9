"""Pretrained teachers by timm's names: list those on this machine, fetch one from the Hugging Face hub, or check one."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ktray.cli.terminal import print_result, settings_of, table
from ktray.errors import UserError
from ktray.output import print_err
from ktray.text import counted, shown

HELP = "list, fetch or check pretrained teachers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("action", choices=["list", "fetch", "check"])
    parser.add_argument("name", nargs="?", metavar="NAME", help="such as vit_base_patch16_dinov3.lvd1689m")
    parser.add_argument("--yes", action="store_true", help="fetch: do not ask; size and licence are said all the same")
    parser.add_argument("--weights", metavar="PATH", help="check: a file or folder with the weights, as teacher.weights")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: there is no such teacher, or it cannot be had or used.
    """
    if args.action == "list":
        if args.name:
            raise UserError("list takes no name", "teachers", f"For one teacher: ktray teachers check {args.name}")
        return _list(args)
    if not args.name:
        raise UserError(
            f"which teacher is to be {args.action}ed?", "teachers", f"ktray teachers {args.action} vit_base_patch16_224.mae"
        )
    return _fetch(args) if args.action == "fetch" else _check(args)


def _list(args: argparse.Namespace) -> int:
    from ktray.runs.teachers import on_disk

    rows = on_disk()
    cells = [
        [
            row["name"],
            f"{row['parameters'] / 1e6:.1f} M",
            _input(row["input"]),
            row["licence"],
            f"{row['bytes'] / 1e6:.1f}",
            row["file"],
        ]
        for row in rows
        if row["problem"] is None
    ]
    lines = [table(["teacher", "parameters", "input", "licence", "MB", "where"], cells)] if cells else []
    lines += [f"{row['name']}: {row['problem']}" for row in rows if row["problem"] is not None]
    lines.append(f"{counted(len(cells), 'teacher')} in the Hugging Face cache of this machine")
    print_result(args, rows, "\n".join(lines))
    return 0


def _input(preprocessing: dict[str, Any]) -> str:
    crop = f", {preprocessing['crop_mode']}" if preprocessing["crop_mode"] != "center" else ""
    return f"{preprocessing['size']} px, {preprocessing['interpolation']}, crop {preprocessing['crop_pct']:g}{crop}"


def _fetch(args: argparse.Namespace) -> int:
    from ktray.runs.teachers import fetch, offer

    offered = offer(_teacher(args).timm)
    print_err(f"ktray: {offered.sentence()}")
    if not args.yes and not _agreed():
        raise UserError("nothing was fetched", "teachers", "Add --yes to fetch it without being asked.")
    files = fetch(offered)
    print_result(
        args,
        {"name": offered.name, "files": [str(file) for file in files], "licence": offered.licence},
        f"fetched {offered.name}; check it with: ktray teachers check {offered.name}",
    )
    return 0


def _agreed() -> bool:
    """Whether the user says yes; without a terminal nobody can be asked."""
    if not sys.stdin or not sys.stdin.isatty():
        return False
    print_err("ktray: fetch it? [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _check(args: argparse.Namespace) -> int:
    from ktray.runs.teachers import check

    found = check(_teacher(args), settings_of(args))
    prepared = found["input"]
    same = f"as in an earlier check ({found['compared']})" if found["compared"] else "kept for later checks"
    lines = [
        f"{found['name']}: {found['place']}, licence: {found['licence']}",
        f"input: {_input(prepared)}, mean {list(prepared['mean'])}, std {list(prepared['std'])}",
        f"features: {found['dim']} numbers, all finite; fingerprint {same}:",
        " ".join(f"{value:.4f}" for value in found["fingerprint"]),
    ]
    print_result(args, found, "\n".join(lines))
    return 0


def _teacher(args: argparse.Namespace) -> Any:
    from pydantic import ValidationError

    from ktray.spec import NamedTeacher

    try:
        return NamedTeacher(timm=args.name, weights=args.weights)
    except ValidationError as error:
        said = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise UserError(said if args.name in said else f"{shown(args.name)}: {said}", "teachers") from error

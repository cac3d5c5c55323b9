"""The command line, on top of the library: arguments in, a table or JSON out, an exit code. No work is done here.

Each verb is one file, `VERB_command.py`, with `HELP`, `add_arguments` and `run`; heavy libraries are imported only by the
verbs that need them. May import everything. Start with `main` here, then `search_command.py`.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from ktray import __version__
from ktray.cli import (
    best_command,
    cache_command,
    compare_command,
    completion_command,
    data_command,
    export_command,
    init_command,
    launch_command,
    logs_command,
    plan_command,
    report_command,
    run_command,
    schema_command,
    search_command,
    show_command,
    status_command,
    sync_command,
    teachers_command,
    ui_command,
)
from ktray.cli.terminal import INTERRUPTED, path_argument
from ktray.errors import MissingInput, PreflightFailed, SearchStopped, StageFailed, UserError
from ktray.output import print_err
from ktray.redaction import remember, without_secrets
from ktray.text import cut, near_word, visible_name

VERBS = {
    "init": init_command,
    "plan": plan_command,
    "run": run_command,
    "search": search_command,
    "launch": launch_command,
    "logs": logs_command,
    "status": status_command,
    "best": best_command,
    "compare": compare_command,
    "show": show_command,
    "report": report_command,
    "export": export_command,
    "ui": ui_command,
    "sync": sync_command,
    "cache": cache_command,
    "data": data_command,
    "schema": schema_command,
    "teachers": teachers_command,
    "completion": completion_command,
}


def run_program() -> NoReturn:
    """Run the command of this process, then end the process with its exit code, whatever threads of Ray are still doing.

    Python's own way to end a process would also close the connection to Ray, which may end it on the spot with another code.
    """
    if sys.stderr is not None:
        # A descriptor of its own: what Ray's C++ code writes to the usual one goes to a log while Ray runs.
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    try:
        code = main(is_program=True)
    except Exception:  # noqa: BLE001 - a bug of ours, shown as Python would
        traceback.print_exc()
        code = 1
    if "ray" not in sys.modules:
        sys.exit(code)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # all is done and said
    logging.shutdown()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # closed, or its reader has gone
            stream.flush()
    os._exit(code)


def main(argv: Sequence[str] | None = None, is_program: bool = False) -> int:
    """Run one command; its exit code (0 ok, 2 the user's spec or arguments, 3 failed trials, 4 preflight, 5 resumable).

    Args:
        is_program: whether the process ends with the command.
    """
    parser = _parser()
    if is_program and "_ARGCOMPLETE" in os.environ:
        from ktray.cli.completion import offer

        offer(parser)
    try:
        args = parser.parse_args(argv)
    except UserError as error:
        print_err(f"ktray: {error}")
        return error.exit_code
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        return UserError.exit_code
    args.is_program = is_program
    remember(args.tracking or "")
    args.command = shlex.join(["ktray", *map(without_secrets, sys.argv[1:] if argv is None else argv)])
    try:
        return int(args.run(args))
    except (UserError, StageFailed, PreflightFailed, SearchStopped, MissingInput) as error:
        print_err(f"ktray: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        print_err(f"ktray: interrupted; nothing that was published is lost, resume with: {args.command}")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our stdout has gone (`ktray best | head`), which is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        code = _exit_code(error)
        if code is None:
            raise
        print_err(f"ktray: {_os_message(error, code)}")
        return code


_MENDED_BY_THE_USER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)


def _exit_code(error: OSError) -> int | None:
    """The exit code where the user can mend what the system refuses: rights, paths, full disks; else None, our bug."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SearchStopped.exit_code
    return UserError.exit_code if error.errno in _MENDED_BY_THE_USER else None


def _os_message(error: OSError, code: int) -> str:
    where = f"{visible_name(cut(str(error.filename), 300))}: " if error.filename else ""
    if code == SearchStopped.exit_code:
        return (
            f"{where}the disk is full. Nothing that was published is lost; make room, and the same command goes on from here."
        )
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{where}{error.strerror}. Give another path."
    return f"{where}{error.strerror}. Change its rights, or choose another place with --home or --store."


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument like every other error: in one paragraph, without the usage."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong:
            known = re.findall(r"[\w-]+", wrong[3])
            near = near_word(wrong[2], known)
            what = "verb" if wrong[1] == "VERB" else f"choice for {wrong[1]}"
            hint = f"Did you mean {near!r}? " if near else "" if wrong[1] == "VERB" else f"It is one of {', '.join(known)}. "
            raise UserError(f"there is no {what} {wrong[2]!r}", instead=f"{hint}See {self.prog} --help.")
        raise UserError(message, instead=f"See {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ktray",
        description="Find the best teacher-student pair for learning without labels.",
        epilog="Start with: ktray init FOLDER, or ktray init --example quickstart",
    )
    parser.add_argument("--version", action="version", version=f"ktray {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", title="verbs (ktray VERB --help says more)")
    for name, verb in VERBS.items():
        verb_parser = verbs.add_parser(name, help=verb.HELP, description=verb.__doc__)
        _add_settings(verb_parser)
        verb.add_arguments(verb_parser)
        verb_parser.set_defaults(run=verb.run)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("everywhere")
    group.add_argument(
        "--home", type=path_argument, default=None, help="store, studies, tracking and logs (KTRAY_HOME, ./.ktray)"
    )
    group.add_argument("--store", default=None, metavar="URL", help="artifacts elsewhere, such as file:///mnt/shared/store")
    group.add_argument("--tracking", default=None, metavar="URI", help="MLflow (MLFLOW_TRACKING_URI, or sqlite in the home)")
    group.add_argument("--runtime", type=path_argument, default=None, metavar="FILE", help="resources per stage kind (YAML)")
    group.add_argument("--allow-plugins", action="append", default=[], metavar="PACKAGE", help="trust kinds from this package")
    group.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    group.add_argument("-q", "--quiet", action="count", default=0)
    group.add_argument("-v", "--verbose", action="count", default=0)

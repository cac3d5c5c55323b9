"""Print what makes a shell complete verbs, options, studies, trials, kinds and paths of --set."""

from __future__ import annotations

import argparse

from ktray.errors import MissingInput
from ktray.output import print_out

HELP = "completion for bash, zsh or fish"
FILES = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/config.fish"}
LINES = {
    "bash": 'eval "$(ktray completion bash)"',
    "zsh": 'eval "$(ktray completion zsh)"',
    "fish": "ktray completion fish | source",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    lines = "; ".join(f"{FILES[shell]}: {line}" for shell, line in LINES.items())
    parser.epilog = f"Put one line into your shell's file: {lines}"
    parser.add_argument("shell", choices=list(LINES))


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        MissingInput: argcomplete is not installed.
    """
    try:
        from argcomplete.shell_integration import shellcode
    except ModuleNotFoundError as error:
        raise MissingInput("completion needs argcomplete: pip install argcomplete") from error
    print_out(shellcode(["ktray"], shell=args.shell))
    return 0

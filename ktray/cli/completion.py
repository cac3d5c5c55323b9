"""What a shell offers when Tab is pressed: studies, trials, kinds, paths of `--set`. Nothing here imports pydantic.

`argcomplete` offers verbs, options and files by itself. An answer must come within 0.2 s.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
KIND_FOLDERS = ("datasets", "backbones", "pretext", "descriptors", "transfer", "evals")
OPERATORS = frozenset(("choice", "int", "log_int", "float", "log_float"))
STUDY_OPTIONS = ("name", "warm_start")
LARGEST_SPACE = 100_000  # bytes, as the loader's limit

Completer = Callable[..., list[str]]


def offer(parser: argparse.ArgumentParser) -> None:
    """Answer the shell, and end the process."""
    import argcomplete

    for verb, verb_parser in _verbs(parser):
        for action in verb_parser._actions:
            completer = _completer(verb, action.dest)
            if completer is not None:
                action.completer = _called_by_argcomplete(completer)  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options="long")


def _called_by_argcomplete(completer: Completer) -> Completer:
    def complete(prefix: str, parsed_args: Any, **_: Any) -> list[str]:
        return completer(prefix, parsed_args)

    return complete


def _verbs(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _completer(verb: str, argument: str) -> Completer | None:
    if argument == "overrides":
        return set_paths
    if verb == "show" and argument == "what":
        return shown
    if (verb, argument) in (("compare", "one"), ("compare", "other"), ("export", "what")):
        return studies_and_trials
    return studies if argument in STUDY_OPTIONS else None


def studies(prefix: str, parsed_args: Any) -> list[str]:
    """Names of the studies of the home."""
    return sorted(path.parent.name for path in (_home(parsed_args) / "studies").glob("*/journal.log"))


def studies_and_trials(prefix: str, parsed_args: Any) -> list[str]:
    """Studies; behind a slash the numbers of a study's trials."""
    name, slash, _number = prefix.partition("/")
    if not slash:
        return studies(prefix, parsed_args)
    from ktray.errors import UserError
    from ktray.search.journal import read

    try:
        return [f"{name}/{trial.number}" for trial in read(_home(parsed_args), name)[1]]
    except UserError:
        return []


def shown(prefix: str, parsed_args: Any) -> list[str]:
    """What `ktray show` takes: studies, trials, kinds."""
    words = ["kinds", "evals", *(f"kinds/{kind}" for kind in kinds())] if "/" in prefix else ["kinds", "evals", *kinds()]
    return [*studies_and_trials(prefix, parsed_args), *words]


def kinds() -> list[str]:
    """All kinds that ship with ktray."""
    entries = (entry for folder in KIND_FOLDERS for entry in (PACKAGE / folder).iterdir())
    modules = (each for each in entries if each.suffix == ".py" or (each / "__init__.py").exists())
    return sorted({each.stem for each in modules if not each.name.startswith("_")})


def set_paths(prefix: str, parsed_args: Any) -> list[str]:
    """Paths of the fields of the file that the command names, each with ``=``; without branches' choices and operators."""
    import yaml

    file = next((getattr(parsed_args, name) for name in ("space", "source") if getattr(parsed_args, name, None)), None)
    try:
        text = Path(str(file)).read_text(encoding="utf-8")
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if len(text) <= LARGEST_SPACE else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    if not isinstance(content, dict):
        return []
    root = content.get("pair", content)
    outside = [f"{name}." for name, value in content.items() if isinstance(value, dict) and name != "pair"]
    return [f"{path}=" for path in _paths(root, "")] + outside * ("pair" in content)


def _paths(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict) and "one_of" in value and isinstance(value["one_of"], dict):
        for branch, body in value["one_of"].items():
            yield from _paths(body, f"{path}.{branch}" if path else str(branch))
    elif isinstance(value, dict) and not OPERATORS & value.keys():
        for name, child in value.items():
            yield from _paths(child, f"{path}.{name}" if path else str(name))
    elif path:
        yield path


def _home(parsed_args: Any) -> Path:
    return Path(str(getattr(parsed_args, "home", None) or os.environ.get("KTRAY_HOME") or ".ktray")).expanduser()

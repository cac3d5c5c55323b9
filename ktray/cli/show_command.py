"""Show a study, a trial, an artifact with its record or failure, the kinds, the fields of one, or presets of evaluations."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from ktray.cli.terminal import answered_elsewhere, path_argument, print_result, settings_of
from ktray.runs.settings import Settings
from ktray.text import near_word

if TYPE_CHECKING:
    from types import ModuleType

    from pydantic import BaseModel

    from ktray.artifact import Artifact
    from ktray.search.history import StudySnapshot
    from ktray.search.trial import Trial
    from ktray.stores import Store

HELP = "a study, a trial, an artifact or the kinds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("what", metavar="NAME|NAME/TRIAL|KEY|KIND|kinds|evals")
    parser.add_argument("--against", type=path_argument, metavar="PAIR", help="KEY: which fields differ from this pair's stage")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: there is no such study, trial, artifact or kind, or `--against` names no pair, or one without such a stage.
    """
    from ktray.errors import UserError

    settings = settings_of(args)
    if args.what == "kinds":
        return _kinds(args)
    if args.what == "evals":
        return _presets(args)
    if args.what.startswith("kinds/"):
        return _kind(args, args.what.removeprefix("kinds/"))
    if _is_kind(args.what) and not (settings.home / "studies" / args.what).is_dir():
        return _kind(args, args.what)
    code = answered_elsewhere(args, settings, args.what.partition("/")[0])
    if code is not None:
        return code
    if args.against:
        return _against(args, settings)
    store = settings.open_store()
    if store.find(args.what) or store.failure(args.what):
        return _artifact(args, args.what, settings)
    if re.fullmatch(r"[a-z_]+-[0-9a-f]{12}", args.what) and not (settings.home / "studies" / args.what).is_dir():
        raise UserError(f"there is no artifact {args.what!r} in {store.url}", instead="See ktray cache list.")
    name, _, number = args.what.partition("/")
    return _trial(args, name, number, settings) if number else _study(args, name, settings)


def _is_kind(name: str) -> bool:
    from ktray import plugins

    return any(name in plugins.kinds(group) for group in plugins.GROUPS)


def _kinds(args: argparse.Namespace) -> int:
    from ktray import plugins

    answer = {
        group: {kind: _described(plugins.module(group, kind)) for kind in plugins.kinds(group)} for group in plugins.GROUPS
    }
    width = max(len(kind) for found in answer.values() for kind in found)
    lines = []
    for group, found in answer.items():
        lines += ["", group]
        for kind, said in found.items():
            lines += [f"  {kind:{width}}  {said['what']}", f"  {'':{width}}  {said['source'].split('; ')[0]}"]
    print_result(args, answer, "\n".join(lines[1:]))
    return 0


def _presets(args: argparse.Namespace) -> int:
    """The presets of evaluations: each entry with its values, what it needs of the data, and where the values come from."""
    from ktray.evaluation_presets import ANNOTATIONS, PRESETS, needs

    answer: dict[str, list[dict[str, Any]]] = {}
    lines: list[str] = []
    for preset, entries in PRESETS.items():
        lines += ["", f"evals: {preset}"]
        answer[preset] = []
        for entry in entries:
            needed = [ANNOTATIONS[each] for each in needs(str(entry.spec["kind"]))]
            spec = _plain_values(entry.spec)
            answer[preset].append({"spec": spec, "needs": needed, "per_layer": entry.per_layer, "source": entry.source})
            fields = {name: value for name, value in spec.items() if name != "kind"}
            values = f"  {_yaml_line(fields)}" if fields else ""
            every = ", once per layer" if entry.per_layer else ""
            lines += [
                f"  {entry.spec['kind']}{values}",
                f"    needs {' and '.join(needed) or 'no labels'}{every}",
                f"    {entry.source}",
            ]
    print_result(args, answer, "\n".join(lines[1:]))
    return 0


def _plain_values(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in spec.items()}


def _yaml_line(value: Any) -> str:
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return text.strip()


def _kind(args: argparse.Namespace, kind: str) -> int:
    """One kind with the fields of its Spec."""
    from ktray import plugins
    from ktray.cli.terminal import table
    from ktray.errors import UserError

    groups = [group for group in plugins.GROUPS if kind in plugins.kinds(group)]
    if not groups:
        near = near_word(kind, [each for group in plugins.GROUPS for each in plugins.kinds(group)])
        hint = f"Did you mean {near!r}? " if near else ""
        raise UserError(f"there is no kind {kind!r}", instead=f"{hint}See ktray show kinds.")
    answer, lines = [], []
    for group in groups:
        module = plugins.module(group, kind)
        fields = _fields(module.Spec)
        found: dict[str, Any] = {"group": group, "kind": kind, **_described(module), "fields": fields}
        found |= {"layers": _layers(module, group), "minimal": _minimal(group, kind, fields)}
        rows = [[field["name"], field["type"], field["range"], _default_text(field), field["description"]] for field in fields]
        text = table(["field", "type", "range", "default", "description"], rows) if rows else "no fields"
        layers = [f"layers: {', '.join(found['layers'])}", ""] if found["layers"] else []
        lines += [f"{group} {kind}: {found['what']}", f"Source: {found['source']}", "", text, "", *layers, found["minimal"], ""]
        answer.append(found)
    print_result(args, answer, "\n".join(lines[:-1]))
    return 0


def _fields(model: type[BaseModel]) -> list[dict[str, Any]]:
    """Name, type, default and description of each field but `kind`; a required field has no default."""
    fields = []
    for name, field in model.model_fields.items():
        if name != "kind":
            default = {} if field.is_required() else {"default": _plain(field.default)}
            kind = {"type": _type_text(field.annotation), "range": _range_text(field.metadata)}
            fields.append({"name": name, **kind, **default, "description": field.description or ""})
    return fields


def _range_text(limits: list[Any]) -> str:
    """``>= 1, < 2048`` from the limits of a field; empty without any."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return ", ".join(
        f"{sign} {limit:.10g}" for each in limits for name, sign in signs.items() if (limit := _limit(each, name)) is not None
    )


def _limit(each: Any, name: str) -> float | None:
    found = getattr(each, name, None)
    return float(found) if isinstance(found, int | float) else None


def _layers(module: ModuleType, group: str) -> list[str]:
    """The layers of a network with default fields; empty for other kinds, and where a field is required."""
    if group != "backbone" or any(field.is_required() for field in module.Spec.model_fields.values()):
        return []
    import torch

    from ktray.errors import UserError

    try:
        with torch.device("meta"):
            return list(module.build(module.Spec()).layers)
    except (UserError, ImportError):  # a library that is not installed
        return []


_PLACES = {  # group -> where a kind stands in a pair file
    "dataset": "data: {}",
    "backbone": "student: {{backbone: {}, schedule: {{epochs: 20}}}}",
    "pretext": "teacher: {{pretext: {}, backbone: alexnet, layer: conv4, schedule: {{epochs: 20}}}}",
    "descriptor": "teacher: {{descriptor: {}}}",
    "transfer": "transfer: {}",
    "evaluation": "evals: [{}]",
}
_EXAMPLES = {"int": 10, "float": 0.1, "text": "/path"}  # type of a required field -> a value


def _minimal(group: str, kind: str, fields: list[dict[str, Any]]) -> str:
    """The line of a pair file that has this kind, with no more than it requires."""
    required = {field["name"]: _example(field["name"], field["type"]) for field in fields if "default" not in field}
    return _PLACES[group].format(_yaml_line({"kind": kind, **required}))


def _example(name: str, type_text: str) -> Any:
    if type_text == "a kind":
        return {"backbone": "alexnet"}[name]
    first = type_text.split(" | ")[0]
    return _EXAMPLES.get(first, first)


def _plain(value: Any) -> Any:
    """A default as JSON values."""
    dump = getattr(value, "model_dump", None)
    if dump is not None:
        return dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


def _default_text(field: dict[str, Any]) -> str:
    """As YAML would have it: ``0.5``, ``null``, ``{crop: 4, flip: true}``."""
    import yaml

    if "default" not in field:
        return "required"
    text: str = yaml.safe_dump(field["default"], default_flow_style=True, sort_keys=False, width=1000)
    return text.removesuffix("...\n").strip()


def _type_text(annotation: Any) -> str:
    """``int | null``, ``all | one``, ``list of int``, or the name of a spec such as ``Augment``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple:
        return f"list of {_type_text(arguments[0])}"
    if arguments:
        return " | ".join(map(_type_text, arguments))
    if annotation in (None, type(None)):
        return "null"
    name = str(annotation.__name__)
    return {"PluginSpec": "a kind", "str": "text", "bool": "true | false"}.get(name, name)


def _described(module: ModuleType) -> dict[str, str]:
    """The first line of a kind's docstring, and whose idea it is: the paragraph that begins with "Source:"."""
    paragraphs = (module.__doc__ or "").strip().split("\n\n")
    source = next((each for each in paragraphs if each.startswith("Source: ")), "Source: not said")
    return {"what": paragraphs[0].splitlines()[0], "source": " ".join(source.removeprefix("Source: ").split())}


def _artifact(args: argparse.Namespace, key: str, settings: Settings) -> int:
    import yaml

    from ktray.artifact import identity_text

    store = settings.open_store()
    found = store.find(key)
    answer: dict[str, Any] = {"key": key}
    if found:
        answer |= {"state": "done", "directory": str(found.directory), **found.record}
        answer["identity"] = identity_text(found.record) or "made by an earlier version, whose keys are not used any more"
        answer |= {f"lineage of {key}": text for key, text in _ancestors(found, store).items()}
    failure = store.failure(key)
    if failure:
        answer |= {"state": "failed", **failure} if not found else {"earlier_failure": dict(failure)}
    print_result(args, answer, yaml.safe_dump(answer, sort_keys=False, allow_unicode=True, width=1000).rstrip())
    return 0


def _ancestors(found: Artifact, store: Store) -> dict[str, str]:
    """Key -> lineage of the students that an artifact reads, as the one that an evaluation judges or that teaches."""
    read = [store.find(key) for key in found.record["inputs"].values() if key.startswith("student-")]
    return {artifact.key: artifact.record["lineage"] for artifact in read if artifact and "lineage" in artifact.record}


def _against(args: argparse.Namespace, settings: Settings) -> int:
    """Why a cached artifact does not serve a pair: the fields of its identity that differ."""
    from ktray.cli.terminal import table
    from ktray.errors import UserError
    from ktray.pipeline import pair_graph
    from ktray.pipeline.identity import data_identity
    from ktray.runs.spec_files import load_pairs

    record = settings.open_store().find(args.what)
    if record is None:
        raise UserError(f"there is no artifact {args.what!r} to compare", instead="See ktray cache list.")
    identity, name = data_identity(settings.cache), record.record["stage"]
    pairs = load_pairs(args.against, []).values()
    stages = [stage for pair in pairs for stage in pair_graph.build(pair, identity).stages if stage.name == name]
    if not stages:
        raise UserError(f"the pair has no stage {name!r} to compare {args.what} with", str(args.against))
    rows: list[list[str]] = []
    for stage in stages if record.key not in {stage.key for stage in stages} else ():
        wanted = {"spec": stage.spec, "revisions": stage.revisions, "inputs": stage.inputs}
        rows += [[stage.key, *line] for line in _differences(wanted, record.record)]
    answer = [dict(zip(("stage", "field", "artifact", "pair"), row, strict=True)) for row in rows]
    text = table(["wanted", "field", args.what, "the pair"], rows) if rows else "no difference: the artifact serves this pair"
    print_result(args, answer, text)
    return 0


def _differences(wanted: dict[str, Any], record: Any) -> list[list[str]]:
    from ktray.fingerprint import canonical, flat

    ours, theirs = flat(json.loads(canonical(wanted))), flat({name: record[name] for name in wanted})
    return [
        [path, str(theirs.get(path, "absent")), str(ours.get(path, "absent"))]
        for path in sorted(ours.keys() | theirs.keys())
        if ours.get(path, "absent") != theirs.get(path, "absent")
    ]


def _study(args: argparse.Namespace, name: str, settings: Settings) -> int:
    from ktray.cli.leaderboard import leaderboard
    from ktray.cli.terminal import table
    from ktray.pipeline.naming import pair_name
    from ktray.runs.best_trials import trial_as_data
    from ktray.search.history import read_study

    study = read_study(settings.home, name)
    answer = {"study": name, "trials": [{**trial_as_data(trial), "state": trial.state} for trial in study.trials]}
    rows = [[str(trial.number), trial.state, pair_name(trial.pair), _outcome(trial, study)] for trial in study.trials]
    text = f"{leaderboard(study, settings.home, top=10)}\n\n{table(['trial', 'state', 'pair', 'outcome'], rows)}"
    print_result(args, answer, text if rows else f"{name}: no trial yet")
    return 0


def _outcome(trial: Trial, study: StudySnapshot) -> str:
    """What there is to say of a trial in one cell."""
    if trial.state == "duplicate":
        return f"same pair as trial {trial.duplicate_of}"
    if trial.cause:
        return trial.cause
    if trial.objectives:
        return ", ".join(f"{metric} {value:.4g}" for metric, value in trial.objectives.items())
    stop = study.space.early_stop
    if stop and not trial.scores and trial.teacher_score is not None:
        return f"{stop.metric_at(0)} {trial.teacher_score:.4g} of its teacher"
    return ", ".join(
        f"{stop.metric if stop else 'score'} {score:.4g} at epoch {epoch}" for epoch, score in trial.scores.items()
    )


def _trial(args: argparse.Namespace, name: str, number: str, settings: Settings) -> int:
    import yaml

    from ktray.errors import UserError
    from ktray.pipeline.naming import lineage
    from ktray.runs.best_trials import trial_as_data
    from ktray.search.history import read_study

    study = read_study(settings.home, name)
    found = [trial for trial in study.trials if str(trial.number) == (number.lstrip("0") or "0")]
    if not found:
        raise UserError(f"the study {name!r} has no trial {number!r}", instead=f"It has {len(study.trials)}, from 0.")
    trial = found[0]
    answer = {
        **trial_as_data(trial),
        "state": trial.state,
        "scores": {str(epoch): score for epoch, score in trial.scores.items()},
        "teacher_score": trial.teacher_score,
        "cause": trial.cause,
        "lineage": lineage(trial.pair) if trial.pair else None,
        "pair": dict(trial.pair),
    }
    print_result(args, answer, yaml.safe_dump(answer, sort_keys=False, allow_unicode=True, width=1000).rstrip())
    return 0

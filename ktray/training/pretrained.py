"""Weights that were trained elsewhere: torchvision or timm files, exported students, snapshots of another training.

`find_weights` finds a network in a checkpoint by the names of its tensors: below any wrappers (`state_dict`, `model_ema`) and
behind any prefix (`module.backbone.`). Where a file holds several networks that fit, weights averaged over the training
(`ema`, `teacher`) are preferred, as by timm and DINO, then the trained network before the target that it learns from
(`encoder_q` before `encoder_k`); what that does not decide is refused. `key` and `prefix` state the choice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ktray import plugins
from ktray.errors import UserError
from ktray.fingerprint import file_sha256
from ktray.local_path import local_path
from ktray.text import first_few
from ktray.training.checkpoint_file import INSTEAD, WHERE, CheckpointFile, StoredTensor, open_checkpoint, shown
from ktray.training.snapshot import write_untrained

IDENTITY, REVISION = "pretrained", 1

ARTIFACT = re.compile(r"(teacher|student)-[0-9a-f]{12}")
"""A checkpoint of this form is the key of an artifact; anything else is a path."""

_STUDENT = ("model.safetensors", "student.json")  # as in `export`
_FILES = (_STUDENT[0], "weights.safetensors", "pytorch_model.bin")  # an exported student's or a hub's, a snapshot's, a hub's
_WRAPPED = "model."  # in names of ktray's timm networks
_MODULES = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}  # wrap a part of a network
_AVERAGED = {"ema", "teacher", "swa", "averaged", "polyak"}
_AVERAGES = _AVERAGED - {"teacher"}  # a teacher may be another network
_TARGETS = {"momentum", "target", "k", "key"}
_HEADS = {
    *("fc", "classifier", "head", "heads", "linear", "logits", "mlp", "dist", "projector", "projection", "predictor"),
    *("prediction", "prototypes", "prototype", "queue", "decoder", "criterion", "loss", "proj", "aux", "auxlogits", "probe"),
    *("cls", "clf", "output", "top", "final", "temperature", "bank", "centroids", "regressor", "temp", "logit", "pred"),
}
_OTHERS = {
    "last_layer",
    "logit_scale",
    "logit_bias",
    "mask_token",
    "head_dist",
    "queue_ptr",
    "center",
    "n_averaged",
    "online_head",
    "mlp_head",
}
_OF_A_BACKBONE = {"conv", "norm", "bn", "embed", "token", "tokens", "pool"}
_NETWORKS = {"student", "online", "encoder", "backbone", "model", "net", "network"}
COMPUTED = ("num_batches_tracked", "relative_position_index", "attn_mask", "relative_coords_table", "position_ids")
"""Buffers that some versions of a library save and others do not; training and prediction do not read a stored value."""
_POSITIONS = ("pos_embed", "pos_embedding", "position_embedding", "position_embeddings")
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_NAMES_SHOWN = 3
_MAX_NETWORKS = 100  # in one file
_MAX_PARTS = 24  # of a dotted name
_PARTLY = 0.5  # share of a network's tensors from which a file counts as having it, though not all of it


@dataclass(frozen=True)
class Place:
    """Where in a checkpoint a network lies: the key of its state_dict, and the prefix of its names."""

    key: str
    prefix: str

    def __str__(self) -> str:
        return f"key {shown(repr(self.key))} with prefix {shown(repr(self.prefix))}"


@dataclass(frozen=True)
class Weights:
    """The weights of a network as a checkpoint holds them, and what was assumed in choosing them.

    Attributes:
        tensors: name in the network -> tensor. Buffers that are computed anyway may be missing.
        place: where they lie.
        others: where other networks lie that fit.
        incomplete: where networks lie of which most tensors fit, but not all.
        ignored: tensors behind the same prefix that are not the network's, such as a classifier's, with their shapes.
        objects: classes of objects in the file, which were skipped.
        nameless: where weights lie that are averaged by what they are called, but have none of the network's names.
    """

    tensors: Mapping[str, StoredTensor]
    place: Place
    others: tuple[Place, ...]
    incomplete: tuple[Place, ...]
    ignored: tuple[str, ...]
    objects: tuple[str, ...]
    nameless: tuple[str, ...] = ()

    def summary(self) -> str:
        """What was taken, in one sentence, for a record."""
        parts = [f"{len(self.tensors)} tensors from {self.place}"]
        if self.others:
            parts.append(f"also in the file: {'; '.join(map(str, self.others))}")
        if self.incomplete:
            parts.append(f"not completely in the file: {'; '.join(map(str, self.incomplete))}")
        if self.nameless:
            parts.append(f"averaged weights without the network's names, not taken: {_listed(self.nameless)}")
        if self.ignored:
            parts.append(f"ignored: {_listed(self.ignored)}")
        if self.objects:
            parts.append(f"skipped objects: {_listed(self.objects)}")
        return "; ".join(parts)


def checkpoint_path(text: str) -> Path:
    """Absolute path of a checkpoint as a spec names it.

    Raises:
        UserError: it is a URL, or begins with ``~`` and there is no such home folder.
    """
    return local_path(text, WHERE).absolute()


def weights_file(checkpoint: Path) -> Path:
    """The file with the weights: `checkpoint` itself, or the one in the folder of an exported student, a snapshot or a hub.

    Raises:
        UserError: there is no such file or folder, or the folder contains none of them.
    """
    try:
        if checkpoint.is_file():
            return checkpoint
        for name in _FILES:
            if (checkpoint / name).is_file():
                return checkpoint / name
        folder = checkpoint.is_dir()
    except OSError as error:  # such as a name that is too long
        raise UserError(f"{checkpoint.name} cannot be read: {error.strerror}", WHERE, INSTEAD) from error
    if folder:
        raise UserError(
            f"the folder {checkpoint.name} contains neither {', '.join(_FILES[:-1])} nor {_FILES[-1]}", WHERE, INSTEAD
        )
    raise UserError(f"there is no file {checkpoint.name} in {checkpoint.parent}", WHERE, INSTEAD)


def import_weights(
    backbone_spec: Any, checkpoint: Path, directory: Path, key: str | None = None, prefix: str | None = None
) -> int:
    """Write a snapshot of epoch 0 with weights trained elsewhere; returns the number of parameters of the backbone.

    Args:
        checkpoint: a file as for `open_checkpoint`, or a folder as for `weights_file`.
        key, prefix: as for `find_weights`.

    Raises:
        UserError: as `find_weights`, or weights that are not finite or all zero.
    """
    backbone: nn.Module = plugins.module_of("backbone", backbone_spec).build(backbone_spec)
    initial = backbone.state_dict()
    found = find_weights(initial, checkpoint, key, prefix)
    tensors = finite(found.tensors, initial, weights_file(checkpoint).name, found.place)
    backbone.load_state_dict({**initial, **tensors})
    write_untrained(backbone, directory)
    return sum(parameter.numel() for parameter in backbone.parameters())


@lru_cache(maxsize=64)
def shapes(backbone_spec: Any) -> Mapping[str, Tensor]:
    """The state_dict of a backbone as tensors without content, for `find_weights` and `check_weights`."""
    with torch.random.fork_rng(devices=[]):
        backbone: nn.Module = plugins.module_of("backbone", backbone_spec).build(backbone_spec)
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in backbone.state_dict().items()}


def check_weights(
    network: Mapping[str, Tensor], checkpoint: Path, key: str | None = None, prefix: str | None = None
) -> Weights:
    """What `import_weights` would take for this network, after comparing names, shapes and values as it does.

    Raises:
        UserError: as `import_weights`.
    """
    found = find_weights(network, checkpoint, key, prefix)
    finite(found.tensors, network, weights_file(checkpoint).name, found.place, keep=False)
    return found


def find_weights(network: Mapping[str, Tensor], checkpoint: Path, key: str | None = None, prefix: str | None = None) -> Weights:
    """The weights in a checkpoint that belong to a network, not read yet; see the module's docstring for the rules.

    A classifier or another head beside them is ignored; any other tensor that the network does not have is an error.

    Args:
        network: its state_dict, of which only names, shapes and types count.
        checkpoint: a file as for `open_checkpoint`, or a folder as for `weights_file`.
        key: of the state_dict in the file, such as ``teacher``; None: any.
        prefix: of the names in it, such as ``module.backbone.``; None: any.

    Raises:
        UserError: no such file, key or prefix; not a checkpoint; weights of another architecture; several that fit.
    """
    path = weights_file(checkpoint)
    if (checkpoint / _STUDENT[1]).is_file():
        _require_intact(checkpoint, path)
    wrapped = all(name.startswith(_WRAPPED) for name in network)
    wanted = {name.removeprefix(_WRAPPED) if wrapped else name: tensor for name, tensor in network.items()}
    content = open_checkpoint(path)
    candidates = [each for each in _candidates(content, wanted) if _is_stated(each.place, key, prefix)]
    if not candidates:
        raise _nothing_fits(path, content, wanted, key, prefix)
    complete = _complete(candidates, wanted, path, prefix is not None)
    fitting = [each for each in complete if not each.unexpected]
    if not fitting:
        nearest = max(complete or candidates, key=_likeness)
        raise _other_architecture(checkpoint, _with_other_tensors(nearest, (), wanted, prefix is not None), wanted)
    chosen = _chosen(fitting, path)
    rest = [
        each for each in candidates if each.share > _PARTLY and each.place != chosen.place and _rank(each.place) < _IN_A_HEAD
    ]
    others, incomplete = (tuple(each.place for each in rest if bool(each.missing) is partly) for partly in (False, True))
    tensors = {(_WRAPPED if wrapped else "") + name: tensor for name, tensor in chosen.tensors.items()}
    nameless = tuple(_nameless_averages(content, candidates)) if _rank(chosen.place) else ()
    return Weights(tensors, chosen.place, others, incomplete, chosen.ignored, content.objects, nameless)


# --- networks in a file


@dataclass(frozen=True)
class _Candidate:
    """A state_dict and a prefix with which at least one of its names is the network's.

    Attributes:
        used: the network's name -> name in the state_dict.
        tensors: the network's name -> tensor, of those that fit in shape and type.
        missing: the network's tensors that are not there or do not fit, with their shapes.
        share: of the network's tensors that are there and fit.
        unexpected, ignored: tensors behind the prefix that are not the network's, with shapes; those of a head are ignored.
    """

    place: Place
    state_dict: Mapping[str, StoredTensor]
    used: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    missing: tuple[str, ...]
    share: float
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def _candidates(content: CheckpointFile, wanted: Mapping[str, Tensor]) -> Iterator[_Candidate]:
    modules = _MODULES - {part for name in wanted for part in name.split(".")}
    for key, state_dict in content.state_dicts:
        by_prefix: dict[str, dict[str, str]] = {}
        for name in state_dict:
            for prefix, bare in _readings(name, modules):
                if bare in wanted:
                    by_prefix.setdefault(prefix, {}).setdefault(bare, name)
        for prefix, used in by_prefix.items():
            yield _candidate(Place(key, prefix), state_dict, used, wanted)


def _candidate(
    place: Place, state_dict: Mapping[str, StoredTensor], used: Mapping[str, str], wanted: Mapping[str, Tensor]
) -> _Candidate:
    tensors = {bare: state_dict[name] for bare, name in used.items() if _fits(state_dict[name], wanted[bare])}
    required = [name for name in wanted if not name.endswith(COMPUTED)]
    missing = tuple(f"{name} of shape {tuple(wanted[name].shape)}" for name in required if name not in tensors)
    return _Candidate(place, state_dict, used, tensors, missing, 1 - len(missing) / max(1, len(required)))


def _readings(name: str, modules: set[str]) -> Iterator[tuple[str, str]]:
    """The ways to read a name as a prefix and a name in a network, without the modules that only wrap a part of it."""
    parts = name.split(".", _MAX_PARTS)
    for count in range(len(parts) if len(parts) <= _MAX_PARTS else 0):
        if parts[count] not in modules:
            prefix = "".join(f"{part}." for part in parts[:count])
            yield prefix, ".".join(part for part in parts[count:] if part not in modules)


def _fits(found: StoredTensor, wanted: Tensor) -> bool:
    """Whether a tensor has the shape that is wanted, and a type that holds such numbers. Quantised weights do not."""
    if found.shape != tuple(wanted.shape) or not isinstance(found.dtype, torch.dtype):
        return False
    if wanted.is_floating_point():
        return found.dtype in _FLOATS
    return not (found.dtype.is_floating_point or found.dtype.is_complex)


def _is_stated(place: Place, key: str | None, prefix: str | None) -> bool:
    return (key is None or place.key == key) and (prefix is None or place.prefix.rstrip(".") == prefix.rstrip("."))


def _with_other_tensors(found: _Candidate, prefixes: Sequence[str], wanted: Mapping[str, Tensor], stated: bool) -> _Candidate:
    """The candidate with the tensors behind its prefix that are not the network's: those to ignore, and those that differ.

    Args:
        prefixes: of other networks in the same state_dict.
        stated: whether the prefix is; then only what lies inside the network's own modules can be a part of it.
    """
    prefix, taken = found.place.prefix, set(found.used.values())
    nested = tuple(each for each in prefixes if each.startswith(prefix) and each != prefix)
    ignored: list[str] = []
    unexpected: list[str] = []
    for name, tensor in found.state_dict.items():
        bare = name.removeprefix(prefix)
        if name.startswith(prefix) and name not in taken and not name.endswith(COMPUTED):
            if name.startswith(nested):
                continue
            beside = _is_beside_a_backbone(bare, wanted) or (stated and not _is_inside(bare, wanted))
            (ignored if beside else unexpected).append(f"{bare} of shape {tensor.shape}")
    return replace(found, ignored=tuple(ignored), unexpected=tuple(unexpected))


def _is_beside_a_backbone(name: str, wanted: Mapping[str, Tensor]) -> bool:
    """Whether a tensor belongs to a head, another network or a loss, and not to a part of a backbone."""
    first = name.partition(".")[0]
    words = set(first.lower().split("_"))
    if first not in _HEADS and (words & _OF_A_BACKBONE or _is_inside(name, wanted)):
        return False
    return first.lower() in _OTHERS or bool(words & (_HEADS | _NETWORKS | _AVERAGED | _TARGETS))


def _is_inside(name: str, wanted: Mapping[str, Tensor]) -> bool:
    """Whether a tensor lies in one of the network's own modules."""
    first = name.partition(".")[0]
    return any(each.partition(".")[0] == first for each in wanted)


def _complete(candidates: Sequence[_Candidate], wanted: Mapping[str, Tensor], path: Path, stated: bool) -> list[_Candidate]:
    """The candidates with all tensors of the network, with what else lies behind their prefixes."""
    found = [each for each in candidates if not each.missing]
    if len(found) > _MAX_NETWORKS:
        raise UserError(
            f"{path.name} has {len(found)} networks that fit, such as {found[0].place}",
            WHERE,
            "Say which with 'key' and 'prefix'.",
        )
    return [
        _with_other_tensors(each, [other.place.prefix for other in found if other.place.key == each.place.key], wanted, stated)
        for each in found
    ]


_IN_A_HEAD = 3


def _rank(place: Place) -> int:
    """Which networks are preferred: averaged ones, trained ones, targets of the training, and last a head's copy of one."""
    parts = [part.lower() for part in re.split(r"[.\-]", f"{place.key}.{place.prefix}") if part]
    words = {word for part in parts for word in part.split("_")}
    if any(part in _HEADS for part in parts):
        return _IN_A_HEAD
    return 0 if words & _AVERAGED else 2 if words & _TARGETS else 1


def _nameless_averages(content: CheckpointFile, candidates: Sequence[_Candidate]) -> Iterator[str]:
    """Where weights lie that are called averaged and have none of the network's names: lists, or names without their dots."""
    yield from (key for key in content.lists if _averages_at(key))
    named = {(each.place.key, name) for each in candidates for name in each.used.values()}
    with_names, found = set[str](), dict[str, None]()
    for key, state_dict in content.state_dicts:
        for name, tensor in state_dict.items():
            place = _averages_at(f"{key}.{name}")
            if place and (key, name) in named:
                with_names.add(place)
            elif place and tensor.shape:
                found[place] = None
    yield from (place for place in found if place not in with_names)


def _averages_at(path: str) -> str:
    """A path up to its first part that speaks of an average, such as ``model_ema`` of ``model_ema.conv1weight``, or nothing."""
    parts = path.split(".")
    found = (at for at, part in enumerate(parts) if set(re.split("[_-]", part.lower())) & _AVERAGES)
    at = next(found, None)
    return "" if at is None else ".".join(parts[: at + 1]).lstrip(".")


def _chosen(fitting: Sequence[_Candidate], path: Path) -> _Candidate:
    best = min(_rank(each.place) for each in fitting)
    first, *rest = [each for each in fitting if _rank(each.place) == best]
    different = [each for each in rest if not _equal(first, each)]
    if different:
        listed = " and ".join(str(each.place) for each in (first, *different))
        raise UserError(
            f"{path.name} has {1 + len(different)} networks that fit, and they differ: {listed}",
            WHERE,
            f"Say which with 'key' and 'prefix', such as key: {first.place.key!r}, prefix: {first.place.prefix!r}.",
        )
    return first


def _equal(one: _Candidate, other: _Candidate) -> bool:
    names = {name for name in {*one.tensors, *other.tensors} if not name.endswith(COMPUTED)}
    return all(torch.equal(one.tensors[name].read(), other.tensors[name].read()) for name in names)


def _likeness(candidate: _Candidate) -> tuple[float, int, int]:
    return candidate.share, len(candidate.used), -_rank(candidate.place)


def finite(
    stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor], name: str, place: Place | None = None, keep: bool = True
) -> dict[str, Tensor]:
    """The tensors, each read in the network's own type.

    Args:
        wanted: the network's state_dict.
        name: of the file, for errors.
        place: in the file, for errors.
        keep: False reads one after the other to check them, and returns none.

    Raises:
        UserError: some are not finite, a variance is negative, or all weights are zero.
    """
    broken: list[str] = []
    negative: list[str] = []
    matrices: list[bool] = []
    kept: dict[str, Tensor] = {}
    for each, found in stored.items():
        tensor = found.read().to(wanted[each].dtype)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            broken.append(each)
        if each.endswith("running_var") and bool((tensor < 0).any()):
            negative.append(each)
        matrices += [bool(tensor.any())] * (tensor.dim() > 1)
        if keep:
            kept[each] = tensor
    if broken:
        raise UserError(f"{name} has weights that are not finite, in {_listed(broken)}", WHERE, "Train it again.")
    if negative:
        raise UserError(f"{name} has negative variances, in {_listed(negative)}", WHERE, "Train it again.")
    if matrices and not any(matrices):
        at = f"at {place} of {name}" if place else f"of {name}"
        raise UserError(f"all weights {at} are zero", WHERE, "Give weights that have been trained.")
    return kept


# --- what is wrong


def _listed(names: Sequence[str]) -> str:
    return first_few(map(shown, names), _NAMES_SHOWN)


def _nothing_fits(
    path: Path, content: CheckpointFile, wanted: Mapping[str, Tensor], key: str | None, prefix: str | None
) -> UserError:
    """The error for a file in which no tensor has a name of the network's, at the stated place if there is one."""
    if not content.state_dicts:
        if content.objects:
            problem = f"{path.name} contains no named tensors but objects of Python, such as {_listed(content.objects)}"
            return UserError(
                f"{problem}; only running the code of a pickle would restore them",
                WHERE,
                "Save the model's state_dict() instead of the model.",
            )
        return UserError(f"{path.name} contains no named tensors", WHERE, INSTEAD)
    places = [each.place for each in _candidates(content, wanted) if each.share > _PARTLY]
    if key is not None or prefix is not None:
        stated = " and ".join(f"{what} {text!r}" for what, text in (("key", key), ("prefix", prefix)) if text is not None)
        where = "; ".join(map(str, places)) or f"keys {_listed([repr(key) for key, _ in content.state_dicts])}"
        field = "teacher.key" if key is not None and key not in dict(content.state_dicts) else "teacher.prefix"
        return UserError(f"{path.name} has no tensors of the backbone at {stated}", field, f"It has {where}.")
    largest = max(content.state_dicts, key=lambda each: len(each[1]))[1]
    missing = [f"{name} of shape {tuple(tensor.shape)}" for name, tensor in wanted.items()]
    there = [f"{name} of shape {each.shape}" for name, each in largest.items()]
    return _architecture_differs(path.name, missing, there, len(wanted))


def _architecture_differs(source: str, missing: Sequence[str], there: Sequence[str], count: int) -> UserError:
    differences = [f"{verb} {_listed(found)}" for verb, found in (("has no", missing), ("has", there)) if found]
    return UserError(
        f"{source} is of another architecture: it {', but '.join(differences)} (the backbone has {count} tensors)",
        WHERE,
        "Give the backbone (kind, depth or size, form, width) that these weights were trained with.",
    )


_BESIDE = " If these tensors are no part of it, say where the network begins, prefix: {prefix!r}, and they are ignored."


def _other_architecture(checkpoint: Path, found: _Candidate, wanted: Mapping[str, Tensor]) -> UserError:
    """The error for the candidate that is most like the network."""
    name = checkpoint.name
    shapes = {bare: (found.state_dict[each].shape, tuple(wanted[bare].shape)) for bare, each in found.used.items()}
    types = {bare: found.state_dict[each].dtype for bare, each in found.used.items() if not bare.endswith(COMPUTED)}
    quantised = [bare for bare, dtype in types.items() if wanted[bare].is_floating_point() and dtype not in _FLOATS]
    wrong = {bare: shapes[bare] for bare in types if shapes[bare][0] != shapes[bare][1] and bare not in quantised}
    absent = len(found.missing) > len(wrong) + len(quantised)
    if wrong and not (absent or quantised or found.unexpected):
        said = _one_shape(name, wrong, wanted)
        if said:
            return said
    if quantised and not (absent or wrong):
        kind = str(types[quantised[0]]).removeprefix("torch.")
        return UserError(
            f"{name} has weights of a type that ktray does not take ({kind}), in {_listed(quantised)}",
            WHERE,
            "Save them as dense tensors of float32, float16 or bfloat16.",
        )
    recorded = _architecture(checkpoint)
    source = f"{name}, the weights of {recorded}," if recorded else name
    if not found.missing:
        return UserError(
            f"{source} is of another architecture: it has {_listed(found.unexpected)}, "
            f"besides all {len(wanted)} tensors of the backbone",
            WHERE,
            "Give the backbone that these weights were trained with."
            + ("" if any(_is_inside(each, wanted) for each in found.unexpected) else _BESIDE.format(prefix=found.place.prefix)),
        )
    there = [f"{bare} of shape {both[0]}" for bare, both in wrong.items()] + list(found.unexpected)
    return _architecture_differs(source, found.missing, there, len(wanted))


def _one_shape(
    name: str, wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], wanted: Mapping[str, Tensor]
) -> UserError | None:
    """The error for weights of the right architecture, but for another kind of image."""
    first = next(iter(wrong))
    found, right = wrong[first]
    if len(wrong) == 1 and len(found) == len(right) == 4 and right[1] == 3 and found[:1] + found[2:] == right[:1] + right[2:]:
        return UserError(
            f"{name} is for images of {found[1]} channel{'s' * (found[1] != 1)}, and ktray's have {right[1]}: "
            f"its {first} has the shape {found} instead of {right}",
            WHERE,
            "Give weights that were trained on colour images, or convert this layer, such as by weight.repeat(1, 3, 1, 1) / 3.",
        )
    if all(each.rpartition(".")[2] in _POSITIONS for each in wrong) and len(found) == len(right):
        here, there = (_grid(shape) for shape in (found, right))
        return UserError(
            f"{name} has position embeddings for {here}, and the backbone for {there}: "
            f"its {first} has the shape {found} instead of {right}",
            WHERE,
            "Give the backbone the 'image' (and 'patch') that these weights were trained with.",
        )
    return None


def _grid(shape: tuple[int, ...]) -> str:
    """The patches that a position embedding (1, tokens, width) is made for."""
    tokens = shape[1] if len(shape) == 3 else math.prod(shape[:-1])
    for extra in (0, 1, 2, 5):  # class token, distillation token, registers
        side = math.isqrt(max(tokens - extra, 0))
        if side and side * side + extra == tokens:
            return f"{side} x {side} patches"
    return f"{tokens} tokens"


def _architecture(checkpoint: Path) -> str:
    """The architecture recorded with an exported student; empty for other checkpoints."""
    try:
        return str(json.loads((checkpoint / _STUDENT[1]).read_text())["architecture"])
    except (OSError, ValueError, KeyError):
        return ""


def _require_intact(folder: Path, weights: Path) -> None:
    try:
        expected = json.loads((folder / _STUDENT[1]).read_text())["files"][weights.name]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the student in {folder.name} is damaged: {_STUDENT[1]}", WHERE, "Export it again.") from error
    if file_sha256(weights) != expected:
        raise UserError(f"the student in {folder.name} is damaged: {weights.name}", WHERE, "Export it again.")

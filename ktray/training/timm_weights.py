"""Pretrained networks by timm's names: where their weights lie on this machine, and the preprocessing that belongs to them.

Nothing here touches a network. Weights lie in the Hugging Face cache, in its own layout, or where the spec says. A
`config.json` beside them says how images become inputs; without one it is what timm records for that exact tag.

Source: Wightman, PyTorch Image Models, doi:10.5281/zenodo.4414861: `timm.data.resolve_data_config`.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ktray import plugins
from ktray.errors import UserError
from ktray.file_kind import require_readable
from ktray.fingerprint import file_version
from ktray.local_path import local_path
from ktray.spec import BackboneSpec, NamedTeacher
from ktray.text import first_few, near_word, shown
from ktray.training import pretrained
from ktray.training.checkpoint_file import StoredTensor, open_checkpoint
from ktray.training.snapshot import write_untrained

IDENTITY, REVISION = "timm_weights", 1
TOOLS = (pretrained,)

CONFIG, README = "config.json", "README.md"
FILES = ("model.safetensors", "pytorch_model.bin")
"""What a repository of timm's on the hub may call its weights, the preferred name first."""
INTERPOLATIONS, CROPS = ("bicubic", "bilinear"), ("center", "squash", "border")
WEIGHTS, NAME = "teacher.weights", "teacher.timm"
_NUMBERS = ("mean", "std", "input_size", "crop_pct", "interpolation")  # without them the preprocessing is unknown
_MAX_CONFIG = 4 << 20  # bytes
_TAGS_SHOWN = 6
_CACHE = "Hugging Face cache"


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input: resized until the side `size` is `crop_pct` of it, cropped to `size`, normalised.

    Attributes:
        size: side of the input in pixels.
        mean: of the channels of images in [0, 1].
        std: of them.
        crop_pct: share of the resized image's side that the crop keeps.
        crop_mode: ``center``: the shorter side counts; ``squash``: both sides are resized to one length; ``border``: the longer
            side counts, and the rest is filled with the mean.
        interpolation: ``bicubic`` or ``bilinear``, antialiased.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str
    interpolation: str

    def crop(self) -> dict[str, Any]:
        """What determines the pixels of an input, as plain data: all but the normalisation."""
        fill = {"fill": list(self.mean)} if self.crop_mode == "border" else {}
        return {
            "size": self.size,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
            "interpolation": self.interpolation,
            **fill,
        }

    def statistics(self) -> dict[str, list[float]]:
        """The normalisation, as plain data (`spec.ChannelStatistics`)."""
        return {"mean": list(self.mean), "std": list(self.std)}


@dataclass(frozen=True)
class NamedNetwork:
    """A pretrained network, found on this machine.

    Attributes:
        name: timm's, with its tag.
        file: with the weights.
        place: what the file belongs to, for people, such as ``Hugging Face cache: timm/resnet18.a1_in1k``.
        backbone: the network at the size of the input that was asked for.
        own_backbone: the network at the weights' own size; equal to `backbone` for one that takes any size.
        preprocessing: of its inputs.
        licence: of the weights, as its config or README says; ``not stated`` otherwise.
    """

    name: str
    file: Path
    place: str
    backbone: BackboneSpec
    own_backbone: BackboneSpec
    preprocessing: Preprocessing
    licence: str


def find(teacher: NamedTeacher) -> NamedNetwork:
    """The network that a teacher names, with what its config says. Weights are not read.

    Raises:
        UserError: timm is not installed or has no such model or tag, the weights are not on this machine, or how images become
            inputs is not known.
    """
    architecture, _, tag = teacher.timm.partition(".")
    known = _known(architecture, tag, tag_needed=teacher.weights is None)
    if teacher.weights is None:
        file, config, readme = _in_cache(teacher.timm, known)
        place = f"{_CACHE}: {known['hf_hub_id']}"
    else:
        file, config, readme = _at(teacher.weights)
        place = file.name
    stated = _stated(config, architecture, tag)
    settings = stated or known
    if not settings:
        raise _unknown_preprocessing(teacher, file, tag)
    own = _preprocessing(settings, config if stated else None, teacher.timm)
    asked = own if teacher.image_size is None else Preprocessing(**{**vars(own), "size": teacher.image_size})
    fixed = bool(settings.get("fixed_input_size", known.get("fixed_input_size", False)))
    licence = str(settings.get("license") or _licence_in(readme) or known.get("license") or "not stated")
    return NamedNetwork(
        teacher.timm,
        file,
        place,
        _backbone(architecture, asked.size if fixed else None),
        _backbone(architecture, own.size if fixed else None),
        asked,
        licence,
    )


def layer_of(teacher: NamedTeacher) -> str | None:
    """The output of the backbone that a teacher's features are: one of its `layers` or `token_layers`, or None."""
    return str(plugins.module("backbone", "timm").token_layer(teacher.layer, teacher.tokens) or "") or None


def repository(name: str) -> str:
    """The repository on the hub with the weights of this name.

    Raises:
        UserError: timm has no such name, or its weights are not on the hub.
    """
    architecture, _, tag = name.partition(".")
    known = _known(architecture, tag, tag_needed=True)
    if not known.get("hf_hub_id"):
        raise UserError(
            f"timm has the weights of {name} at {known.get('url') or 'no address'}, not on the hub",
            NAME,
            "Download that file yourself, and name it: teacher.weights.",
        )
    return str(known["hf_hub_id"])


def _timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError("a teacher by its name needs the package timm", NAME, "pip install 'ktray[timm]'") from error
    return timm


@lru_cache(maxsize=256)
def _known(architecture: str, tag: str, tag_needed: bool) -> dict[str, Any]:
    """What timm records for a tag, or nothing for a tag that it does not know. Not to be changed."""
    timm = _timm()
    if not timm.is_model(architecture):
        near = near_word(architecture, timm.list_models())
        raise UserError(
            f"timm has no model {architecture!r}", NAME, f"Did you mean {near!r}?" if near else "See timm.list_models()."
        )
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag in tags:
        found: dict[str, Any] = timm.get_pretrained_cfg(f"{architecture}.{tag}").to_dict()
        return found
    if not tag_needed:
        return {}
    listed = first_few([f"{architecture}.{each}" for each in tags], _TAGS_SHOWN)
    said = f"{architecture} has no weights with the tag {tag!r}" if tag else f"{architecture!r} does not say which weights"
    instead = f"One of: {listed}." if tags else "timm knows no weights of it; name a file or folder: teacher.weights."
    raise UserError(said, NAME, instead)


def _backbone(architecture: str, image: int | None) -> BackboneSpec:
    found: BackboneSpec = plugins.parse("backbone", {"kind": "timm", "model": architecture, "image": image})
    return found


# --- where weights are


Files = tuple[Path, Path | None, Path | None]
"""The weights, their `config.json`, and the `README.md` of their repository, if there are these."""


def cached(name: str, repo: str) -> Files | None:
    """The files of a repository in the Hugging Face cache of this machine; None if its weights are not there."""
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ModuleNotFoundError as error:  # timm needs it, so it is there unless somebody removed it
        raise UserError(f"{name}: the package huggingface_hub is missing", NAME, "pip install 'ktray[timm]'") from error
    repo, _, revision = repo.partition("@")

    def lookup(file: str) -> Path | None:
        found = try_to_load_from_cache(repo, file, cache_dir=constants.HF_HUB_CACHE, revision=revision or None)
        return Path(found) if isinstance(found, str) else None

    weights = next(filter(None, map(lookup, FILES)), None)
    return None if weights is None else (weights, lookup(CONFIG), lookup(README))


def _in_cache(name: str, known: Mapping[str, Any]) -> Files:
    repo = repository(name)
    found = cached(name, repo)
    if found is None:
        from huggingface_hub import constants

        size, licence = _expected_megabytes(name.partition(".")[0]), known.get("license") or "not stated"
        raise UserError(
            f"the weights of {name} are not in the Hugging Face cache of this machine, {constants.HF_HUB_CACHE}",
            NAME,
            f"Get them with 'ktray teachers fetch {name}' (about {size:,} MB; licence: {licence}), or name a file or folder "
            "that has them: teacher.weights.",
        )
    return found


@lru_cache(maxsize=64)
def _expected_megabytes(architecture: str) -> int:
    """Megabytes of float32 weights, from the shapes of the network alone."""
    with torch.device("meta"):
        model = _timm().create_model(architecture, pretrained=False)
    return max(1, round(sum(4 * int(each.numel()) for each in model.state_dict().values()) / 1e6))


def _at(weights: str) -> Files:
    """The files that a spec names: weights, or a folder with them; a `config.json` lies beside the weights."""
    path = local_path(weights, WEIGHTS).absolute()
    with _errors_at(WEIGHTS):
        file = pretrained.weights_file(path)
    beside = [file.parent / name for name in (CONFIG, README)]
    config, readme = (each if each.is_file() else None for each in beside)
    return file, config, readme


@contextmanager
def _errors_at(where: str, instead: str = "") -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(error.problem, where, instead or error.instead) from error


# --- what their config says


def _stated(config: Path | None, architecture: str, tag: str) -> dict[str, Any]:
    """The settings in a `config.json` of timm's; none without one. It must be about the same architecture and tag."""
    found = _settings(config, file_version(config.stat())) if config else {}
    if not found:
        return {}
    other, other_tag = found.get("architecture", architecture), found.get("tag") or tag
    if other != architecture or (tag and other_tag != tag):
        named, asked = (f"{name}.{of}" if of else name for name, of in ((other, other_tag), (architecture, tag)))
        raise UserError(
            f"the {CONFIG} beside the weights is about {shown(named)}, and the teacher is {asked}",
            NAME,
            f"Write timm: {named} if these are the weights you mean.",
        )
    return found


@lru_cache(maxsize=256)
def _settings(config: Path, version: object) -> dict[str, Any]:
    """`pretrained_cfg` of a config with the architecture, in its present and in its older form.

    Raises:
        UserError: it is no config of timm's.
    """
    require_readable(config, WEIGHTS)
    instead = f"Give the {CONFIG} that timm writes, or remove it if timm's own record of this tag is right."
    try:
        with open(config, "rb") as file:
            content = json.loads(file.read(_MAX_CONFIG))
        settings = content.get("pretrained_cfg", content)
        if not isinstance(settings, dict):
            raise TypeError("no mapping")
        architecture = content.get("architecture") or settings.get("architecture")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{config.name} beside the weights is no config of timm's", WEIGHTS, instead) from error
    if not isinstance(architecture, str):
        kind = " but one of transformers" if isinstance(content.get("architectures"), list) else ""
        raise UserError(
            f"{config.name} beside the weights is no config of timm's{kind}: it names no architecture", WEIGHTS, instead
        )
    return {**settings, "architecture": architecture}


def _unknown_preprocessing(teacher: NamedTeacher, file: Path, tag: str) -> UserError:
    return UserError(
        f"how images become inputs of {teacher.timm} is not known: {file.name} has no {CONFIG} beside it, and "
        + (f"timm has no tag {tag!r} of it" if tag else "the name has no tag"),
        NAME,
        f"Put the {CONFIG} of the weights beside them, or write the name with the tag that they have.",
    )


def _preprocessing(settings: Mapping[str, Any], config: Path | None, name: str) -> Preprocessing:
    source = f"{CONFIG} of {name}" if config else f"timm's record of {name}"
    missing = [field for field in _NUMBERS if settings.get(field) is None]
    if missing:
        raise UserError(
            f"how images become inputs is not known: the {source} says no {' and no '.join(missing)}",
            WEIGHTS if config else NAME,
            "Add it as timm's pretrained_cfg has it.",
        )
    try:
        channels, height, width = (int(each) for each in settings["input_size"])
        mean, std = (tuple(float(each) for each in settings[field]) for field in ("mean", "std"))
        crop = float(settings["crop_pct"])
        sound = len(mean) == len(std) == 3 and all(map(math.isfinite, (*mean, *std))) and min(std) > 0 and 0 < crop <= 2
    except (TypeError, ValueError):
        sound = False
    mode, interpolation = settings.get("crop_mode") or "center", settings["interpolation"]
    if not sound or mode not in CROPS or interpolation not in INTERPOLATIONS:
        stated = {field: settings.get(field) for field in (*_NUMBERS, "crop_mode")}
        raise UserError(
            f"the {source} has a preprocessing that ktray does not know: {shown(json.dumps(stated, default=str))}",
            WEIGHTS if config else NAME,
            f"Known are crop_mode {', '.join(CROPS)} and interpolation {', '.join(INTERPOLATIONS)}.",
        )
    if channels != 3 or height != width:
        raise UserError(
            f"{name} takes inputs of {channels} x {height} x {width}, and ktray's images are squares of three channels",
            NAME,
            "Choose other weights.",
        )
    return Preprocessing(height, mean, std, crop, str(mode), str(interpolation))


_LICENCE_IN_README = re.compile(r"^license(?:_name)?:[ \t]*[\"']?([^\s\"']+)", re.MULTILINE)


def _licence_in(readme: Path | None) -> str:
    """The licence in the head of a model card; empty without one."""
    if readme is None:
        return ""
    try:
        with open(readme, encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_CONFIG)
    except OSError:
        return ""
    head = text.split("---", 2)[1] if text.startswith("---") and text.count("---") > 1 else ""
    named = [name for name in _LICENCE_IN_README.findall(head) if name != "other"]
    return named[-1][:100] if named else ""


# --- reading weights

_REMEDY = "Give the weights of {name} (ktray teachers fetch {name} gets them in timm's layout), or the name of these."


def check(network: NamedNetwork) -> None:
    """Refuse weights that do not fit the network, are not finite, or whose network cannot take images of the size asked for.

    Raises:
        UserError: names the tensors that differ.
    """
    where = NAME if network.place.startswith(_CACHE) else WEIGHTS
    with _errors_at(where, _REMEDY.format(name=network.name)):
        _tensors(network.file, network.own_backbone)
    if network.backbone == network.own_backbone:
        return
    model: Any = built(network.own_backbone).model
    if not hasattr(model, "set_input_size"):
        raise UserError(f"{network.name} takes inputs of its own size only", "teacher.image_size", "Leave it out.")
    size, patch = network.preprocessing.size, _patch_side(model)
    if size % patch:
        raise UserError(
            f"an image of {size} px cannot be divided into the patches of {network.name}, of {patch} px",
            "teacher.image_size",
            f"Give {max(1, round(size / patch)) * patch}, for example.",
        )


def _patch_side(model: Any) -> int:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return int(patch[0] if isinstance(patch, tuple | list) else patch)


def write_snapshot(file: Path, backbone: BackboneSpec, own: BackboneSpec, directory: Path) -> int:
    """Write a snapshot of epoch 0 with the weights of a file, their position embeddings interpolated by timm.

    Args:
        backbone: the network, for images of the size asked for.
        own: the same for images of the weights' own size.

    Returns:
        The number of parameters.

    Raises:
        UserError: names the tensors that differ.
    """
    tensors = _tensors(file, own)
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = plugins.module_of("backbone", own).build(own)
    network.load_state_dict({**network.state_dict(), **tensors})
    if backbone != own:
        model: Any = network.model
        with torch.no_grad():
            model.set_input_size(img_size=(backbone.model_dump()["image"],) * 2)
    write_untrained(network, directory)
    return sum(parameter.numel() for parameter in network.parameters())


@lru_cache(maxsize=2)  # large, and the same few checks ask for one after the other
def built(backbone: BackboneSpec) -> nn.Module:
    """The network, untrained, in eval mode; shared by all callers, which do not change it."""
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = plugins.module_of("backbone", backbone).build(backbone)
    return network.eval()


def _tensors(file: Path, own: BackboneSpec) -> dict[str, Tensor]:
    """Name in the backbone -> tensor, of all that the weights have.

    Raises:
        UserError: names the tensors that differ.
    """
    model = built(own)
    wanted = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    try:
        found = pretrained.find_weights(wanted, file).tensors
    except UserError:
        converted = _as_timm_reads(model, wanted, file)
        if converted is None:
            raise
        found = converted
    return pretrained.finite(found, wanted, file.name)


def _as_timm_reads(model: nn.Module, wanted: Mapping[str, Tensor], file: Path) -> dict[str, StoredTensor] | None:
    """The tensors of a file in an older or the authors' own layout, by the function with which timm reads such; None: no."""
    inner: Any = model.model
    convert = getattr(sys.modules[type(inner).__module__], "checkpoint_filter_fn", None)
    state_dicts = open_checkpoint(file).state_dicts
    if convert is None or not state_dicts:
        return None
    stored = max(state_dicts, key=lambda each: len(each[1]))[1]
    try:
        with redirect_stdout(io.StringIO()):  # timm prints what it leaves out, into the tables and the JSON of a command
            converted: Mapping[str, Tensor] = convert({name: each.read() for name, each in stored.items()}, inner)
    except Exception:  # noqa: BLE001 - it was written for files of this architecture, and may fail anyhow on another one
        return None
    required = [name for name in wanted if not name.endswith(pretrained.COMPUTED)]
    found = {f"model.{name}": tensor for name, tensor in converted.items() if f"model.{name}" in wanted}
    others = [name for name in converted if f"model.{name}" not in wanted and not name.startswith(("head", "fc", "classifier"))]
    counts = {math.prod(each.shape) for each in stored.values()}
    fits = all(name in found and found[name].shape == wanted[name].shape for name in required)
    # timm would interpolate what belongs to another size; the config says the size, so such a file is another one. A position
    # of the class token alone may have gone into that token, as in the authors' DINOv2 with registers.
    resized = any(
        tensor.numel() not in counts and tensor.numel() + tensor.shape[-1] not in counts
        for name, tensor in found.items()
        if "pos_embed" in name or "patch_embed" in name
    )
    if not fits or others or resized:
        return None
    return {name: _held(tensor) for name, tensor in found.items()}


def _held(tensor: Tensor) -> StoredTensor:
    return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


# --- what is on disk


def on_disk() -> Sequence[tuple[str, Path, Path]]:
    """(repository, config, weights) of every timm network in the Hugging Face cache of this machine, by name."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    found = []
    for repo in repositories:
        files = cached(repo.repo_id, repo.repo_id) if repo.repo_type == "model" else None
        if files is not None and files[1] is not None:
            found.append((str(repo.repo_id), files[1], files[0]))
    return sorted(found)

"""Checkpoints as training codes write them: the right network is taken, assumptions are said, and nothing of a file runs."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pathlib
import pickle
import struct
import threading
import time
import types
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from ktray import plugins
from ktray.cli import main
from ktray.errors import UserError
from ktray.training import loop, pretrained
from ktray.training.checkpoint_file import open_checkpoint
from tests.child import peak_memory
from tests.toys import DATA, ROTATION, toy_spec

torch.set_num_threads(1)

ALEXNET = plugins.parse("backbone", {"kind": "alexnet", "width": 0.125})
NETWORK = loop.untrained_backbone(ALEXNET, 3).state_dict()
OTHER = loop.untrained_backbone(ALEXNET, 4).state_dict()
HEAD = {"weight": torch.zeros(7, 32), "bias": torch.zeros(7)}
State = Mapping[str, Tensor]


def behind(prefix: str, network: State = NETWORK) -> dict[str, Tensor]:
    """The network with a prefix before each name."""
    return {prefix + name: tensor for name, tensor in network.items()}


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def imported(path: Path, **stated: str | None) -> dict[str, Tensor]:
    """The network that a checkpoint gives, by the names of its own."""
    out = path.parent / "imported"
    pretrained.import_weights(ALEXNET, path, out, **stated)
    return {name.removeprefix("backbone."): tensor for name, tensor in load_file(out / "weights.safetensors").items()}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def found_in(path: Path) -> pretrained.Weights:
    return pretrained.find_weights(pretrained.shapes(ALEXNET), path)


# --- the network is found below any keys and behind any prefix


class Config(dict):  # type: ignore[type-arg]
    """A mapping of a library's own, such as OmegaConf's."""


ONE_NETWORK: dict[str, Any] = {
    "bare": NETWORK,
    "ordered": collections.OrderedDict(NETWORK),
    "parameters": {name: torch.nn.Parameter(t, requires_grad=False) for name, t in NETWORK.items()},
    "compiled": behind("_orig_mod."),
    "compiled inside": behind("backbone._orig_mod."),
    "one part compiled": {name.replace("conv3.", "conv3._orig_mod."): t for name, t in NETWORK.items()},
    "one part in parallel": {name.replace("conv3.", "conv3.module."): t for name, t in NETWORK.items()},
    "sharded": {
        f"_fsdp_wrapped_module.{n.replace('conv2.', 'conv2._checkpoint_wrapped_module.')}": t for n, t in NETWORK.items()
    },
    "in parallel and compiled": behind("module._orig_mod."),
    "in parallel and compiled the other way round": behind("_orig_mod.module."),
    "three wrappers": behind("model.module.backbone."),
    "in parallel twice": behind("module.module."),
    "an encoder of its own name": behind("trunk._feature_blocks."),
    "Lightning": {
        "state_dict": behind("net."),
        "hyper_parameters": {"lr": 0.1},
        "callbacks": {"EarlyStopping": {"best": torch.ones(1)}},
    },
    "with its optimiser": {
        "model": NETWORK,
        "optimizer": {"state": {0: {"exp_avg": NETWORK["conv1.0.weight"]}}, "param_groups": []},
    },
    "nested keys": {"checkpoint": {"model": {"module": behind("encoder.")}}},
    "model_state_dict": {"model_state_dict": NETWORK, "epoch": 3},
    "network": {"network": NETWORK},
    "net": {"net": behind("module.")},
    "params": {"params": NETWORK},
    "weights": {"weights": behind("backbone.")},
    "base_encoder": {"state_dict": behind("module.base_encoder.")},
    "in a list": [NETWORK, {"lr": 0.1}],
    "a head": {**NETWORK, **{f"fc.{n}": t for n, t in HEAD.items()}},
    "a projection head and prototypes": {
        **behind("module."),
        **{"module.projection_head.0.weight": torch.zeros(8, 4), "module.prototypes.weight": torch.zeros(4, 8)},
    },
    "mmpretrain": {"meta": {}, "state_dict": {**behind("backbone."), "head.fc.weight": torch.zeros(10, 4)}},
    "a projector beside": {
        "state_dict": {**behind("backbone."), "projector.0.weight": torch.zeros(8, 4), "criterion.center": torch.ones(1)}
    },
    "half precision": {name: t.double().half() if t.is_floating_point() else t for name, t in NETWORK.items()},
    "without counters": {name: t for name, t in NETWORK.items() if not name.endswith("num_batches_tracked")},
    "a view of one storage": None,  # made below
    "arguments": {"state_dict": NETWORK, "args": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("/x"))},
    "scalars of NumPy": {"state_dict": NETWORK, "best": np.float64(0.5), "history": np.arange(5), "seen": {1, 2}},
    "a configuration": {"config": Config(a=Config(b=1)), "types": types.SimpleNamespace(a=1), "state_dict": NETWORK},
    "a mapping of a library's own": {"state_dict": Config(NETWORK)},
    "a default mapping": {"state_dict": collections.defaultdict(list, NETWORK)},
    "one network under two names": {"model": NETWORK, "model_without_ddp": NETWORK},
}
FLAT = torch.cat([t.flatten().float() for t in NETWORK.values()])
STARTS = np.cumsum([0, *(t.numel() for t in NETWORK.values())])
ONE_NETWORK["a view of one storage"] = {
    name: FLAT[start : start + t.numel()].view(t.shape) if t.is_floating_point() else t
    for (name, t), start in zip(NETWORK.items(), STARTS, strict=False)
}
HALVED = {name: t.half().float() if t.is_floating_point() else t for name, t in NETWORK.items()}
UNTRAINED_COUNTERS = {n: torch.zeros_like(t) if n.endswith("num_batches_tracked") else t for n, t in NETWORK.items()}
EXPECTED = {"half precision": HALVED, "without counters": UNTRAINED_COUNTERS}


@pytest.mark.parametrize("form", ONE_NETWORK)
def test_the_network_in_a_checkpoint_is_found_whatever_lies_around_it(form: str, tmp_path: Path) -> None:
    path = saved(ONE_NETWORK[form], tmp_path / "weights.pth")
    assert_same(imported(path), EXPECTED.get(form, NETWORK))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_every_tensor_is_what_torch_loads(zipped: bool, protocol: int, tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
    tensors = {
        str(kind): torch.arange(12).reshape(3, 4).to(kind) for kind in (*kinds, torch.uint8, torch.bool, torch.complex64)
    }
    base = torch.randn(6, 5)
    tensors |= {"transposed": base.T, "part": base[1:4, ::2], "scalar": torch.tensor(3.5), "none": torch.zeros(0, 3)}
    tensors |= {"expanded": torch.ones(1).expand(4, 3), "tied": base, "parameter": torch.nn.Parameter(base)}
    path = tmp_path / "all.pt"
    torch.save({"some": {"key": tensors}}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    expected = torch.load(path, weights_only=False)["some"]["key"]
    (place, found), *rest = open_checkpoint(path).state_dicts
    assert (place, rest) == ("some.key", [])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].read(), tensor.detach(), rtol=0, atol=0)
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt", ".bin", ""])
def test_a_format_is_known_by_its_content_and_not_by_its_name(suffix: str, tmp_path: Path) -> None:
    save_file(behind("_orig_mod."), tmp_path / f"one{suffix}", metadata={"format": "pt", "note": "x"})
    assert_same(imported(tmp_path / f"one{suffix}"), NETWORK)
    assert_same(imported(saved(NETWORK, tmp_path / f"two{suffix}")), NETWORK)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors", "pytorch_model.bin"])
def test_the_folder_of_a_hub_is_a_checkpoint(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(NETWORK, folder / name) if name.endswith("safetensors") else torch.save(NETWORK, folder / name)
    assert_same(imported(folder), NETWORK)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pretrained.checkpoint_path("~/hub") == folder


# --- several networks in one file

CHOICES: dict[str, tuple[Any, str, str]] = {  # form -> (content with the right NETWORK and OTHER, key, prefix that are taken)
    "timm's EMA": ({"state_dict": OTHER, "state_dict_ema": NETWORK}, "state_dict_ema", ""),
    "model_ema": ({"model": OTHER, "model_ema": {"module": NETWORK}}, "model_ema.module", ""),
    "ema_state_dict": ({"ema_state_dict": behind("module."), "state_dict": OTHER}, "ema_state_dict", "module."),
    "an EMA by prefix": ({"state_dict": {**behind("model.", OTHER), **behind("ema_model.")}}, "state_dict", "ema_model."),
    "averaged": ({"swa_model": behind("module."), "model": OTHER}, "swa_model", "module."),
    "DINO": ({"student": behind("module.backbone.", OTHER), "teacher": behind("backbone.")}, "teacher", "backbone."),
    "DINOv2": ({"model": {**behind("student.backbone.", OTHER), **behind("teacher.backbone.")}}, "model", "teacher.backbone."),
    "MoCo": (
        {
            "state_dict": {
                **behind("module.encoder_k.", OTHER),
                **behind("module.encoder_q."),
                "module.queue": torch.zeros(8, 4),
            }
        },
        "state_dict",
        "module.encoder_q.",
    ),
    "MoCo v3": (
        {"state_dict": {**behind("module.momentum_encoder.", OTHER), **behind("module.base_encoder.")}},
        "state_dict",
        "module.base_encoder.",
    ),
    "BYOL": ({**behind("target_encoder.", OTHER), **behind("online_encoder.")}, "", "online_encoder."),
    "bare beside a target": ({**NETWORK, **behind("target.", OTHER)}, "", ""),
    "a copy in a head": ({**behind("backbone."), **behind("head.target.backbone.", OTHER)}, "", "backbone."),
}


@pytest.mark.parametrize("form", CHOICES)
def test_of_several_networks_the_usual_one_is_taken_and_the_others_are_named_and_can_be_stated(
    form: str, tmp_path: Path
) -> None:
    content, key, prefix = CHOICES[form]
    path = saved(content, tmp_path / "weights.pth")
    assert_same(imported(path), NETWORK)
    found = found_in(path)
    assert found.place == pretrained.Place(key, prefix)
    if form == "a copy in a head":
        return
    assert len(found.others) == 1
    assert str(found.others[0]) in found.summary()
    other = found.others[0]
    assert_same(imported(path, key=other.key, prefix=other.prefix), OTHER)
    assert_same(imported(path, key=key, prefix=prefix.rstrip(".")), NETWORK)


AMBIGUOUS = {
    "two networks": {"a": NETWORK, "b": OTHER},
    "two prefixes": {**behind("one."), **behind("two.", OTHER)},
    "a teacher and an EMA": {"teacher": NETWORK, "ema": OTHER, "student": OTHER},
    "the last and the best": {"state_dict": NETWORK, "best_state_dict": OTHER},
    "an ensemble": [NETWORK, OTHER],
}


@pytest.mark.parametrize("form", AMBIGUOUS)
def test_networks_that_nothing_tells_apart_are_refused_until_one_is_stated(form: str, tmp_path: Path) -> None:
    path = saved(AMBIGUOUS[form], tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"has 2 networks that fit, and they differ: key .* and key .*'key' and 'prefix'"):
        imported(path)
    for key, state_dict in open_checkpoint(path).state_dicts:
        for prefix in {name.removesuffix("conv1.0.weight") for name in state_dict if name.endswith("conv1.0.weight")}:
            assert set(imported(path, key=key, prefix=prefix)) == set(NETWORK)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        (
            {"key": "teachr"},
            r"teacher\.key: .* no tensors of the backbone at key 'teachr'\. It has key 'student' .*; key 'teacher'",
        ),
        ({"key": "teacher", "prefix": "module."}, r"teacher\.prefix: .* at key 'teacher' and prefix 'module\.'"),
        ({"prefix": ""}, r"teacher\.prefix: .* at prefix ''\. It has key 'student' with prefix 'module\.backbone\.'"),
    ],
)
def test_a_stated_key_or_prefix_that_is_not_there_is_refused_with_those_that_are(
    stated: dict[str, str], said: str, tmp_path: Path
) -> None:
    path = saved(CHOICES["DINO"][0], tmp_path / "weights.pth")
    with pytest.raises(UserError, match=said):
        imported(path, **stated)


# --- what does not fit


def grown(name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {**NETWORK, name: torch.zeros(shape)}


FIRST = NETWORK["conv1.0.weight"]
UNFIT: dict[str, tuple[Any, str]] = {
    "NaN": ({**NETWORK, "conv3.0.weight": NETWORK["conv3.0.weight"] * float("nan")}, r"not finite, in conv3\.0\.weight"),
    "too large for float32": (
        {**NETWORK, "conv3.0.weight": NETWORK["conv3.0.weight"].double() + 1e300},
        r"not finite, in conv3",
    ),
    "one channel": (
        {**NETWORK, "conv1.0.weight": FIRST.mean(1, keepdim=True)},
        r"is for images of 1 channel, and ktray's have 3: its conv1\.0\.weight has the shape \(\d+, 1, 3, 3\) instead",
    ),
    "four channels, wrapped": (
        {"state_dict": behind("module.", {**NETWORK, "conv1.0.weight": torch.cat([FIRST, FIRST[:, :1]], 1)})},
        r"is for images of 4 channels",
    ),
    "a part more": (
        grown("conv1.7.weight", (3,)),
        r"another architecture: it has conv1\.7\.weight of shape \(3,\), besides all",
    ),
    "an embedding more": (grown("pos_embed", (1, 5, 4)), r"it has pos_embed of shape \(1, 5, 4\), besides all \d+ tensors"),
    "a norm more": (grown("fc_norm.weight", (4,)), r"it has fc_norm\.weight of shape \(4,\), besides all"),
    "a part less": ({n: t for n, t in NETWORK.items() if not n.startswith("conv5")}, r"it has no conv5\.0\.weight of shape"),
    "a part twice": (
        {**NETWORK, **{n.replace("conv3.", "conv3.module."): t for n, t in OTHER.items() if n.startswith("conv3.")}},
        r"it has conv3\.module\.0\.weight",
    ),
    "quantised": (
        {n: t.to(torch.int8) if t.is_floating_point() else t for n, t in NETWORK.items()},
        r"weights of a type that ktray does not take \(int8\), in conv1\.0\.weight, .*dense tensors of float32",
    ),
    "complex": ({**NETWORK, "conv1.0.weight": FIRST.to(torch.complex64)}, r"a type that ktray does not take \(complex64\)"),
    "sparse": ({**NETWORK, "conv1.0.weight": FIRST.to_sparse()}, r"does not take \(sparse\), in conv1\.0\.weight\."),
    "arrays of NumPy": ({n: t.numpy() for n, t in NETWORK.items()}, r"does not take \(array of NumPy\), in conv1\.0\.weight, "),
    "without values": ({n: t.to("meta") for n, t in NETWORK.items()}, r"does not take \(meta, which has no values\)"),
    "all zero": ({n: t * 0 for n, t in NETWORK.items()}, r"all weights at key '' with prefix '' of weights\.pth are zero"),
    "negative variances": (
        {n: t - 5 if n.endswith("running_var") else t for n, t in NETWORK.items()},
        r"negative variances, in conv1\.1\.running_var",
    ),
    "nothing of it": ({"a.b": torch.zeros(3)}, r"it has no conv1\.0\.weight of shape .* but has a\.b of shape \(3,\)"),
    "no tensors": ({"epoch": 3, "state_dict": {}}, r"contains no named tensors"),
    "a tensor alone": (torch.zeros(3), r"contains no named tensors"),
    "a pickled network": (
        torch.nn.Linear(2, 2),
        r"objects of Python, such as torch\.nn\.modules\.linear\.Linear; .*state_dict\(\)",
    ),
    "a pickled thread": ({"state_dict": threading.Thread}, r"contains no named tensors"),
}


@pytest.mark.parametrize("form", UNFIT)
def test_weights_that_do_not_fit_are_refused_with_what_differs(form: str, tmp_path: Path) -> None:
    content, said = UNFIT[form]
    with pytest.raises(UserError, match=said) as refused:
        imported(saved(content, tmp_path / "weights.pth"))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "imported").exists()


def test_unknown_modules_beside_the_network_are_ignored_if_the_prefix_is_stated_and_parts_of_it_never(tmp_path: Path) -> None:
    path = saved({**NETWORK, "mystery.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(
        UserError, match=r"it has mystery\.weight .*say where the network begins, prefix: '', and they are ignored"
    ):
        imported(path)
    assert_same(imported(path, prefix=""), NETWORK)
    assert pretrained.find_weights(pretrained.shapes(ALEXNET), path, prefix="").ignored == ("mystery.weight of shape (3,)",)
    inside = saved({**NETWORK, "conv1.9.weight": torch.zeros(3)}, tmp_path / "inside.pth")
    with pytest.raises(UserError, match=r"it has conv1\.9\.weight") as refused:
        imported(inside, prefix="")
    assert "prefix" not in refused.value.instead


def test_a_network_that_is_there_only_in_part_is_not_taken_and_kept_apart_in_the_record(tmp_path: Path) -> None:
    averaged = {name: tensor for name, tensor in OTHER.items() if "running" not in name}
    path = saved({"model": NETWORK, "model_ema": averaged}, tmp_path / "weights.pth")
    assert_same(imported(path), NETWORK)
    found = found_in(path)
    assert found.others == ()
    assert found.incomplete == (pretrained.Place("model_ema", ""),)
    assert "not completely in the file: key 'model_ema'" in found.summary()


NAMELESS = {
    "torch_ema": ({"model": NETWORK, "ema": {"decay": 0.99, "shadow_params": list(OTHER.values())}}, "ema"),
    "a callback": ({"state_dict": NETWORK, "callbacks": {"EMA": {"ema_weights": list(OTHER.values())}}}, "callbacks.EMA"),
    "names without dots": (
        {"state_dict": NETWORK | {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in OTHER.items()}},
        "state_dict.model_ema",
    ),
}


@pytest.mark.parametrize(("content", "place"), NAMELESS.values(), ids=NAMELESS.keys())
def test_averages_without_names_are_not_taken_and_said(content: dict[str, Any], place: str, tmp_path: Path) -> None:
    path = saved(content, tmp_path / "weights.pth")
    assert_same(imported(path), NETWORK)
    assert any(each.startswith(place) for each in found_in(path).nameless)
    assert "averaged weights without the network's names" in found_in(path).summary()


def test_only_averages_are_said_to_have_no_names(tmp_path: Path) -> None:
    path = saved(
        {"model": NETWORK, "model_ema": OTHER, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, tmp_path / "a.pth"
    )
    assert found_in(path).place.key == "model_ema"
    assert found_in(path).nameless == ()


def test_a_tensor_that_torch_wrote_as_a_negating_view_has_its_own_sign(tmp_path: Path) -> None:
    name = next(iter(NETWORK))
    negated = torch.complex(torch.zeros_like(NETWORK[name]), -NETWORK[name]).conj().imag
    assert negated.is_neg()
    assert torch.equal(negated, NETWORK[name])
    path = saved(NETWORK | {name: negated}, tmp_path / "weights.pth")
    assert_same(imported(path), NETWORK)


def test_position_embeddings_of_another_size_are_named_as_such(tmp_path: Path) -> None:
    network = pretrained.shapes(plugins.parse("backbone", {"kind": "vit", "size": "tiny", "patch": 8, "image": 64}))
    state = {name: torch.zeros(tensor.shape) for name, tensor in network.items()}
    path = saved({**state, "encoder.pos_embedding": torch.zeros(1, 17, 192)}, tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"position embeddings for 4 x 4 patches, and the backbone for 8 x 8 patches"):
        pretrained.check_weights(network, path)


# --- files that are no checkpoints


def raw(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def zipped(*names: str, compression: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name in names:
                archive.writestr(name, b"x" * 10_000)

    return write


def cut(share: float, **options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save(NETWORK, path, **options)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return write


def cut_safetensors(length: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        save_file(NETWORK, path)
        path.write_bytes(path.read_bytes()[:length])

    return write


def flipped(name: str) -> Callable[[Path], None]:
    """One bit of a tensor's bytes is another."""

    def write(path: Path) -> None:
        torch.save(NETWORK, path)
        content = bytearray(path.read_bytes())
        at = content.index(NETWORK[name].numpy().tobytes()) + 5
        content[at] ^= 1
        path.write_bytes(content)

    return write


def script(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # torch has deprecated it
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), path)


def array(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (raw(b""), "is empty"),
    "a web page": (raw(b"<!DOCTYPE html>\n<html>404</html>"), "is a web page, such as the error or login page of a download"),
    "a web page after spaces": (raw(b"\n  <HTML><body>Sign in</body></HTML>"), "is a web page"),
    "XML of a bucket": (raw(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"), "is a web page"),
    "an LFS pointer": (
        raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "is a pointer of Git LFS and not the file itself. Fetch the file: git lfs pull",
    ),
    "a text": (raw(b"hello there\nsecond line"), "is a text file that begins with 'hello there'"),
    "a text in UTF-16": (raw("hello there".encode("utf-16")), "is a text file that begins with 'hello there'"),
    "a text with an escape": (raw(b"a\x1b]0;owned\x07"), "is neither a safetensors file nor one of torch.save"),
    "an answer in JSON": (raw(b'{"error": "not found"}'), "is a text file that begins with"),
    "zeros": (raw(bytes(5000)), "begins with zeros, as a download that did not finish"),
    "noise": (raw(np.random.default_rng(0).bytes(5000)), "is neither a safetensors file nor one of torch.save"),
    "gzip": (raw(b"\x1f\x8b\x08\0" + bytes(50)), "is a gzip archive. Unpack it"),
    "tar": (raw(b"a".ljust(257, b"\0") + b"ustar\x0000" + bytes(300)), "is a tar archive. Unpack it"),
    "HDF5": (raw(b"\x89HDF\r\n\x1a\n" + bytes(50)), "is an HDF5 file"),
    "an array": (array, "is an array of NumPy"),
    "a zip of something else": (
        zipped("readme.txt", "img/1.png"),
        "is a zip archive without weights; it holds img/1.png, readme.txt",
    ),
    "an empty zip": (zipped(), "is an empty zip archive"),
    "a TorchScript program": (script, "is a TorchScript program, not weights"),
    "an exported program": (exported, "is a program of torch.export, not weights"),
    "a compressed zip": (zipped("a/data.pkl", compression=zipfile.ZIP_DEFLATED), "is a compressed zip archive"),
    "a cut zip": (cut(0.6), "is cut off or damaged"),
    "a zip cut at its last byte": (cut(0.9999), "is cut off or damaged"),
    "a cut old file": (cut(0.6, _use_new_zipfile_serialization=False), "is cut off"),
    "an old file cut in its pickle": (cut(0.02, _use_new_zipfile_serialization=False), "is damaged or cut off"),
    "a safetensors cut in its header": (cut_safetensors(700), "is cut off: it has 700 bytes, and its header needs"),
    "a safetensors cut in its data": (cut_safetensors(20_000), "is cut off: it has 20,000 bytes, and its header needs"),
    "a bare pickle": (
        raw(pickle.dumps({"a": argparse.Namespace()})),
        "is a Python pickle of argparse.Namespace that torch.save did not",
    ),
    "one flipped bit": (flipped("conv4.0.weight"), "has another checksum than was written"),
    "a huge header": (raw(struct.pack("<Q", 1 << 40) + b'{"a":' + bytes(100)), "claims a header of 1,099,511,627,776 bytes"),
    "a header that is no JSON": (raw(struct.pack("<Q", 20) + b'{"a": nothing......'.ljust(20)), "damaged safetensors file"),
    "a deep header": (raw(struct.pack("<Q", 100_000) + b'{"a":' + b"[" * 99_995), "damaged safetensors file"),
}


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("form", WRONG)
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(form: str, name: str, tmp_path: Path) -> None:
    write, said = WRONG[form]
    write(tmp_path / name)
    with pytest.raises(UserError) as refused:
        imported(tmp_path / name)
    assert said in str(refused.value)
    assert f"{name} " in str(refused.value) or "the file is damaged" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "\x1b" not in str(refused.value)


class Trap:
    """What makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("zipped_form", [True, False], ids=["zip", "before torch 1.6"])
def test_nothing_in_a_checkpoint_runs_and_the_weights_beside_it_are_read(zipped_form: bool, tmp_path: Path) -> None:
    path = tmp_path / "trap.pth"
    content = {"state_dict": NETWORK, "hook": Trap(tmp_path / "sprung"), "__setstate__": Trap(tmp_path / "sprung")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped_form)
    assert_same(imported(path), NETWORK)
    assert "posix.system" in found_in(path).objects
    assert not (tmp_path / "sprung").exists()


# --- files that claim more than they hold


def torch_zip(path: Path, pickled: bytes, **parts: bytes) -> Path:
    """A file like one of torch.save with this pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, content in parts.items():
            archive.writestr(f"archive/data/{key.removeprefix('_')}", content)
    return path


class Persistent(pickle.Pickler):
    """Writes tensors as torch.save does, with whatever numbers a test wants."""

    def persistent_id(self, found: Any) -> Any:
        return found.identity if isinstance(found, Storage) else None


class Storage:
    def __init__(self, numel: Any = 4, key: str = "0") -> None:
        self.identity = ("storage", torch.FloatStorage, key, "cpu", numel)


class Rebuilt:
    """A tensor that a pickle describes with these numbers."""

    def __init__(self, offset: Any, size: Any, stride: Any, storage: Any = None) -> None:
        self.arguments = (storage or Storage(), offset, size, stride, False, collections.OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


def pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    Persistent(buffer, protocol=2).dump(content)
    return buffer.getvalue()


IMPOSSIBLE = {
    "more elements than bytes": Rebuilt(0, (5,), (1,)),
    "a negative length": Rebuilt(0, (-1,), (1,)),
    "a negative stride": Rebuilt(3, (2,), (-1,)),
    "a negative offset": Rebuilt(-1, (2,), (1,)),
    "an offset past the end": Rebuilt(4, (1,), (1,)),
    "a huge shape": Rebuilt(0, (10**12, 10**12), (10**12, 1)),
    "a shape of texts": Rebuilt(0, ("a",), (1,)),
    "a shape that is none": Rebuilt(0, None, None),
    "other numbers of lengths and strides": Rebuilt(0, (2, 2), (1,)),
    "a stride of half": Rebuilt(0, (2,), (0.5,)),
    "a storage that is not there": Rebuilt(0, (1,), (1,), Storage(4, "7")),
}


@pytest.mark.parametrize("form", IMPOSSIBLE)
def test_a_tensor_that_its_storage_cannot_hold_is_refused(form: str, tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "weights.pth", pickled({"conv1.0.weight": IMPOSSIBLE[form]}), _0=bytes(16))
    with pytest.raises(UserError, match=r"the tensor conv1\.0\.weight (has no bytes or an impossible shape|needs .* bytes)"):
        open_checkpoint(path)


def sparse(path: Path) -> None:
    """A header of 10 TB, and a hole where they should be."""
    size = 10 * 10**12
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"head.weight": entry}).encode().ljust(256)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + size)


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data.pkl", "w") as part:
        for _ in range(30):
            part.write(bytes(1_000_000))


def containing_itself(path: Path) -> None:
    inner: dict[str, Any] = {}
    inner["state_dict"] = {"state_dict": inner, "list": [inner, inner]}
    torch.save(inner, path)


def doubled(path: Path) -> None:
    """2 ** 200 paths to one mapping."""
    inner: Any = {"x": 1}
    for _ in range(200):
        inner = {"a": inner, "b": inner}
    torch_zip(path, pickled(inner))


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "a sparse file": sparse,
    "a zip bomb": bomb,
    "a mapping that contains itself": containing_itself,
    "a mapping by 2 ** 200 paths": doubled,
    "deep nesting": lambda path: torch_zip(path, b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "many opcodes": lambda path: torch_zip(path, b"\x80\x02" + b"]0" * 1_600_000 + b"N."),
    "a place far out in the memo": lambda path: torch_zip(path, b"\x80\x02}r\xff\xff\xff\x7f."),
    "a text of 2 ** 60 bytes": lambda path: torch_zip(path, b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"a."),
    "a number of a million digits": lambda path: torch_zip(path, b"I" + b"9" * 1_000_000 + b"\n."),
    "calls within calls": lambda path: torch_zip(
        path, b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n" + b"(" * 3000 + b"N" + b"t" * 3000 + b"R."
    ),
    "a name of a million dots": lambda path: torch.save({"." * 1_000_000 + "conv1.0.weight": torch.zeros(1)}, path),
    "3,000 prefixes": lambda path: torch.save({f"p{n}.conv1.0.weight": torch.zeros(1) for n in range(3_000)}, path),
    "an empty stack": lambda path: torch_zip(path, b"\x80\x02RRR."),
    "a mark that is not there": lambda path: torch_zip(path, b"\x80\x02tt."),
    "no end": lambda path: torch_zip(path, b"\x80\x02}"),
    "nothing at all": lambda path: torch_zip(path, b""),
    "a trap in an old pickle": lambda path: path.write_bytes(b"cos\nsystem\n(S'echo'\ntR."),
}


@pytest.mark.parametrize("form", HOSTILE)
def test_a_hostile_file_is_refused_within_seconds_and_bounded_memory(form: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    HOSTILE[form](path)
    before, began = peak_memory(), time.process_time()
    with pytest.raises(UserError) as refused:
        imported(path)
    assert time.process_time() - began < 10
    assert peak_memory() - before < 2 << 30
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 2000


def test_what_torch_cannot_open_is_a_sentence_too(tmp_path: Path) -> None:
    for name in ("x" * 300 + ".pt", "a\0b.pt"):
        with pytest.raises(UserError, match=r"cannot be read|there is no file"):
            pretrained.weights_file(tmp_path / name)
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("loop.pt", "pipe.pt"):
        with pytest.raises(UserError, match=f"there is no file {name}"):
            pretrained.weights_file(tmp_path / name)


# --- the command line


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def pair_file(at: Path, **teacher: Any) -> str:
    judge = {"kind": "effective_rank", "of": "teacher"}
    teacher = {"backbone": ALEXNET.model_dump(), **teacher}
    spec = toy_spec(data={**DATA, "count": 60}, teacher=teacher, transfer={"kind": "none"}, evals=[judge])
    (at / "pair.yaml").write_text(yaml.safe_dump(spec))
    return str(at / "pair.yaml")


def test_which_of_two_networks_teaches_is_said_by_plan_and_run_and_kept_in_the_record(
    home: Path, tmp_path: Path, capsys: Any
) -> None:
    path = saved(CHOICES["timm's EMA"][0], tmp_path / "weights.pth")
    said = "weights.pth has several networks: the one at key 'state_dict_ema' with prefix '' is taken"
    assert main(["plan", pair_file(tmp_path, checkpoint=str(path))]) == 0
    assert f"note: {said}" in capsys.readouterr().out
    assert main(["run", pair_file(tmp_path, checkpoint=str(path)), "--local", "--json"]) == 0
    answer = capsys.readouterr()
    assert said in answer.err
    key = json.loads(answer.out)[0]["keys"]["teacher"]
    record = json.loads((home / "store" / key / "record.json").read_text())
    assert record["weights"].startswith(
        f"{len(NETWORK)} tensors from key 'state_dict_ema' with prefix ''; also in the file: key"
    )
    kept = load_file(home / "store" / key / "weights.safetensors")
    assert_same({name.removeprefix("backbone."): tensor for name, tensor in kept.items()}, NETWORK)
    assert main(["run", pair_file(tmp_path, checkpoint=str(path), key="state_dict"), "--local", "--json", "--quiet"]) == 0
    other = json.loads(capsys.readouterr().out)[0]["keys"]["teacher"]
    kept = load_file(home / "store" / other / "weights.safetensors")
    assert_same({name.removeprefix("backbone."): tensor for name, tensor in kept.items()}, OTHER)
    assert other != key


@pytest.mark.parametrize("form", ["NaN", "one channel", "a part less", "a part more", "nothing of it"])
def test_plan_refuses_what_the_run_would_refuse(form: str, home: Path, tmp_path: Path, capsys: Any) -> None:
    path = saved(UNFIT[form][0], tmp_path / "weights.pth")
    assert main(["plan", pair_file(tmp_path, checkpoint=str(path)), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert "teacher.checkpoint: weights.pth" in err
    assert err.count("\n") == 1


def test_plan_refuses_an_artifact_of_another_architecture_and_a_key_of_an_artifact(
    home: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(toy_spec(data={**DATA, "count": 60}, teacher=ROTATION, evals=[])))
    assert main(["run", str(tmp_path / "first.yaml"), "--local", "--json", "--quiet"]) == 0
    key = json.loads(capsys.readouterr().out)[0]["keys"]["teacher"]
    assert main(["plan", pair_file(tmp_path, checkpoint=key)]) == 0
    capsys.readouterr()
    wide = {**ALEXNET.model_dump(), "width": 0.25}
    assert main(["plan", pair_file(tmp_path, checkpoint=key, backbone=wide)]) == 2
    assert f"teacher.checkpoint: {key} is of another architecture" in capsys.readouterr().err
    assert main(["plan", pair_file(tmp_path, checkpoint=key, key="model")]) == 2
    assert "teacher.key: an artifact has no key. Leave it out" in capsys.readouterr().err


def test_a_file_of_terabytes_is_refused_before_it_is_hashed(home: Path, tmp_path: Path, capsys: Any) -> None:
    sparse(tmp_path / "weights.safetensors")
    before = time.time_ns() - 60_000_000_000
    os.utime(tmp_path / "weights.safetensors", ns=(before, before))
    began = time.process_time()
    assert main(["plan", pair_file(tmp_path, checkpoint=str(tmp_path / "weights.safetensors")), "--quiet"]) == 2
    assert "are on disk; the rest is a hole" in capsys.readouterr().err
    assert time.process_time() - began < 10


def test_the_index_of_a_checkpoint_in_several_files_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(
        json.dumps(
            {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}}
        )
    )
    with pytest.raises(UserError, match=r"is the index of a checkpoint in 2 files, and ktray reads one file. Save all tensors"):
        open_checkpoint(path)


def test_large_arrays_of_numpy_in_a_checkpoint_are_named_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "arrays.pt"
    torch.save({"conv.weight": np.zeros((17 << 20,), np.float32)}, path)
    with pytest.raises(UserError, match=r"arrays of NumPy among them. Make tensors of the arrays with torch.from_numpy before"):
        open_checkpoint(path)

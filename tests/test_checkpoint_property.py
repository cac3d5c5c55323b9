"""Any nesting of keys, prefixes, heads and damage: a checkpoint gives the right weights, or soon one sentence."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from ktray import plugins
from ktray.errors import UserError
from ktray.training import loop, pretrained
from tests.child import peak_memory

torch.set_num_threads(1)

ALEXNET = plugins.parse("backbone", {"kind": "alexnet", "width": 0.125})
NETWORK = loop.untrained_backbone(ALEXNET, 3).state_dict()
OTHER = loop.untrained_backbone(ALEXNET, 4).state_dict()
SHAPES = pretrained.shapes(ALEXNET)
KEYS = [
    "state_dict",
    "model",
    "network",
    "net",
    "model_state_dict",
    "params",
    "weights",
    "checkpoint",
    "module",
    "generator",
    "0",
]
PREFIXES = [
    "module",
    "_orig_mod",
    "model",
    "backbone",
    "encoder",
    "net",
    "trunk",
    "encoder_q",
    "base_encoder",
    "student",
    "online",
]
TARGETS = ["encoder_k", "momentum_encoder", "target_encoder", "target"]
AVERAGED = ["teacher", "model_ema", "ema_model", "swa_model"]
HEADS = [
    "fc.weight",
    "head.weight",
    "classifier.1.bias",
    "projector.0.weight",
    "prototypes.weight",
    "last_layer.weight_g",
    "queue",
]
BESIDE: list[tuple[str, Any]] = [
    *[("epoch", 3), ("args", argparse.Namespace(lr=0.1)), ("best", np.float64(0.5)), ("loss", torch.tensor(0.1))],
    *[
        ("optimizer", {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}),
        ("path", Path("x")),
        ("none", None),
    ],
]

nesting = st.lists(st.sampled_from(KEYS), max_size=4)
prefixes = st.lists(st.sampled_from(PREFIXES), max_size=4).map(lambda parts: "".join(f"{part}." for part in parts))
extras = st.lists(st.sampled_from(HEADS), max_size=3)
beside = st.lists(st.sampled_from(BESIDE), max_size=3)
forms = st.sampled_from(["zip", "old", "safetensors"])
rivals = st.sampled_from([*TARGETS, *AVERAGED])


def behind(prefix: str, network: dict[str, Tensor], heads: list[str]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in network.items()} | {prefix + name: torch.ones(5, 2) for name in heads}


def written(content: Any, keys: list[str], more: list[tuple[str, Any]], form: str, path: Path) -> None:
    if form == "safetensors":
        save_file(content, path)
        return
    for key in reversed(keys):
        content = {**dict(more), key: content}
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


def outcome(path: Path, **stated: str | None) -> dict[str, Tensor] | str:
    """The weights that a file gives, or why it gives none; soon, in little memory, and in one paragraph."""
    before, began = peak_memory(), time.process_time()
    try:
        found = pretrained.check_weights(SHAPES, path, **stated)
        result: dict[str, Tensor] | str = {name: stored.read() for name, stored in found.tensors.items()}
    except UserError as error:
        result = str(error)
        assert "\n" not in result
        assert len(result) < 2000
    assert time.process_time() - began < 10
    assert peak_memory() - before < 2 << 30
    return result


def same(found: dict[str, Tensor] | str, expected: dict[str, Tensor]) -> bool:
    return not isinstance(found, str) and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def finds_the_network(keys: list[str], prefix: str, heads: list[str], more: list[tuple[str, Any]], form: str) -> None:
    """One network: found, whatever lies around it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        written(behind(prefix, NETWORK, heads), keys, more, form, path)
        found = outcome(path)
        assert same(found, NETWORK), found


def chooses(keys: list[str], prefix: str, rival: str, form: str, swapped: bool) -> None:
    """Two networks in one state_dict: averaged weights before others, targets after them, and the other one if it is stated."""
    network, other = (NETWORK, OTHER) if rival in AVERAGED else (OTHER, NETWORK)
    first, second = behind(f"{rival}.{prefix}", network, []), behind(prefix or "main.", other, [])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        written({**second, **first} if swapped else {**first, **second}, keys, [], form, path)
        found = outcome(path)
        assert same(found, NETWORK), found
        place = pretrained.find_weights(SHAPES, path).others[0]
        assert same(outcome(path, key=place.key, prefix=place.prefix), OTHER)


def survives_damage(prefix: str, form: str, cut: float, flips: list[tuple[float, int]]) -> None:
    """A damaged file gives a sentence, or weights of the right names, shapes and types that are finite."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        written(behind(prefix, NETWORK, []), ["state_dict"], BESIDE[:2], form, path)
        content = bytearray(path.read_bytes())
        head = len(content) // 4
        for at, value in flips:
            content[int(at * head) if value % 2 else len(content) - 1 - int(at * head)] = value
        path.write_bytes(content[: int(cut * len(content))])
        found = outcome(path)
        if not isinstance(found, str):
            assert all(SHAPES[name].shape == tensor.shape and bool(tensor.isfinite().all()) for name, tensor in found.items())


def survives_bytes(start: bytes, content: bytes) -> None:
    """Any bytes give a sentence."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        path.write_bytes(start + content)
        assert isinstance(outcome(path), str)


starts = st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x10\0\0\0\0\0\0\0{", b"\x80\x02}q\0(", b"<html>"])
flip = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))
PROPERTIES: dict[str, tuple[Callable[..., None], tuple[Any, ...], int, int]] = {  # -> (property, strategies, cases, slow cases)
    "finds": (finds_the_network, (nesting, prefixes, extras, beside, forms), 15, 250),
    "chooses": (chooses, (nesting, prefixes, rivals, forms, st.booleans()), 10, 150),
    "damage": (
        survives_damage,
        (prefixes, forms, st.sampled_from([1.0, 1.0, 0.99, 0.5, 0.01]), st.lists(flip, max_size=4)),
        10,
        250,
    ),
    "bytes": (survives_bytes, (starts, st.binary(max_size=300)), 10, 150),
}


def run(name: str, cases: int) -> None:
    check, strategies, *_ = PROPERTIES[name]
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings(max_examples=cases, deadline=None, derandomize=True, suppress_health_check=quiet, database=None)(
        given(*strategies)(check)
    )()


@pytest.mark.parametrize("name", PROPERTIES)
def test_checkpoints_give_the_right_weights_or_one_sentence(name: str) -> None:
    run(name, PROPERTIES[name][2])


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_many_checkpoints_give_the_right_weights_or_one_sentence(name: str) -> None:
    run(name, PROPERTIES[name][3])

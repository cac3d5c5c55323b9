"""Keys are the same on every machine, in every release; what has no canonical form is refused by its path."""

from __future__ import annotations

import collections
import enum
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ktray.artifact import Stage
from ktray.fingerprint import canonical, file_sha256, fingerprint, flat, seed_of

CLUSTERS = Stage(
    name="clusters",
    spec={"pca": None, "k": 500, "l2": True},
    revisions={"kmeans": 2, "clusters": 1},
    inputs={"features": "features-0123456789ab"},
)


@pytest.mark.parametrize(
    ("value", "golden"),
    [  # each is `printf '%s' TEXT | sha256sum` of the text that the value should have
        (None, "74234e98afe7498fb5daf1f36ac2d78acc339464f950703b8c019892f982b90b"),
        ({}, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"),
        (
            {"b": {"x": 1.0}, "a": [1, 2.5, None, True, "ü"]},
            "89ca6bef4dd0bfa3dc84f339ac664dfe80e8a08f9d893d328be59a90168db4df",
        ),
    ],
)
def test_golden_fingerprints_never_change(value, golden):
    assert fingerprint(value) == golden


def test_the_golden_key_of_a_stage_never_changes():
    assert CLUSTERS.sha256 == "2b0cff8e98a117261eaa78d154465977f4c870cf37cc43f177447a9990a09743"
    assert CLUSTERS.key == "clusters-2b0cff8e98a1"


def test_a_golden_seed_never_changes():
    assert seed_of(0, "shuffle", 3) == 0x4061921719247352 >> 1


def test_a_key_does_not_depend_on_the_process():
    script = "from ktray.fingerprint import fingerprint; print(fingerprint({'b': 1, 'a': {'d': 0.1, 'c': None}}))"
    answers = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert answers == {fingerprint({"a": {"c": None, "d": 0.1}, "b": 1})}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": 1, "a": 2}, '{"a":2,"b":1}'),
        ({"a": {"d": 1, "c": [2, (3, 4)]}}, '{"a":{"c":[2,[3,4]],"d":1}}'),
        (1, "1"),
        (1.0, "1.0"),
        (True, "true"),
        (0.1, "0.1"),
        (1e-07, "1e-07"),
        (1e22, "1e+22"),
        (2**70, "1180591620717411303424"),
        ("é\n", '"é\\n"'),
        (collections.OrderedDict(b=1, a=2), '{"a":2,"b":1}'),
    ],
)
def test_every_value_has_one_text(value, text):
    assert canonical(value) == text


def test_a_canonical_text_is_json_of_the_same_value():
    value = {"lr": 0.1 + 0.2, "layers": ["layer1", None], "deep": {"π": -1e-300}}
    assert json.loads(canonical(value)) == value


@pytest.mark.parametrize(
    ("one", "other"), [(1, 1.0), (1, True), (0, None), ("1", 1), ([], {}), ([[1], 2], [1, [2]]), ("", None)]
)
def test_different_values_have_different_fingerprints(one, other):
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"data": {"path": Path("/p")}}, "data.path: a PosixPath has no canonical form"),
        ({"teacher": {"layers": ["a", {"x": {1, 2}}]}}, "teacher.layers.1.x: a set has no canonical form"),
        ({"transfer": {"k": np.int64(5)}}, "transfer.k: a int64 has no canonical form"),
        ({"student": {"lr": np.float32(0.5)}}, "student.lr: a float32 has no canonical form"),
        ({"student": {"lr": float("nan")}}, "student.lr: nan has no canonical form"),
        ([1, [float("inf")]], "1.0: inf has no canonical form"),
        ({"a": {1: "b"}}, "a: the key 1 is not a string"),
        ({"a": b"bytes"}, "a: a bytes has no canonical form"),
        ({"a": enum.Enum("Colour", "RED").RED}, "a: a Colour has no canonical form"),
        ({"a": np.zeros(2)}, "a: a ndarray has no canonical form"),
        (float("nan"), "value: nan"),
    ],
)
def test_what_has_no_canonical_form_is_refused_by_its_path(value, path):
    with pytest.raises(TypeError) as caught:
        fingerprint(value)
    assert str(caught.value).startswith(path)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "pseudo_labels"},
        {"spec": {"pca": None, "k": 501, "l2": True}},
        {"revisions": {"kmeans": 3, "clusters": 1}},
        {"inputs": {"features": "features-0123456789ac"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_all_that_determines_a_stage_is_in_its_key(change):
    fields = {"name": CLUSTERS.name, "spec": CLUSTERS.spec, "revisions": CLUSTERS.revisions, "inputs": CLUSTERS.inputs}
    assert Stage(**{**fields, **change}).sha256 != CLUSTERS.sha256


def test_where_a_stage_runs_and_what_it_starts_from_is_not_in_its_key():
    moved = Stage(
        name=CLUSTERS.name,
        spec=CLUSTERS.spec,
        revisions=CLUSTERS.revisions,
        inputs=CLUSTERS.inputs,
        resume_from=("clusters-000000000000",),
        local={"path": "/elsewhere", "device": "cuda:1"},
    )
    assert moved.key == CLUSTERS.key


def test_seeds_fit_a_torch_generator_and_neighbours_are_unrelated():
    seeds = [seed_of(seed, "batch", epoch) for seed in range(30) for epoch in range(30)]
    assert len(set(seeds)) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds])
    assert np.abs(bits.mean(0) - 0.5).max() < 0.1  # 900 fair coins stay within six standard deviations of a half


def test_a_file_has_the_sha256_of_its_bytes(tmp_path):
    content = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_flat_names_every_leaf_by_its_dotted_path_and_keeps_empty_mappings() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]}) == {"a.b": 1, "a.c": {}, "d": [1, {"e": 2}]}

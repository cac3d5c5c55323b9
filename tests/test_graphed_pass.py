"""On a GPU a network runs as a CUDA graph, which changes no bit, and features do not depend on what else is extracted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ktray import conditions, plugins
from ktray.features import extraction, graphed_pass
from ktray.features.graphed_pass import GraphedPass, batch_size
from ktray.ops.precision import computing_in
from ktray.spec import Pooling
from ktray.training import loop
from tests.toy_images import toy_images

NETWORKS = {
    "alexnet": {"kind": "alexnet", "width": 0.5},
    "resnet": {"kind": "resnet", "depth": 18, "width": 0.5},
    "vit": {"kind": "vit", "patch": 4, "image": 28},
}
GIB = 1 << 30


@pytest.fixture(autouse=True)
def _nothing_kept():
    extraction._kept.clear()
    yield
    extraction._kept.clear()


def weights_of(backbone, folder: Path, seed: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    network = loop.untrained_backbone(backbone, seed)
    save_file({f"backbone.{k}": v.contiguous() for k, v in network.state_dict().items()}, folder / "weights.safetensors")
    return folder


def extracted(
    folder: Path, count: int, kind: str = "alexnet", computed_in="float32", device="cuda:0", layers=(None,), **options
):
    backbone = plugins.parse("backbone", NETWORKS[kind])
    views = [extraction.network_view(backbone, layer, Pooling(), computed_in=computed_in) for layer in layers]
    weights = weights_of(backbone, folder / kind, options.pop("seed", 0))
    return extraction.extract_views(views, weights, None, toy_images(count), device, **options)


@pytest.mark.parametrize(
    ("side", "memory", "size"),
    [(32, 140 * GIB, 2048), (224, 140 * GIB, 256), (224, 8 * GIB, 16), (32, 8 * GIB, 1024), (1024, 4 * GIB, 1), (8, GIB, 2048)],
)
def test_the_batch_size_on_a_gpu_is_a_power_of_two_that_fits(side, memory, size):
    assert batch_size(side, memory) == size
    assert extraction.SHARD_ROWS % size == 0


@pytest.mark.parametrize(
    ("count", "side", "pays"), [(1_281_167, 224, True), (50_000, 224, False), (1_281_167, 32, False), (200_000, 64, False)]
)
def test_a_network_is_compiled_where_so_many_images_pay_for_it(count, side, pays):
    backbone = plugins.parse("backbone", {"kind": "resnet", "depth": 50, "form": "full"})
    views = extraction.fingerprint.canonical([extraction.network_view(backbone, None, Pooling())])
    assert extraction._pays_to_compile(views, side, count) == pays


def test_conditions_are_collected_where_somebody_asks_and_a_part_has_its_own():
    conditions.note("lost", {"batch": 1})
    with conditions.collecting() as outer:
        conditions.note("one", {"batch": 1})
        with conditions.collecting() as inner:
            conditions.note("two", {"batch": 2})
        conditions.note("one", {"batch": 3})
    assert (outer, inner) == ({"one": {"batch": 3}}, {"two": {"batch": 2}})


@pytest.mark.gpu
@pytest.mark.parametrize("computed_in", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_graph_gives_the_bits_of_the_same_batch_kernel_by_kernel(kind, computed_in, tmp_path):
    with conditions.collecting() as noted:
        (rows,) = extracted(tmp_path, 70, kind, computed_in)
    assert noted["extraction"]["cuda_graph"] is True
    assert noted["extraction"]["compiled"] is False
    backbone = plugins.parse("backbone", NETWORKS[kind])
    network = extraction.trained_network(backbone, tmp_path / kind).cuda()
    pixels = torch.zeros(noted["extraction"]["batch"], 28, 28, 3, dtype=torch.uint8)
    pixels[:70] = torch.from_numpy(toy_images(70).read(np.arange(70)))
    eager = extraction.layer_extractor(network, None, Pooling(), computed_in=computed_in)(pixels.cuda())[:70].cpu().numpy()
    np.testing.assert_array_equal(rows, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", NETWORKS)
def test_features_on_a_gpu_are_close_to_those_of_a_cpu(kind, tmp_path):
    (exact,) = extracted(tmp_path, 40, kind, device="cpu")
    scale = np.abs(exact).max()
    for computed_in, tolerance in (("float32", 1e-5), ("tf32", 5e-3), ("bfloat16", 6e-2), ("float16", 1e-2)):
        (rows,) = extracted(tmp_path, 40, kind, computed_in)
        assert np.abs(rows - exact).max() < tolerance * scale, computed_in


@pytest.mark.gpu
@pytest.mark.parametrize("computed_in", ["float32", "bfloat16"])
def test_features_depend_on_neither_the_number_of_images_nor_their_place_in_a_batch(computed_in, tmp_path, monkeypatch):
    monkeypatch.setattr(graphed_pass, "MAX_BATCH", 64)
    (rows,) = extracted(tmp_path, 500, "resnet", computed_in)
    for count in (1, 63, 64, 65, 300):
        (fewer,) = extracted(tmp_path, count, "resnet", computed_in)
        np.testing.assert_array_equal(fewer, rows[:count])


@pytest.mark.gpu
@pytest.mark.parametrize("computed_in", ["float32", "bfloat16", "float16"])
def test_another_snapshot_of_the_same_network_takes_the_captured_one(computed_in, tmp_path):
    (first,) = extracted(tmp_path, 30, computed_in=computed_in, seed=1)
    kept = extraction._kept[0]
    torch.cuda.empty_cache()
    filled = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(200)]  # where something was freed
    (second,) = extracted(tmp_path, 30, computed_in=computed_in, seed=2)
    assert extraction._kept[0] is kept
    assert len(filled) == 200
    extraction._kept.clear()
    (fresh,) = extracted(tmp_path, 30, computed_in=computed_in, seed=2)
    np.testing.assert_array_equal(second, fresh)
    assert not (first == second).all()


@pytest.mark.gpu
def test_several_layers_in_one_pass_have_the_bits_of_each_on_its_own(tmp_path):
    layers = ("layer1", "layer3", None)
    together = extracted(tmp_path, 50, "resnet", "bfloat16", layers=layers)
    for layer, rows in zip(layers, together, strict=True):
        (alone,) = extracted(tmp_path, 50, "resnet", "bfloat16", layers=(layer,))
        np.testing.assert_array_equal(rows, alone)


@pytest.mark.gpu
def test_a_network_that_cannot_be_captured_runs_kernel_by_kernel():
    def forward(images):
        rows = images.float().mean((1, 2))
        return [rows * (2.0 if rows.sum().item() > 1e12 else 1.0)]  # waits for the GPU

    graphed = GraphedPass(forward, 16, 28, "cuda:0", lambda: computing_in("float32", "cuda"))
    assert not graphed.graphed
    images = toy_images(50)
    found = np.concatenate([rows.copy() for _, (rows,) in graphed.batches(images, 0, 50)])
    np.testing.assert_allclose(found, images.read(np.arange(50)).mean((1, 2)), rtol=1e-5)


@pytest.mark.gpu
def test_an_error_while_reading_ends_the_pass_and_the_next_one_works(tmp_path):
    images = toy_images(200)

    def broken(rows):
        if rows[-1] > 150:
            raise ValueError("unreadable")
        return images.read(rows)

    graphed = GraphedPass(lambda batch: [batch.float().mean((1, 2))], 32, 28, "cuda:0", lambda: computing_in("tf32", "cuda"))
    failing = type(images)(count=200, size=28, read=broken)
    with pytest.raises(ValueError, match="unreadable"):
        list(graphed.batches(failing, 0, 200))
    assert len(list(graphed.batches(images, 0, 200))) == 7


@pytest.mark.gpu
def test_a_compiled_network_gives_nearly_the_same_features_and_is_recorded(tmp_path):
    (rows,) = extracted(tmp_path, 40, "resnet", "bfloat16")
    with conditions.collecting() as noted:
        (compiled,) = extracted(tmp_path, 40, "resnet", "bfloat16", expected=10**9)
    assert noted["extraction"]["compiled"] is True
    assert np.abs(compiled - rows).max() < 0.05 * np.abs(rows).max()

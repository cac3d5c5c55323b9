"""Features are the outputs of the layer, bitwise identical for any number of workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from ktray import images, plugins, spec
from ktray.errors import UserError
from ktray.features import extraction
from ktray.features.extraction import layers_extractor
from ktray.ops import augmentation
from ktray.pool import LocalPool
from ktray.training import loop, snapshot
from tests.pools import ShuffledPool
from tests.toy_images import toy_images

ALEXNET = plugins.parse("backbone", {"kind": "alexnet", "width": 0.125})
DATA = {"kind": "synthetic", "count": 150, "size": 28}


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extraction, "SHARD_ROWS", 32)
    monkeypatch.setattr(extraction, "BATCH", 16)
    extraction._source.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    snapshot.write_untrained(loop.untrained_backbone(ALEXNET, 0), tmp_path / "weights")
    return tmp_path / "weights"


def rows_of(images, layer=None, pool=None, weights=None, backbone=ALEXNET):
    """Features of a layer of a network."""
    view = extraction.network_view(backbone, layer, pool or spec.Pooling())
    (rows,) = extraction.extract_views([view], weights, None, images)
    return rows


def source(tmp_path: Path, weights: Path | None, **changes) -> dict:
    data = TypeAdapter(spec.DataSpec).validate_python(DATA)
    directory = tmp_path / "images"
    if not directory.exists():
        directory.mkdir()
        images.write(data, directory, LocalPool())
    view = extraction.network_view(ALEXNET, "conv3", spec.Pooling(grid=2))
    fields = {
        "view": view,
        "weights": str(weights) if weights else None,
        "state": None,
        "images": str(directory),
        "data": data.model_dump(mode="json"),
        "split": "train",
        "dtype": "float32",
        "device": "cpu",
    }
    return {**fields, **changes}


def written(tmp_path: Path, name: str, given: dict, pool=None) -> tuple[Path, dict[str, float]]:
    (tmp_path / name).mkdir()
    return tmp_path / name, extraction.write(given, tmp_path / name, pool or LocalPool())


def test_shards_are_bitwise_identical_for_any_number_of_workers(tmp_path: Path, weights: Path) -> None:
    given = source(tmp_path, weights)
    alone, _ = written(tmp_path, "alone", given)
    for workers in (2, 3, 7):
        together, _ = written(tmp_path, f"by-{workers}", given, ShuffledPool(workers))
        assert {p.name: p.read_bytes() for p in extraction.shards(together)} == {
            p.name: p.read_bytes() for p in extraction.shards(alone)
        }


def test_shards_hold_the_rows_of_all_images_at_once(tmp_path: Path, weights: Path) -> None:
    given = source(tmp_path, weights)
    out, metrics = written(tmp_path, "out", given)
    opened = images.open_split(Path(given["images"]), "train", TypeAdapter(spec.DataSpec).validate_python(DATA))
    rows = rows_of(opened, "conv3", spec.Pooling(grid=2), weights)
    assert (extraction.load(out) == rows).all()
    assert [len(np.load(path)) for path in extraction.shards(out)][:-1] == [32] * (len(rows) // 32)
    assert (metrics["count"], metrics["dim"]) == rows.shape
    assert metrics["images_per_s"] > 0


def test_float16_shards_are_the_rounded_float32_ones(tmp_path: Path, weights: Path) -> None:
    full, _ = written(tmp_path, "full", source(tmp_path, weights))
    half, _ = written(tmp_path, "half", source(tmp_path, weights, dtype="float16"))
    assert np.load(extraction.shards(half)[0]).dtype == np.float16
    assert (extraction.load(half) == extraction.load(full).astype(np.float16)).all()


@pytest.mark.parametrize(("kind", "grid"), [("avg", 1), ("avg", 3), ("max", 2)])
def test_features_of_a_layer_are_the_pooled_output_of_its_module(weights: Path, kind: str, grid: int) -> None:
    toys = toy_images(8)
    network = loop.untrained_backbone(ALEXNET, 0).eval()
    maps = augmentation.to_float(torch.from_numpy(toys.read(np.arange(8))))
    with torch.inference_mode():
        for name, block in network.named_children():
            maps = block(maps)
            if name == "conv2":
                break
    pool = torch.nn.AdaptiveAvgPool2d(grid) if kind == "avg" else torch.nn.AdaptiveMaxPool2d(grid)
    ours = rows_of(toys, "conv2", spec.Pooling(kind=kind, grid=grid), weights)
    np.testing.assert_allclose(ours, pool(maps).flatten(1).numpy(), rtol=1e-4, atol=1e-5)


def test_without_a_layer_features_are_the_output_of_the_backbone(weights: Path) -> None:
    toys = toy_images(8)
    rows = rows_of(toys, None, None, weights)
    last = rows_of(toys, "conv5", None, weights)
    assert rows.shape == (8, loop.untrained_backbone(ALEXNET, 0).feature_dim)
    np.testing.assert_allclose(rows, last, atol=1e-6)


def test_extraction_changes_no_statistics_and_runs_no_later_layer(weights: Path) -> None:
    network = loop.untrained_backbone(ALEXNET, 0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.conv4.register_forward_hook(lambda *_: pytest.fail("conv4 ran although conv3 was asked for"))
    extract = extraction.layer_extractor(network, "conv3", spec.Pooling())
    extract(torch.from_numpy(toy_images(4).read(np.arange(4))))
    assert all((tensor == before[name]).all() for name, tensor in network.state_dict().items())
    assert not network.conv3._forward_hooks


def test_every_type_of_teacher_has_features(weights: Path) -> None:
    toys = toy_images(6)
    backbone = ALEXNET.model_dump()
    trained = {"pretext": {"kind": "rotation"}, "backbone": backbone, "layer": "conv3", "schedule": {"epochs": 1}}
    loaded = {"checkpoint": "x.safetensors", "backbone": backbone, "layer": "conv3"}
    parse = TypeAdapter(spec.TeacherSpec).validate_python
    views = [extraction.teacher_view(parse(each)) for each in (trained, loaded)]
    rows = [extraction.extract_views([view], weights, None, toys)[0] for view in views]
    assert (rows[0] == rows[1]).all()
    handcrafted = parse({"descriptor": {"kind": "hog", "cell": 7}})
    (described,) = extraction.extract_views([extraction.teacher_view(handcrafted)], None, None, toys)
    assert described.shape == (6, 3 * 3 * 4 * 9)


def test_layers_and_grids_that_do_not_exist_are_refused(weights: Path) -> None:
    with pytest.raises(UserError, match=r"no layer 'conv9'.*conv1, conv2"):
        rows_of(toy_images(4), "conv9", None, weights)
    with pytest.raises(UserError, match=r"grid of 8 is finer.*At most 7"):
        rows_of(toy_images(4), "conv5", spec.Pooling(grid=8), weights)
    with pytest.raises(UserError, match="grid of 2 is finer"):
        rows_of(toy_images(4), None, spec.Pooling(grid=2), weights)
    with pytest.raises(ValueError, match="no weights"):
        rows_of(toy_images(4), "conv3")


def test_the_error_for_features_that_are_not_finite_names_the_first_image(tmp_path: Path) -> None:
    network = loop.untrained_backbone(ALEXNET, 0)
    with torch.no_grad():
        network.conv3[1].bias[0] = torch.nan
    snapshot.write_untrained(network, tmp_path / "nan")
    with pytest.raises(ValueError, match=r"of 4 images .* not finite, the first is image 0 \(0000.png\)"):
        rows_of(toy_images(4), "conv3", None, tmp_path / "nan")


def test_features_too_large_for_float16_are_refused_rather_than_infinite(tmp_path: Path) -> None:
    network = loop.untrained_backbone(ALEXNET, 0)
    with torch.no_grad():
        network.conv3[1].bias[0] = 1e5
    snapshot.write_untrained(network, tmp_path / "large")
    written(tmp_path, "full", source(tmp_path, tmp_path / "large"))
    with pytest.raises(ValueError, match=r"beyond the range of float16, .* with 1e\+05; float16 holds up to 65504"):
        written(tmp_path, "half", source(tmp_path, tmp_path / "large", dtype="float16"))


RESNET = plugins.parse("backbone", {"kind": "resnet", "depth": 18, "width": 0.125})
VIEWS = {
    "alexnet": (ALEXNET, [("conv5", 2), ("conv2", 3), (None, 1), ("conv2", 1)]),
    "resnet": (RESNET, [("layer1", 1), ("layer3", 2), ("layer4", 1)]),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("network", VIEWS)
def test_one_forward_pass_for_several_layers_is_bitwise_equal_to_separate_passes(
    tmp_path: Path, network: str, dtype: str
) -> None:
    backbone, views = VIEWS[network]
    snapshot.write_untrained(loop.untrained_backbone(backbone, 0), tmp_path / "network")
    base = source(tmp_path, tmp_path / "network", dtype=dtype)
    sources = [{**base, "view": extraction.network_view(backbone, layer, spec.Pooling(grid=grid))} for layer, grid in views]
    outs = [tmp_path / f"together-{number}" for number in range(len(sources))]
    for out in outs:
        out.mkdir()
    together = extraction.write_views(sources, outs, ShuffledPool(2))
    for number, each in enumerate(sources):
        alone, metrics = written(tmp_path, f"alone-{number}", each)
        assert {path.name: path.read_bytes() for path in extraction.shards(outs[number])} == {
            path.name: path.read_bytes() for path in extraction.shards(alone)
        }
        assert (together[number][0]["dim"], together[number][0]["count"]) == (metrics["dim"], metrics["count"])


def test_the_output_of_a_layer_is_safe_from_later_layers_that_modify_it_in_place() -> None:
    class InPlace(torch.nn.Module):
        layers = ("first", "second")

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Flatten(), torch.nn.ReLU(inplace=True)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(images - 1))

    pictures = torch.from_numpy(toy_images(3).read(np.arange(3)))
    (first, _), (second, _) = layers_extractor(InPlace(), [("first", spec.Pooling()), ("second", spec.Pooling())])(pictures)
    assert (first < 0).any()
    assert (second == first.clamp(min=0)).all()


def test_the_cost_of_a_view_on_its_own_is_lower_for_earlier_layers(weights: Path) -> None:
    views = [("conv5", spec.Pooling()), ("conv1", spec.Pooling())]
    network = loop.untrained_backbone(ALEXNET, 0)
    (_, deep), (_, shallow) = layers_extractor(network, views)(torch.from_numpy(toy_images(64).read(np.arange(64))))
    assert 0 < shallow < deep


def test_small_batches_for_a_small_device_give_the_same_features(tmp_path: Path, weights: Path) -> None:
    whole, _ = written(tmp_path, "whole", source(tmp_path, weights))
    pieces, _ = written(tmp_path, "pieces", source(tmp_path, weights, max_batch_size=3))
    np.testing.assert_allclose(extraction.load(pieces), extraction.load(whole), rtol=1e-4, atol=1e-5)


def test_a_directory_without_shards_is_an_error_not_an_empty_array(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no features"):
        extraction.load(tmp_path)

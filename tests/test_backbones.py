import copy

import pytest
import torch
from pyarrow import parquet
from torch import nn

from ktray import plugins
from ktray.errors import UserError
from ktray.features import extraction
from ktray.ops import augmentation
from ktray.spec import Augment, Pooling, Schedule
from ktray.training import classification, loop
from tests.toy_images import toy_images

torch.set_num_threads(1)

KINDS = plugins.kinds("backbone")
SMALL = {"width": 0.125}


def spec_of(kind, **fields):
    """The kind with few channels if it has such a field, for tests of a second; skips what is not installed."""
    module = plugins.module("backbone", kind)
    spec = plugins.parse(
        "backbone", {"kind": kind, **{n: v for n, v in SMALL.items() if n in module.Spec.model_fields}, **fields}
    )
    try:
        with torch.device("meta"):
            module.build(spec)
    except UserError as error:
        if "pip install" not in error.instead:
            raise
        pytest.skip(str(error))
    return spec


def outputs_of_layers(backbone, pixels):
    seen = {}
    handles = [
        backbone.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
        for name in backbone.layers
    ]
    features = backbone(pixels)
    for handle in handles:
        handle.remove()
    return features, seen


@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_backbone_returns_features_of_its_width_and_has_the_layers_that_it_names(kind, size):
    backbone = loop.untrained_backbone(spec_of(kind), 0).eval()
    with torch.inference_mode():
        features, layers = outputs_of_layers(backbone, torch.randn(2, 3, size, size))
    assert features.shape == (2, backbone.feature_dim)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert list(layers) == list(backbone.layers), "each is called once, in the order of depth"
    assert all(out.ndim in (2, 4) and len(out) == 2 for out in layers.values())


FOR_LARGE = {"vit": {"patch": 16}, "alexnet": {"form": "grouped"}}  # what these are meant to be at 224 px


@pytest.mark.parametrize("kind", KINDS)
def test_every_backbone_takes_images_of_96_and_224_pixels(kind):
    backbone = loop.untrained_backbone(spec_of(kind, **FOR_LARGE.get(kind, {})), 0).eval()
    for size in (96, 224):
        with torch.inference_mode():
            found = backbone(torch.randn(1, 3, size, size))
        assert found.shape == (1, backbone.feature_dim)
        assert found.isfinite().all()


# (backbone, layer, side of the images, grid, width of the features), as in the paper where the images are large
PAPERS = [
    ({"kind": "alexnet", "form": "grouped"}, "conv4", 224, 5, 5 * 5 * 384),
    ({"kind": "alexnet", "form": "full"}, "conv4", 224, 5, 5 * 5 * 384),
    ({"kind": "vgg", "depth": 16, "form": "full"}, "block4", 224, 4, 4 * 4 * 512),
    ({"kind": "alexnet"}, "conv4", 32, 5, 5 * 5 * 256),
    ({"kind": "vgg", "depth": 16}, "block4", 28, 4, 4 * 4 * 512),
]


@pytest.mark.parametrize(("backbone", "layer", "size", "grid", "width"), PAPERS)
def test_a_layer_is_pooled_to_the_grid_of_the_paper(backbone, layer, size, grid, width):
    network = loop.untrained_backbone(plugins.parse("backbone", backbone), 0)
    pixels = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8)
    found = extraction.layer_extractor(network, layer, Pooling(kind="max", grid=grid))(pixels)
    assert found.shape == (1, width)
    seen = []
    network.get_submodule(layer).register_forward_hook(lambda m, i, out: seen.append(out[0]))
    with torch.inference_mode():
        network(augmentation.to_float(pixels))
    side = seen[0].shape[1]
    edges = [(cell * side // grid, -(-(cell + 1) * side // grid)) for cell in range(grid)]
    cells = [[seen[0][:, a:b, c:d].amax(dim=(1, 2)) for c, d in edges] for a, b in edges]
    assert torch.equal(found[0].view(-1, grid, grid), torch.stack([torch.stack(row, dim=1) for row in cells], dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_every_backbone_gets_a_gradient(kind):
    backbone = loop.untrained_backbone(spec_of(kind), 0).train()
    backbone(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_every_backbone_draws_its_weights_from_the_global_generator(kind):
    spec = spec_of(kind)
    first, again, other = (loop.untrained_backbone(spec, seed).state_dict() for seed in (4, 4, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_layout_does_not_change_what_a_backbone_computes(kind):
    backbone = loop.untrained_backbone(spec_of(kind), 0).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = backbone(pixels)
        found = backbone.to(memory_format=torch.channels_last)(pixels.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_of_every_backbone_are_known_without_its_weights(kind):
    spec = spec_of(kind)
    with torch.device("meta"):
        backbone = plugins.module("backbone", kind).build(spec)
    assert all(tensor.is_meta for tensor in backbone.state_dict().values())
    assert [backbone.get_submodule(name) for name in backbone.layers]


@pytest.mark.parametrize("kind", KINDS)
def test_every_backbone_learns(kind, tmp_path):
    images = toy_images(48, size=24)
    schedule = Schedule(kind="constant", epochs=5, lr=2e-3, batch_size=16, optimizer="adamw")
    loop.fit(
        loop.untrained_backbone(spec_of(kind), 0),
        classification.task(images.labels, 4, Augment(crop=0)),
        images,
        schedule,
        0,
        out=tmp_path,
        until=5,
    )
    losses = parquet.read_table(tmp_path / "history.parquet")["loss"].to_pylist()
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_backbone_shares_nothing_with_it(kind):
    backbone = loop.untrained_backbone(spec_of(kind), 0).eval()
    copied = copy.deepcopy(backbone)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = backbone(pixels)
        for tensor in backbone.state_dict().values():
            tensor.zero_()
        assert torch.equal(copied(pixels), expected)


def parameters(backbone):
    return sum(p.numel() for p in backbone.parameters())


def test_the_small_alexnet_has_two_million_parameters_and_pools_28_pixels_to_7():
    backbone = loop.untrained_backbone(plugins.parse("backbone", "alexnet"), 0)
    assert 2.2e6 < parameters(backbone) < 2.4e6
    _, layers = outputs_of_layers(backbone.eval(), torch.zeros(1, 3, 28, 28))
    assert [tuple(out.shape[1:]) for out in layers.values()] == [
        (64, 28, 28),
        (192, 14, 14),
        (384, 7, 7),
        (256, 7, 7),
        (256, 7, 7),
    ]


def test_the_full_alexnet_has_the_maps_of_the_paper_at_224_pixels():
    backbone = loop.untrained_backbone(plugins.parse("backbone", {"kind": "alexnet", "form": "full"}), 0).eval()
    with torch.inference_mode():
        features, layers = outputs_of_layers(backbone, torch.zeros(1, 3, 224, 224))
    assert [tuple(out.shape[1:]) for out in layers.values()] == [
        (96, 55, 55),
        (256, 27, 27),
        (384, 13, 13),
        (384, 13, 13),
        (256, 13, 13),
    ]
    assert features.shape == (1, 256)


@pytest.mark.parametrize(("form", "size", "sides"), [("grouped", 224, [55, 27, 13]), ("grouped_stride2", 64, [29, 14, 6])])
def test_the_grouped_alexnet_matches_the_paper_and_its_puzzle_form_takes_tiles(form, size, sides):
    backbone = loop.untrained_backbone(plugins.parse("backbone", {"kind": "alexnet", "form": form}), 0).eval()
    with torch.inference_mode():
        _, layers = outputs_of_layers(backbone, torch.zeros(1, 3, size, size))
    assert [tuple(out.shape[1:3]) for out in layers.values()] == list(
        zip([96, 256, 384, 384, 256], [*sides, sides[-1], sides[-1]], strict=True)
    )
    assert parameters(backbone) == 2_334_080, "of conv1 to conv5 in Krizhevsky et al., section 3.5"


def test_weights_of_a_puzzle_alexnet_load_into_the_one_for_whole_images():
    puzzles, whole = (
        loop.untrained_backbone(plugins.parse("backbone", {"kind": "alexnet", "form": form, "width": 0.125}), seed).eval()
        for seed, form in enumerate(("grouped_stride2", "grouped"))
    )
    whole.load_state_dict(puzzles.state_dict())
    pixels = torch.randn(1, 3, 71, 71)
    with torch.inference_mode():
        assert torch.equal(whole.conv1(pixels), puzzles.conv1(pixels)[:, :, ::2, ::2])


def test_alexnet_channels_are_multiples_of_eight_at_any_width():
    backbone = loop.untrained_backbone(plugins.parse("backbone", {"kind": "alexnet", "width": 0.3}), 0)
    channels = [m.out_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    assert channels == [16, 56, 112, 80, 80]


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_a_full_resnet_equals_torchvisions(depth):
    from torchvision import models

    backbone = loop.untrained_backbone(plugins.parse("backbone", {"kind": "resnet", "depth": depth, "form": "full"}), 1).eval()
    oracle = getattr(models, f"resnet{depth}")(num_classes=5).eval()
    classifier = {f"fc.{name}": tensor for name, tensor in oracle.fc.state_dict().items()}
    oracle.load_state_dict({**backbone.state_dict(), **classifier}, strict=True)
    pixels = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(oracle.fc(backbone(pixels)), oracle(pixels))
    assert backbone.feature_dim == oracle.fc.in_features


def test_the_initial_weights_of_a_full_resnet_are_distributed_like_torchvisions():
    from torchvision.models import resnet18

    ours = loop.untrained_backbone(plugins.parse("backbone", {"kind": "resnet", "form": "full"}), 0).state_dict()
    for name, tensor in resnet18().state_dict().items():
        if tensor.ndim == 4:
            assert ours[name].std() == pytest.approx(float(tensor.std()), rel=0.05), name


def test_a_small_resnet_keeps_the_resolution_of_its_images():
    backbone = loop.untrained_backbone(plugins.parse("backbone", {"kind": "resnet", "width": 0.25}), 0).eval()
    _, layers = outputs_of_layers(backbone, torch.zeros(1, 3, 32, 32))
    assert [tuple(out.shape[1:]) for out in layers.values()] == [(16, 32, 32), (32, 16, 16), (64, 8, 8), (128, 4, 4)]

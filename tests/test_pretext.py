import itertools
from dataclasses import asdict

import numpy as np
import pytest
import torch

from ktray import plugins
from ktray.fingerprint import seed_of
from ktray.ops.permutations import hashed_permutations
from ktray.pretext import jigsaw_pp, rotation
from ktray.spec import Augment, Schedule
from ktray.training import loop
from ktray.training.task import make_batch
from tests.toy_images import toy_images

torch.set_num_threads(1)

KINDS = plugins.kinds("pretext")
BACKBONE = plugins.parse("backbone", {"kind": "alexnet", "width": 0.125})


def task_of(kind, size=28, **fields):
    module = plugins.module("pretext", kind)
    images = [toy_images(24, size=size)] if hasattr(module, "NEEDS") else []  # of which the tests below take the first
    return module.task(plugins.parse("pretext", {"kind": kind, **fields}), size, *images)


def batch_of(task, images, count, seed=0):
    indices = torch.arange(count)
    pixels = torch.from_numpy(images.read(indices.numpy()))
    return make_batch(task, pixels, indices, torch.Generator().manual_seed(seed))


def losses_of(task, images, out, epochs, lr=0.05, batch_size=32, device="cpu"):
    losses = []
    loop.fit(
        loop.untrained_backbone(BACKBONE, 0),
        task,
        images,
        Schedule(epochs=epochs, lr=lr, batch_size=batch_size),
        0,
        out=out,
        until=epochs,
        device=device,
        on_epoch=lambda epoch, metrics, write: losses.append(metrics),
    )
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_every_pretext_task_trains_two_epochs_with_finite_losses(kind, tmp_path):
    images = toy_images(24, size=28)
    metrics = losses_of(task_of(kind), images, tmp_path, epochs=2, batch_size=12)
    assert all(np.isfinite(list(row.values())).all() for row in metrics)
    assert all(0 <= row["top1"] <= 1 for row in metrics if "top1" in row)


@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_pretext_task_makes_float_inputs_and_its_head_matches_its_targets(kind, size):
    task, images = task_of(kind, size), toy_images(6, size=size)
    inputs, targets = batch_of(task, images, 6)
    assert inputs.dtype == torch.float32
    assert inputs.ndim == 4
    assert inputs.shape[1] == 3
    assert inputs.isfinite().all()
    assert len(inputs) % 6 == 0
    assert len(targets) == 6
    loss, metrics = task.loss(task.head(24)(torch.randn(len(inputs), 24)), targets)
    assert loss.ndim == 0
    assert all(value.ndim == 0 for value in metrics.values())


@pytest.mark.parametrize("kind", KINDS)
def test_every_pretext_task_draws_only_from_the_generator_and_does_not_change_the_images(kind):
    task, images = task_of(kind), toy_images(6)
    pixels = torch.from_numpy(images.read(np.arange(6)))
    before = pixels.clone()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))
        found.append(make_batch(task, pixels, torch.arange(6), torch.Generator().manual_seed(seed))[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pretext_task_computes_on_the_device_of_the_images(kind):
    task = task_of(kind)
    for count in (2, 5):
        pixels = torch.empty(
            count, 28, 28, 3, dtype=torch.uint8, device="meta"
        )  # it mixes with the CPU as little as a GPU does
        inputs, targets = make_batch(task, pixels, torch.arange(count), torch.Generator())
        assert inputs.is_meta
        assert targets.is_meta
        outputs = task.head(24).to("meta")(torch.empty(len(inputs), 24, device="meta"))
        assert task.loss(outputs, targets)[0].is_meta


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_every_pretext_task_trains_on_a_gpu_and_sees_the_same_batches_there(kind, tmp_path):
    task, images = task_of(kind), toy_images(24)
    pixels = torch.from_numpy(images.read(np.arange(24)))
    ours, theirs = (
        make_batch(task, pixels.to(device), torch.arange(24), torch.Generator().manual_seed(0)) for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(theirs[0].cpu(), ours[0], atol=2e-3, rtol=2e-3)
    if ours[1].is_floating_point():
        torch.testing.assert_close(theirs[1].cpu(), ours[1], atol=2e-3, rtol=2e-3)
    else:  # a class is a rounded number where colours are quantised: one in a hundred may lie on the edge
        assert (theirs[1].cpu() != ours[1]).double().mean() < 0.01
    metrics = losses_of(task, images, tmp_path, epochs=2, batch_size=12, device="cuda")
    assert all(np.isfinite(list(row.values())).all() for row in metrics)


def test_rotations_are_those_of_numpy_and_each_image_has_all_four():
    images = toy_images(3)
    inputs, targets = batch_of(task_of("rotation", augment={"crop": 0, "flip": False}), images, 3)
    shown = ((inputs + 2) / (4 / 255)).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert targets.tolist() == [[0, 1, 2, 3]] * 3
    for place, turned in enumerate(shown):
        image, turns = divmod(place, 4)
        assert np.array_equal(turned, np.rot90(images.read(np.array([image]))[0], turns))


def test_with_one_random_rotation_each_image_is_rotated_as_its_target_says():
    images = toy_images(40)
    task = rotation.task(rotation.Spec(rotations="one", augment=Augment(crop=0)), 28)
    inputs, targets = batch_of(task, images, 40)
    shown = ((inputs + 2) / (4 / 255)).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for turned, image, turns in zip(shown, images.read(np.arange(40)), targets.flatten(), strict=True):
        assert np.array_equal(turned, np.rot90(image, int(turns)))
    assert set(targets.flatten().tolist()) == {0, 1, 2, 3}


def test_a_network_learns_to_tell_rotations_apart(tmp_path):
    metrics = losses_of(task_of("rotation"), toy_images(96), tmp_path, epochs=8)
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert metrics[-1]["top1"] > 0.8


def test_a_network_learns_to_solve_puzzles(tmp_path):
    task = task_of("jigsaw_pp", permutations=6, occlusions=1)
    metrics = losses_of(task, toy_images(128, seed=1), tmp_path, epochs=8)
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    assert metrics[-1]["top1"] > 0.5


def test_the_701_permutations_are_distinct_and_differ_in_at_least_three_and_on_average_eight_positions():
    rows = hashed_permutations(701, jigsaw_pp.DISTANCE)
    assert np.array_equal(np.sort(rows, axis=1), np.tile(np.arange(9), (701, 1)))
    assert len(np.unique(rows, axis=0)) == 701
    distances = (rows[:, None] != rows[None]).sum(-1)[np.triu_indices(701, 1)]
    assert distances.min() >= 3
    assert distances.mean() == pytest.approx(8.0, abs=0.02)
    assert np.array_equal(hashed_permutations(100, 3), rows[:100])
    authors = np.array([152, 927, 3569, 14513, 44497, 93251, 88441])  # pairs at 3 to 9 places in their permutations_701.bin
    ours = np.bincount(distances, minlength=10)[3:]
    assert authors.sum() == ours.sum()
    assert np.abs(ours - authors).sum() / authors.sum() < 0.04, "and as often at each number of places as the authors'"


def test_the_permutations_are_lexicographic_ranks_by_hash_and_so_the_same_on_every_machine():
    ranked = list(itertools.permutations(range(9)))
    candidates = [ranked[seed_of("permutations", number) % len(ranked)] for number in range(40)]
    assert hashed_permutations(40, 0).tolist() == [list(row) for row in candidates]


def test_too_many_far_permutations_are_refused():
    with pytest.raises(ValueError, match="of 10 permutations at Hamming distances of 9"):
        hashed_permutations(10, 9)


def test_the_geometry_at_255_pixels_is_the_released_one():
    assert asdict(jigsaw_pp.geometry(255, 18)) == dict(side=255, cell=85, tile=64, gap=18, channel=2)
    assert jigsaw_pp.geometry(256, 18) == jigsaw_pp.geometry(255, 18)


@pytest.mark.parametrize("gap", [0, 9, 18])
def test_tiles_fit_into_their_cells_at_every_size(gap):
    for size in range(8, 600):
        sizes = jigsaw_pp.geometry(size, gap)
        assert sizes.side == 3 * sizes.cell
        assert sizes.side <= max(size, 48)
        assert sizes.gap >= 0
        assert sizes.tile + sizes.gap + sizes.channel <= sizes.cell
        assert 0.7 <= sizes.tile / sizes.cell <= 0.8


@pytest.mark.parametrize("occlusions", [0, 1, 2])
def test_occluding_tiles_are_limited_come_from_one_other_image_and_show_distinct_cells(occlusions):
    permutations = torch.from_numpy(hashed_permutations(701, 3).copy())
    sources, cells = jigsaw_pp.arrange(permutations, occlusions, torch.Generator().manual_seed(0))
    own = torch.arange(701)[:, None]
    occluded = sources != own
    assert torch.equal(cells[~occluded], permutations[~occluded])
    numbers = torch.bincount(occluded.sum(1), minlength=occlusions + 1)
    assert len(numbers) == occlusions + 1
    assert (numbers > 701 / (occlusions + 1) * 0.8).all(), "each number is equally likely"
    for row in range(701):
        foreign = sources[row][occluded[row]]
        assert len(set(foreign.tolist())) <= 1
        assert len(set(cells[row][occluded[row]].tolist())) == len(foreign)
    if occlusions:
        assert (occluded.float().sum(0) > 0.5 * occluded.float().sum() / 9).all(), "every place is hit"


def puzzle_of_cells(size=48, count=4):
    """Images with cells of one colour each, which encodes the cell and (in blue) the image."""
    cell = np.arange(size) // (size // 3)
    images = np.zeros((count, size, size, 3), np.uint8)
    images[..., 0] = 20 + 80 * cell[:, None]
    images[..., 1] = 20 + 80 * cell[None, :]
    images[..., 2] = np.arange(count)[:, None, None] * 50
    return torch.from_numpy(images)


def test_each_position_shows_the_cell_that_the_permutation_says():
    sizes = jigsaw_pp.geometry(48, 18)
    squares = puzzle_of_cells().float().requires_grad_()
    permutations = torch.from_numpy(hashed_permutations(4, 3).copy())
    sources, cells = jigsaw_pp.arrange(permutations, 2, torch.Generator().manual_seed(3))
    corner = jigsaw_pp.corners(cells, sizes, torch.Generator().manual_seed(0))
    cut = jigsaw_pp.tiles(squares, sources, corner, sizes.tile)
    assert cut.shape == (36, 3, 12, 12)
    for place in range(36):
        (touched,) = torch.autograd.grad(cut[place].square().sum() + cut[place].sum(), squares, retain_graph=True)
        pixels = touched.abs().sum(-1).nonzero()
        image, cell = int(sources.flatten()[place]), int(cells.flatten()[place])
        assert set(pixels[:, 0].tolist()) <= {image}
        assert set((pixels[:, 1] // 16 * 3 + pixels[:, 2] // 16).tolist()) <= {cell}


def test_tiles_have_mean_zero_and_deviation_one_and_constant_ones_become_zero():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), dtype=np.uint8))
    images[4] = 7
    inputs, _ = make_batch(
        jigsaw_pp.task(jigsaw_pp.Spec(occlusions=0), 48), images, torch.arange(5), torch.Generator().manual_seed(0)
    )
    tiles = inputs.reshape(5, 9, -1)
    assert torch.allclose(tiles.mean(-1), torch.zeros(5, 9), atol=1e-4)
    assert torch.allclose(tiles[:4].std(-1), torch.ones(4, 9), atol=0.05)
    assert tiles[4].abs().max() < 1e-3


def test_tiles_move_within_their_cells_and_colour_channels_a_little_more():
    sizes = jigsaw_pp.geometry(96, 18)
    across = torch.arange(96, dtype=torch.float32)
    squares = across[None, None, :, None].expand(300, 96, 96, 3).contiguous()
    squares = squares + 1000 * across[None, :, None, None]
    sources = torch.arange(300)[:, None].expand(300, 9)
    cells = torch.arange(9).expand(300, 9)
    generator = torch.Generator().manual_seed(0)
    offset = torch.randint(sizes.gap + 1, (2, 300, 9, 1), generator=generator)
    extra = torch.randint(sizes.channel + 1, (2, 300, 9, 3), generator=generator)
    assert set(offset.flatten().tolist()) == set(range(8))
    assert set(extra.flatten().tolist()) == {0, 1}
    corner = jigsaw_pp.corners(cells, sizes, torch.Generator().manual_seed(0))
    cut = jigsaw_pp.tiles(squares, sources, corner, sizes.tile).view(300, 9, 3, 24, 24)
    rows = (cells // 3 * 32)[..., None] + offset[0] + extra[0]
    columns = (cells % 3 * 32)[..., None] + offset[1] + extra[1]
    place = torch.arange(24)
    oracle = 1000.0 * (rows[..., None, None] + place[:, None]) + columns[..., None, None] + place
    mean = oracle.mean(dim=(2, 3, 4), keepdim=True)
    oracle = (oracle - mean) / oracle.std(dim=(2, 3, 4), keepdim=True, correction=0)
    assert torch.allclose(cut, oracle, atol=1e-3)


@pytest.mark.parametrize(("variant", "grey", "projected"), [("paper", 0.7, 0.0), ("released", 0.5, 0.25)])
def test_puzzles_are_grey_as_often_as_their_variant_says(variant, grey, projected):
    shares = torch.tensor(jigsaw_pp._SHARES[variant])
    assert shares.tolist() == pytest.approx([grey, projected, 1 - grey - projected])
    images = torch.zeros(2000, 6, 6, 3, dtype=torch.uint8)
    images[..., 0] = torch.randint(0, 256, (6, 6), dtype=torch.uint8)
    images[..., 1] = 60
    task = jigsaw_pp.task(jigsaw_pp.Spec(variant=variant, occlusions=0, gap=0), 6)
    inputs, _ = make_batch(task, images, torch.arange(2000), torch.Generator().manual_seed(0))
    green = inputs.reshape(2000, 9, 3, -1)[:, :, 1]
    still = (green.std(-1) < 1e-3).all(1)  # the green of the image as it is; any mixture takes red's pattern in
    assert float(still.float().mean()) == pytest.approx(1 - grey - projected, abs=0.03)


def test_grey_is_that_of_scikit_image_up_to_its_weights_and_the_projection_is_the_released_one():
    from skimage.color import rgb2gray

    image = np.random.default_rng(0).random((1, 5, 5, 3)).astype(np.float32)
    grey = jigsaw_pp.mix_channels(torch.from_numpy(image), jigsaw_pp._COLOURS[:1])
    assert np.allclose(grey[0, ..., 0], grey[0, ..., 2])
    assert np.allclose(grey[0, ..., 0].numpy(), rgb2gray(image[0]), atol=0.15)
    r, g, b = np.moveaxis(image[0], -1, 0)
    released = np.stack([0.8333 * r + 0.3333 * g - 0.1667 * b, (r + g + b) / 3, -0.1667 * r + 0.3333 * g + 0.8333 * b])
    found = jigsaw_pp.mix_channels(torch.from_numpy(image), jigsaw_pp._COLOURS[1:2])[0].numpy()
    assert np.allclose(np.moveaxis(found, -1, 0), released, atol=1e-3)

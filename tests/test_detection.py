"""Detection, segmentation and VOC classification by training: parts equal to torchvision's, learning, killed and continued."""

from __future__ import annotations

import codecs
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import roi_align

from ktray import plugins
from ktray.errors import UserError
from ktray.evals import voc07_cls_finetune, voc12_seg, voc_det
from ktray.fine_tuning import detectors, proposals
from ktray.fine_tuning.detector_training import annotated
from ktray.fine_tuning.detectors import LayerMaps, RoiAlign
from ktray.images import Images, WholeImages
from ktray.pipeline import identity
from ktray.scoring import per_image
from ktray.spec import Student
from ktray.stages import evaluation_stage
from ktray.training import loop
from tests.judged_networks import attempt, judged_network, run_whole_and_killed

pytestmark = pytest.mark.usefixtures("one_thread")

COLOURS = np.array([(230, 40, 40), (40, 230, 40), (60, 60, 240)])
NAMES = ("red", "green", "blue")


def scenes(count: int, seed: int, *, difficult: float = 0.0) -> Images:
    """Images of noise, 48 x 64 or 64 x 48, with one or two rectangles whose class is their colour: boxes, masks, presence."""
    rng = np.random.default_rng(seed)
    pixels, boxes, flags, masks = [], [], [], []
    presence = np.full((count, 3), -1, np.int8)
    for index in range(count):
        height, width = [(48, 64), (64, 48)][index % 2]
        image = rng.integers(90, 160, (height, width, 3), dtype=np.uint8)
        mask, rows, hard = np.zeros((height, width), np.uint8), [], []
        for _ in range(rng.integers(1, 3)):
            side = rng.integers(16, 28, 2)
            y, x = rng.integers(0, height - side[0]), rng.integers(0, width - side[1])
            class_ = int(rng.integers(0, 3))
            image[y : y + side[0], x : x + side[1]] = COLOURS[class_]
            mask[y : y + side[0], x : x + side[1]] = class_ + 1
            rows.append([x, y, x + side[1], y + side[0], class_])
            hard.append([rng.random() < difficult, False, False])
            presence[index, class_] = max(presence[index, class_], 0 if hard[-1][0] else 1)
        mask[0] = 255
        pixels.append(image)
        boxes.append(np.array(rows, np.float32))
        flags.append(np.array(hard, bool))
        masks.append(mask)
    sizes = np.array([image.shape[:2] for image in pixels])
    whole = WholeImages(lambda index, _: pixels[index], sizes, tuple(boxes), tuple(flags), lambda index: masks[index])
    names = tuple(f"scenes/{index:03d}.png" for index in range(count))
    return Images(
        *(count, 32, lambda rows: np.zeros((len(rows), 32, 32, 3), np.uint8)),
        classes=NAMES,
        names=names,
        presence=presence,
        whole=lambda: whole,
    )


TRAIN, JUDGED = scenes(40, 0, difficult=0.2), scenes(16, 1)
SMALL = {"kind": "alexnet", "width": 0.125}


@pytest.fixture(scope="module")
def proposal_file(tmp_path_factory):
    """Boxes near every object of both sets, and others; the names of both sets are the same, so boxes of both are in."""
    rng = np.random.default_rng(0)
    found = {}
    for index in range(40):
        rows = [images.whole().boxes[index][:, :4].repeat(6, 0) for images in (TRAIN, JUDGED) if index < len(images)]
        near = np.vstack(rows) + rng.integers(-4, 5, (len(np.vstack(rows)), 4))
        corner = rng.integers(0, 30, (30, 2))
        far = np.hstack([corner, corner + rng.integers(8, 34, (30, 2))])
        boxes = np.vstack([near, far]).clip(0, 48)
        found[f"{index:03d}"] = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
    path = tmp_path_factory.mktemp("proposals") / "boxes.npz"
    np.savez(path, **found)
    return path


def judge(kind: str, tmp_path, tries=None, train=TRAIN, judged=JUDGED, device="cpu", **fields):
    module = plugins.module("evaluation", kind)
    return module.evaluate(
        module.Spec(**fields),
        features=None,
        train=train,
        judged=judged,
        pseudo_labels=None,
        out=tmp_path,
        device=device,
        network=judged_network(SMALL, device=device),
        attempt=tries or attempt(tmp_path),
    )


FAST = {
    "min_sizes": (48,),
    "steps": 110,
    "batch_size": 4,
    "lr": 0.01,
    "width": 64,
    "freeze_layers": 0,
    "train_batch_norm": True,
}
FASTER = {**FAST, "form": "faster_rcnn", "anchors": (24,), "per_image": 32, "warmup": 20}
CASES = {
    "voc_det": (FAST, "map", 0.4),
    "voc_det faster": (FASTER, "map", 0.3),
    "coco_det": ({name: value for name, value in FASTER.items() if name != "form"}, "ap50", 0.3),
    "voc12_seg": ({"crop": 48, "steps": 110, "batch_size": 4, "lr": 0.1}, "miou", 0.4),
    "voc07_cls_finetune": (
        {
            **{"crop": 32, "areas": (0.5, 1.0), "steps": 110, "batch_size": 8, "lr": 0.02, "grid": 3, "hidden": (32,)},
            **{"train_batch_norm": True},
        },
        "map",
        0.6,
    ),
}


FEW_TRAIN, FEW_JUDGED = scenes(10, 0), scenes(4, 1)


def with_proposals(case: str, proposal_file) -> dict:
    fields = CASES[case][0]
    return {**fields, "proposals": str(proposal_file)} if case == "voc_det" else fields


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_learns(case, tmp_path, proposal_file):
    found = judge(case.split()[0], tmp_path, **with_proposals(case, proposal_file))
    _, metric, least = CASES[case]
    assert found[metric] > least


@pytest.mark.parametrize("case", CASES)
def test_a_killed_training_ends_in_the_metrics_of_the_uninterrupted_one(case, tmp_path, proposal_file):
    def evaluate(tries):
        (tmp_path / "out").mkdir(exist_ok=True)
        fields = {**with_proposals(case, proposal_file), "steps": 52, "batch_size": 2}
        return judge(case.split()[0], tmp_path / "out", tries, FEW_TRAIN, FEW_JUDGED, **fields)

    whole, continued = run_whole_and_killed(evaluate, tmp_path, kill_at=50)
    assert continued == whole
    assert all(type(value) is float and math.isfinite(value) for value in whole.values())
    module = plugins.module("evaluation", case.split()[0])
    assert set(whole) <= set(module.DIRECTION)
    images = per_image.read(tmp_path / "out" / per_image.FILE)
    assert images.names == FEW_JUDGED.names
    again = per_image.metrics_of(images, module.recompute)
    assert {name: again[name] for name in whole} == pytest.approx(whole, abs=1e-12)
    if case != "voc07_cls_finetune":
        rows = json.loads((tmp_path / "out" / "per_class.json").read_text())
        assert [row["class"] for row in rows][-3:] == list(NAMES)
        plots = {"average_precision.png", "precision_recall.png", "detections.png"}
        assert {path.name for path in (tmp_path / "out").glob("*.png")} == (
            {"segmentation.png"} if case == "voc12_seg" else plots
        )


@pytest.mark.parametrize("case", ["voc_det", "coco_det", "voc12_seg", "voc07_cls_finetune"])
def test_results_per_image_of_a_finished_seed_outlive_a_kill(case, tmp_path, proposal_file):
    def evaluate(tries):
        out = tmp_path / ("killed" if tries.start else "whole")
        out.mkdir(exist_ok=True)
        fields = {**with_proposals(case, proposal_file), "steps": 3, "batch_size": 2, "seeds": 2}
        return judge(case, out, tries, FEW_TRAIN, FEW_JUDGED, **fields)

    whole, continued = run_whole_and_killed(evaluate, tmp_path, kill_at=4)  # after the first of two seeds
    assert continued == whole
    one, other = (per_image.read(tmp_path / name / per_image.FILE) for name in ("whole", "killed"))
    assert set(one.columns) == set(other.columns)
    for name, values in one.columns.items():
        assert [np.asarray(each).tolist() for each in values] == [np.asarray(each).tolist() for each in other.columns[name]]
    found = per_image.metrics_of(one, plugins.module("evaluation", case).recompute)
    means = {name: whole[name] for name in plugins.module("evaluation", case).DIRECTION if name in whole}
    assert {name: found[name] for name in means} == pytest.approx(means, abs=1e-12)
    errors = per_image.standard_errors(one, plugins.module("evaluation", case).recompute)
    assert set(errors) == {name for name, value in found.items() if not math.isnan(value)}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_killed_training_ends_in_the_metrics_of_the_uninterrupted_one_on_a_gpu(case, precision, tmp_path, proposal_file):
    def evaluate(tries):
        (tmp_path / "out").mkdir(exist_ok=True)
        fields = {**with_proposals(case, proposal_file), "precision": precision}
        return judge(case.split()[0], tmp_path / "out", tries, device="cuda:0", **fields)

    whole, continued = run_whole_and_killed(evaluate, tmp_path, kill_at=50)
    assert continued == whole
    assert whole[CASES[case][1]] > CASES[case][2]


def test_roi_align_equals_torchvisions_values_and_gradients():
    maps = torch.randn(2, 5, 9, 13, requires_grad=True)
    corner = torch.rand(7, 2) * 100 - 20
    boxes = [torch.cat([each, each + torch.rand(7, 2) * 120 + 1], 1) for each in (corner, corner.flip(0))]
    ours = RoiAlign(4)({"0": maps}, boxes, [(144, 208)] * 2)
    theirs = roi_align(maps, boxes, 4, 1 / 16, 2, aligned=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(ours)
    (expected,) = torch.autograd.grad((theirs * weights).sum(), maps)
    (found,) = torch.autograd.grad((ours * weights).sum(), maps)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_enlarged_maps_equal_torchs_interpolation():
    maps = torch.randn(2, 3, 5, 7)
    expected = nn.functional.interpolate(maps, (33, 47), mode="bilinear", align_corners=False)
    torch.testing.assert_close(voc12_seg.enlarged(maps, (33, 47)), expected, atol=1e-5, rtol=1e-5)


def test_maps_are_those_of_the_layer_and_the_layers_after_it_do_not_run():
    network = loop.untrained_backbone(plugins.parse("backbone", SMALL), 0).eval()
    images = torch.randn(1, 3, 64, 48)
    expected = network.conv3(network.pool2(network.conv2(network.pool1(network.conv1(images)))))
    maps = LayerMaps(network, "conv3")
    torch.testing.assert_close(maps(images), expected)
    assert maps.out_channels == expected.shape[1]
    frozen = detectors.first_layers(maps, 2)
    assert {name for name, module in network.named_modules() if module in frozen} == {
        *("conv1.0", "conv1.1", "conv1.2", "pool1", "conv2.0", "conv2.1", "conv2.2")
    }


class Flat(nn.Module):
    """A network whose layer is a vector, for images of any size or of one alone."""

    layers = ("last",)

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        self.last = nn.Linear(width, 4)

    def forward(self, images):
        maps = self.conv(images)
        return self.last(maps.mean((2, 3)) if self.last.in_features == 2 else maps.flatten(1))


@pytest.mark.parametrize(("width", "message"), [(2, "no maps"), (7200, "one size alone")])
def test_a_network_that_makes_no_maps_of_images_of_any_size_is_refused_in_the_plan(width, message):
    with pytest.raises(UserError, match=message):
        voc_det.check_network(voc_det.Spec(), Flat(width), 32)


def test_several_scales_judge_each_region_at_the_one_that_brings_it_nearest_to_224_pixels():
    maps = LayerMaps(loop.untrained_backbone(plugins.parse("backbone", SMALL), 0).eval(), None)
    detector = detectors.FastRCNN(maps, 3, width=8, min_sizes=(240, 480), max_size=2000).eval()
    boxes = torch.tensor([[0.0, 0, 100, 100], [0, 0, 30, 30], [0, 0, 113, 113]])
    image = torch.rand(3, 120, 160)
    assert detector._nearest_scale(image, boxes).tolist() == [0, 1, 0]
    with torch.inference_mode():
        one = detector.detect(image, boxes, 0.0, 0.3, 100)
    assert one["boxes"].shape[1] == 4
    assert (one["boxes"][:, 2] <= 160).all()
    assert detector.transform.min_size == (240, 480)


def test_mirrored_training_images_have_mirrored_boxes_and_difficult_objects_are_not_trained_on():
    from ktray.fine_tuning.detector_training import _training_image, trained_objects

    images = annotated(TRAIN, None, 0)
    row = next(index for index, each in enumerate(images.objects) if each.difficult.any() and not each.difficult.all())
    pixels = images.reader.read(row)
    seen, boxes, labels, _ = _training_image(images, row, pixels, True)
    assert len(boxes) == trained_objects(images.objects[row]).sum() < len(images.objects[row].boxes)
    for (x0, y0, x1, y1), label in zip(boxes.int().tolist(), labels.tolist(), strict=True):
        assert (seen[(y0 + y1) // 2, (x0 + x1) // 2].numpy() == COLOURS[label - 1]).all() or len(images.objects[row].boxes) > 1
        assert 0 <= x0 < x1 <= pixels.shape[1]


def test_images_with_difficult_objects_alone_cannot_be_learned_from(tmp_path):
    with pytest.raises(ValueError, match="no training image has an object"):
        judge("voc_det", tmp_path, train=scenes(4, 0, difficult=1.1), **FASTER)
    with pytest.raises(ValueError, match="objects that are not difficult"):
        judge("voc_det", tmp_path, judged=scenes(4, 0, difficult=1.1), **FASTER)


def test_void_pixels_are_neither_trained_on_nor_judged():
    generator = torch.Generator().manual_seed(0)
    image, mask = np.zeros((10, 20, 3), np.uint8), np.full((10, 20), 3, np.uint8)
    seen, labels = voc12_seg.augmented(image, mask, 32, (0.5, 2.0), generator)
    assert seen.shape == (32, 32, 3)
    assert set(labels.unique().tolist()) == {3, 255}  # what is padded is void


def test_a_class_that_is_shown_only_as_difficult_objects_counts_neither_way():
    presence = np.array([[1], [-1], [0]], np.int8)
    scores = np.array([[0.5], [0.1], [0.9]])
    assert voc07_cls_finetune.mean_aps(scores, presence) == {"map": 1.0, "map_area": 1.0, "map_steps": 1.0}


def boxes_by_name():
    return {"a": np.array([[0.0, 1, 5, 9]]), "b": np.array([[2.0, 2, 4, 4], [0, 0, 3, 8]])}


def write_npz(path):
    np.savez(path, **boxes_by_name())


def write_json(path):
    path.write_text(json.dumps({f"{name}.jpg": boxes.tolist() for name, boxes in boxes_by_name().items()}))


def write_mat(path):
    from scipy.io import savemat

    names, boxes = np.empty(2, object), np.empty(2, object)
    for index, (name, rows) in enumerate(boxes_by_name().items()):
        names[index] = name
        boxes[index] = (rows + np.array([1, 1, 0, 0]))[:, [1, 0, 3, 2]]  # y before x, from 1, the last included
    savemat(path, {"images": names[:, None], "boxes": boxes[None]})


@pytest.mark.parametrize(("suffix", "write"), [("npz", write_npz), ("json", write_json), ("mat", write_mat)])
def test_proposals_are_the_same_from_files_of_every_form(suffix, write, tmp_path):
    path = tmp_path / f"boxes.{suffix}"
    write(path)
    proposals.check_proposals(str(path))
    found = proposals.from_file(path, ["VOC2007/JPEGImages/b.jpg", "VOC2007/JPEGImages/a.jpg"])
    np.testing.assert_array_equal(found[0], boxes_by_name()["b"])
    np.testing.assert_array_equal(found[1], boxes_by_name()["a"])


@pytest.mark.parametrize(
    ("name", "content", "names", "message"),
    [
        ("x.json", '{"a": [[0, 0, 1, 1]]}', ["b.jpg"], "no proposals for the image b.jpg"),
        ("x.json", '{"a": [[5, 0, 1, 1]]}', ["a.jpg"], "is no box"),
        ("x.json", '{"a": [1, 2, 3]}', ["a.jpg"], r"have the shape \(3,\)"),
        ("x.json", "[]", ["a.jpg"], "no mapping"),
        ("x.json", '{"a": [[0, 0, 1, 1]], "a": [[0, 0, 2, 2]]}', ["a.jpg"], "'a' is there twice"),
        ("x.json", '{"a": [["0", "0", "1", "1"]]}', ["a.jpg"], "its proposals are not numbers"),
        ("x.json", '{"a": [[0, 0, 0.5, 1], [0.1, 0.2, 0.9, 0.8]]}', ["a.jpg"], "in shares of the sides"),
        ("x.json", "{", ["a.jpg"], "cannot be read"),
        ("x.json", '{"a": "\xe9"}', ["a.jpg"], "its proposals are not numbers"),
        ("x.npz", "not a zip", ["a.jpg"], "no arrays of NumPy in a zip file: the file is a text file"),
        ("x.npz", "PK\x03\x04 cut", ["a.jpg"], "cannot be read"),
        ("x.npz", "<html>login</html>", ["a.jpg"], "is a web page"),
        ("x.mat", "<html>login</html>", ["a.jpg"], "is a web page"),
        ("x.mat", "MATLAB 5.0 MAT-file" + " " * 105 + "\x00\x01IM cut", ["a.jpg"], "cannot be read"),
        ("x.json", '{"a": ' + "[" * 100_000, ["a.jpg"], "cannot be read"),
        ("x.json", '{"a": [[0, 0, 1], [1, 1, 2, 2]]}', ["a.jpg"], "is no box"),
        ("x.json", '{"a": [[0, 0, 9, 9, 0.5], [1, 1, 8, 8, 0.4], [2, 2, 7, 7, 0.3], [3, 3, 6, 6, 0.2]]}', ["a"], r"\(4, 5\)"),
        ("x.json", '{"a": [[0, 1, 2], [0, 1, 2], [9, 9, 9], [9, 9, 9]]}', ["a"], r"have the shape \(4, 3\)"),
        ("x.mat", "MATLAB 7.3 MAT-file", ["a.jpg"], "Save it with -v7"),
        ("x.json", '{"a": [[0, 0, 1, 1]]}', ["p/a.jpg", "q/a.jpg"], "same name in different folders"),
    ],
)
def test_proposals_that_do_not_fit_are_refused(name, content, names, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        proposals.from_file(tmp_path / name, names)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npz", b"<html>login</html>", "no arrays of NumPy in a zip file: the file is a web page"),
        ("x.json", b"version https://git-lfs", "no mapping in JSON: the file is a pointer of Git LFS"),
        ("x.mat", b"", "no file of MATLAB: the file is empty"),
        ("x.mat", b"MATLAB 7.3 MAT-file", "Save it with -v7"),
    ],
)
def test_a_file_of_proposals_of_another_kind_is_refused_in_the_plan(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        proposals.check_proposals(str(tmp_path / name))


@pytest.mark.parametrize(("suffix", "write"), [("npz", write_npz), ("json", write_json), ("mat", write_mat)])
def test_an_image_without_proposals_is_told_in_the_plan(suffix, write, tmp_path):
    path = tmp_path / f"boxes.{suffix}"
    write(path)
    proposals.require_images(str(path), ["VOC2007/JPEGImages/b.jpg", "VOC2007/JPEGImages/a.jpg"])
    with pytest.raises(UserError, match=rf"boxes\.{suffix} has no proposals for the image VOC2007/JPEGImages/c\.jpg"):
        proposals.require_images(str(path), ["VOC2007/JPEGImages/a.jpg", "VOC2007/JPEGImages/c.jpg"])


def test_a_mark_of_byte_order_before_proposals_is_no_part_of_them(tmp_path):
    (tmp_path / "x.json").write_bytes(codecs.BOM_UTF8 + b'{"a": [[0, 0, 1, 1]]}')
    proposals.check_proposals(str(tmp_path / "x.json"))
    np.testing.assert_array_equal(proposals.from_file(tmp_path / "x.json", ["p/a.jpg"])[0], [[0, 0, 1, 1]])


def test_a_file_of_proposals_counts_by_its_content_and_not_by_its_place(tmp_path):
    student = Student.model_validate({"backbone": SMALL, "schedule": {"epochs": 1}})

    def key(path, content):
        path.write_text(content)
        spec = voc_det.Spec(proposals=str(path))
        inputs = {"images.target": "images-1", "student": "student-1"}
        stage = evaluation_stage.stage_of(spec, student, inputs, {}, None, identity.evaluation_files(spec))
        assert stage.local["evaluation_files"] == {"proposals": str(path)}
        return stage.key

    first = key(tmp_path / "a.json", '{"a": []}')
    assert key(tmp_path / "b.json", '{"a": []}') == first
    assert key(tmp_path / "c.json", '{"b": []}') != first
    assert identity.evaluation_files(voc_det.Spec()) == {}
    with pytest.raises(UserError, match=r"no file .*gone\.npz"):
        identity.evaluation_files(voc_det.Spec(proposals="gone.npz"))


@pytest.mark.parametrize("given", ["selective_serch", "/no/such/file.npz", "boxes.txt"])
def test_proposals_that_do_not_exist_are_refused_in_the_plan(given):
    with pytest.raises(UserError, match="proposals"):
        voc_det.check(voc_det.Spec(proposals=given))


def test_selective_search_finds_the_objects_and_gives_the_same_regions_twice():
    images = annotated(JUDGED, proposals.SELECTIVE_SEARCH, 2000)
    from ktray.scoring.detection_scores import overlaps

    found = [overlaps(each.boxes, near).max(1) for each, near in zip(images.objects, images.proposals, strict=True)]
    assert (np.concatenate(found) >= 0.5).mean() > 0.9
    again = proposals.selective_search(images.reader.read(3), 2000)
    np.testing.assert_array_equal(again, images.proposals[3])
    assert len(proposals.selective_search(images.reader.read(3), 5)) == 5


def test_selective_search_without_opencv_is_refused_with_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(UserError, match="selective search needs OpenCV"):
        voc_det.check(voc_det.Spec())


def test_the_defaults_are_those_of_the_form():
    fast, faster, several = voc_det.Spec(), voc_det.Spec(form="faster_rcnn"), voc_det.Spec(multi_scale=True)
    assert (fast.steps, fast.lr, fast.min_sizes) == (150_000, 0.001, (600,))
    assert voc_det.settings_of(fast).recipe.milestones == (50_000, 100_000)
    assert (faster.steps, faster.lr, faster.proposals) == (24_000, 0.02, None)
    assert voc_det.settings_of(faster).recipe.milestones == (18_000, 22_000)
    assert (several.min_sizes, several.max_size) == ((480, 576, 688, 864, 1200), 2000)
    assert voc_det.Spec.model_validate(faster.model_dump()) == faster
    assert voc_det.Spec(form="faster_rcnn", steps=7).batch_size == 16


@pytest.mark.parametrize(
    "fields",
    [
        {"form": "faster_rcnn", "proposals": "a.npz"},
        {"proposals": None},
        {"form": "faster_rcnn", "multi_scale": True},
        {"drops": (1.5,)},
        {"anchors": (16, 32)},
        {"form": "faster_rcnn", "most_proposals": 300},
        {"proposals": "a.npz", "most_proposals": 300},
        {"min_sizes": (0,)},
    ],
)
def test_specs_that_contradict_their_form_are_refused(fields):
    with pytest.raises(ValueError, match=r"proposals|multi_scale|drops|anchors|min_sizes"):
        voc_det.Spec(**fields)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("voc07_cls_finetune", {"areas": (0.5, 0.1)}, "in this order"),
        ("voc07_cls_finetune", {"areas": (-0.1, 0.5)}, "areas"),
        ("voc07_cls_finetune", {"hidden": (0,)}, "hidden"),
        ("nonlinear_probe", {"hidden": (64, -1)}, "hidden"),
        ("voc12_seg", {"scales": (2.0, 0.5)}, "in this order"),
        ("voc12_seg", {"scales": (0.0, 1.0)}, "scales"),
        ("voc12_seg", {"drops": (1.0,)}, "drops"),
        ("coco_det", {"drops": (60_000.0,)}, "drops"),
        ("coco_det", {"anchors": (0,)}, "anchors"),
    ],
)
def test_numbers_that_no_training_can_use_are_refused(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        plugins.module("evaluation", kind).Spec(**fields)


def test_evaluations_that_read_a_network_refuse_a_pool_that_would_change_nothing():
    modules = [plugins.module("evaluation", kind) for kind in plugins.kinds("evaluation")]
    readers = [module for module in modules if getattr(module, "READS_NETWORK", False)]
    assert len(readers) > 5
    for module in readers:
        with pytest.raises(ValueError, match="does not pool"):
            module.Spec(pool={"grid": 2})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze_layers": 99}, "layers"),
        ({"freeze_layers": 99, "grid": None}, "layers"),
        ({"grid": None, "layer": "conv1"}, "not a layer"),
    ],
)
def test_fine_tuning_for_voc_refuses_in_the_plan_what_the_network_does_not_have(fields, message):
    network = loop.untrained_backbone(plugins.parse("backbone", {"kind": "alexnet", "width": 0.0625}), 0).eval()
    with pytest.raises(UserError, match=message):
        voc07_cls_finetune.check_network(voc07_cls_finetune.Spec(**fields), network, 64)

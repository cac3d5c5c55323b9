"""Scores equal an independent implementation of each benchmark's rules, on random and on adversarial cases."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ktray.evals import voc_det
from ktray.scoring import label_maps, per_image
from ktray.scoring.average_precision import (
    RECALLS,
    ap_of,
    bootstrap_draws,
    classification_ap,
    interval,
    precision_recall,
    resampled_aps,
)
from ktray.scoring.detection_scores import (
    Detections,
    Objects,
    coco_judgement,
    coco_scores,
    coco_scores_again,
    columns_of,
    overlaps,
    rank_all,
    rank_class,
    ranked_again,
)

# --- the oracle: the devkit's rules as they stand in its text, pixels counted from 1 with the last one included, in plain loops


def devkit_ap(tp: list[int], fp: list[int], positives: int, rule: str) -> float:
    rec, prec, found, lost = [], [], 0, 0
    for right, wrong in zip(tp, fp, strict=True):
        found, lost = found + right, lost + wrong
        rec.append(found / positives)
        prec.append(found / (found + lost) if found + lost else -1.0)
    if rule == "voc07":
        total = 0.0
        for t in RECALLS:
            total += max([p for r, p in zip(rec, prec, strict=True) if r >= t] or [0.0]) / 11 if rec else 0.0
        return total
    mrec, mpre = [0.0, *rec, 1.0], [0.0, *[max(0.0, p) for p in prec], 0.0]
    for i in reversed(range(len(mpre) - 1)):
        mpre[i] = max(mpre[i], mpre[i + 1])
    return sum((mrec[i] - mrec[i - 1]) * mpre[i] for i in range(1, len(mrec)) if mrec[i] != mrec[i - 1])


def devkit_detection_ap(truth: list[Objects], detected: list[Detections], class_: int, rule: str) -> float:
    gt = []
    for objects in truth:
        rows = [
            ([box[0] + 1, box[1] + 1, box[2], box[3]], bool(hard))
            for box, own, hard in zip(objects.boxes, objects.classes, objects.difficult, strict=True)
            if own == class_
        ]
        gt.append({"boxes": [row[0] for row in rows], "diff": [row[1] for row in rows], "det": [False] * len(rows)})
    npos = sum(not hard for each in gt for hard in each["diff"])
    if npos == 0:
        return math.nan
    lines = [
        (image, float(score), [box[0] + 1, box[1] + 1, box[2], box[3]])
        for image, found in enumerate(detected)
        for box, own, score in zip(found.boxes, found.classes, found.scores, strict=True)
        if own == class_
    ]
    lines.sort(key=lambda line: -line[1])
    tp, fp = [0] * len(lines), [0] * len(lines)
    for d, (image, _, bb) in enumerate(lines):
        ovmax, jmax = -math.inf, -1
        for j, bbgt in enumerate(gt[image]["boxes"]):
            bi = [max(bb[0], bbgt[0]), max(bb[1], bbgt[1]), min(bb[2], bbgt[2]), min(bb[3], bbgt[3])]
            iw, ih = bi[2] - bi[0] + 1, bi[3] - bi[1] + 1
            if iw > 0 and ih > 0:
                ua = (bb[2] - bb[0] + 1) * (bb[3] - bb[1] + 1) + (bbgt[2] - bbgt[0] + 1) * (bbgt[3] - bbgt[1] + 1) - iw * ih
                if iw * ih / ua > ovmax:
                    ovmax, jmax = iw * ih / ua, j
        if ovmax >= 0.5:
            if not gt[image]["diff"][jmax]:
                if not gt[image]["det"][jmax]:
                    tp[d], gt[image]["det"][jmax] = 1, True
                else:
                    fp[d] = 1
        else:
            fp[d] = 1
    return devkit_ap(tp, fp, npos, rule)


def boxes_of(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, np.float64).reshape(-1, 4)


def objects(boxes: np.ndarray, classes=None, difficult=None) -> Objects:
    count = len(boxes)
    return Objects(
        boxes,
        np.zeros(count, np.int64) if classes is None else np.asarray(classes, np.int64),
        np.zeros(count, bool) if difficult is None else np.asarray(difficult, bool),
    )


def detections(boxes: np.ndarray, scores, classes=None) -> Detections:
    own = np.zeros(len(boxes), np.int64) if classes is None else np.asarray(classes, np.int64)
    return Detections(boxes, own, np.asarray(scores, np.float64))


def random_case(seed: int, *, whole: bool, ties: bool) -> tuple[list[Objects], list[Detections]]:
    """Images with up to 4 objects of 3 classes, and detections near them: shifted, duplicated, of another class, or nowhere."""
    rng = np.random.default_rng(seed)
    truth, detected = [], []
    for _ in range(30):
        count = rng.integers(0, 5)
        corner, size = rng.integers(0, 40, (count, 2)), rng.integers(4, 30, (count, 2))
        boxes = np.hstack([corner, corner + size]).astype(np.float64)
        classes = rng.integers(0, 3, count)
        truth.append(objects(boxes, classes, rng.random(count) < 0.25))
        picked = rng.integers(0, max(1, count), rng.integers(0, 9)) if count else np.zeros(0, np.int64)
        near = boxes[picked] + (rng.integers(-4, 5, (len(picked), 4)) if whole else rng.normal(0, 3, (len(picked), 4)))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        nowhere = np.array([[50.0, 50, 60, 60]] * rng.integers(0, 3)).reshape(-1, 4)
        own = np.concatenate([np.where(rng.random(len(picked)) < 0.8, classes[picked], 1), rng.integers(0, 3, len(nowhere))])
        found = np.vstack([near, nowhere])
        scores = rng.integers(0, 4, len(found)) / 4 if ties else rng.random(len(found))
        detected.append(detections(found, scores, own))
    return truth, detected


@pytest.mark.parametrize("rule", ["voc07", "area"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_detection_ap_equals_the_devkits_rules_on_random_boxes(whole, ties, rule):
    for seed in range(12):
        truth, detected = random_case(seed, whole=whole, ties=ties)
        for class_, ranked in enumerate(rank_all(truth, detected, 3)):
            expected = devkit_detection_ap(truth, detected, class_, rule)
            assert ranked.ap(rule) == pytest.approx(expected, abs=1e-12, nan_ok=True)


ONE = boxes_of((0, 0, 10, 10))
ADVERSARIAL = {
    "no detections": ([objects(ONE)], [detections(boxes_of(), [])]),
    "no positives": ([objects(boxes_of())], [detections(ONE, [0.5])]),
    "neither": ([objects(boxes_of())], [detections(boxes_of(), [])]),
    "all difficult": ([objects(ONE, difficult=[True])], [detections(ONE, [0.5])]),
    "difficult and not": (
        [objects(np.vstack([ONE, ONE + 20]), difficult=[True, False])],
        [detections(np.vstack([ONE, ONE, ONE + 20, ONE + 40]), [0.9, 0.8, 0.7, 0.6])],
    ),
    "duplicates of equal score": ([objects(ONE)], [detections(np.vstack([ONE] * 4), [0.5] * 4)]),
    "an overlap of exactly a half": ([objects(ONE)], [detections(boxes_of((0, 0, 10, 5)), [0.5])]),
    "an overlap of just below a half": (
        [objects(boxes_of((0, 0, 1000, 1000)))],
        [detections(boxes_of((0, 0, 1000, 499)), [1])],
    ),
    "two objects of equal overlap": (
        [objects(boxes_of((0, 0, 10, 10), (0, 0, 10, 10)))],
        [detections(boxes_of((0, 0, 10, 9), (0, 0, 10, 9)), [0.9, 0.8])],
    ),
    "ties over images": ([objects(ONE), objects(ONE + 30)], [detections(ONE + 5, [0.5]), detections(ONE + 30, [0.5])]),
    "boxes that only touch": ([objects(ONE)], [detections(boxes_of((10, 0, 20, 10)), [0.5])]),
    "an empty image among others": ([objects(ONE), objects(boxes_of())], [detections(ONE, [0.2]), detections(ONE, [0.9])]),
    "a box of no area": ([objects(ONE)], [detections(boxes_of((3, 3, 3, 3)), [0.5])]),
}


@pytest.mark.parametrize("rule", ["voc07", "area"])
@pytest.mark.parametrize("case", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_detection_ap_equals_the_devkits_rules_on_adversarial_boxes(case, rule):
    truth, detected = case
    expected = devkit_detection_ap(truth, detected, 0, rule)
    assert rank_class(truth, detected, 0).ap(rule) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_an_overlap_of_exactly_a_half_is_enough_and_a_duplicate_is_wrong():
    truth, detected = ADVERSARIAL["an overlap of exactly a half"]
    assert overlaps(detected[0].boxes, truth[0].boxes) == 0.5
    assert rank_class(truth, detected, 0).results.tolist() == [1]
    assert rank_class(*ADVERSARIAL["duplicates of equal score"], 0).results.tolist() == [1, -1, -1, -1]
    assert rank_class(*ADVERSARIAL["difficult and not"], 0).results.tolist() == [0, 0, 1, -1]


def test_scores_and_boxes_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="1 of 1 scores are not numbers"):
        rank_class([objects(ONE)], [detections(ONE, [np.nan])], 0)
    with pytest.raises(ValueError, match="not of numbers"):
        rank_class([objects(ONE)], [detections(ONE * np.nan, [0.5])], 0)
    with pytest.raises(ValueError, match="2 images and detections of 1"):
        rank_class([objects(ONE)] * 2, [detections(ONE, [0.5])], 0)


@pytest.mark.parametrize("seed", range(3))
def test_ap50_lies_within_what_the_definitions_of_coco_and_of_the_devkit_differ_in(seed):
    # COCO samples the precision at 101 recalls, so its AP differs from the area by at most 1/101 where the matches agree. They
    # agree where no two objects of a class compete for a detection, which these boxes, far apart, exclude.
    rng = np.random.default_rng(seed)
    truth, detected = [], []
    for _ in range(60):
        corner = np.array([[0, 0], [100, 0], [0, 100], [100, 100]])[: rng.integers(1, 5)]
        boxes = np.hstack([corner, corner + rng.integers(33, 60, corner.shape)]).astype(np.float64)
        classes = rng.integers(0, 2, len(boxes))
        truth.append(objects(boxes, classes))
        near = boxes + rng.normal(0, 6, boxes.shape)
        detected.append(detections(near, rng.random(len(near)), np.where(rng.random(len(near)) < 0.8, classes, 1 - classes)))
    areas = [ranked.ap("area") for ranked in rank_all(truth, detected, 2)]
    assert coco_scores(truth, detected, 2)["ap50"] == pytest.approx(np.mean(areas), abs=1 / 101)
    assert 0 < np.mean(areas) < 0.95


def test_coco_scores_of_perfect_boxes_are_one_and_of_none_are_zero():
    truth = [objects(boxes_of((0, 0, 40, 40), (50, 50, 90, 90)), [0, 1])]
    perfect = [detections(truth[0].boxes, [0.9, 0.8], [0, 1])]
    assert coco_scores(truth, perfect, 2)["map"] == pytest.approx(1)
    assert coco_scores(truth, [detections(boxes_of(), [])], 2)["map"] == 0


def test_coco_scores_leave_out_difficult_objects_whether_or_not_the_data_speak_of_crowds():
    easy = objects(boxes_of((0, 0, 40, 40), (50, 50, 90, 90)), difficult=[False, True])
    no_crowds = replace(easy, crowd=np.zeros(2, bool))
    for truth in (easy, no_crowds):
        for found in (easy.boxes, easy.boxes[:1]):
            assert coco_scores([truth], [detections(found, np.linspace(0.8, 0.9, len(found)))], 1)["map"] == pytest.approx(1)


@pytest.mark.parametrize("rule", ["voc07", "area"])
@pytest.mark.parametrize("ties", [False, True])
def test_classification_ap_equals_the_devkits_rules(ties, rule):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        truth = rng.choice([-1, -1, 0, 1], 60)
        scores = truth + rng.normal(0, 1.5, 60)
        scores = np.round(scores) if ties else scores
        order = sorted(range(60), key=lambda index: -scores[index])
        tp, fp = [int(truth[i] == 1) for i in order], [int(truth[i] == -1) for i in order]
        expected = devkit_ap(tp, fp, sum(tp), rule)
        assert classification_ap(scores, truth, rule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("truth", "expected"),
    [([1, 1, -1], 1.0), ([-1, -1, 1], 1 / 3), ([-1, 0, 0], math.nan), ([0, 0, 1], 1.0), ([1], 1.0), ([-1], math.nan)],
)
def test_classification_ap_of_small_cases(truth, expected):
    scores = -np.arange(len(truth), dtype=np.float64)
    for rule in ("voc07", "area"):
        assert classification_ap(scores, np.array(truth), rule) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_the_eleven_recalls_are_matlabs_of_which_three_tenths_is_the_only_one_beside_its_decimal():
    assert [recall == step / 10 for step, recall in enumerate(RECALLS)] == [step != 3 for step in range(11)]
    results = np.array([1, 1, 1, *[-1] * 7, *[1] * 7])
    # 3 of 10 positives do not reach the recall 0.3, so the precision there is that of the fourth, at the eleventh result
    expected = (3 * 1.0 + 8 * 10 / 17) / 11
    assert ap_of(*precision_recall(results, 10), "voc07") == pytest.approx(expected, abs=1e-12)


def test_resampled_aps_are_those_of_the_copied_images():
    truth, detected = random_case(5, whole=False, ties=False)
    ranked = rank_class(truth, detected, 0)
    draws = bootstrap_draws(len(truth), 8, seed=0)
    found = resampled_aps(ranked.results, ranked.images, ranked.positives, "voc07", draws=draws)
    for counts, ap in zip(draws, found, strict=True):
        copied = [index for index, times in enumerate(counts) for _ in range(times)]
        again = rank_class([truth[index] for index in copied], [detected[index] for index in copied], 0)
        # copies of an image tie, and a tie may order right before wrong or after; no two detections of one image tie here
        assert ap == pytest.approx(again.ap("voc07"), abs=1e-12)
    low, high = interval(found)
    assert low <= np.median(found) <= high
    assert all(map(math.isnan, interval(np.array([math.nan]))))


@pytest.mark.parametrize("seed", range(3))
def test_miou_equals_the_formula_on_sets_of_pixels_and_torchmetrics_with_void_left_out(seed):
    torchmetrics = pytest.importorskip("torchmetrics.classification")
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(0, 5, (3, 20, 20)), rng.integers(0, 5, (3, 20, 20))
    truth[rng.random(truth.shape) < 0.2] = label_maps.VOID
    found = label_maps.ious(label_maps.confusion(truth, predicted, 6))
    for class_ in range(5):
        known = truth != label_maps.VOID
        both = ((truth == class_) & (predicted == class_) & known).sum()
        either = (((truth == class_) | (predicted == class_)) & known).sum()
        assert found[class_] == pytest.approx(both / either, abs=1e-12)
    assert np.isnan(found[5])  # in neither map
    index = torchmetrics.MulticlassJaccardIndex(num_classes=6, ignore_index=255)
    assert np.nanmean(found) == pytest.approx(float(index(torch.from_numpy(predicted), torch.from_numpy(truth))), abs=1e-6)


def test_label_maps_of_another_size_or_with_unknown_classes_are_refused():
    with pytest.raises(ValueError, match="for one of"):
        label_maps.confusion(np.zeros((2, 2), int), np.zeros((2, 3), int), 3)
    with pytest.raises(ValueError, match="3 classes"):
        label_maps.confusion(np.full((2, 2), 7), np.zeros((2, 2), int), 3)


def random_scenes(seed, images=30, classes=3):
    """Objects and detections of `images` images, with ties, difficult objects, crowds, and images without either."""
    random = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(images):
        count = int(random.integers(0, 5))
        corner, sides = (
            random.uniform(0, 200, (count, 2)),
            random.choice([10, 25, 60, 120], (count, 1)) * random.uniform(0.7, 1.3),
        )
        boxes = np.hstack([corner, corner + sides])
        known = objects(boxes, random.integers(0, classes, count), random.random(count) < 0.15)
        truth.append(replace(known, crowd=random.random(count) < 0.15))
        near = np.repeat(boxes, 2, 0) + random.normal(0, 4, (2 * count, 4))
        far = random.uniform(0, 150, (3, 2))
        near = np.vstack([near, np.hstack([far, far + 30])])
        scores = random.random(len(near)).round(1)
        found.append(detections(near, scores, random.integers(0, classes, len(near))))
    return truth, found


def of_images(rows, *lists):
    return [[each[row] for row in rows] for each in lists]


@pytest.mark.parametrize("seed", range(3))
def test_cocos_figures_of_resampled_images_are_pycocotools_of_the_copied_images(seed, tmp_path):
    truth, found = random_scenes(seed)
    scores, columns = coco_judgement(truth, found, 3)
    per_image.write(tmp_path, (), columns)
    read = per_image.read(tmp_path / per_image.FILE).columns
    everything = coco_scores_again(read, np.arange(len(truth)))
    assert {name: everything[name] for name in scores} == pytest.approx(scores, abs=1e-12)
    assert [name for name in everything if np.isnan(everything[name])] == [name for name in everything if name not in scores]
    rows = np.random.default_rng(seed).integers(0, len(truth), len(truth))
    expected = coco_scores(*of_images(rows, truth, found), 3)
    again = coco_scores_again(read, rows)
    assert {name: again[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_cocos_figures_of_nothing_found_are_zero_also_when_they_are_computed_anew():
    truth, found = random_scenes(0)
    nothing = [detections(boxes_of(), []) for _ in found]
    scores, columns = coco_judgement(truth, nothing, 3)
    assert set(scores.values()) == {0.0}
    again = coco_scores_again(columns, np.arange(len(truth)))
    assert {name: again[name] for name in scores} == scores


@pytest.mark.parametrize("seed", range(3))
def test_vocs_aps_of_resampled_images_are_those_of_the_copied_images(seed, tmp_path):
    truth, found = random_scenes(seed)
    per_image.write(tmp_path, (), columns_of(rank_all(truth, found, 3)))
    columns = per_image.read(tmp_path / per_image.FILE).columns
    for rows in (np.arange(len(truth)), np.random.default_rng(seed).integers(0, len(truth), len(truth))):
        expected = rank_all(*of_images(rows, truth, found), 3)
        for one, other in zip(ranked_again(columns, rows), expected, strict=True):
            for rule in ("voc07", "area"):
                assert one.ap(rule) == pytest.approx(other.ap(rule), abs=1e-12, nan_ok=True)


def test_two_detectors_are_compared_by_mean_ap_of_the_same_resampled_images(monkeypatch):
    monkeypatch.setattr(per_image, "RESAMPLES_TO_RECOMPUTE", 12)
    truth, found = random_scenes(0)
    weaker = [replace(each, scores=np.random.default_rng(1).random(len(each.scores))) for each in found]
    names = tuple(map(str, range(len(truth))))
    judged = [per_image.PerImage(names, per_image.numbered([columns_of(rank_all(truth, each, 3))])) for each in (found, weaker)]
    difference = per_image.paired_differences(*judged, voc_det.recompute)["map"]
    random = np.random.default_rng(0)
    values = []
    for rows in (np.arange(len(truth)), *(random.integers(0, len(truth), len(truth)) for _ in range(12))):
        one, other = (voc_det.mean_aps(rank_all(*of_images(rows, truth, each), 3))["map"] for each in (found, weaker))
        values.append(one - other)
    assert difference.value == pytest.approx(values[0], abs=1e-12)
    assert (difference.low, difference.high) == pytest.approx(np.percentile(values[1:], [2.5, 97.5]), abs=1e-12)

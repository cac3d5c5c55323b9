"""COCO, ImageNet and Places365 in the layouts that people have on disk: read as others read them, damage named by place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from ktray import images
from ktray.datasets import coco, imagenet
from ktray.errors import UserError
from ktray.images import CROWD
from ktray.pool import LocalPool
from ktray.runs.data_check import describe
from tests.pictures import data_spec, listed, noise


def picture(file: Path, height: int = 12, width: int = 16, seed: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, seed=seed)).save(file)


# ---- COCO ----

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "emu"}]


def described(start: int) -> dict[str, Any]:
    """Two images with boxes, one of them a crowd, and one without any."""
    pictures = [{"id": start + i, "file_name": f"{start + i}.png", "height": 12, "width": 16} for i in range(3)]
    boxes = [
        {"id": 1, "image_id": start, "category_id": 90, "bbox": [0, 0, 16, 12], "iscrowd": 0, "area": 192},
        {"id": 2, "image_id": start, "category_id": 3, "bbox": [1.5, 2, 3.25, 4], "iscrowd": 0, "area": 13},
        {"id": 3, "image_id": start + 1, "category_id": 7, "bbox": [2, 2, 8, 8], "iscrowd": 1, "area": 64},
    ]
    return {"images": pictures, "annotations": boxes, "categories": [dict(each) for each in CATEGORIES]}


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for name, start in (("train2017", 10), ("val2017", 20)):
        for index in range(3):
            picture(root / name / f"{start + index}.png", seed=start + index)
        write(root, name, described(start))
    return root


def write(root: Path, name: str, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (root / f"annotations/instances_{name}.json").write_text(text)
    coco._read.cache_clear()  # written again within a step of the clock


def test_coco_is_what_pycocotools_reads(coco_root: Path) -> None:
    pytest.importorskip("pycocotools")
    from torchvision.datasets import CocoDetection

    splits = listed(f"coco:{coco_root}")
    assert splits.train.classes == ("cat", "dog", "emu")
    for source, name in ((splits.train, "train2017"), (splits.test, "val2017")):
        oracle = CocoDetection(str(coco_root / name), str(coco_root / f"annotations/instances_{name}.json"))
        numbers = sorted(oracle.coco.getCatIds())
        assert list(source.classes) == [each["name"] for each in oracle.coco.loadCats(numbers)]
        for row, (pixels, targets) in enumerate(oracle):
            boxes = [[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in targets)]
            assert source.boxes[row][:, :4].tolist() == boxes
            assert [numbers[int(label)] for label in source.boxes[row][:, 4]] == [each["category_id"] for each in targets]
            assert source.box_flags[row][:, CROWD].tolist() == [bool(each["iscrowd"]) for each in targets]
            assert source.sizes[row].tolist() == [pixels.height, pixels.width]
    assert splits.train.presence.tolist() == [[1, -1, 1], [-1, 1, -1], [-1, -1, -1]]


def test_coco_goes_through_the_store(coco_root: Path, tmp_path: Path) -> None:
    spec = data_spec(f"coco:{coco_root}?size=8")
    images.write(spec, tmp_path / "out", LocalPool())
    test = images.open_split(tmp_path / "out", "test", spec)
    assert test.whole().boxes[0].tolist() == [[0, 0, 16, 12, 2], [1.5, 2, 4.75, 6, 0]]
    assert [len(each) for each in test.boxes] == [2, 1, 0]
    boxes = describe(spec)["splits"]["train"]["boxes"]
    assert boxes == {"count": 3, "difficult": 0, "truncated": 0, "crowd": 1, "images_without": 1}


@pytest.mark.parametrize("form", ["annotations/train2017.json", "train2017/_annotations.coco.json", "images"])
def test_coco_is_found_in_the_forms_that_tools_write(form: str, coco_root: Path) -> None:
    before = listed(f"coco:{coco_root}").train
    if form == "images":
        (coco_root / "images").mkdir()
        (coco_root / "train2017").rename(coco_root / "images/train2017")
    else:
        (coco_root / "annotations/instances_train2017.json").rename(coco_root / form)
    after = listed(f"coco:{coco_root}").train
    assert after.names == before.names
    assert (after.boxes[0] == before.boxes[0]).all()


def with_change(place: str, value: Any) -> Any:
    """A change of the training set: `place` is such as ``annotations.0.bbox``."""

    def change(content: dict[str, Any]) -> dict[str, Any]:
        *above, last = [int(part) if part.isdigit() else part for part in place.split(".")]
        target: Any = content
        for part in above:
            target = target[part]
        target[last] = value
        return content

    return change


LEFT_OUT = [
    (
        "annotations.0.bbox",
        [0, 0, 40, 12],
        r"10\.png: its box reaches from \(0, 0\) to \(40, 12\), outside the image of 16 x 12",
    ),
    ("annotations.0.bbox", [0, 0, -4, 12], r"annotations\[0\]: its bbox is not one of an image"),
    ("annotations.0.bbox", [0, 0, 4], r"annotations\[0\]: its bbox is no list of x, y, width and height"),
    ("annotations.0.bbox", [0, 0, 4, "5"], r"annotations\[0\]: its bbox is no list"),
    ("annotations.0.bbox", [0, 0, 10**400, 5], r"annotations\[0\]: its bbox is not one"),
    ("annotations.0.category_id", 4, r"annotations\[0\]: unknown category 4"),
    ("annotations.0.iscrowd", 2, r"annotations\[0\]: iscrowd is 2, not 0 or 1"),
    ("images.0.height", None, r"images\[0\]: no height and width in pixels"),
]


@pytest.mark.parametrize(("place", "value", "says"), LEFT_OUT, ids=[f"{place}={value!r:.20}" for place, value, _ in LEFT_OUT])
def test_an_image_with_a_wrong_annotation_is_left_out_of_training_and_refused_where_it_judges(
    place: str, value: Any, says: str, coco_root: Path
) -> None:
    write(coco_root, "train2017", with_change(place, value)(described(10)))
    splits = listed(f"coco:{coco_root}?max_unreadable=0.5")
    assert splits.train.names == ("train2017/11.png", "train2017/12.png")
    with pytest.raises(UserError, match=rf"more than max_unreadable=0\.01 allows: .*{says}"):
        listed(f"coco:{coco_root}")
    write(coco_root, "train2017", described(10))
    changed = with_change(place, value)(described(20))
    write(coco_root, "val2017", changed)
    with pytest.raises(UserError, match=r"and of test, which judges, none is left out: instances_val2017\.json, "):
        listed(f"coco:{coco_root}?max_unreadable=0.5")


def test_whole_numbers_may_be_written_as_tools_for_tables_write_them(coco_root: Path) -> None:
    content = described(10)
    before = listed(f"coco:{coco_root}").train
    for each in content["images"]:
        each |= {name: float(each[name]) for name in ("id", "height", "width")}
    for each in content["annotations"]:
        each |= {name: float(each[name]) for name in ("image_id", "category_id", "iscrowd") if name in each}
    write(coco_root, "train2017", content)
    after = listed(f"coco:{coco_root}").train
    assert after.names == before.names
    np.testing.assert_array_equal(np.concatenate(after.boxes), np.concatenate(before.boxes))
    np.testing.assert_array_equal(after.sizes, before.sizes)


REFUSED = [
    ("annotations.0.image_id", 999, r"annotations\[0\]: none of the images has its image_id, 999"),
    ("annotations.0.image_id", "10", r"annotations\[0\]: its image_id is '10', which is no number"),
    ("annotations.0", [], r"annotations\[0\]: its image_id is None, which is no number"),
    ("images.1.id", 10, r"images\[1\]: the image '11\.png' with id 10 is listed twice"),
    ("images.1.file_name", "../../etc/passwd", r"images\[1\]: '\.\./\.\./etc/passwd' is no name of an image"),
    ("images.1.file_name", "C:\\x.png", r"is no name of an image"),
    ("images.1", 3, r"images\[1\]: no id and file_name"),
    ("categories.1.id", 7, r"categories\[1\]: no id and name of its own"),
    ("categories.1.name", "dog", r"categories\[1\]: no id and name of its own"),
    ("categories", [], "has no list of categories"),
    ("images", None, "has no list of images"),
    (
        "annotations",
        [{"image_id": row, "category_id": 7, "bbox": [0.1, 0.2, 0.3, 0.8]} for row in (10, 11, 12)],
        r"all boxes lie within the first pixel, as boxes in shares of the sides do\. Write them in pixels",
    ),
    ("categories", [*CATEGORIES, {"id": 91, "name": "yak"}], "val2017 has other categories than train2017: yak"),
]


@pytest.mark.parametrize(("place", "value", "says"), REFUSED, ids=[f"{place}={value!r:.20}" for place, value, _ in REFUSED])
def test_what_concerns_the_whole_json_file_is_refused_with_its_place(
    place: str, value: Any, says: str, coco_root: Path
) -> None:
    write(coco_root, "train2017", with_change(place, value)(described(10)))
    with pytest.raises(UserError, match=says):
        listed(f"coco:{coco_root}?max_unreadable=1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"images": [\n{]}', r"line 2, column 2"),
        ('{"images": NaN}', "it holds NaN"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "no object with images"),
        ("\x00", "line 1, column 1"),
    ],
)
def test_a_broken_json_file_is_refused(text: str, says: str, coco_root: Path) -> None:
    write(coco_root, "train2017", text)
    with pytest.raises(UserError, match=says):
        listed(f"coco:{coco_root}")


def test_a_box_without_area_is_left_out_alone_and_a_missing_image_with_all_its_boxes(coco_root: Path) -> None:
    write(coco_root, "train2017", with_change("annotations.1.bbox", [3, 3, 0, 5])(described(10)))
    (coco_root / "train2017/11.png").unlink()
    splits = listed(f"coco:{coco_root}?max_unreadable=0.5")
    assert [len(each) for each in splits.train.boxes] == [1, 0]
    said = " ".join(splits.layout.warnings)
    assert "1 box of train without any area left out" in said
    assert "instances_train2017.json, images[1]: train2017 has no '11.png'" in said


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 30) | st.floats(allow_nan=False) | st.sampled_from(["10.png", "cat", ".."]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "bbox", "name"]), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_whatever_a_json_file_holds_is_refused_or_has_boxes_of_known_classes(data: st.DataObject) -> None:
    content = described(10)
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from(["images", "annotations", "categories"]))
        if isinstance(content[part], list) and data.draw(st.booleans()):
            row = content[part][0] if content[part] else None
            if isinstance(row, dict) and row:
                row[data.draw(st.sampled_from(sorted(row)))] = data.draw(JSON_VALUES)
        else:
            content[part] = data.draw(JSON_VALUES)
    try:
        found = coco.parse(content, Path("x.json"))
    except UserError:
        return
    assert len(found.images) == len(found.boxes) == len(found.crowd)
    for boxes, crowd in zip(found.boxes, found.crowd, strict=True):
        assert len(boxes) == len(crowd)
        assert np.isfinite(boxes).all()
        assert (boxes[:, 4] < len(found.classes)).all()


# ---- ImageNet ----

WORDNET = ("n01440764", "n01443537", "n02012849")
WORDS = ("tench, Tinca tinca", "goldfish", "crane")
KIT_ORDER = (2, 0, 1)  # the kit's number 1 is WORDNET[2], and so on
VAL = (1, 3, 2, 1)  # the kit's numbers of the images of val


@pytest.fixture
def imagenet_root(tmp_path: Path) -> Path:
    """Six training images, four flat ones of val, and the development kit."""
    root = tmp_path / "imagenet"
    for row, name in enumerate(WORDNET):
        for index in range(2):
            picture(root / f"train/{name}/{name}_{index}.JPEG", seed=10 * row + index)
    for index in range(4):
        picture(root / f"val/ILSVRC2012_val_{index + 1:08d}.JPEG", seed=100 + index)
    kit = root / "ILSVRC2012_devkit_t12/data"
    kit.mkdir(parents=True)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_bytes(b"".join(b"%d\r\n" % number for number in VAL))
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number + 1, WORDNET[row], WORDS[row], "", 0) for number, row in enumerate(KIT_ORDER)]
    savemat(kit / "meta.mat", {"synsets": np.array([*rows, (4, "n00001740", "entity", "", 3)], fields)})
    return root


def test_imagenet_is_what_torchvision_reads(imagenet_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torchvision.datasets import ImageNet
    from torchvision.datasets.imagenet import parse_val_archive

    splits = listed(f"imagenet:{imagenet_root}")
    truth = [WORDNET[KIT_ORDER[number - 1]] for number in VAL]
    names = {WORDNET[row]: tuple(WORDS[row].split(", ")) for row in range(3)}
    torch.save((names, truth), imagenet_root / "meta.bin")
    sorted_root = imagenet_root.parent / "sorted"
    shutil.copytree(imagenet_root, sorted_root)
    # What torchvision does with the images of val once they are unpacked.
    monkeypatch.setattr("torchvision.datasets.imagenet.extract_archive", lambda archive, folder: None)
    monkeypatch.setattr("torchvision.datasets.imagenet._verify_archive", lambda *_: None)
    parse_val_archive(str(sorted_root), wnids=truth, folder="val")
    for source, split in ((splits.train, "train"), (splits.test, "val")):
        oracle = {Path(path).name: label for path, label in ImageNet(str(sorted_root), split).samples}
        assert dict(zip((Path(name).name for name in source.names), source.labels.tolist(), strict=True)) == oracle
    assert splits.train.classes == ("n01440764 tench", "n01443537 goldfish", "n02012849 crane")
    in_folders = listed(f"imagenet:{sorted_root}")
    assert sorted(in_folders.test.labels) == sorted(splits.test.labels)


def test_all_lists_of_val_say_the_same(imagenet_root: Path) -> None:
    from_kit = listed(f"imagenet:{imagenet_root}").test
    shutil.rmtree(imagenet_root / "ILSVRC2012_devkit_t12")
    files = [Path(name).name for name in from_kit.names]
    solution = imagenet_root / "LOC_val_solution.csv"
    rows = [
        f"{file[:-5]},{WORDNET[label]} 1 2 3 4 {WORDNET[label]} 5 6 7 8"
        for file, label in zip(files, from_kit.labels, strict=True)
    ]
    solution.write_text("ImageId,PredictionString\n" + "\n".join(rows))
    assert listed(f"imagenet:{imagenet_root}").test.labels.tolist() == from_kit.labels.tolist()
    solution.unlink()
    words = [f"{name} {text}\n" for name, text in zip(WORDNET, WORDS, strict=True)]
    (imagenet_root / "synset_words.txt").write_text("".join(words))
    lines = [f"{file} {label}\n" for file, label in zip(files, from_kit.labels, strict=True)]
    (imagenet_root / "val.txt").write_text("".join(lines))
    from_list = listed(f"imagenet:{imagenet_root}")
    assert from_list.test.labels.tolist() == from_kit.labels.tolist()
    assert from_list.layout.read_from["test"] == {"val.txt": 4}
    with open(imagenet_root / "val.txt", "a") as opened:
        opened.write(lines[0].replace(" 0", " 1").replace(" 2", " 1"))
    with pytest.raises(UserError, match=r"val\.txt, line 5: '.*' was already named in val\.txt, line 1"):
        listed(f"imagenet:{imagenet_root}")


SOLUTIONS = {
    "as Windows writes it": (lambda rows: "\r\n".join(rows).encode("utf-8-sig"), ""),
    "without its header": (lambda rows: "\n".join(rows[1:]).encode(), ""),
    "an image twice": (lambda rows: "\n".join([*rows, rows[1]]).encode(), r"line 6: '.*' was already named in .*, line 2"),
    "with semicolons": (lambda rows: "\n".join(rows).replace(",", ";").encode(), r"line 1: .* has no class"),
    "in UTF-16": (lambda rows: "\n".join(rows).encode("utf-16"), r"is no text in UTF-8: byte 0\. Save it as UTF-8"),
    "empty": (lambda rows: b"", "does not state the class of 4 images of val"),
}


@pytest.mark.parametrize(("written", "says"), SOLUTIONS.values(), ids=SOLUTIONS)
def test_kaggles_list_is_read_or_refused_with_its_line(written: Any, says: str, imagenet_root: Path) -> None:
    expected = listed(f"imagenet:{imagenet_root}").test
    shutil.rmtree(imagenet_root / "ILSVRC2012_devkit_t12")
    files = [Path(name).stem for name in expected.names]
    rows = [f"{file},{WORDNET[label]} 1 2 3 4" for file, label in zip(files, expected.labels, strict=True)]
    (imagenet_root / "LOC_val_solution.csv").write_bytes(written(["ImageId,PredictionString", *rows]))
    if says:
        with pytest.raises(UserError, match=says):
            listed(f"imagenet:{imagenet_root}")
    else:
        assert listed(f"imagenet:{imagenet_root}").test.labels.tolist() == expected.labels.tolist()


def test_kaggles_folders_are_found(imagenet_root: Path, tmp_path: Path) -> None:
    inner = tmp_path / "kaggle/ILSVRC/Data/CLS-LOC"
    inner.mkdir(parents=True)
    for part in ("train", "val"):
        shutil.move(imagenet_root / part, inner / part)
    shutil.move(imagenet_root / "ILSVRC2012_devkit_t12", tmp_path / "kaggle")
    splits = listed(f"imagenet:{tmp_path / 'kaggle'}")
    assert (len(splits.train.names), len(splits.test.names)) == (6, 4)


def test_a_part_of_the_classes_is_judged_on_its_images_alone(imagenet_root: Path) -> None:
    shutil.rmtree(imagenet_root / f"train/{WORDNET[2]}")
    splits = listed(f"imagenet:{imagenet_root}")
    assert splits.train.classes == ("n01440764 tench", "n01443537 goldfish")
    assert len(splits.test.names) == 2
    assert "2 images of val left out, whose classes have no training images" in splits.layout.warnings


def break_truth(root: Path) -> None:
    file = root / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    file.write_text("1\n3\nx\n1\n")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda root: (root / "val/ILSVRC2012_val_00000002.JPEG").unlink(),
            r"1 image of .* missing in .*val, such as .*00000002",
        ),
        (
            lambda root: picture(root / "val/stranger.JPEG"),
            r"does not state the class of 1 image of val, such as stranger\.JPEG",
        ),
        (break_truth, r"ground_truth\.txt, line 3: 'x' is no class"),
        (lambda root: shutil.rmtree(root / "ILSVRC2012_devkit_t12"), r"no file says the classes of its 4 images"),
        (lambda root: (root / "ILSVRC2012_devkit_t12/data/meta.mat").unlink(), r"meta\.mat says, which is missing"),
        (lambda root: (root / "ILSVRC2012_devkit_t12/data/meta.mat").write_bytes(b"x" * 200), r"no meta\.mat of ILSVRC 2012"),
        (lambda root: (root / "train" / WORDNET[0]).rename(root / "train/tench"), r"no WordNet number, such as 'tench'"),
        (lambda root: picture(root / "train/x.JPEG"), r"lie outside every class folder: 1, such as x\.JPEG"),
        (lambda root: shutil.rmtree(root / "train"), r"has no folder train"),
    ],
)
def test_a_damaged_imagenet_is_refused(damage: Any, says: str, imagenet_root: Path) -> None:
    damage(imagenet_root)
    with pytest.raises(UserError, match=says):
        listed(f"imagenet:{imagenet_root}")


def test_a_hostile_meta_file_runs_nothing_and_ends_in_a_sentence(imagenet_root: Path) -> None:
    file = imagenet_root / "ILSVRC2012_devkit_t12/data/meta.mat"
    content = file.read_bytes()
    for cut in (0, 50, 128, 140, 300, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"no meta\.mat of ILSVRC 2012"):
            imagenet._read_meta(str(file))


# ---- Places365 ----

PLACES = ("/a/airfield", "/a/airport/entrance", "/b/bar")


def easy_form(root: Path) -> None:
    for row, name in enumerate(("airfield", "airport-entrance", "bar")):
        for split, count in (("train", 2), ("val", 1)):
            for index in range(count):
                picture(root / split / name / f"{index:08d}.jpg", seed=10 * row + index)


def official_form(root: Path) -> None:
    lists = root / "filelist_places365-standard"
    lists.mkdir(parents=True)
    (lists / "categories_places365.txt").write_text("".join(f"{name} {row}\n" for row, name in enumerate(PLACES)))
    train, val = [], []
    for row, name in enumerate(PLACES):
        for index in range(2):
            picture(root / f"data_256{name}/{index:08d}.jpg", seed=10 * row + index)
            train.append(f"{name}/{index:08d}.jpg {row}\r\n")
        picture(root / f"val_256/Places365_val_{row:08d}.jpg", seed=100 + row)
        val.append(f"Places365_val_{row:08d}.jpg {row}\n")
    (lists / "places365_train_standard.txt").write_bytes("".join(train).encode())
    (lists / "places365_val.txt").write_text("".join(val))


@pytest.mark.parametrize(
    ("form", "classes"),
    [(easy_form, ("airfield", "airport-entrance", "bar")), (official_form, ("airfield", "airport/entrance", "bar"))],
)
def test_places_is_read_in_both_of_its_forms(form: Any, classes: tuple[str, ...], tmp_path: Path) -> None:
    form(tmp_path)
    splits = listed(f"places365:{tmp_path}")
    assert splits.train.classes == splits.test.classes == classes
    assert splits.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert splits.test.labels.tolist() == [0, 1, 2]
    assert splits.test.read(0).shape == (12, 16, 3)


def test_places_by_its_lists_is_what_torchvision_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import Places365

    official_form(tmp_path)
    for file in (tmp_path / "filelist_places365-standard").iterdir():
        shutil.copy(file, tmp_path / file.name)
    shutil.copytree(tmp_path / "data_256", tmp_path / "data_256_standard")
    monkeypatch.setattr(Places365, "_check_integrity", lambda *_: True)
    splits = listed(f"places365:{tmp_path}")
    for source, split in ((splits.train, "train-standard"), (splits.test, "val")):
        oracle = Places365(str(tmp_path), split, small=True)
        assert source.labels.tolist() == oracle.targets
        assert all(path.endswith(name.split("/")[-1]) for (path, _), name in zip(oracle.imgs, source.names, strict=True))


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("places365_val.txt", "x.jpg 3", r"places365_val\.txt, line 4: no name and number of a class below 3"),
        ("places365_val.txt", "../x.jpg 1", r"places365_val\.txt, line 4: '\.\./x\.jpg' is no name"),
        ("places365_val.txt", "Places365_val_00000000.jpg 1", r"was already named in places365_val\.txt, line 1"),
        (
            "places365_val.txt",
            "x.jpg 1",
            r"and of test, which judges, none is left out: places365_val\.txt, line 4: val_256 has no x",
        ),
        ("places365_train_standard.txt", "/a/yard/x.jpg 1", r"line 7: a/yard/x\.jpg lies in the folder of another class than"),
        (
            "places365_train_standard.txt",
            "/a/airport/entrance/x.jpg 1",
            r"more than max_unreadable=0\.01.*line 7: data_256 has no a/airp",
        ),
        (
            "categories_places365.txt",
            "/c/cafe 7",
            r"categories_places365\.txt, line 4: '/c/cafe 7' is not a class with the number 3",
        ),
    ],
)
def test_a_wrong_line_of_a_list_of_places_is_refused_with_its_number(file: str, line: str, says: str, tmp_path: Path) -> None:
    official_form(tmp_path)
    with open(tmp_path / "filelist_places365-standard" / file, "a") as opened:
        opened.write(f"{line}\n")
    with pytest.raises(UserError, match=says):
        listed(f"places365:{tmp_path}")


def test_a_class_of_val_without_training_images_is_refused(tmp_path: Path) -> None:
    easy_form(tmp_path)
    picture(tmp_path / "val/yard/1.jpg")
    with pytest.raises(UserError, match=r"the class 'yard' in .*val has no training images"):
        listed(f"places365:{tmp_path}")

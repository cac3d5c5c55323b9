"""VOC: read as torchvision reads it, composed as its layout demands, and every kind of damage reported with file and line."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import VOCDetection, VOCSegmentation

from ktray import images, plugins
from ktray.cli import main
from ktray.datasets.voc import annotation_xml
from ktray.errors import UserError
from ktray.evaluation_presets import ANNOTATIONS
from ktray.images import CROWD, DIFFICULT, TRUNCATED
from ktray.images.annotation_files import BadAnnotation
from ktray.pool import LocalPool
from ktray.runs.data_check import describe
from ktray.runs.voc_composition import _material, compose
from tests.pictures import data_spec, listed, picture

COUNT = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composed data set, not to be changed."""
    out = tmp_path_factory.mktemp("made")
    compose(data_spec("fashion_mnist_mini"), out, images=COUNT, size=80, seed=3, coco=True)
    return out


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of its VOC2007, to be damaged."""
    shutil.copytree(made / "VOCdevkit", tmp_path / "VOCdevkit")
    return tmp_path / "VOCdevkit" / "VOC2007"


def spec_of(root: Path, **fields: Any) -> Any:
    return data_spec({"kind": "voc", "path": str(root), "size": 32, **fields})


def first(root: Path, split: str = "train") -> str:
    """The name of the first image of a list."""
    return (root / f"ImageSets/Main/{split}.txt").read_text().split()[0]


# ---- torchvision reads the same ----


@pytest.mark.parametrize(("split", "theirs"), [("train", "trainval"), ("test", "test")])
def test_boxes_and_their_flags_are_those_that_torchvision_reads(split: str, theirs: str, made: Path) -> None:
    source = getattr(listed(spec_of(made)), split)
    oracle = VOCDetection(str(made), year="2007", image_set=theirs)
    assert len(oracle) == len(source.names)
    for row, (decoded, target) in enumerate(oracle):
        objects = target["annotation"]["object"]
        corners = [[int(each["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")] for each in objects]
        assert (source.boxes[row][:, :4] + [1, 1, 0, 0] == corners).all()
        assert [source.classes[int(number)] for number in source.boxes[row][:, 4]] == [each["name"] for each in objects]
        assert source.box_flags[row][:, DIFFICULT].tolist() == [each["difficult"] == "1" for each in objects]
        assert source.box_flags[row][:, TRUNCATED].tolist() == [each["truncated"] == "1" for each in objects]
        assert source.sizes[row].tolist() == [decoded.height, decoded.width]
        easy = {each["name"] for each in objects if each["difficult"] == "0"}
        every = {each["name"] for each in objects}
        assert source.presence[row].tolist() == [1 if name in easy else 0 if name in every else -1 for name in source.classes]


@pytest.mark.parametrize(("split", "theirs"), [("train", "train"), ("test", "val")])
def test_masks_are_those_that_torchvision_reads(split: str, theirs: str, made: Path) -> None:
    source = getattr(listed(spec_of(made, task="segmentation")), split)
    oracle = VOCSegmentation(str(made), year="2007", image_set=theirs)
    assert len(oracle) == len(source.names)
    for row, (_, mask) in enumerate(oracle):
        assert (source.mask(row) == np.asarray(mask)).all()


def test_labels_alone_are_those_of_the_lists(made: Path) -> None:
    alone, with_boxes = listed(spec_of(made, task="classification")), listed(spec_of(made))
    assert (alone.train.presence == with_boxes.train.presence).all()
    assert alone.test.presence.dtype == np.int8
    assert alone.train.boxes is None


# ---- the composed images ----


def test_composed_boxes_are_the_bounds_of_the_objects_in_the_masks(made: Path) -> None:
    root = made / "VOCdevkit/VOC2007"
    splits, counted = listed(spec_of(made)), 0
    for source in (splits.train, splits.test):
        for row, name in enumerate(source.names):
            mask = np.asarray(Image.open(root / f"SegmentationObject/{Path(name).stem}.png"))
            classes = np.asarray(Image.open(root / f"SegmentationClass/{Path(name).stem}.png"))
            for number, (box, flags) in enumerate(zip(source.boxes[row], source.box_flags[row], strict=True), 1):
                if flags[DIFFICULT]:
                    continue  # void in the masks, as in VOC
                rows, columns = np.nonzero(mask == number)
                assert box[:4].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert set(classes[mask == number]) == {box[4] + 1}
                counted += 1
    assert counted > COUNT


def test_a_spec_says_which_annotations_its_images_have(made: Path) -> None:
    others = (data_spec(text) for text in (f"coco:{made}/coco?train=train&test=test", "synthetic", "fashion_mnist_mini"))
    for spec in (*(spec_of(made, task=task) for task in ("detection", "classification", "segmentation")), *others):
        module = plugins.module_of("dataset", spec)
        present = {name for name in ANNOTATIONS if getattr(module.load(spec).train, name) is not None}
        assert present == set(module.annotations_of(spec) if hasattr(module, "annotations_of") else ("labels",)), spec


def test_the_form_of_coco_holds_the_same_boxes_and_the_masks_that_pycocotools_draws(made: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    of_voc, of_coco = listed(spec_of(made)), listed(f"coco:{made}/coco?train=train&test=test")
    for split in ("train", "test"):
        voc, same = getattr(of_voc, split), getattr(of_coco, split)
        assert [Path(name).name for name in voc.names] == [Path(name).name for name in same.names]
        assert all((first == other).all() for first, other in zip(voc.boxes, same.boxes, strict=True))
        crowds = [flags[:, CROWD].tolist() for flags in same.box_flags]
        assert [flags[:, DIFFICULT].tolist() for flags in voc.box_flags] == crowds
    oracle = coco.COCO(str(made / "coco/annotations/instances_test.json"))
    for number in oracle.getImgIds():
        objects = oracle.loadAnns(oracle.getAnnIds(number))
        drawn = np.asarray(Image.open(made / f"VOCdevkit/VOC2007/SegmentationObject/{number:06d}.png"))
        for index, each in enumerate(objects, 1):
            if not each["iscrowd"]:
                assert (oracle.annToMask(each) == (drawn == index)).all()
                assert each["area"] == (drawn == index).sum()


def test_a_composed_set_has_what_its_tests_need(made: Path) -> None:
    source = listed(spec_of(made)).test
    flags, counts = np.concatenate(source.box_flags), [len(boxes) for boxes in source.boxes]
    assert flags[:, DIFFICULT].any()
    assert flags[:, TRUNCATED].any()
    assert set(counts) <= {1, 2, 3, 4}
    assert len(set(counts)) > 1
    assert all((~each[:, DIFFICULT]).any() for each in source.box_flags)


def test_the_same_seed_composes_the_same_bytes_and_another_one_other_images(made: Path, tmp_path: Path) -> None:
    def sums(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    compose(data_spec("fashion_mnist_mini"), tmp_path / "same", images=COUNT, size=80, seed=3, coco=True)
    compose(data_spec("fashion_mnist_mini"), tmp_path / "other", images=COUNT, size=80, seed=4, coco=True)
    assert sums(tmp_path / "same") == sums(made)
    first, other = sums(made), sums(tmp_path / "other")
    assert all(first[name] != other[name] for name in first if name.endswith(".jpg"))


def test_images_to_train_on_to_hold_out_and_to_test_share_no_object() -> None:
    spec = data_spec("fashion_mnist_mini")
    material, classes = _material(spec)
    parts = images.split_rows(listed(spec), spec.split)
    assert (material["train"].rows == parts["train"][1]).all()
    assert material["test"].source.names == parts["test"][0].names
    assert sorted(classes) == classes
    drawn, label = material["train"].draw(np.random.default_rng(0))
    assert drawn.shape == (28, 28, 3)
    assert 0 <= label < 10


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--from", "synthetic?classes=1"], "no classes to compose"),
        (["--from", "fashion_mnist_mini", "--images", "3"], "too few"),
        (["--from", "fashion_mnist_mini", "--images", "1000000"], "Give at most 999,999"),
        (["--from", "fashion_mnist_mini", "--size", "20"], "Give 48 to 4096 pixels"),
        ([], "make-voc composes labelled images"),
    ],
)
def test_what_cannot_be_composed_is_refused(arguments: list[str], says: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["data", "make-voc", str(tmp_path / "out"), *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "file/below", "dangling", "/dev/null", "/dev/null/below", "/proc/below", "x" * 300])
def test_a_place_where_no_folder_can_be_is_refused(place: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "below")
    assert main(["data", "make-voc", str(tmp_path / place), "--from", "fashion_mnist_mini", "--images", "4"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ktray: ")
    assert "\n" not in err.strip()
    assert Path("/dev/null").is_char_device()


def test_the_command_composes_and_names_what_it_made(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["data", "make-voc", str(out), "--from", "fashion_mnist_mini", "--images", "8", "--size", "64"]) == 0
    assert f"voc:{out}" in capsys.readouterr().out
    assert main(["data", "check", f"voc:{out}"]) == 0
    said = capsys.readouterr().out
    assert "train: 4 images, 10 classes, several in an image" in said
    assert "4 VOC2007/ImageSets/Main/trainval.txt" in said
    assert "annotations: boxes of the XML files, which count pixels from 1" in said
    assert main(["data", "make-voc", str(out), "--from", "fashion_mnist_mini"]) == 2
    assert "already holds" in capsys.readouterr().err


def test_photos_in_class_folders_without_a_test_split_are_composed_too(tmp_path: Path) -> None:
    for label in ("small cat", "dog/wild"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(12):
            picture(index, 40).save(tmp_path / f"photos/{label}/{index}.png")
    made = compose(data_spec(f"imagefolder:{tmp_path / 'photos'}"), tmp_path / "out", images=8, size=64)
    assert made["classes"] == ["dog", "small_cat"]
    splits = listed(spec_of(tmp_path / "out"))
    assert splits.train.classes == ("dog", "small_cat")
    assert len(splits.test.names) == 4


# ---- where the data are, and which lists count ----


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_three_folders_are_understood_and_mean_the_same_data(below: str, made: Path) -> None:
    assert images.identity(spec_of(made / below)) == images.identity(spec_of(made))


def test_a_folder_of_another_year_is_refused_with_the_year_that_it_has(made: Path) -> None:
    with pytest.raises(UserError, match=r"is VOC2007, and the year is 2012.*year: 2007"):
        listed(spec_of(made / "VOCdevkit/VOC2007", year=2012))
    with pytest.raises(UserError, match=r"has no VOC2012.*there is VOC2007"):
        listed(spec_of(made, year="2012"))


def test_two_unpacked_archives_side_by_side_are_refused(made: Path, tmp_path: Path) -> None:
    for name in ("trainval", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "VOCdevkit").symlink_to(made / "VOCdevkit")
    with pytest.raises(UserError, match=r"lies in several places.*copy both into one VOC2007"):
        listed(spec_of(tmp_path))


@pytest.mark.parametrize(
    ("fields", "lists"),
    [
        ({}, {"train": "trainval", "test": "test"}),
        ({"train": "train"}, {"train": "train", "val": "val", "test": "test"}),
        ({"train": "train", "test": "val"}, {"train": "train", "test": "val"}),
        ({"task": "segmentation"}, {"train": "train", "test": "val"}),
        ({"task": "segmentation", "train": "trainval"}, {"train": "trainval", "test": "test"}),
    ],
)
def test_the_lists_are_those_of_the_protocol(fields: dict[str, str], lists: dict[str, str], made: Path) -> None:
    read_from = listed(spec_of(made, **fields)).layout.read_from
    assert {split: Path(next(iter(files))).stem for split, files in read_from.items()} == lists


def test_two_years_are_trained_on_together_and_judged_on_the_first(made: Path, tmp_path: Path) -> None:
    for year in ("2007", "2012"):
        shutil.copytree(made / "VOCdevkit/VOC2007", tmp_path / f"VOC{year}")
    splits = listed(spec_of(tmp_path, year="2007+2012"))
    assert (len(splits.train.names), len(splits.test.names)) == (COUNT, COUNT // 2)
    assert {name.split("/")[0] for name in splits.train.names} == {"VOC2007", "VOC2012"}
    assert listed(spec_of(tmp_path, year=2012)).layout.read_from["test"] == {"VOC2012/ImageSets/Main/val.txt": COUNT // 4}


def test_trainval_is_not_judged_on_val() -> None:
    with pytest.raises(ValueError, match="trainval holds the images of val"):
        spec_of(Path("/p"), train="trainval", test="val")


# ---- what is written is what was read ----


def test_squares_whole_images_and_presence_go_through_the_store(made: Path, tmp_path: Path) -> None:
    spec = spec_of(made)
    images.write(spec, tmp_path, LocalPool())
    source, test = listed(spec).test, images.open_split(tmp_path, "test", spec)
    whole = test.whole()
    assert (test.presence == source.presence).all()
    for row in range(len(source.names)):
        assert (whole.boxes[row] == source.boxes[row]).all()
        assert (whole.box_flags[row] == source.box_flags[row]).all()
        assert whole.read(row, None).shape == (*source.sizes[row], 3)
        assert len(test.boxes[row]) == len(test.box_flags[row]) <= len(source.boxes[row])


def test_the_sample_of_a_dry_run_has_all_that_was_drawn(made: Path, tmp_path: Path) -> None:
    spec, source = spec_of(made), listed(spec_of(made)).test
    images.write_sample(spec, tmp_path, 3)
    test = images.open_split(tmp_path, "test", spec)
    rows = [source.names.index(name) for name in test.names]
    assert len(rows) == 3
    assert (test.presence == source.presence[rows]).all()
    assert all((test.whole().boxes[at] == source.boxes[row]).all() for at, row in enumerate(rows))


def test_masks_are_read_on_demand(made: Path, tmp_path: Path) -> None:
    spec = spec_of(made, task="segmentation")
    images.write(spec, tmp_path, LocalPool())
    whole = images.open_split(tmp_path, "test", spec).whole()
    assert whole.mask(0).shape == tuple(whole.sizes[0])
    assert set(np.unique(whole.mask(0))) <= {*range(11), 255}


def test_a_flag_in_an_xml_file_is_part_of_the_identity(root: Path) -> None:
    before = images.identity(spec_of(root))
    file = root / f"Annotations/{first(root)}.xml"
    text = file.read_text()
    file.write_text(text.replace("<pose>Unspecified</pose>", "<pose>Left</pose>"))
    assert images.identity(spec_of(root)) == before
    file.write_text(text.replace("<truncated>0</truncated>", "<truncated>1</truncated>", 1))
    assert images.identity(spec_of(root)) != before


# ---- damage: file and line; left out of training, refused where it judges ----

XML = """<annotation>
 <size><width>{width}</width><height>{height}</height></size>
 <object>
  <name>{name}</name>
  <difficult>{difficult}</difficult>
  <bndbox><xmin>{xmin}</xmin><ymin>1</ymin>
   <xmax>{xmax}</xmax><ymax>9</ymax></bndbox>
 </object>
</annotation>
"""
RIGHT = {"width": 20, "height": 10, "name": "cat", "difficult": 0, "xmin": 1, "xmax": 20}
BOMB = '<!DOCTYPE a [<!ENTITY b "cc"><!ENTITY d "&b;&b;&b;">]>\n<annotation>&d;</annotation>'
BROKEN = [
    (XML.replace("</object>", ""), r"line 9: broken XML: mismatched tag"),
    (XML.format(**RIGHT)[:150], r"broken XML: no element found"),
    ("", r"line 1: broken XML"),
    (BOMB, r"line 1: a document type or an entity"),
    ("<a>" * 40, r"begins with <a>"),
    ("<annotation>" + "<a>" * 40, r"line 1: more than 32 elements"),
    (XML.format(**RIGHT).replace("<object>", "<size/><object>"), r"line 3: too many elements <size>"),
    (XML.format(**{**RIGHT, "name": "cta"}), r"line 4: unknown class 'cta'; did you mean 'cat'\?"),
    (XML.format(**{**RIGHT, "difficult": 2}), r"line 5: <difficult> is '2', not 0 or 1"),
    (
        XML.format(**{**RIGHT, "xmax": 30}),
        r"line 6: cat: its box reaches from \(0, 0\) to \(30, 9\), outside the image of 20 x 10",
    ),
    (XML.format(**{**RIGHT, "xmin": -5}), r"line 6: cat: its box reaches from \(-6, 0\)"),
    (XML.format(**{**RIGHT, "xmin": 15, "xmax": 3}), r"line 6: cat: its box is -11 pixels wide"),
    (XML.format(**{**RIGHT, "xmin": "nan"}), r"line 6: <xmin> is 'nan', not a number"),
    (XML.format(**{**RIGHT, "xmin": "1_0"}), r"line 6: <xmin> is '1_0', not a number"),
    (
        XML.format(**{**RIGHT, "xmin": 0.25, "xmax": 0.75}).replace("<ymax>9", "<ymax>0.9"),
        r"line 6: cat: its box ends within the first pixel, as one in shares of the sides does",
    ),
    (XML.format(**RIGHT).replace("<ymin>1</ymin>", ""), r"line 3: <ymin> is missing"),
    (XML.format(**RIGHT).replace("<ymin>1", "<ymin>1</ymin><ymin>2"), r"line 6: a second <ymin>"),
    (XML.format(**{**RIGHT, "width": 21}), r"line 2: 21 x 10 pixels, but 1\.png has 20 x 10"),
    (XML.format(**{**RIGHT, "width": "1e9"}), r"line 2: an image of 1e\+09 x 10 pixels"),
    ('<?xml version="1.0" encoding="klingon"?><annotation/>', r"broken XML"),
]


def annotation(content: str, folder: Path) -> Any:
    """What is read of an XML file beside an image of 20 x 10 pixels."""
    image, file = folder / "1.png", folder / "1.xml"
    if not image.exists():
        Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(image)
    file.write_text(content)
    annotation_xml._parsed.cache_clear()  # the same file is written again and again within a step of the clock
    return annotation_xml.read_annotation(file, image, {"cat": 0, "dog": 1})


@pytest.mark.parametrize(("content", "says"), BROKEN, ids=[says[:40] for _, says in BROKEN])
def test_a_broken_xml_file_is_named_with_its_line(content: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(BadAnnotation, match=rf"1\.xml.*{says}"):
        annotation(content, tmp_path)


@pytest.mark.parametrize(
    ("changed", "box"),
    [
        ({}, [0, 0, 20, 9, 0]),
        ({"xmin": 0, "xmax": 21}, [0, 0, 20, 9, 0]),  # clipped
        ({"xmin": "2.5"}, [1.5, 0, 20, 9, 0]),  # VOC 2012 has a few of these
        ({"width": 0, "height": 0}, [0, 0, 20, 9, 0]),  # some tools state no size
        ({"difficult": "", "name": " dog "}, [0, 0, 20, 9, 1]),
    ],
)
def test_what_tools_write_is_read(changed: dict[str, Any], box: list[float], tmp_path: Path) -> None:
    found = annotation(XML.format(**{**RIGHT, **changed}), tmp_path)
    assert found.boxes.tolist() == [box]
    assert found.clipped == (changed.get("xmin") == 0)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_xml_file_is_refused_or_has_boxes_inside_its_image(tmp_path_factory: Any, data: st.DataObject) -> None:
    content = XML.format(**RIGHT)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 12))
        content = content[:at] + data.draw(st.text("<>/&;!0123456789-.ena xmi\n\0", max_size=8)) + content[at + length :]
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    try:
        found = annotation(content, folder)
    except BadAnnotation:
        return
    assert (found.boxes[:, :2] >= 0).all()
    assert (found.boxes[:, 2:4] <= [20, 10]).all()
    assert (found.boxes[:, 2:4] > found.boxes[:, :2]).all()
    assert found.size == (10, 20)


def break_xml(root: Path, name: str) -> str:
    (root / f"Annotations/{name}.xml").write_text("<annotation>\n<object>")
    return rf"{name}\.xml, line 2: broken XML"


def lose_xml(root: Path, name: str) -> str:
    (root / f"Annotations/{name}.xml").unlink()
    return rf"{name}\.xml: No such file"


def lose_image(root: Path, name: str) -> str:
    (root / f"JPEGImages/{name}.jpg").unlink()
    return rf"\.txt, line 1: JPEGImages has no image {name}"


def replace_image(root: Path, name: str) -> str:
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / f"JPEGImages/{name}.jpg")
    return rf"{name}\.xml, line 7: .* pixels, but {name}\.jpg has 9 x 9"


def name_unknown_class(root: Path, name: str) -> str:
    file = root / f"Annotations/{name}.xml"
    file.write_text(file.read_text().replace("<name>", "<name>un", 1))
    return rf"{name}\.xml, line 14: unknown class"


@pytest.mark.parametrize("damage", [break_xml, lose_xml, lose_image, replace_image, name_unknown_class])
def test_a_damaged_training_image_is_left_out_and_a_damaged_test_image_is_refused(damage: Any, root: Path) -> None:
    name = first(root)
    says = damage(root, name)
    spec = spec_of(root, max_unreadable=0.1)
    splits = listed(spec)
    assert f"VOC2007/JPEGImages/{name}.jpg" not in splits.train.names
    assert len(splits.train.names) == len(splits.train.presence) == len(splits.train.boxes) == COUNT // 2 - 1
    (warning,) = (each for each in describe(spec)["warnings"] if "left out of train" in each)
    assert re.search(says, warning)
    with pytest.raises(UserError, match=rf"1 of 12 images cannot be used, more than max_unreadable=0\.01.*{says}"):
        listed(spec_of(root))
    says = damage(root, first(root, "test"))
    with pytest.raises(UserError, match=rf"and of test, which judges, none is left out: .*{says}"):
        listed(spec)


def shrink_mask(file: Path) -> str:
    Image.open(file).resize((9, 9), Image.Resampling.NEAREST).save(file)
    return r"SegmentationClass/.*\.png: 9 x 9 pixels, but .*\.jpg has"


def lose_mask(file: Path) -> str:
    file.unlink()
    return r"SegmentationClass/.*\.png: .*No such file"


def colour_mask(file: Path) -> str:
    Image.open(file).convert("RGB").save(file)
    return r"SegmentationClass/.*\.png: a mask holds numbers of classes, as a palette or grey; this one is in RGB"


@pytest.mark.parametrize("damage", [shrink_mask, lose_mask, colour_mask])
def test_a_mask_that_is_not_that_of_its_image_is_reported(damage: Any, root: Path) -> None:
    says = damage(root / f"SegmentationClass/{first(root)}.png")
    with pytest.raises(UserError, match=says):
        listed(spec_of(root, task="segmentation"))
    splits = listed(spec_of(root, task="segmentation", max_unreadable=0.5))
    assert len(splits.train.names) == COUNT // 4 - 1


def test_a_mask_with_other_values_makes_its_image_unreadable_as_the_check_of_data_says(root: Path, tmp_path: Path) -> None:
    file = root / f"SegmentationClass/{first(root)}.png"
    Image.fromarray(np.full_like(np.asarray(Image.open(file)), 77)).save(file)
    spec, says = spec_of(root, task="segmentation", max_unreadable=0.5), "a pixel has the value 77, and a mask has 0 to 10"
    assert any(says in each for each in describe(spec)["warnings"])
    images.write(spec, tmp_path / "out", LocalPool())
    assert f"{says} for 10 classes, or 255" in (tmp_path / "out/splits.json").read_text()
    with pytest.raises(ValueError, match=r"unreadable, more than max_unreadable=0\.01"):
        images.write(spec_of(root, task="segmentation"), tmp_path / "strict", LocalPool())


# ---- lists ----


def test_lists_with_windows_line_ends_and_a_bom_are_read_alike(root: Path) -> None:
    before = listed(spec_of(root))
    for file in (root / "ImageSets/Main").glob("*.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    after = listed(spec_of(root))
    assert after.train.names == before.train.names
    assert (after.train.presence == before.train.presence).all()


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("trainval.txt", "../../etc/passwd", r"trainval\.txt, line 13: '\.\./\.\./etc/passwd' is no name of an image"),
        ("trainval.txt", "/etc/passwd", r"trainval\.txt, line 13: '/etc/passwd' is no name"),
        ("trainval.txt", "000001", r"trainval\.txt, line 13: '000001' was already named in trainval\.txt, line 1"),
        ("trainval.txt", "000013", r"1 image is in train and in test, such as VOC2007/JPEGImages/000013\.jpg"),
        ("trainval.txt", "000001 2 3", r"trainval\.txt, line 13: '000001 2 3' is not the name of an image\. .* no blanks"),
        ("trainval.txt", "IMG 0001", r"trainval\.txt, line 13: 'IMG 0001' is not the name of an image\. .* no blanks"),
        ("trainval.txt", "a.jpg", r"trainval\.txt, line 13: 'a\.jpg' is the name of a file\. .* no suffix: write a\."),
        ("Bag_trainval.txt", "000001", r"Bag_trainval\.txt, line 13: '000001' is not an image and 1, 0 or -1"),
        ("Bag_trainval.txt", "000013 1", r"Bag_trainval\.txt, line 13: the image '000013' is not in trainval\.txt"),
        ("Bag_trainval.txt", "000001 1", r"Bag_trainval\.txt, line 13: the image '000001' was named before"),
        ("Bag_trainval.txt", "000001 yes", r"Bag_trainval\.txt, line 13: '000001 yes' is not"),
    ],
)
def test_a_wrong_line_of_a_list_is_refused_with_its_number(file: str, line: str, says: str, root: Path) -> None:
    with open(root / "ImageSets/Main" / file, "a") as opened:
        opened.write(f"{line}\n")
    with pytest.raises(UserError, match=says):
        listed(spec_of(root))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_damaged_list_is_refused_or_names_images_that_exist(made: Path, tmp_path_factory: Any, data: st.DataObject) -> None:
    root = tmp_path_factory.getbasetemp() / "damaged_lists" / "VOC2007"
    if not root.exists():
        shutil.copytree(made / "VOCdevkit/VOC2007", root)
    name = data.draw(st.sampled_from(["trainval.txt", "test.txt", "Bag_trainval.txt"]))
    content = (made / f"VOCdevkit/VOC2007/ImageSets/Main/{name}").read_bytes()
    at, length = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 20))
    drawn = data.draw(st.text("0123456789 -\r\n\t./\\\0\u2028é", max_size=12)).encode() + data.draw(st.binary(max_size=2))
    (root / f"ImageSets/Main/{name}").write_bytes(content[:at] + drawn + content[at + length :])
    try:
        splits = listed(spec_of(root, max_unreadable=1))
    except UserError:
        return
    else:
        for source in (splits.train, splits.test):
            assert all((root.parent / each).is_file() for each in source.names)
            assert len(set(source.names)) == len(source.presence)
            assert set(np.unique(source.presence)) <= {-1, 0, 1}
    finally:
        (root / f"ImageSets/Main/{name}").write_bytes(content)


def test_a_list_that_lacks_an_image_or_is_no_text_is_refused(root: Path) -> None:
    file = root / "ImageSets/Main/Bag_trainval.txt"
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"Bag_trainval\.txt lacks the image '000001' of trainval\.txt, line 1"):
        listed(spec_of(root))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"Bag_trainval\.txt is no text in UTF-8: byte 0"):
        listed(spec_of(root))
    file.unlink()
    with pytest.raises(UserError, match=r"there is no list .*Bag_trainval\.txt"):
        listed(spec_of(root))


def test_without_lists_of_classes_the_objects_say_which_classes_there_are(root: Path) -> None:
    before = listed(spec_of(root))
    for file in (root / "ImageSets/Main").glob("*_*.txt"):
        file.unlink()
    after = listed(spec_of(root))
    assert (after.train.presence == before.train.presence).all()
    assert after.train.classes == before.train.classes
    assert after.layout.classes == "the XML files of the training images, in alphabetical order"
    with pytest.raises(UserError, match=r"has no lists of classes.*task: detection"):
        listed(spec_of(root, task="classification"))


def test_lists_that_contradict_the_objects_are_reported_and_count(root: Path) -> None:
    file = root / "ImageSets/Main/Bag_trainval.txt"
    name, value = file.read_text().split()[:2]
    other = "-1" if value == "1" else " 1"
    file.write_text(file.read_text().replace(f"{name} {value:>2}", f"{name} {other}", 1))
    splits = listed(spec_of(root))
    assert splits.train.presence[0, splits.train.classes.index("Bag")] == int(other)
    (warning,) = (each for each in splits.layout.warnings if "contradict" in each)
    assert f"{name} has {int(other)} for Bag in the list and {value} by objects" in warning


def test_the_twenty_classes_of_the_real_kit_keep_its_numbers(root: Path) -> None:
    folder = root / "ImageSets/Main"
    for file in folder.glob("*_*.txt"):
        file.unlink()
    names = (folder / "trainval.txt").read_text().split()
    for name in ("person", "cat"):
        for split in ("trainval", "test"):
            (folder / f"{name}_{split}.txt").write_text("".join(f"{each} -1\n" for each in names))
    with pytest.raises(UserError, match=r"there is no list .*aeroplane_trainval\.txt"):
        listed(spec_of(root, task="classification"))

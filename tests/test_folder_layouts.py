"""Folders of images as people have them: what is a split, what a class, in which order, and what is refused or said."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from ktray import plugins
from ktray.errors import UserError
from ktray.images import Splits, folder_tree
from ktray.pipeline.pair_check import check_pair, data_loader
from ktray.pool import LocalPool
from ktray.runs.data_check import describe, notes_about
from tests.pictures import data_spec, listed, noise
from tests.toys import toy_pair

HEIC = b"\0\0\0\x18ftypheic" + bytes(40)


def files(root: Path, *names: str, count: int = 1) -> Path:
    """Images below a root, by name, or folders for names that end in `/`. `{}` in a name stands for a number below `count`."""
    for place in names:
        for name in {place.format(number) for number in range(count)}:
            path = root / name
            if name.endswith("/"):
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix.lower() in (".heic", ".txt", ".avif", ""):
                path.write_bytes(HEIC if path.suffix.lower() == ".heic" else b"text")
            else:
                Image.fromarray(noise(8, 8, seed=hash(name) % 1000)).save(path, FORMATS.get(path.suffix.lower()))
    return root


FORMATS = {
    ".jfif": "JPEG",
    ".jpe": "JPEG",
    ".jif": "JPEG",
    ".jfi": "JPEG",
    ".pjp": "JPEG",
    ".pjpeg": "JPEG",
    ".mpo": "MPO",
    ".apng": "PNG",
    ".dib": "BMP",
}


def of(splits: Splits) -> dict[str, list[str]]:
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {name: list(part.names) for name, part in parts.items() if part is not None}


# ---- splits ----

SPLITS = {
    "Training/Testing": {"train": "Training", "test": "Testing"},
    "Train/Test": {"train": "Train", "test": "Test"},
    "TRAIN/TEST": {"train": "TRAIN", "test": "TEST"},
    "train/valid/test": {"train": "train", "val": "valid", "test": "test"},
    "train/Validation": {"train": "train", "val": "Validation"},
    "training_set/test_set": {"train": "training_set", "test": "test_set"},
    "train/dev/eval": {"train": "train", "val": "dev", "test": "eval"},
    "train/eval/test": {"train": "train", "val": "eval", "test": "test"},
    "seg_train/seg_train": {"train": "seg_train/seg_train", "test": "seg_test/seg_test"},
    "train2017/val2017": {"train": "train2017", "val": "val2017"},
    "cars_train/cars_test": {"train": "cars_train", "test": "cars_test"},
    "trainset/testset": {"train": "trainset", "test": "testset"},
    "01 train/02 test": {"train": "01 train", "test": "02 test"},
    "train alone": {"train": "train"},
    "trainval/test": {"train": "trainval", "test": "test"},
    "mytrain/mytest": {"train": "mytrain", "test": "mytest"},
    "brackets": {"train": "[train] a*?", "test": "[test] a*?"},
}


@pytest.mark.parametrize("folders", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("kind", ["folder", "imagefolder"])
def test_folders_named_like_splits_are_splits(kind: str, folders: dict[str, str], tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    for place in folders.values():
        files(tmp_path, f"{place}/cat/{{}}.png", f"{place}/dog/{{}}.png", count=2)
    found = listed(f"{kind}:{tmp_path}")
    assert of(found).keys() == folders.keys()
    for split, names in of(found).items():
        oracle = ImageFolder(str(tmp_path / folders[split]))
        assert [str(tmp_path / name) for name in names] == [path for path, _ in oracle.samples]
        if kind == "imagefolder":
            part = getattr(found, split)
            assert part.labels.tolist() == oracle.targets
            assert part.classes == tuple(oracle.classes)
    assert {split: sum(places.values()) for split, places in found.layout.read_from.items()} == dict.fromkeys(folders, 4)


CLASSES = {
    "words inside others": ("latest", "strain", "valley", "cat"),
    "a split's word in a longer name": ("train_station", "bus_stop", "test_kitchen"),
    "station and kitchen": ("test_kitchen", "bus"),
    "numbers": ("0", "1", "10", "2"),
    "brackets": ("[a]", "b*", "c?"),
    "markup": ("$5", "100%", "<b>", "a&b"),
    "other scripts": ("日本語", "ünï", "😀"),
    "a line break": ("a\nb", "c"),
}


@pytest.mark.parametrize("names", CLASSES.values(), ids=CLASSES)
def test_other_folders_are_classes_as_in_torchvision(names: tuple[str, ...], tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    files(tmp_path, *(f"{name}/0.png" for name in names))
    found, oracle = listed({"kind": "imagefolder", "path": str(tmp_path)}), ImageFolder(str(tmp_path))
    assert found.train.classes == tuple(oracle.classes)
    assert found.train.labels.tolist() == oracle.targets


REFUSED = {  # files, words of the message
    "two for train": (["train/a/0.png", "Training/a/0.png", "test/a/0.png"], ["'train'", "'Training'"]),
    "two for val": (["train/a/0.png", "val/a/0.png", "valid/a/0.png"], ["'val'", "'valid'"]),
    "none for training": (["test/a/0.png", "val/a/0.png"], ["'test'", "'val'", "none is for training"]),
    "one that is not for training": (["Testing/a/0.png"], ["'Testing'"]),
    "a folder of predictions": (["seg_train/a/0.png", "seg_test/a/0.png", "seg_pred/0.png"], ["'seg_train'", "'seg_pred'"]),
    "images beside them": (["train/a/0.png", "test/a/0.png", "0.png"], ["'train'", "images"]),
    "a split inside each class": (["cat/train/0.png", "cat/test/0.png", "dog/train/0.png"], ["cat", "'train'", "outermost"]),
    "two in one name": (["train_test/a/0.png", "val/a/0.png"], ["'train_test'"]),
    "both beside one": (["trainval/a/0.png", "val/a/0.png", "train/a/0.png"], ["'trainval'"]),
    "words run together": (["catstrain/a/0.png", "catstest/a/0.png"], ["'catstrain'", "'catstest'"]),
}
REFUSED_AS_CLASSES = {
    "a class called train": (["train/0.png", "bus/0.png", "car/0.png"], ["'train'", "'bus'"]),
    "test beside classes": (["cat/0.png", "dog/0.png", "Test/0.png"], ["'Test'", "'cat'", "one folder named 'train'"]),
    "val with other classes": (["train/cat/0.png", "val/emu/0.png"], ["'emu'", "no training images"]),
    "val with other capitals": (["train/cat/0.png", "val/Cat/0.png"], ["'Cat'", "Name it 'cat'"]),
    "val with another form of a letter": (
        ["train/caf\u00e9/0.png", "train/bar/0.png", "val/cafe\u0301/0.png", "val/a/0.png"],
        ["'cafe\u0301' (and 1 other)", "Name it 'caf\u00e9'", "written differently, 'cafe\\u0301' and 'caf\\xe9'"],
    ),
    "val with a blank that has no width": (
        ["train/cat/0.png", "val/cat\u200b/0.png"],
        ["'cat\\u200b' in", "Name it 'cat', as in", "written differently, 'cat\\u200b' and 'cat'"],
    ),
    "val with an underscore": (["train/ice_cream/0.png", "val/Ice cream/0.png"], ["Name it 'ice_cream'", "look alike"]),
    "test without classes": (["train/cat/0.png", "test/0.png"], ["test", "outside every class folder"]),
    "no classes": (["0.png", "1.png"], ["every class folder: 2", "outside every class folder", "folder"]),
    "a class of one format only": (["cat/0.png", "dog/0.heic"], ["'dog'", ".heic (images that ktray does not read) 1"]),
    "a test class of one format only": (["train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.heic"], ["'b'", ".heic"]),
    "nothing that is read": (["cat/0.heic", "dog/0.heic"], ["no image files", "read) 2"]),
}
CASES = [(kind, *case) for kind in ("folder", "imagefolder") for case in REFUSED.values()]
CASES += [("imagefolder", *case) for case in REFUSED_AS_CLASSES.values()]


@pytest.mark.parametrize(("kind", "names", "said"), CASES)
def test_what_is_ambiguous_is_refused_with_the_folders(kind: str, names: list[str], said: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        listed(f"{kind}:{files(tmp_path, *names)}")
    message = str(caught.value)
    assert all(word in message for word in said), message
    assert caught.value.instead
    assert caught.value.where == "data.path"
    assert "\n" not in message


# ---- order ----

ORDERS = [
    ["church/{}.png", "church-indoor/{}.png", "dog/{}.png"],
    ["a/{}.png", "a/sub/{}.png", "a/sub-b/{}.png", "a/sub/deep/{}.png", "a.b/{}.png"],
    ["a/b/c/{}.png", "a/b-c/{}.png", "a/b.c/{}.png", "a/b/{}.png"],
    ["Z/{}.png", "a/{}.png", "_/{}.png", "ä/{}.png", "1/{}.png"],
    ["x y/{}.png", "x/{}.png", "x!/{}.png", "x~/{}.png"],
    ["a/ /{}.png", "a/!/{}.png", "a/{}.png", "a//-/{}.png"],
]


@pytest.mark.parametrize("names", ORDERS, ids=lambda names: names[0])
def test_rows_are_in_the_order_of_torchvision(names: list[str], tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    files(tmp_path, *names, count=12)
    oracle = [os.path.relpath(path, tmp_path) for path, _ in ImageFolder(str(tmp_path)).samples]
    for kind in ("folder", "imagefolder"):
        found = listed(f"{kind}:{tmp_path}")
        assert list(found.train.names) == oracle
        assert "torchvision" in found.layout.order


def test_names_that_are_not_utf8_are_ordered_by_torchvision_too(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    for name in (b"a\xff", b"a", b"a\xc3\xa4", b"b"):
        folder = os.fsencode(tmp_path) + b"/" + name
        os.mkdir(folder)
        Image.fromarray(noise(8, 8)).save(os.fsdecode(folder + b"/\xfe.png"))
    oracle = ImageFolder(str(tmp_path))
    found = listed(f"imagefolder:{tmp_path}")
    assert found.train.labels.tolist() == oracle.targets
    assert [found.train.original(row) for row in range(4)] == [Path(path) for path, _ in oracle.samples]
    "".join(found.train.names + found.train.classes).encode()


def test_features_of_the_order_of_torchvision_reach_their_images(tmp_path: Path) -> None:
    """A .npy without names: each row holds the class of its image, as an extraction with torchvision writes it."""
    import numpy as np
    from torchvision.datasets import ImageFolder

    from ktray.features import precomputed

    root = files(tmp_path / "data", "church/{}.png", "church-indoor/{}.png", "dog/{}.png", count=12)
    oracle = ImageFolder(str(root))
    np.save(tmp_path / "f.npy", np.eye(3, dtype=np.float32)[oracle.targets])
    found = listed(f"imagefolder:{root}")
    pair = toy_pair(data=f"imagefolder:{root}", teacher={"features": str(tmp_path / "f.npy")}, evals=["effective_rank"])
    read = precomputed.open_features(pair.teacher, found.train.names)
    assert read(found.train.names).argmax(axis=1).tolist() == found.train.labels.tolist()
    (note,) = [note for note in notes_about([pair], data_loader()) if "f.npy" in note]
    assert "torchvision" in note
    assert "church/0.png" in note


# ---- what is left out ----


@pytest.mark.parametrize("suffix", folder_tree.SUFFIXES)
@pytest.mark.parametrize("upper", [False, True])
def test_every_suffix_of_an_image_is_read_in_any_case(suffix: str, upper: bool, tmp_path: Path) -> None:
    name = f"0{suffix.upper() if upper else suffix}"
    files(tmp_path, f"a/{name}", "b/0.png")
    splits = listed(f"imagefolder:{tmp_path}")
    assert splits.train.names == (f"a/{name}", "b/0.png")
    assert splits.train.read(0).shape == (8, 8, 3)
    assert not splits.layout.left_out


def test_what_is_left_out_is_counted_by_suffix_and_images_among_it_are_a_warning(tmp_path: Path) -> None:
    files(tmp_path, "a/{}.png", "b/{}.png", "a/IMG_{}.HEIC", count=3)
    files(tmp_path, "a/notes.txt", "a/.hidden.png", "__MACOSX/a/x.png", "@eaDir/x.png")
    (tmp_path / "b/no_suffix").write_bytes((tmp_path / "b/0.png").read_bytes())
    (tmp_path / "b/photo.jpg!d").write_bytes((tmp_path / "b/0.png").read_bytes())
    (tmp_path / "b/gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "b/self.png").symlink_to(tmp_path / "b/self.png")
    os.mkfifo(tmp_path / "b/pipe.png")
    answer = describe(data_spec(f"imagefolder:{tmp_path}"))
    unread = "(images that ktray does not read)"
    assert answer["left_out"] == {
        f".heic {unread}": 3,
        "links that lead nowhere": 2,
        ".txt": 1,
        "hidden": 1,
        "folder __MACOSX": 1,
        "folder @eaDir": 1,
        f"without a suffix {unread}": 1,
        f"with another suffix {unread}": 1,
        "neither files nor folders": 1,
    }
    assert answer["splits"]["train"]["images_of_class"] == {"a": 3, "b": 3}
    said = "\n".join(answer["warnings"])
    assert "5 of 11 images are left out" in said
    assert ".heic 3" in said


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("caf\u00e9", "cafe\u0301", True),
        ("Rock", "rock", True),
        ("polar bear", "polar_bear", True),
        ("ﬁsh", "fish", True),
        ("cafe", "caf\u00e9", False),
        ("class1", "class2", False),
    ],
)
def test_classes_that_a_person_would_read_as_one_are_said(one: str, other: str, alike: bool, tmp_path: Path) -> None:
    answer = describe(data_spec(f"imagefolder:{files(tmp_path, f'{one}/0.png', f'{other}/0.png', 'emu/0.png')}"))
    assert set(answer["splits"]["train"]["images_of_class"]) == {one, other, "emu"}
    said = [warning for warning in answer["warnings"] if "differ only in case, blanks, hyphens" in warning]
    assert len(said) == alike
    assert all(repr(one) in text and repr(other) in text for text in said)


def test_an_empty_class_folder_is_said(tmp_path: Path) -> None:
    answer = describe(data_spec(f"imagefolder:{files(tmp_path, 'cat/0.png', 'dog/0.png', 'emu/', 'fox/sub/')}"))
    assert "folders without images are no classes: 'emu', 'fox'" in answer["warnings"]


def test_a_class_of_which_no_image_is_readable_is_refused(tmp_path: Path) -> None:
    from ktray import images

    files(tmp_path / "x", "a/{}.png", "b/{}.png", count=40)
    spec = data_spec({"kind": "imagefolder", "path": str(tmp_path / "x"), "size": 8, "max_unreadable": 1.0})
    for number in range(39):
        (tmp_path / f"x/b/{number}.png").write_bytes(b"")
    assert images.write(spec, tmp_path / "one", LocalPool())["unreadable"] == 39
    (tmp_path / "x/b/39.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"images of the class 'b' in train are unreadable: b/.*an empty file.*remove the class"
    ):
        images.write(spec, tmp_path / "none", LocalPool())


def test_the_artifact_of_the_images_says_what_was_assumed(tmp_path: Path) -> None:
    import json

    from ktray import images

    spec = data_spec(
        f"imagefolder:{files(tmp_path / 'x', 'Training/a/{}.png', 'Testing/a/{}.png', 'Training/b/0.heic.png')}?size=8"
    )
    images.write(spec, tmp_path / "out", LocalPool())
    assumed = json.loads((tmp_path / "out/splits.json").read_text())["assumed"]
    assert assumed["read_from"] == {"train": {"Training/": 2}, "test": {"Testing/": 1}}
    assert "torchvision" in assumed["order"]


# ---- one class ----

NESTED = {
    "one folder": (["photos/cat/{}.png", "photos/dog/{}.png"], "photos"),
    "two folders": (["a/photos/cat/{}.png", "a/photos/dog/{}.png"], "a/photos"),
    "below the split": (["train/photos/cat/{}.png", "train/photos/dog/{}.png"], "train/photos"),
}


@pytest.mark.parametrize(("names", "right"), NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("judge", ["knn", "linear_probe", "cluster_quality"])
def test_judges_of_one_class_are_refused_with_the_folder_that_looks_right(
    judge: str, names: list[str], right: str, tmp_path: Path
) -> None:
    files(tmp_path, *names, count=20)
    data = f"imagefolder:{tmp_path}?size=32"
    with pytest.raises(UserError, match="the same class") as caught:
        check_pair(toy_pair(data=data, evals=[judge]), data_loader())
    assert f"{tmp_path}/{right} looks like the folder of the classes" in str(caught.value)
    check_pair(toy_pair(data=f"imagefolder:{tmp_path}/{right}?size=32", evals=[judge]), data_loader())
    check_pair(toy_pair(data=data, evals=["effective_rank"]), data_loader())


@pytest.mark.parametrize(
    "change",
    [
        {"transfer": {"kind": "labels"}, "teacher": None},
        {
            "teacher": {
                "pretext": "supervised",
                "backbone": {"kind": "alexnet", "width": 0.125},
                "layer": "conv4",
                "schedule": {"epochs": 1},
            }
        },
    ],
)
def test_training_on_one_class_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    files(tmp_path, "a/{}.png", count=20)
    with pytest.raises(UserError, match="have the same class, 'a'"):
        check_pair(toy_pair(data=f"imagefolder:{tmp_path}?size=32", evals=["effective_rank"], **change), data_loader())


def test_a_plan_says_what_looks_wrong(tmp_path: Path) -> None:
    files(tmp_path, "photos/cat/{}.png", "photos/dog/{}.png", "photos/dog/{}.heic", count=3)
    notes = notes_about([toy_pair(data=f"imagefolder:{tmp_path}", evals=["effective_rank"])], data_loader())
    assert len(notes) == 3
    assert all(note.startswith(f"imagefolder:{tmp_path}: ") for note in notes)


# ---- links, and places without end ----


def test_images_in_two_splits_through_links_are_said(tmp_path: Path) -> None:
    files(tmp_path / "all", "cat/{}.png", "dog/{}.png", count=5)
    for split in ("train", "val"):
        (tmp_path / "x" / split).mkdir(parents=True)
        for name in ("cat", "dog"):
            (tmp_path / "x" / split / name).symlink_to(tmp_path / "all" / name)
    splits = listed(f"imagefolder:{tmp_path}/x")
    assert [len(splits.train.names), len(splits.val.names)] == [10, 10]  # as in torchvision
    assert "10 images both in train and in val, through links" in splits.layout.warnings


def test_hard_links_between_splits_are_said(tmp_path: Path) -> None:
    files(tmp_path, "train/cat/0.png", "train/dog/0.png", "val/cat/1.png")
    os.link(tmp_path / "train/dog/0.png", tmp_path / "val/dog.png")
    (tmp_path / "val/dog").mkdir()
    (tmp_path / "val/dog.png").rename(tmp_path / "val/dog/7.png")
    assert "1 image both in train and in val, through links" in listed(f"imagefolder:{tmp_path}").layout.warnings


def loop_to_itself(root: Path) -> None:
    (root / "a/loop").symlink_to(root / "a/loop")


def loop_of_two(root: Path) -> None:
    (root / "a/one").symlink_to(root / "a/two")
    (root / "a/two").symlink_to(root / "a/one")


def loop_to_the_top(root: Path) -> None:
    (root / "a/top").symlink_to(root)


def loop_between_folders(root: Path) -> None:
    (root / "a/b").symlink_to(root / "b")
    (root / "b/a").symlink_to(root / "a")


@pytest.mark.parametrize("link", [loop_to_itself, loop_of_two, loop_to_the_top, loop_between_folders])
@pytest.mark.parametrize("kind", ["folder", "imagefolder"])
def test_links_in_circles_end(kind: str, link, tmp_path: Path) -> None:
    link(files(tmp_path, "a/0.png", "b/0.png"))
    splits = listed(f"{kind}:{tmp_path}")
    assert {"a/0.png", "b/0.png"} <= set(splits.train.names)
    assert any(
        what.startswith("links that lead nowhere") or what == "links to a folder above" for what in splits.layout.left_out
    )


def test_a_path_that_is_a_link_to_itself_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to(tmp_path / "self")
    files(tmp_path, "0.png")
    for place, said in (("self", "is a link that leads nowhere"), ("0.png", "is a file"), ("**", "there is no folder")):
        with pytest.raises(UserError, match=said):
            listed(f"folder:{tmp_path}/{place}")


def test_folders_that_link_to_each_other_in_all_ways_are_refused(tmp_path: Path, monkeypatch) -> None:
    """Of 12 folders that each link to all others there are 12! paths."""
    monkeypatch.setattr(folder_tree, "_MOST_REPEATED", 2000)
    files(tmp_path, "{}/0.png", count=12)
    for one in range(12):
        for other in range(12):
            if one != other:
                (tmp_path / f"{one}/to{other}").symlink_to(tmp_path / str(other))
    with pytest.raises(UserError, match="again and again"):
        listed(f"folder:{tmp_path}")


def test_a_place_with_few_images_among_very_many_files_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(folder_tree, "_MOST_OTHERS", 50)
    files(tmp_path, "a/0.png", "a/{}.txt", count=60)
    with pytest.raises(UserError, match="only 1 are images"):
        listed(f"folder:{tmp_path}")
    files(tmp_path, "a/b{}.png", count=10)
    assert len(listed(f"folder:{tmp_path}").train.names) == 11


@pytest.mark.slow
def test_the_whole_file_system_is_refused_within_ten_seconds_of_processor_time() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(UserError):
        listed("folder:/")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


@pytest.mark.parametrize("part", ["[a-z]", "*", "?", "a b", "{x}", "%20", "'\"", "-x"])
def test_a_path_with_characters_of_patterns_is_taken_as_it_is(part: str, tmp_path: Path) -> None:
    files(tmp_path / part, "cat/{}.png", "dog/{}.png", count=3)
    for kind in ("folder", "imagefolder"):
        splits = listed({"kind": kind, "path": str(tmp_path / part)})
        assert len(splits.train.names) == 6
        assert splits.train.read(0).shape == (8, 8, 3)


def test_a_very_deep_folder_is_listed(tmp_path: Path) -> None:
    subprocess.run(["mkdir", "-p", str(tmp_path / "/".join("d" * 900))], check=True)
    files(tmp_path, "a.png")
    Image.fromarray(noise(8, 8)).save(tmp_path / "/".join("d" * 900) / "b.png")
    assert len(listed(f"folder:{tmp_path}").train.names) == 2


def test_the_schema_of_every_kind_with_files_has_the_limits_of_decoding() -> None:
    for kind in ("folder", "imagefolder", "parquet"):
        fields = plugins.module("dataset", kind).Spec.model_fields
        assert {"max_pixels", "range"} <= fields.keys()

"""The split that a name speaks of: words of hubs and Kaggle in any delimited place, and no guess where they contradict."""

from __future__ import annotations

import pytest

from ktray.errors import UserError
from ktray.images.split_words import splits_of

TRAIN = """train|Train|TRAIN|training|Training|train-00000-of-00002.parquet|cifar-train.parquet|seg_train|train2017|train_images
training_set/training_set|trainset|TrainSet|imagesTrain|trainA|TRAINset|split=train/part-0.parquet|mnist.train.parquet|ｔｒａｉｎ
train (1).parquet|[train] images|train images|traindata|fashion-mnist_train.parquet|data/0000_train|train%20set
data%2Ftrain-0|trn|xtrain|minitrain|bounding_box_train|is_train=1|trainval|v1.0-trainval/0|train_val/0|trainvalset|train+val"""
VAL = "val|valid|Validation|dev|DEV-set|validation/0000.parquet|val2017|valset|imagenet_val-3|devset"
TEST = """test|Testing|TEST|test1|seg_test|test_set|TestImages|testB|x.test.parquet|1test2|eval|tst|PublicTest|holdout|ytest
Evaluation-0.parquet"""
NONE = """latest.parquet|contest|strain|restrain|trainer|valley|interval|retrieval|invalid|devil|device|protest|testament|evalue
data-0.parquet|trains|trainé|unlabeled|extra||00000|."""
NAMES = {"train": TRAIN, "val": VAL, "test": TEST, None: NONE}


@pytest.mark.parametrize(
    ("name", "split"), [(name, split) for split, names in NAMES.items() for name in names.replace("\n", "|").split("|")]
)
def test_a_name_belongs_to_the_split_of_its_word(name: str, split: str | None) -> None:
    assert splits_of([name]) == {name: split}


def test_every_split_of_the_hubs_keywords_is_known() -> None:
    """The keywords of Hugging Face's `datasets.data_files.SPLIT_KEYWORDS`, between its delimiters `-._ 0-9`."""
    keywords = {
        "train": ["train", "training"],
        "val": ["validation", "valid", "dev", "val"],
        "test": ["test", "testing", "eval"],
    }
    for split, words in keywords.items():
        for word in words:
            for name in (word, f"{word}-0", f"my_{word}", f"a.{word}.b", f"9{word}9", f"a {word}/b", f"{word}/0"):
                assert splits_of([name]) == {name: split}, name


@pytest.mark.parametrize(
    "splits",
    [
        {"train/train-0": "train", "train/train-1": "train", "test/test-0": "test"},
        {"my-test-set/train-0": "train", "my-test-set/test-0": "test"},  # the folder is common, so it decides nothing
        {"crash-test-train-0": "train", "crash-test-test-0": "test"},
        {"train/train-0": "train", "train/test-0": "test"},
        {"train/a": "train", "eval/a": "test"},
        {"train/a": "train", "eval/a": "val", "test/a": "test"},
        {"train/a": "train", "val/a": "val", "eval/a": "test"},
        {"train/a": "train", "eval/test-0": "test", "eval/val-0": "val"},
        {"trainval/a": "train", "test/a": "test"},
        {"v1.0-trainval/train/a": "train", "v1.0-trainval/val/a": "val"},
        {"train_small/train-0": "train", "train_small/test-0": "test"},
        {"train/a": "train", "holdout/a": "test"},
        {"train/a": "train", "extra/a": None},
        {"no_valid_license": None, "b": None},
        {"a": None, "b": None},
        {},
    ],
)
def test_what_names_share_decides_nothing_and_eval_is_the_split_that_the_others_leave(splits: dict[str, str | None]) -> None:
    assert splits_of(list(splits)) == splits


@pytest.mark.parametrize(
    "names",
    [
        ["train/test-0.parquet", "test/train-0.parquet"],
        ["train/0.parquet", "train_test/0.parquet", "test/0.parquet"],
        ["trainval/0.parquet", "val/0.parquet", "test/0.parquet"],
        ["trainval/0.parquet", "train/0.parquet"],
        ["is_train=0/part-0.parquet", "is_train=1/part-0.parquet"],
        ["Train=False/part-0.parquet", "Train=True/part-0.parquet"],
        ["not_test-0.parquet", "test-0.parquet"],
        ["nontrain.parquet", "train.parquet"],
        ["train-eval.parquet", "val.parquet"],
        ["test-dev.parquet", "train.parquet"],
        ["train_test_split-0.parquet", "train_test_split-1.parquet"],
        ["train-eval.parquet", "test.parquet"],
        ["crash-test-train-0", "crash-test-0"],
        ["train-test.parquet"],
    ],
)
def test_names_of_two_splits_are_refused_and_named(names: list[str]) -> None:
    with pytest.raises(UserError, match="which split") as caught:
        splits_of(names)
    assert any(name in str(caught.value) for name in names)
    assert caught.value.instead

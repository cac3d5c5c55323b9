"""Teachers by timm's names: features as timm computes them from the same files, and what is refused in their place."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ktray import images, plugins
from ktray.cli import main
from ktray.errors import UserError
from ktray.features import extraction
from ktray.images import own_crop
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_check import check_pair, data_loader
from ktray.pipeline.pair_graph import build
from ktray.pool import LocalPool, StageContext
from ktray.runs.student_export import licences_of
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.spec import PairSpec
from ktray.stores.file import FileStore
from tests.hub_cache import config_of, in_cache, in_folder, photographs, random_weights
from tests.toys import STUDENT, toy_spec

timm = pytest.importorskip("timm")
torch.set_num_threads(1)

SMALL = "vit_tiny_patch16_224.augreg_in21k"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and no network at all."""
    from huggingface_hub import constants

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def pair_of(folder: Path, teacher: dict[str, Any], **changes: Any) -> PairSpec:
    """A pair whose teacher describes the images of a folder."""
    data = {"kind": "folder", "path": str(folder), "size": 32, "split": {"val": 0}}
    plain = {"data": data, "teacher": teacher, "transfer": {"kind": "clusters", "k": 2}, "evals": [], **changes}
    return PairSpec.model_validate(toy_spec(**plain))


def features_of(folder: Path, teacher: dict[str, Any], at: Path) -> torch.Tensor:
    """The features that the stages of such a pair write, in the order of the files."""
    pair = pair_of(folder, teacher)
    check_pair(pair, data_loader())
    graph = build(pair, data_identity())
    stages = [stage for stage in graph.stages if stage.name in ("images", "teacher", "features")]
    store = FileStore(at / "store")
    LocalScheduler(store, execute, StageContext(), lambda event: None).obtain(stages, "test")
    found = store.find(graph.keys["features"])
    assert found is not None
    return torch.from_numpy(extraction.load(found.directory))


def oracle(name: str, weights: Path, files: list[Path], image_size: int | None = None) -> tuple[Any, torch.Tensor]:
    """timm's own model with these weights, and its `forward_features` of the files through its own transform."""
    sized = {} if image_size is None else {"img_size": image_size}
    overlay = {"file": str(weights)}
    takes = timm.get_pretrained_cfg(name).fixed_input_size
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **(sized if takes else {})).eval()
    config = timm.data.resolve_data_config(sized, model=model)
    transform = timm.data.create_transform(**config)
    with torch.inference_mode():
        return model, model.forward_features(torch.stack([transform(Image.open(file).convert("RGB")) for file in files]))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-4


def tokens_of(model: Any, features: torch.Tensor, tokens: str) -> torch.Tensor:
    """What the words for tokens mean, of timm's `forward_features` (B, T, D), (B, C, h, w) or, of Swin, (B, h, w, C)."""
    if features.ndim == 4:
        return features.mean(dim=(1, 2) if getattr(model, "output_fmt", "") == "NHWC" else (2, 3))
    count = model.num_prefix_tokens
    patches = features[:, count:].mean(1)
    parts = {"cls": [features[:, 0]], "patches": [patches], "cls+patches": [features[:, 0], patches]}
    return torch.cat(parts.get(tokens, [features[:, :count].flatten(1), patches]), dim=1)


FAMILIES = {  # name -> the tokens to ask for
    "vit_tiny_patch16_224.augreg_in21k": ("cls", "cls+patches"),
    "convnext_atto.d2_in1k": ("patches",),
    "efficientvit_b0.r224_in1k": (),
}
LARGE = {
    "resnet18.a1_in1k": ("all",),
    "mobilenetv4_conv_small.e2400_r224_in1k": ("patches",),
    "vit_small_patch14_dinov2.lvd142m": ("cls",),
    "vit_small_patch14_reg4_dinov2.lvd142m": ("all",),
    "vit_small_patch16_dinov3.lvd1689m": ("cls", "patches", "all"),
    "vit_base_patch16_siglip_224.v2_webli": ("patches",),
    "vit_base_patch32_clip_224.openai": ("cls",),
    "vit_base_patch16_224.mae": ("cls+patches",),
    "swin_tiny_patch4_window7_224.ms_in1k": ("patches",),
    "beit_base_patch16_224.in22k_ft_in22k": ("cls",),
}


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_features_are_timms_of_its_own_transform_of_the_same_files(name: str, cache: Path, tmp_path: Path) -> None:
    files = photographs(tmp_path / "photographs")
    snapshot = in_cache(random_weights(name), name, cache)
    model, expected = oracle(name, snapshot / "model.safetensors", files)
    with torch.inference_mode():
        own = model.forward_head(expected, pre_logits=True)
    assert_close(features_of(tmp_path / "photographs", {"timm": name}, tmp_path), own)
    for tokens in {**FAMILIES, **LARGE}[name]:
        found = features_of(tmp_path / "photographs", {"timm": name, "tokens": tokens}, tmp_path)
        assert_close(found, tokens_of(model, expected, tokens))


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_images_are_squashed_or_bordered_where_the_weights_config_says_so(mode: str, cache: Path, tmp_path: Path) -> None:
    model = random_weights("convnext_atto.d2_in1k")
    config = config_of(model)
    config["pretrained_cfg"] |= {"crop_mode": mode, "crop_pct": 0.9, "interpolation": "bilinear", "mean": [0.4, 0.5, 0.6]}
    folder = in_folder(model, tmp_path / "weights", config)
    files = photographs(tmp_path / "photographs")
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=config["pretrained_cfg"]))
    with torch.inference_mode():
        inputs = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        expected = model.forward_head(model.forward_features(inputs), pre_logits=True)
    teacher = {"timm": "convnext_atto", "weights": str(folder)}
    assert_close(features_of(tmp_path / "photographs", teacher, tmp_path), expected)


def test_position_embeddings_for_another_size_are_interpolated_as_by_timm(cache: Path, tmp_path: Path) -> None:
    files = photographs(tmp_path / "photographs")
    snapshot = in_cache(random_weights(SMALL), SMALL, cache)
    model, expected = oracle(SMALL, snapshot / "model.safetensors", files, image_size=96)
    teacher = {"timm": SMALL, "image_size": 96, "tokens": "cls+patches"}
    assert_close(features_of(tmp_path / "photographs", teacher, tmp_path), tokens_of(model, expected, "cls+patches"))
    level = {"timm": SMALL, "image_size": 96, "layer": "blocks_3", "tokens": "all", "pool": {"grid": 2}}
    found = features_of(tmp_path / "photographs", level, tmp_path)
    assert found.shape == (len(files), 192 * (1 + 2 * 2))


def test_a_file_in_torchs_format_teaches_what_the_cache_does_and_another_place_is_no_other_teacher(
    cache: Path, tmp_path: Path
) -> None:
    name = "mobilenetv4_conv_small.e2400_r224_in1k"
    photographs(tmp_path / "photographs")
    model = random_weights(name)
    snapshot = in_cache(model, name, cache)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "weights.pth")
    teachers = [
        {"timm": name},
        {"timm": name, "weights": str(snapshot)},
        {"timm": name, "weights": str(tmp_path / "weights.pth")},
    ]
    keys = [build(pair_of(tmp_path / "photographs", teacher), data_identity()).keys for teacher in teachers]
    assert keys[0] == keys[1]
    assert keys[0]["teacher"] != keys[2]["teacher"], "other bytes in the file"
    one, other = (features_of(tmp_path / "photographs", teachers[index], tmp_path / str(index)) for index in (0, 2))
    assert torch.equal(one, other)


def test_what_the_config_says_is_in_the_key(cache: Path, tmp_path: Path) -> None:
    photographs(tmp_path / "photographs")
    model = random_weights("convnext_atto.d2_in1k")
    config = config_of(model)
    teacher = {"timm": "convnext_atto", "weights": str(tmp_path / "weights")}
    found = set()
    changes: list[dict[str, Any]] = [
        {}, {"mean": [0.1, 0.2, 0.3]}, {"std": [1, 1, 1]}, {"crop_pct": 0.5}, {"interpolation": "bilinear"}
    ]  # fmt: skip
    for change in [*changes, {"input_size": [3, 192, 192]}, {"crop_mode": "squash"}]:
        in_folder(model, tmp_path / "weights", {**config, "pretrained_cfg": {**config["pretrained_cfg"], **change}})
        found.add(build(pair_of(tmp_path / "photographs", teacher), data_identity()).keys["features"])
    assert len(found) == 7


MISSING = "resnet18.a2_in1k"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "not in the cache": ({"timm": MISSING}, r"teacher\.timm: .*fetch resnet18\.a2_in1k.*about 47 MB.*licence: apache-2\.0"),
    "no tag": ({"timm": "resnet18"}, r"does not say which weights.*resnet18\.a1_in1k"),
    "no such tag": ({"timm": "resnet18.nowhere"}, r"no weights with the tag 'nowhere'"),
    "no such model": ({"timm": "resnet19.a1_in1k"}, r"no model 'resnet19'.*Did you mean"),
    "no such folder": ({"timm": MISSING, "weights": "/nowhere"}, r"teacher\.weights: .*no file nowhere"),
    "no config and no tag": ({"timm": "resnet18", "weights": "BARE"}, r"how images become inputs.*is not known"),
    "another architecture": ({"timm": "resnet34.a1_in1k", "weights": "BARE"}, r"layer1\.2\.conv1\.weight"),
    "a config of another": ({"timm": "resnet34.a1_in1k", "weights": "OWN"}, r"is about 'resnet18\.a1_in1k'.*Write timm"),
    "a config of transformers": ({"timm": "resnet18.a1_in1k", "weights": "FOREIGN"}, r"no config of timm's but one of trans"),
    "no mean": ({"timm": "resnet18.a1_in1k", "weights": "MEANLESS"}, r"config\.json.*says no mean"),
    "no class token": ({"timm": "resnet18.a1_in1k", "weights": "OWN", "tokens": "cls"}, r"teacher\.tokens: .*no class token"),
    "no such layer": ({"timm": "resnet18.a1_in1k", "weights": "OWN", "layer": "layer9"}, r"teacher\.layer: .*layer4"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the same weights and different configs."""
    root, model = tmp_path_factory.mktemp("folders"), random_weights("resnet18.a1_in1k")
    config = config_of(model)
    meanless = {key: value for key, value in config["pretrained_cfg"].items() if key != "mean"}
    configs = {
        "BARE": None,
        "OWN": config,
        "FOREIGN": {"architectures": ["Dinov2Model"], "hidden_size": 768},
        "MEANLESS": {**config, "pretrained_cfg": meanless},
    }
    return {name: in_folder(model, root / name, each) for name, each in configs.items()}


@pytest.mark.parametrize("case", REFUSED)
def test_a_teacher_that_cannot_be_used_as_meant_is_one_sentence_in_plan(
    case: str, cache: Path, folders: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    teacher, said = REFUSED[case]
    photographs(tmp_path / "photographs")
    teacher = {**teacher, **({"weights": str(folders[w])} if (w := teacher.get("weights")) in folders else {})}
    data = {"kind": "folder", "path": str(tmp_path / "photographs"), "size": 32, "split": {"val": 0}}
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(toy_spec(data=data, teacher=teacher, evals=[])))
    assert main(["plan", str(tmp_path / "pair.yaml"), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert re.search(said, err), err
    assert err.count("\n") == 1


def test_an_image_size_that_patches_do_not_divide_is_refused_with_one_that_they_do(cache: Path, tmp_path: Path) -> None:
    photographs(tmp_path / "photographs")
    in_cache(random_weights(SMALL), SMALL, cache)
    with pytest.raises(UserError, match=r"100 px cannot be divided.*Give 96"):
        check_pair(pair_of(tmp_path / "photographs", {"timm": SMALL, "image_size": 100}), data_loader())
    with pytest.raises(ValueError, match=r"pool is for patches"):
        pair_of(tmp_path / "photographs", {"timm": SMALL, "tokens": "cls", "pool": {"grid": 2}})


def test_a_pair_runs_offline_and_says_the_licence_in_the_record(cache: Path, tmp_path: Path, capsys: Any) -> None:
    """Teacher and student at their own sizes; an evaluation of each; the teacher sees its own crops."""
    photographs(tmp_path / "photographs", repeat=2)
    model = random_weights("convnext_atto.d2_in1k")
    config = config_of(model)
    config["pretrained_cfg"] |= {"input_size": [3, 64, 64], "license": "a-licence"}
    folder = in_folder(model, tmp_path / "weights", config)
    judges = [{"kind": "effective_rank"}, {"kind": "effective_rank", "of": "teacher", "name": "of_teacher"}]
    spec = toy_spec(
        data={"kind": "folder", "path": str(tmp_path / "photographs"), "size": 64, "split": {"val": 0.25}},
        teacher={"timm": "convnext_atto", "weights": str(folder)},
        transfer={"kind": "clusters", "k": 2},
        student={**STUDENT, "image_size": 32},
        evals=judges,
    )
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(spec))
    assert main(["run", str(tmp_path / "pair.yaml"), "--local", "--json", "--quiet"]) == 0, capsys.readouterr().err
    answer = json.loads(capsys.readouterr().out)[0]
    assert {"effective_rank/rank", "of_teacher/rank"} <= answer["metrics"].keys()
    store = tmp_path / "home" / "store"
    record = json.loads((store / answer["keys"]["teacher"] / "record.json").read_text())
    assert (record["licence"], record["weights"]) == ("a-licence", "convnext_atto, model.safetensors")
    of_teacher, of_student = (
        json.loads((store / answer["keys"][stage] / "record.json").read_text())["inputs"] for stage in ("features", "student")
    )
    assert of_teacher["images"] != of_student["images.transfer"]
    said = licences_of(answer["keys"], FileStore(store))
    assert said == {"convnext_atto, model.safetensors": "a-licence"}, "what the card of an exported student says"


@pytest.mark.slow
def test_a_vit_b16_at_224_px_teaches_a_student_at_96_px_from_one_folder(cache: Path, tmp_path: Path, capsys: Any) -> None:
    name = "vit_base_patch16_224.augreg_in21k"
    in_cache(random_weights(name), name, cache)
    photographs(tmp_path / "photographs", repeat=4)
    spec = toy_spec(
        data={"kind": "folder", "path": str(tmp_path / "photographs"), "size": 96, "split": {"val": 0.25}},
        teacher={"timm": name, "tokens": "cls"},
        transfer={"kind": "clusters", "k": 3},
        evals=[{"kind": "effective_rank"}, {"kind": "effective_rank", "of": "teacher", "name": "taught"}],
    )
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(spec))
    assert main(["run", str(tmp_path / "pair.yaml"), "--local", "--json", "--quiet"]) == 0, capsys.readouterr().err
    answer = json.loads(capsys.readouterr().out)[0]
    assert answer["metrics"]["features/dim"] == 768
    assert answer["metrics"]["teacher/parameters"] == 85_798_656
    stored = {kind: tmp_path / "home" / "store" / answer["keys"][kind] / "record.json" for kind in ("features", "student")}
    read = {kind: json.loads(file.read_text())["inputs"] for kind, file in stored.items()}
    for key, size in ((read["features"]["images"], 224), (read["student"]["images.transfer"], 96)):
        assert json.loads((tmp_path / "home" / "store" / key / "splits.json").read_text())["size"] == size


@pytest.mark.slow
def test_the_licence_stands_in_the_report_and_in_the_card_of_an_exported_student(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.undo()  # Ray talks to itself by sockets
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    photographs(tmp_path / "photographs", repeat=3)
    model = random_weights("convnext_atto.d2_in1k")
    config = config_of(model)
    config["pretrained_cfg"] |= {"input_size": [3, 64, 64], "license": "a-licence"}
    folder = in_folder(model, tmp_path / "weights", config)
    pair = toy_spec(
        data={"kind": "folder", "path": str(tmp_path / "photographs"), "size": 64, "split": {"val": 0.25}},
        teacher={"timm": "convnext_atto", "weights": str(folder)},
        transfer={"kind": "clusters", "k": {"choice": [2, 3]}},
        student={**STUDENT, "image_size": 32},
        evals=[{"kind": "effective_rank"}],
    )
    space = {"study": "licensed", "objectives": [{"metric": "effective_rank/rank", "mode": "max"}]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({**space, "budget": {"trials": 1}, "pair": pair}))
    assert main(["search", str(tmp_path / "space.yaml"), "--quiet"]) == 0, capsys.readouterr().err
    assert main(["export", "licensed", str(tmp_path / "student")]) == 0
    card = json.loads((tmp_path / "student" / "student.json").read_text())
    assert card["lineage"]["licences"] == {"convnext_atto, model.safetensors": "a-licence"}
    assert card["input"]["size"] == [32, 32]
    assert main(["report", "licensed", "-o", str(tmp_path / "report.html")]) == 0
    assert "convnext_atto, model.safetensors: a-licence" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("streamed", [False, True])
def test_crops_of_a_parquet_file_are_those_of_timm_whether_kept_or_decoded_on_demand(streamed: bool, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    files = photographs(tmp_path / "photographs")
    rows = [{"image": {"bytes": file.read_bytes(), "path": file.name}} for file in files]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "images.parquet")
    spec = plugins.parse("dataset", {"kind": "parquet", "path": str(tmp_path / "images.parquet"), "split": {"val": 0}})
    own = {"size": 40, "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"}
    images.write(spec, tmp_path / "out", LocalPool(), 0 if streamed else 1 << 30, own)
    found = images.open_split(tmp_path / "out", "train", spec).read(np.arange(len(files)))
    transform = timm.data.create_transform((3, 40, 40), interpolation="bicubic", crop_pct=0.9, normalize=False)
    expected = [transform(Image.open(file).convert("RGB")).permute(1, 2, 0).numpy() for file in files]
    assert np.array_equal(found, np.stack(expected))


def test_an_image_too_long_to_be_resized_by_its_shorter_side_is_unreadable() -> None:
    own = {"size": 224, "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"}
    with pytest.raises(images.Unreadable, match="too long and narrow"):
        own_crop.crop_of(np.zeros((1, 30_000, 3), np.uint8), own)

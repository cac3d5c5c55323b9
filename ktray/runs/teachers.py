"""Pretrained teachers of this machine: list them, fetch one from the Hugging Face hub, and check one before it teaches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ktray.checksums import read_json, write_json
from ktray.errors import UserError
from ktray.fingerprint import fingerprint
from ktray.runs.settings import Settings
from ktray.spec import NamedTeacher

if TYPE_CHECKING:
    from ktray.training.timm_weights import NamedNetwork

NAME = "teachers"  # where errors are, and the folder of fingerprints in the home
TOLERANCE = 2e-3  # by which numbers of a fingerprint may differ between machines and versions of torch
_IMAGES = ((180, 240), (224, 224), (300, 140), (96, 128))  # height, width
_DIRECTIONS = 4


def on_disk() -> list[dict[str, Any]]:
    """Every teacher of timm's in the Hugging Face cache of this machine: what it is, or why it cannot be used."""
    from ktray.training import timm_weights
    from ktray.training.checkpoint_file import open_checkpoint

    found = []
    for repository, _, file in timm_weights.on_disk():
        name = repository.removeprefix("timm/")
        row: dict[str, Any] = {"name": name, "file": str(file), "bytes": file.stat().st_size, "problem": None}
        try:
            network = timm_weights.find(NamedTeacher(timm=name))
            stored = max(open_checkpoint(file).state_dicts, key=lambda each: len(each[1]))[1]
            row |= {"parameters": sum(math.prod(each.shape) for each in stored.values()), **_described(network)}
        except (UserError, ValueError) as error:
            row["problem"] = str(error)
        found.append(row)
    return found


def _described(network: NamedNetwork) -> dict[str, Any]:
    return {"input": vars(network.preprocessing), "licence": network.licence, "place": network.place}


# --- fetch


@dataclass(frozen=True)
class Offer:
    """What a download would bring.

    Attributes:
        name: of the teacher.
        repository: on the hub.
        files: name -> bytes, or None where the hub does not say.
        licence: as the hub says it.
        gated: whether its licence must be accepted on the hub first.
    """

    name: str
    repository: str
    files: Mapping[str, int | None]
    licence: str
    gated: bool

    def sentence(self) -> str:
        """What, how large, and under which licence."""
        sizes = [size for size in self.files.values() if size is not None]
        size = f"{sum(sizes) / 1e6:,.1f} MB" if len(sizes) == len(self.files) else "a size that the hub does not say"
        gated = "; its licence must be accepted on the hub first" if self.gated else ""
        return f"{self.name}: {', '.join(self.files)} of {self.repository}, {size}; licence: {self.licence}{gated}"


def offer(name: str) -> Offer:
    """What the hub has of a teacher; asks the hub.

    Raises:
        UserError: timm has no such name, or the hub has no such weights or does not answer.
    """
    from huggingface_hub import HfApi

    from ktray.training import timm_weights

    repository = timm_weights.repository(NamedTeacher(timm=name).timm)
    with _hub_errors(name, repository):
        info = HfApi().model_info(repository.partition("@")[0], files_metadata=True, timeout=30)
    sizes = {each.rfilename: each.size for each in info.siblings or ()}
    weights = next((file for file in timm_weights.FILES if file in sizes), None)
    if weights is None:
        raise UserError(f"the repository {repository} has no {' and no '.join(timm_weights.FILES)}", NAME, "Choose another.")
    files = {file: sizes[file] for file in (timm_weights.CONFIG, timm_weights.README, weights) if file in sizes}
    return Offer(name, repository, files, _licence(info), bool(getattr(info, "gated", False)))


def _licence(info: Any) -> str:
    card = info.card_data or {}
    tags = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    stated = card.get("license_name") or card.get("license") or next(iter(tags), None)
    return str(stated or "not stated")[:100]


def fetch(offered: Offer) -> list[Path]:
    """Download into the Hugging Face cache, the weights last; the files.

    Raises:
        UserError: the hub refuses or does not answer.
    """
    from huggingface_hub import constants, hf_hub_download

    repository, _, revision = offered.repository.partition("@")
    with _hub_errors(offered.name, repository):
        return [
            Path(hf_hub_download(repository, file, revision=revision or None, cache_dir=constants.HF_HUB_CACHE))
            for file in offered.files
        ]


@contextmanager
def _hub_errors(name: str, repository: str) -> Iterator[None]:
    """Turns what the hub's client raises into one sentence."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set, so nothing is fetched", NAME, "Unset it for this command.") from error
    except GatedRepoError as error:
        instead = f"Accept its licence at the page of {repository} on the hub, and set HF_TOKEN to a token of yours."
        raise UserError(f"the hub gives {name} only to those who accepted its licence", NAME, instead) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no repository {repository}", NAME, "Check the name and HF_TOKEN.") from error
    except Exception as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        instead = "Try again where the hub can be reached, or copy the files here and name them: teacher.weights."
        raise UserError(f"{repository} could not be fetched: {said}", NAME, instead) from error


# --- check


def check(teacher: NamedTeacher, settings: Settings) -> dict[str, Any]:
    """Run a teacher on a few images; what it is, and a fingerprint of its features, which is kept in the home.

    Raises:
        UserError: it is not on this machine, its weights or its preprocessing do not fit, its features are not finite, or they
            are not those of an earlier check of the same weights.
    """
    import timm

    from ktray.pipeline.identity import weights_sha256
    from ktray.pipeline.pair_check import check_named

    check_named(teacher)
    network, features = features_of_samples(teacher)
    if not np.isfinite(features).all():
        raise UserError(f"some features of {teacher.timm} are not finite", NAME, "Fetch or train the weights again.")
    sha256 = weights_sha256(network.file)
    found = {
        "name": teacher.timm,
        **_described(network),
        "dim": int(features.shape[1]),
        "sha256": sha256,
        "timm": str(timm.__version__),
        "fingerprint": fingerprint_of(features),
    }
    file = settings.home / NAME / f"{teacher.timm}-{sha256[:12]}{_variant(teacher)}.json"
    found["compared"] = _compare(found, file)
    if found["compared"] is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
    return found


def _variant(teacher: NamedTeacher) -> str:
    asked = teacher.model_dump(exclude={"timm", "weights", "dtype"})
    return f"-{fingerprint(asked)[:8]}"


def _compare(found: Mapping[str, Any], file: Path) -> str | None:
    """With which earlier check the features agree; None if there was none.

    Raises:
        UserError: they differ.
    """
    try:
        earlier = read_json(file)
    except (OSError, ValueError):
        return None
    distance = float(np.abs(np.subtract(earlier["fingerprint"], found["fingerprint"])).max())
    if not distance <= TOLERANCE:
        raise UserError(
            f"the features of {found['name']} are not those of an earlier check of the same weights: numbers of the "
            f"fingerprint differ by up to {distance:.2g}; that was timm {earlier['timm']}, and this is timm {found['timm']}",
            NAME,
            f"If the new ones are right, remove {file.name} in the folder {NAME} of the home.",
        )
    return f"timm {earlier['timm']}, by at most {distance:.1e}"


def features_of_samples(teacher: NamedTeacher) -> tuple[NamedNetwork, NDArray[np.float32]]:
    """The network, and its features (4, D) of the sample images, through its own crop."""
    from tempfile import TemporaryDirectory

    from ktray.features import extraction
    from ktray.images import Images
    from ktray.images.own_crop import crop_of
    from ktray.training import timm_weights

    network = timm_weights.find(teacher)
    size = network.preprocessing.size
    squares = np.stack([crop_of(pixels, network.preprocessing.crop()) for pixels in sample_images()])
    images = Images(len(squares), size, lambda rows: squares[rows])
    with TemporaryDirectory() as folder:
        timm_weights.write_snapshot(network.file, network.backbone, network.own_backbone, Path(folder))
        [rows] = extraction.extract_views([extraction.teacher_view(teacher)], Path(folder), None, images)
    assert rows is not None
    return network, rows


def sample_images() -> list[NDArray[np.uint8]]:
    """Four images (h, w, 3) uint8 of different aspect ratios: waves, a checkerboard and discs, by formulas alone."""
    found = []
    for number, (height, width) in enumerate(_IMAGES):
        y, x = np.mgrid[0:height, 0:width].astype(np.float64)
        waves = [np.sin((x * (3 + channel) + y * (number - 1)) / (9.0 + 4 * channel)) for channel in range(3)]
        board = ((x // 24 + y // 24) % 2)[..., None] * 40.0
        disc = (np.hypot(x - width / 2, y - height / 2) < min(height, width) / 3)[..., None] * 60.0 * (number % 2)
        found.append((np.stack(waves, -1) * 60 + 90 + board + disc).round().clip(0, 255).astype(np.uint8))
    return found


def fingerprint_of(features: NDArray[np.float32]) -> list[float]:
    """Sixteen numbers: the features of each image, scaled to length 1, along four directions of a fixed rule."""
    unit = features.astype(np.float64) / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    places = np.arange(1, features.shape[1] + 1)
    directions = np.sin(places[:, None] * np.sqrt([2.0, 3.0, 5.0, 7.0][:_DIRECTIONS])[None] * 10)
    return [round(float(value), 5) for value in (unit @ directions).ravel()]

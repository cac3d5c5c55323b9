"""The specs of a pair, as users write them in YAML. Every field belongs to the identity of results, defaults included."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from ktray import evaluation_presets, plugins
from ktray.errors import UserError
from ktray.plugins import PluginSpec
from ktray.strict import StrictSpec, added_field, plain_types
from ktray.text import shown

MAX_DATA_TEXT = 4096  # characters; a path may have as many
MAX_GENERATIONS = 20  # pairs in a chain
MAX_EVALUATIONS = 100
MAX_TEACHERS = 16  # of one student


def _parse(group: str, value: Any) -> Any:
    try:
        found = plugins.parse(group, value)
    except UserError as error:  # pydantic adds the path of the field to a ValueError
        raise ValueError(str(error)) from error
    if not isinstance(found, StrictSpec):
        article = "an" if group[0] in "aeiou" else "a"
        raise ValueError(f"{article} {group} is a kind's name or a mapping with 'kind', and this is {shown(value)}")
    return found


def _data(value: Any) -> Any:
    """The spec of a data set from ``fashion_mnist_mini``, ``parquet:/p?label=label`` or a mapping."""
    if not isinstance(value, str):
        return _parse("dataset", value)
    if len(value) > MAX_DATA_TEXT:
        raise ValueError(
            f"a data set is written in at most {MAX_DATA_TEXT:,} characters, and this one has {len(value):,}; "
            "write it as a mapping: {kind: parquet, path: ...}"
        )
    place, mark, query = value.partition("?")
    kind, _, location = place.partition(":")
    if mark and location and not os.path.exists(location) and os.path.exists(value.partition(":")[2]):
        raise ValueError(
            f"fields follow the first ? of {shown(value)}, and there is a path that has a ? itself; "
            f"write {{kind: {kind}, path: {shown(value.partition(':')[2])}}} for it"
        )
    fields: dict[str, Any] = {"kind": kind}
    if location:
        fields["path"] = location
    for pair in filter(None, query.split("&")):
        name, _, text = pair.partition("=")
        if name in fields:
            raise ValueError(f"the data set {shown(value)} says {name!r} twice; leave one of them out")
        fields[name] = _from_text(kind, name, text)
    return _parse("dataset", fields)


def _from_text(kind: str, name: str, text: str) -> Any:
    """`text` as a number, boolean or null where the field of the data set may be one; otherwise the text itself."""
    if kind not in plugins.kinds("dataset"):
        return text
    model = plugins.module("dataset", kind).Spec
    if name not in model.model_fields:
        return text
    if text == "null" and type(None) in get_args(model.model_fields[name].annotation):
        return None
    if not plain_types(model, name):
        return text
    try:
        return TypeAdapter(model.model_fields[name].annotation).validate_strings(text)
    except ValidationError:  # the spec will reject it, with the path of the field
        return text


Seed = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
"""An entry of a list of numbers or lengths."""
Share = Annotated[float, Field(gt=0, lt=1)]
"""A part of a whole, neither none nor all of it."""
Precision = Literal["float32", "tf32", "bfloat16", "float16"]
"""How a GPU rounds the inputs of a network's products and convolutions; see `ops/precision.py`."""
NetworkPrecision = Annotated[
    Precision, Field(description="of products and convolutions when features are extracted; bfloat16 is fast on GPUs")
]


ImageSize = Annotated[
    int | None,
    Field(
        ge=8,
        le=2048,
        description="side in pixels of the images that the network sees, resized on its device from those of the data; null: "
        "the data's size",
    ),
]


class Split(StrictSpec):
    """How a val split is taken from the training images of a data set without one; stratified if there are labels."""

    val: float = Field(default=0.1, ge=0, lt=1, description="share of the training images; 0: no val split")
    seed: Seed = 0


def _grid(value: Any) -> Any:
    if value == "under_9000" or (type(value) is int and 1 <= value <= 64):
        return value
    raise ValueError(f"grid is {shown(value)} and should be a whole number from 1 to 64, or under_9000")


class Pooling(StrictSpec):
    """How the feature maps of a layer become one vector: pooled to a grid x grid x C, then flattened."""

    kind: Literal["avg", "max"] = "avg"
    grid: Annotated[int | Literal["under_9000"], PlainValidator(_grid)] = Field(
        default=1, description="cells per side; under_9000: as many as give fewer than 9,000 features, the paper's rule"
    )

    def side(self, channels: int, finest: int) -> int:
        """Cells per side for maps of so many channels, of which the shorter side has `finest` cells."""
        if isinstance(self.grid, int):
            return self.grid
        return max(1, min(finest, math.isqrt(8_999 // channels)))


class DataPlugin(PluginSpec, Protocol):
    """What ktray reads of every data set's Spec."""

    @property
    def size(self) -> int:
        """Side of the images in pixels."""

    @property
    def split(self) -> Split:
        """How a val split is taken from the training images where there is none."""

    @property
    def max_unreadable(self) -> float:
        """Largest tolerated share of unreadable images."""


class EvaluationPlugin(PluginSpec, Protocol):
    """What ktray reads of every evaluation's Spec; `EvaluationFields` has these fields."""

    @property
    def name(self) -> str | None:
        """Prefix of its metrics; None for its kind."""

    @property
    def of(self) -> Literal["student", "teacher"]:
        """Whose features are judged."""

    @property
    def layer(self) -> str | None:
        """Layer whose features are judged; None for the network's own."""

    @property
    def pool(self) -> Pooling:
        """How a layer's maps become one vector."""

    @property
    def split(self) -> Literal["val", "test"]:
        """Split of the target data whose images are judged."""


def _any_kind(group: str) -> WithJsonSchema:
    """Stands for the kinds of a group in the JSON schema of a model; `search.file_schema` replaces it."""
    return WithJsonSchema({"kinds": group})


TOLERANCE = "max_unreadable"
"""Field of every data set that decides whether its images are accepted, and not what they are. Every key has its default."""


def without_max_unreadable(data: DataPlugin) -> DataPlugin:
    """The data set with the default of the tolerated share of unreadable images."""
    fields: Mapping[str, Any] = type(data).model_fields  # type: ignore[attr-defined]
    return data.model_copy(update={TOLERANCE: fields[TOLERANCE].default})


DataSpec = Annotated[DataPlugin, PlainValidator(_data), _any_kind("dataset")]
BackboneSpec = Annotated[PluginSpec, PlainValidator(partial(_parse, "backbone")), _any_kind("backbone")]
PretextSpec = Annotated[PluginSpec, PlainValidator(partial(_parse, "pretext")), _any_kind("pretext")]
DescriptorSpec = Annotated[PluginSpec, PlainValidator(partial(_parse, "descriptor")), _any_kind("descriptor")]
TransferSpec = Annotated[PluginSpec, PlainValidator(partial(_parse, "transfer")), _any_kind("transfer")]
EvaluationSpec = Annotated[EvaluationPlugin, PlainValidator(partial(_parse, "evaluation")), _any_kind("evaluation")]


METRIC_PREFIXES = ("images", "teacher", "features", "clusters", "pseudo_labels", "student", "cost", "objective", "test")
"""What the names of metrics begin with that no evaluation makes: stages, the cost, objectives in MLflow, results on test."""


class EvaluationFields(StrictSpec):
    """The fields that every evaluation has, for its Spec to extend."""

    kind: str
    name: str | None = Field(default=None, min_length=1, max_length=100, description="prefix of its metrics; null: its kind")
    of: Literal["student", "teacher"] = "student"
    layer: str | None = Field(default=None, description="layer to read; null: the network's own features")
    pool: Pooling = Pooling()
    split: Literal["val", "test"] = "val"
    network_precision: Precision | None = Field(
        default=None,
        description="of products and convolutions when features are extracted; null: float32 for a student, a teacher's own",
    )


def refuse_pool(evaluation: EvaluationFields, instead: str = "leave 'pool' out") -> None:
    """Refuse a `pool` of an evaluation that pools nothing: it would count in its key and change no metric.

    Raises:
        ValueError: there is one.
    """
    if evaluation.pool != Pooling():
        raise ValueError(f"{evaluation.kind} does not pool the maps of a layer; {instead}")


class KMeansFields(StrictSpec):
    """The fields of k-means and of the projection before it, for the Spec of a transfer by clusters to extend."""

    kind: str
    k: int | tuple[int, ...] = Field(default=500, description="number of clusters")
    l2: bool = Field(default=True, description="scale features to length 1 first")
    pca: int | None = Field(default=None, ge=1, description="components kept; null: no PCA")
    whiten: bool = Field(default=False, description="scale PCA components to unit variance")
    l2_after: bool = Field(default=False, description="scale to length 1 again at the end")
    iterations: int = Field(default=20, ge=1, le=1000, description="most iterations of k-means")
    seed: Seed = 0


KMEANS_FIELDS = tuple(name for name in KMeansFields.model_fields if name != "kind")
"""What `NEEDS["clusters"]` of such a transfer is: the fields that determine the clusters."""


class DataRoles(StrictSpec):
    """The data set of each role. They may differ, as in the paper's Table 2."""

    pretext: DataSpec
    cluster: DataSpec
    transfer: DataSpec
    target: DataSpec


class Schedule(StrictSpec):
    """How a network is trained: learning rate over time, and the optimiser's settings.

    `warmup_stable` warms up linearly, stays constant, and decays linearly to zero over the last `decay` share of the epochs.
    Before the decay it does not depend on `epochs`, so a longer training resumes from a shorter one. `cosine` depends on it.

    With `ema` the averaged weights are those that are judged, exported and read by later stages; the training goes on with its
    own. lars and lamb are timm's, need `pip install 'ktray[timm]'`, and on a GPU run kernel by kernel, not as CUDA graphs.
    """

    kind: Literal["constant", "warmup_stable", "cosine"] = "warmup_stable"
    epochs: int = Field(ge=1, le=10_000)
    lr: float = Field(default=0.05, gt=0, le=100)
    warmup: float = Field(default=0.0, ge=0, description="epochs")
    decay: float = Field(default=0.0, ge=0, le=1, description="share of the epochs, warmup_stable only")
    batch_size: int = Field(default=128, ge=2)
    optimizer: Literal["sgd", "adamw", "lars", "lamb"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        default="float32",
        description="of products and convolutions; weights stay float32. tf32 and bfloat16 are for GPUs: on a CPU, tf32 is "
        "float32 and bfloat16 is slow",
    )
    clip: float | None = added_field(
        None, gt=0, le=1e6, description="largest norm of a step's gradient, of all weights together; null: any"
    )
    ema: float | None = added_field(
        None,
        ge=0,
        lt=1,
        description="share of an exponential moving average of the weights that a step keeps; null: no average",
    )
    layer_decay: float = added_field(
        1.0, gt=0, le=1, description="factor on the learning rate for each layer of the backbone further from the head"
    )
    micro_batch: int | None = added_field(
        None,
        ge=2,
        description="images that go through the network at once; their gradients add up to those of a batch; null: all",
    )

    @model_validator(mode="after")
    def _only_what_the_kind_has(self) -> Schedule:
        if self.kind != "warmup_stable" and self.decay:
            raise ValueError(f"decay belongs to warmup_stable; a {self.kind} schedule has none")
        if self.kind == "constant" and self.warmup:
            raise ValueError("a constant schedule has no warmup; use warmup_stable")
        if self.optimizer in ("adamw", "lamb") and self.momentum != type(self).model_fields["momentum"].default:
            raise ValueError(f"momentum belongs to sgd and lars; {self.optimizer} has none, so leave 'momentum' out")
        if self.micro_batch is not None and self.micro_batch >= self.batch_size:
            raise ValueError(
                f"micro_batch={self.micro_batch} is a whole batch of batch_size={self.batch_size} or more; leave it out "
                "or make it smaller"
            )
        return self

    @model_validator(mode="after")
    def _the_warmup_reaches_the_learning_rate(self) -> Schedule:
        # A warm-up may last to the very end: a longer training begins like that and shares the snapshot. Not so for a cosine.
        stable = self.epochs - self.epochs * self.decay
        if self.warmup > stable + 1e-9 or (self.kind == "cosine" and self.warmup >= self.epochs):
            what = "decay begins" if self.decay else "training ends"
            raise ValueError(
                f"warmup={self.warmup:g} epochs do not end before the {what}, after {stable:g} of {self.epochs}, so "
                f"lr={self.lr:g} is never reached; warm up for less or train for more"
            )
        return self


class TrainedTeacher(StrictSpec):
    """A backbone trained on a pretext task; its features are those of one named layer, float32 unless `dtype` says less."""

    pretext: PretextSpec
    backbone: BackboneSpec
    layer: str | None = Field(default=None, description="null: the backbone's own features")
    pool: Pooling = Pooling()
    schedule: Schedule
    seed: Seed = 0
    image_size: ImageSize = None
    dtype: Literal["float32", "float16"] = "float32"
    network_precision: NetworkPrecision = "float32"


class HandcraftedTeacher(StrictSpec):
    """A descriptor; nothing is trained."""

    descriptor: DescriptorSpec
    dtype: Literal["float32", "float16"] = "float32"


Normalization = Literal["ktray", "imagenet", "half"]  # how pixels become a network's inputs; see `augmentation.normalize`
ChannelStatistics = Mapping[str, Sequence[float]]
"""``{"mean": ..., "std": ...}``: of the channels of images in [0, 1], by which they are normalised."""


class LoadedTeacher(StrictSpec):
    """A backbone with existing weights.

    `checkpoint` is a file (safetensors, or whatever torch.save wrote that holds named tensors), the folder of an exported
    student, or the key of a teacher or student in the store, such as ``teacher-3f9a1c0b2d44``. The network in a file is found
    by the names of its tensors, below any keys and behind any prefix; where several fit, `key` and `prefix` say which.
    """

    checkpoint: str
    key: str | None = Field(default=None, description="of the state_dict in the file, such as model_ema; null: found by names")
    prefix: str | None = Field(default=None, description="of the names in it, such as module.backbone; null: found by names")
    backbone: BackboneSpec
    normalize: Normalization = Field(default="ktray", description="imagenet for the weights of torchvision and most of timm")
    layer: str | None = None
    pool: Pooling = Pooling()
    image_size: ImageSize = None
    dtype: Literal["float32", "float16"] = "float32"
    network_precision: NetworkPrecision = "float32"


class NamedTeacher(StrictSpec):
    """Pretrained weights by the name that timm gives them, with the preprocessing that belongs to them.

    The weights lie in this machine's Hugging Face cache, or where `weights` says; nothing is ever downloaded on the way. Mean,
    standard deviation, input size, crop and interpolation are those of the weights' `config.json`, or else of timm.

    Without `tokens` and `layer` the features are those before the classifier, as timm computes them; with a `layer` alone they
    are its patches. `pool` applies to patches.
    """

    timm: str = Field(description="name with its tag, such as vit_base_patch16_dinov3.lvd1689m")
    weights: str | None = Field(
        default=None,
        description="a file of these weights, or a folder with one and its config.json; null: the Hugging Face cache",
    )
    layer: str | None = Field(default=None, description="such as blocks_5; null: the last one, after the network's final norm")
    tokens: Literal["cls", "patches", "cls+patches", "all"] | None = Field(
        default=None,
        description="cls: the class token; patches: their mean, or more cells by pool; cls+patches: both, one after the other; "
        "all: class token, each register, and patches; null: the network's own features",
    )
    pool: Pooling = Pooling()
    image_size: int | None = Field(
        default=None,
        ge=8,
        le=2048,
        description="side of the input in pixels; null: the weights' own. Position embeddings are interpolated as by timm",
    )
    input: Literal["files", "data"] = Field(
        default="files",
        description="files: each image is decoded, resized and cropped as the weights' config says, and kept on disk at that "
        "size; data: the squares of the data set (data.size) are resized on the device",
    )
    dtype: Literal["float32", "float16"] = "float32"
    network_precision: NetworkPrecision = "float32"

    @field_validator("timm")
    @classmethod
    def _is_written_as_timm_writes_it(cls, name: str) -> str:
        bare = re.sub(r"^(hf[-_]hub:)?(timm/)?", "", name.strip())
        if not re.fullmatch(r"[a-z0-9_]+(\.[A-Za-z0-9_\-]+)?", bare):
            raise ValueError(f"{shown(name)} is no name of timm's, such as vit_base_patch16_dinov3.lvd1689m")
        if bare != name:
            raise ValueError(f"write timm: {bare}, as timm spells it, instead of {shown(name)}")
        return name

    @model_validator(mode="after")
    def _a_pool_only_with_patches(self) -> NamedTeacher:
        if self.pool != Pooling() and (self.tokens == "cls" or (self.tokens is None and self.layer is None)):
            what = "a class token" if self.tokens == "cls" else "the network's own features, which are no maps"
            raise ValueError(f"pool is for patches, and this teacher's features are {what}; leave it out, or ask for patches")
        return self


class Columns(StrictSpec):
    """Where a parquet file keeps an image's path and its features (a list of floats)."""

    path: str = "path"
    features: str = "features"


class PrecomputedTeacher(StrictSpec):
    """Precomputed features: a .npy (N, D) or a .parquet, by image path as in the data set, such as ``cats/1.png``.

    `names` of a .npy is a text file with one path per line, or a .npy of texts. Without it row i is the i-th training image
    of the data set in its own order, before a val part is taken out of it.
    """

    features: str
    names: str | None = Field(default=None, description=".npy only")
    columns: Columns | None = Field(default=None, description=".parquet only; null: path and features")
    dtype: Literal["float32", "float16"] = "float32"

    @model_validator(mode="after")
    def _only_what_the_file_has(self) -> PrecomputedTeacher:
        parquet = self.features.endswith(".parquet")
        if not parquet and not self.features.endswith(".npy"):
            raise ValueError(f"ready-made features are a .npy or a .parquet file, and this is {shown(self.features)}")
        if (self.names if parquet else self.columns) is not None:
            raise ValueError("a .parquet has its paths in 'columns', a .npy in 'names'; leave the other out")
        return self


def _teacher(value: Any) -> Any:
    """The spec of a teacher, whose type is found by its distinguishing field, so that errors concern that type alone."""
    if not isinstance(value, Mapping):
        return value
    present = [field for field in TEACHERS if field in value]
    if len(present) != 1:
        known = [f"{field!r} ({name})" for field, (_, name) in TEACHERS.items()]
        raise ValueError(
            f"a teacher has exactly one of {', '.join(known[:-1])} or {known[-1]}"
            + (f"; this one has {' and '.join(present)}" if present else "")
        )
    parsed = TEACHERS[present[0]][0].model_validate(dict(value))
    return parsed.several[0] if isinstance(parsed, SeveralTeachers) and len(parsed.several) == 1 else parsed


if TYPE_CHECKING:
    TeacherSpec: TypeAlias = (
        "TrainedTeacher | HandcraftedTeacher | LoadedTeacher | NamedTeacher | PrecomputedTeacher | StudentTeacher"
    )
    AnyTeachers: TypeAlias = "TeacherSpec | SeveralTeachers"
else:
    TeacherSpec = AnyTeachers = Annotated[SerializeAsAny[StrictSpec], BeforeValidator(_teacher), _any_kind("teacher")]


class SeveralTeachers(StrictSpec):
    """Several teachers of one student, or several layers of one: each teaches it by cluster heads of its own.

    An entry that is null is left out, so that a search space may draw the subset; of one that is left the pair is that of this
    teacher alone.
    """

    several: tuple[TeacherSpec, ...] = Field(min_length=1, max_length=MAX_TEACHERS)

    @field_validator("several", mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        left = [entry for entry in value if entry is not None]
        if value and not left:
            raise ValueError("no teacher is left; at least one entry must not be null")
        if any(isinstance(entry, Mapping) and "several" in entry for entry in left):
            raise ValueError("an entry is one teacher; write all of them into one list")
        return left


class Jitter(StrictSpec):
    """Random changes of brightness, contrast and saturation (factors in [1 - x, 1 + x]) and of hue (by -x to x turns)."""

    brightness: float = Field(default=0.4, ge=0, le=1)
    contrast: float = Field(default=0.4, ge=0, le=1)
    saturation: float = Field(default=0.4, ge=0, le=1)
    hue: float = Field(default=0.1, ge=0, le=0.5)
    share: float = Field(default=0.8, ge=0, le=1, description="probability that an image is changed at all")


class RandAugment(StrictSpec):
    """Operations drawn for each image from 14, geometric ones and changes of colour, all of one strength."""

    operations: int = Field(default=2, ge=1, le=8, description="one after the other")
    magnitude: int = Field(default=9, ge=0, le=30, description="strength, from 0 to 30 as in torchvision")


class Augment(StrictSpec):
    """Random views of training images, changed in the order of the fields; `mixup` and `cutmix` then mix images of a batch.

    Images that are mixed have mixed targets, so only transfers that classify images allow it.
    """

    crop: int = Field(default=2, ge=0, description="pixels of padding before a random crop; 0 where 'area' is given")
    flip: bool = False
    area: float | None = added_field(
        None, gt=0, le=1, description="smallest share of the area that a random resized crop keeps; null: no such crop"
    )
    randaugment: RandAugment | None = added_field(None)
    jitter: Jitter | None = added_field(None)
    grey: float = added_field(0.0, ge=0, le=1, description="probability of a grey image")
    blur: float = added_field(0.0, ge=0, le=1, description="probability of a Gaussian blur of 0.1 to 2 px")
    solarise: float = added_field(0.0, ge=0, le=1, description="probability that values above one half are inverted")
    mixup: float = added_field(
        0.0, ge=0, le=10, description="a of the Beta(a, a) distribution of an image's share in its mean with another; 0: none"
    )
    cutmix: float = added_field(
        0.0, ge=0, le=10, description="a of the Beta(a, a) distribution of an image's area beside a cutting of another; 0: none"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_way_to_crop(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("area") is None:
            return value
        if value.get("crop"):
            raise ValueError(
                f"crop={value['crop']} pads and crops, and area={value['area']} crops and resizes; with 'area' leave 'crop' out"
            )
        return {**value, "crop": 0}

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return bool(self.mixup or self.cutmix)


def _unmixed(augment: Augment) -> Augment:
    if augment.mixes:
        raise ValueError("mixup and cutmix mix the classes of images, and this task has none; leave them out")
    return augment


UnmixedAugment = Annotated[Augment, AfterValidator(_unmixed)]
"""For tasks whose targets cannot be mixed."""


class Student(StrictSpec):
    """A network that is trained from random weights on the targets of the transfer."""

    backbone: BackboneSpec
    schedule: Schedule
    augment: Augment = Augment()
    seed: Seed = 0
    image_size: ImageSize = None


def _plain_teachers(teacher: Any) -> list[Mapping[str, Any]]:
    """The teachers of a pair as plain data that may be wrong: those that are mappings."""
    several = teacher.get("several") if isinstance(teacher, Mapping) else None
    return [each for each in (several if isinstance(several, list | tuple) else [teacher]) if isinstance(each, Mapping)]


class PairSpec(StrictSpec):
    """One complete transfer: data, teacher, transfer, student and evaluations."""

    data: DataRoles
    teacher: AnyTeachers | None = Field(default=None, description="null only for transfers without a teacher")
    transfer: TransferSpec
    student: Student
    evals: tuple[EvaluationSpec, ...] = Field(default=(), max_length=MAX_EVALUATIONS)

    @model_validator(mode="before")
    @classmethod
    def _a_chain_of_a_few_generations(cls, value: Any) -> Any:
        generation, count = [value], 0
        while generation:
            generation = [
                teacher["pair"]
                for pair in generation
                if isinstance(pair, Mapping)
                for teacher in _plain_teachers(pair.get("teacher"))
                if "pair" in teacher
            ]
            count += 1
        if count > MAX_GENERATIONS:
            raise ValueError(
                f"this is a chain of {count} pairs, each the teacher of the next; at most {MAX_GENERATIONS} are read"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _inherit_data_for_the_teaching_pair(cls, value: Any) -> Any:
        """The pair that teaches has the same data by default, so a search space draws data once for all generations."""
        if not isinstance(value, Mapping) or "data" not in value or not isinstance(value.get("teacher"), Mapping):
            return value

        def with_data(teacher: Any) -> Any:
            inner = teacher.get("pair") if isinstance(teacher, Mapping) else None
            if not isinstance(inner, Mapping) or "data" in inner:
                return teacher
            return {**teacher, "pair": {"data": value["data"], **inner}}

        teacher = with_data(value["teacher"])
        if isinstance(teacher.get("several"), list | tuple):
            teacher = {**teacher, "several": [with_data(each) for each in teacher["several"]]}
        return {**value, "teacher": teacher}

    @model_validator(mode="before")
    @classmethod
    def _expand_presets_of_evaluations(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "evals" not in value or "data" not in value:
            return value
        data, student = value["data"], value.get("student")
        target = data.target if isinstance(data, DataRoles) else data
        if isinstance(data, Mapping) and "kind" not in data:
            target = data.get("target")
        network = (
            student.backbone
            if isinstance(student, Student)
            else student.get("backbone")
            if isinstance(student, Mapping)
            else None
        )
        names = value["evals"] if isinstance(value["evals"], list | tuple) else [value["evals"]]
        if isinstance(value["evals"], str):
            evaluation_presets.refuse_unknown(value["evals"])
        if target is None or not any(isinstance(name, str) and name in evaluation_presets.PRESETS for name in names):
            return value
        try:
            backbone = None if network is None else _parse("backbone", network)
            return {**value, "evals": evaluation_presets.expanded(value["evals"], _data(target), backbone)}
        except UserError as error:
            raise ValueError(str(error)) from error

    @field_validator("data", mode="before")
    @classmethod
    def _one_name_for_all_roles(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "kind" not in value:
            return value
        if isinstance(value, DataRoles):
            return value
        return {role: value for role in DataRoles.model_fields}

    @model_validator(mode="after")
    def _a_teacher_exactly_where_needed(self) -> PairSpec:
        needs = {"features", "clusters", "pseudo_labels"} & plugins.module_of("transfer", self.transfer).NEEDS.keys()
        if needs and self.teacher is None:
            raise ValueError(f"the transfer {self.transfer.kind!r} needs a teacher, such as teacher: {{descriptor: hog}}")
        if not needs and self.teacher is not None and not self._judges_the_teacher():
            raise ValueError(f"the transfer {self.transfer.kind!r} uses no teacher; leave 'teacher' out")
        transfer = plugins.module_of("transfer", self.transfer)
        if self.student.augment.randaugment and getattr(transfer, "READS_MAPS", False):
            raise ValueError(
                f"student.augment.randaugment shears and rotates images, which the targets of {self.transfer.kind!r} at their "
                "positions cannot follow; leave it out"
            )
        if isinstance(self.teacher, SeveralTeachers):
            self._refuse_where_one_teacher_is_meant()
        if self.student.augment.mixes and hasattr(transfer, "task") and not getattr(transfer, "MIXES_IMAGES", False):
            raise ValueError(
                f"student.augment mixes images, and the transfer {self.transfer.kind!r} has no targets that can be mixed; "
                "leave mixup and cutmix out, or transfer by clusters"
            )
        names = [entry.name or entry.kind for entry in self.evals]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two evals are called {twice.pop()!r}; give one of them a 'name'")
        named = [entry.name for entry in self.evals if entry.name]  # the kind `cost` measures what a run of the network costs
        taken = [name for name in named if name.split("/")[0] in METRIC_PREFIXES]
        if taken:
            raise ValueError(f"no eval can be called {taken[0]!r}: other metrics begin with that word; give it another 'name'")
        return self

    @model_validator(mode="after")
    def _a_pool_only_with_its_layer(self) -> PairSpec:
        for entry in self.evals:
            if entry.of == "teacher" and entry.layer is None and entry.pool != Pooling():
                name = entry.name or entry.kind
                raise ValueError(f"the eval {name!r} judges the teacher's own layer and pool; give it a 'layer' for its 'pool'")
        return self

    def _refuse_where_one_teacher_is_meant(self) -> None:
        transfer = self.transfer.kind
        if not getattr(plugins.module_of("transfer", self.transfer), "SEVERAL_TEACHERS", False):
            raise ValueError(f"the transfer {transfer!r} has one teacher, and here are several; use clusters or soft_clusters")
        judged = [entry.name or entry.kind for entry in self.evals if entry.of == "teacher"]
        if judged:
            raise ValueError(
                f"the eval {judged[0]!r} judges the teacher, and there are several; judge each in a pair of its own, which "
                "shares its stages with this one"
            )

    def _judges_the_teacher(self) -> bool:
        return any(entry.of == "teacher" for entry in self.evals)


class StudentTeacher(StrictSpec):
    """The student of another pair, fully trained. Pairs form a chain of generations, each taught by the previous student.

    That pair has the same stages here as on its own, so a search that ran it has already computed them.
    """

    pair: PairSpec
    layer: str | None = Field(default=None, description="null: the student's own features")
    pool: Pooling = Pooling()
    dtype: Literal["float32", "float16"] = "float32"
    network_precision: NetworkPrecision = "float32"

    @field_validator("pair")
    @classmethod
    def _has_no_evaluations(cls, pair: PairSpec) -> PairSpec:
        if pair.evals:
            raise ValueError("a pair that teaches is not judged here, so leave its 'evals' out; judge it as a pair of its own")
        return pair

    @property
    def backbone(self) -> BackboneSpec:
        """The network of the student that teaches."""
        return self.pair.student.backbone

    @property
    def image_size(self) -> int | None:
        """The size of the images that this student sees."""
        return self.pair.student.image_size


TEACHERS: Mapping[str, tuple[type[StrictSpec], str]] = {
    "pretext": (TrainedTeacher, "a trained teacher"),
    "descriptor": (HandcraftedTeacher, "a handcrafted teacher"),
    "checkpoint": (LoadedTeacher, "a loaded teacher"),
    "timm": (NamedTeacher, "a teacher by its name"),
    "features": (PrecomputedTeacher, "a ready-made teacher"),
    "pair": (StudentTeacher, "a teacher that was a student"),
    "several": (SeveralTeachers, "a list of teachers"),
}
"""The field by which a type of teacher is known -> that type, and what messages call it."""


def teachers_of(pair: PairSpec) -> tuple[TeacherSpec, ...]:
    """The teachers of a pair: none, one or several."""
    if pair.teacher is None:
        return ()
    return pair.teacher.several if isinstance(pair.teacher, SeveralTeachers) else (pair.teacher,)


def taught_by_each(pair: PairSpec) -> tuple[PairSpec, ...]:
    """The pair with one teacher at a time; the pair itself if it has no more than one."""
    if not isinstance(pair.teacher, SeveralTeachers):
        return (pair,)
    return tuple(pair.model_copy(update={"teacher": teacher}) for teacher in pair.teacher.several)


NetworkTeacher = TrainedTeacher | LoadedTeacher | StudentTeacher
"""The teachers that are a network as the spec says it: they have a `backbone`, a `layer` and a `pool`."""

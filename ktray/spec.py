"""What a pair is: the frozen, strict specs that a person types. Every field is part of the identity, defaults included."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ktray import plugins
from ktray.errors import UserError


class Spec(BaseModel):
    """Frozen and strict: an unknown field is an error, never ignored, and true is no 1, "5" no 5, "on" no true."""

    # Not pydantic's strict=True, which also refuses a list for a tuple and a mapping for a spec.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_own_type(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = _plain_types(cls, info.field_name or "")
        entries = value if isinstance(value, list | tuple) else (value,)
        if wanted and any(_disguised(entry, wanted) for entry in entries):
            kind, text = _WANTED[next(each for each in _WANTED if each in wanted)]
            if isinstance(value, list | tuple):
                raise PydanticCustomError("entries_type", "a list, each entry a {text}", {"text": text})
            raise PydanticCustomError(kind, "Input should be a {text}", {"text": text})
        return value


_WANTED: dict[type, tuple[Any, str]] = {
    float: ("float_type", "finite number"),
    int: ("int_type", "whole number"),
    bool: ("bool_type", "true or false"),
}


@lru_cache(maxsize=1024)
def _plain_types(model: type[BaseModel], name: str) -> frozenset[type]:
    """The types of a field that is only numbers, booleans and null; empty for any other field."""
    field = model.model_fields[name]
    if any(isinstance(each, BeforeValidator) for each in field.metadata):  # it reads text of its own, such as 30m
        return frozenset()
    types = frozenset(_leaves(field.annotation))
    return types if types <= {int, float, bool, type(None)} and types & {int, float, bool} else frozenset()


def _leaves(annotation: Any) -> set[Any]:
    inside = getattr(annotation, "__metadata__", None) is not None
    arguments = get_args(annotation)[:1] if inside else [each for each in get_args(annotation) if each is not Ellipsis]
    return {leaf for each in arguments for leaf in _leaves(each)} if arguments else {annotation}


def _disguised(value: Any, wanted: frozenset[type]) -> bool:
    """Whether pydantic would turn a value of another type into one of `wanted`."""
    if isinstance(value, bool):
        return bool not in wanted
    return isinstance(value, str) or (isinstance(value, int | float) and wanted <= {bool, type(None)})


def _parse(room: str, value: Any) -> Any:
    try:
        found = plugins.parse(room, value)
    except UserError as error:  # as a ValueError it leaves pydantic with the path of the field
        raise ValueError(str(error)) from error
    if not isinstance(found, Spec):
        raise ValueError(f"a {room} is a kind's name or a mapping with 'kind', and this is {value!r}")
    return found


def _data(value: Any) -> Any:
    """``fashion_mnist_mini``, ``parquet:/p?label=label`` or a mapping, as one data set's mapping or spec."""
    if not isinstance(value, str):
        return _parse("dataset", value)
    place, _, query = value.partition("?")
    kind, _, location = place.partition(":")
    fields: dict[str, Any] = {"kind": kind}
    if location:
        fields["path"] = location
    for pair in filter(None, query.split("&")):
        name, _, text = pair.partition("=")
        fields[name] = _from_text(kind, name, text)
    return _parse("dataset", fields)


def _from_text(kind: str, name: str, text: str) -> Any:
    """The number or boolean that `text` stands for in a field of a data set; the text itself where it stands for none."""
    if kind not in plugins.kinds("dataset"):
        return text
    model = plugins.module("dataset", kind).Spec
    if name not in model.model_fields or not _plain_types(model, name):
        return text
    try:
        return TypeAdapter(model.model_fields[name].annotation).validate_strings(text)
    except ValidationError:  # the spec refuses it, with the path of the field
        return text


DataSpec = Annotated[SerializeAsAny[Spec], BeforeValidator(_data)]
BackboneSpec = Annotated[Any, BeforeValidator(partial(_parse, "backbone"))]
PretextSpec = Annotated[Any, BeforeValidator(partial(_parse, "pretext"))]
DescriptorSpec = Annotated[Any, BeforeValidator(partial(_parse, "descriptor"))]
TransferSpec = Annotated[Any, BeforeValidator(partial(_parse, "transfer"))]
EvaluationSpec = Annotated[Any, BeforeValidator(partial(_parse, "evaluation"))]
Seed = Annotated[int, Field(ge=0)]


class Split(Spec):
    """How images for judging are taken from a data set that brings none: a seeded part, stratified where there are labels."""

    val: float = Field(default=0.1, ge=0, lt=1, description="share of the training images; 0: no val split")
    seed: Seed = 0


class DataRoles(Spec):
    """Which data set plays which part; the paper's Table 2 lets them differ."""

    pretext: DataSpec
    cluster: DataSpec
    transfer: DataSpec
    target: DataSpec


class Schedule(Spec):
    """How a network is trained: learning rate over time, and the optimiser's settings.

    `warmup_stable` warms up linearly, stays, and decays linearly to zero over the last `decay` share of the epochs. Its trunk
    (all before the decay) does not read the total, so a longer training continues a shorter one's trunk. `cosine` reads it.
    """

    kind: Literal["constant", "warmup_stable", "cosine"] = "warmup_stable"
    epochs: int = Field(ge=1, le=10_000)
    lr: float = Field(default=0.05, gt=0, le=100)
    warmup: float = Field(default=0.0, ge=0, description="epochs")
    decay: float = Field(default=0.0, ge=0, le=1, description="share of the epochs, warmup_stable only")
    batch_size: int = Field(default=128, ge=2)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)

    @model_validator(mode="after")
    def _only_what_the_kind_has(self) -> Schedule:
        if self.kind != "warmup_stable" and self.decay:
            raise ValueError(f"decay belongs to warmup_stable; a {self.kind} schedule has none")
        if self.kind == "constant" and self.warmup:
            raise ValueError("a constant schedule has no warmup; use warmup_stable")
        if self.optimizer == "adamw" and self.momentum != type(self).model_fields["momentum"].default:
            raise ValueError("momentum belongs to sgd; adamw has none, so leave 'momentum' out")
        return self


class Pooling(Spec):
    """How the feature maps of a layer become one vector: pooled to a grid x grid x C, then flattened."""

    kind: Literal["avg", "max"] = "avg"
    grid: int = Field(default=1, ge=1, le=64)


class TrainedTeacher(Spec):
    """A backbone trained on a pretext task; its features are those of one named layer, float32 unless `dtype` says less."""

    pretext: PretextSpec
    backbone: BackboneSpec
    layer: str | None = Field(default=None, description="null: the backbone's own features")
    pool: Pooling = Pooling()
    schedule: Schedule
    seed: Seed = 0
    dtype: Literal["float32", "float16"] = "float32"


class HandcraftedTeacher(Spec):
    """A descriptor: no training, no seed, no schedule."""

    descriptor: DescriptorSpec
    dtype: Literal["float32", "float16"] = "float32"


class LoadedTeacher(Spec):
    """A backbone with weights made elsewhere.

    `checkpoint` is a file (safetensors, or a state_dict that loads with weights_only), the folder of an exported student, or
    the key of a teacher or student in the store, such as ``teacher-3f9a1c0b2d44``.
    """

    checkpoint: str
    backbone: BackboneSpec
    layer: str | None = None
    pool: Pooling = Pooling()
    dtype: Literal["float32", "float16"] = "float32"


def _teacher(value: Any) -> Any:
    """The teacher type by the field that only it has, so that errors speak of one type and not of three."""
    if not isinstance(value, Mapping):
        return value
    by_field: dict[str, type[Spec]] = {"pretext": TrainedTeacher, "descriptor": HandcraftedTeacher, "checkpoint": LoadedTeacher}
    present = [field for field in by_field if field in value]
    if len(present) != 1:
        raise ValueError(
            "a teacher has exactly one of 'pretext' (trained), 'descriptor' (handcrafted) or 'checkpoint' (loaded)"
            + (f"; this one has {' and '.join(present)}" if present else "")
        )
    return by_field[present[0]].model_validate(dict(value))


TeacherSpec = Annotated[SerializeAsAny[Spec], BeforeValidator(_teacher)]


class Augment(Spec):
    """Random views of the student's training images."""

    crop: int = Field(default=2, ge=0, description="pixels of padding before a random crop")
    flip: bool = False


class Student(Spec):
    """A fresh network that learns to predict what the transfer asks of it."""

    backbone: BackboneSpec
    schedule: Schedule
    augment: Augment = Augment()
    seed: Seed = 0


class PairSpec(Spec):
    """One complete transfer: a teacher, a way to transfer, a student, and how they are judged."""

    data: DataRoles
    teacher: TeacherSpec | None = Field(default=None, description="null only for transfers without a teacher")
    transfer: TransferSpec
    student: Student
    evals: tuple[EvaluationSpec, ...] = ()

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
        names = [getattr(entry, "name", None) or entry.kind for entry in self.evals]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two evals are called {twice.pop()!r}; give one of them a 'name'")
        return self

    @model_validator(mode="after")
    def _a_pool_only_with_its_layer(self) -> PairSpec:
        for entry in self.evals:
            judges_teacher, layer = getattr(entry, "of", "student") == "teacher", getattr(entry, "layer", None)
            if judges_teacher and layer is None and getattr(entry, "pool", Pooling()) != Pooling():
                name = getattr(entry, "name", None) or entry.kind
                raise ValueError(f"the eval {name!r} judges the teacher's own layer and pool; give it a 'layer' for its 'pool'")
        return self

    def _judges_the_teacher(self) -> bool:
        return any(getattr(entry, "of", "student") == "teacher" for entry in self.evals)

"""Estimates the seconds of stages from the records of artifacts.

Each kind of stage, such as ``student``, has a Bayesian linear regression of log seconds on its covariates: the logarithms of
epochs, images, image size, network width and depth, k and feature width, and an effect of each plugin, backbone and device.
With few records an estimate stays near the median of its kind, scaled with the prior's exponents. Estimates have intervals.

numpy is imported when the first record is learned from, so that the broker, which imports this module, starts without it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ktray.artifact import Stage, kind_of
from ktray.fingerprint import fingerprint
from ktray.stores import Store

if TYPE_CHECKING:
    from ktray.cost_model.bayesian_regression import Posterior

Record = Mapping[str, Any]

# Prior of the exponents: seconds grow with covariate ** exponent; mean and standard deviation.
EXPONENTS = {
    "epochs": (1.0, 0.15),
    "images": (0.8, 0.3),
    "size": (1.0, 0.7),
    "width": (0.8, 0.5),
    "depth": (0.8, 0.4),
    "k": (0.5, 0.3),
    "dim": (0.6, 0.3),
}
# Prior of the categories' effects: standard deviation of the log of the factor between two values of a category.
CATEGORY_DEVIATIONS = {"plugin": 1.5, "backbone": 1.0, "device": 1.5, "of": 0.7}
# For a kind without any record: seconds of training per epoch, and of any other stage.
PRIOR_SECONDS_PER_EPOCH = {"teacher": 3.0, "student": 3.0}
PRIOR_SECONDS = 5.0
PRIOR_SECONDS_PER_STEP = 0.1  # of an evaluation that trains for a number of steps, such as a detector on two images of 600 px
# How many times as long a stage that can run on both is taken to run on CPUs as on a GPU, until there are records of both.
PRIOR_CPU_FACTOR = 10.0
TYPICAL = {"images": 10_000, "size": 32, "width": 1.0, "depth": 18, "k": 100, "dim": 512}  # covariates that these are meant for

SHORTEST = 0.02  # seconds; shorter times are mostly noise of the clock and the machine
MOST_RECORDS = 400  # of a kind that are learned from; keys are hashes, so the first ones are a fair sample
MOST_KEPT = 2 * MOST_RECORDS
GROWTH = 1.2  # a kind is fitted again when its number of records has grown by this factor
RELATIVE_ERROR = 0.4  # standard deviation of a stage's seconds as a share of the estimate, if there is no interval
INTERVAL = 1.645  # 90 % of a normal distribution lie within this many standard deviations of the mean


@dataclass(frozen=True)
class _Estimate:
    """Total seconds of stages that run one after the other.

    Attributes:
        low: with `high` the ends of a 90 % interval.
        known: number of stages of kinds with records.
        unknown: number of stages of kinds without records, which the seconds do not include.
    """

    seconds: float
    low: float
    high: float
    known: int
    unknown: int


class CostModel:
    """Estimates the seconds of stages; `add` updates it with new records.

    Args:
        records: key -> record of past artifacts.
    """

    def __init__(self, records: Mapping[str, Record] | None = None) -> None:
        self._observations: dict[str, dict[str, _Observation]] = {}  # kind -> key -> observation
        self._epochs: dict[str, int] = {}  # key of a recorded training -> its last epoch
        self._dims: dict[str, float] = {}
        self._learned: dict[str, _LearnedKind] = {}
        for key, record in sorted((records or {}).items()):
            self.add(key, record)

    def add(self, key: str, record: Record) -> None:
        """Adds a record; each counts once. For a kind with enough records, only the epoch is kept."""
        if "epoch" in record.get("spec", {}):
            self._epochs[key] = int(record["spec"]["epoch"])
        kept = self._observations.setdefault(kind_of(key), {})
        if key in kept or len(kept) >= MOST_KEPT:
            return
        kept[key] = found = _observation(key, record)
        if found.stage.kind == "features" and "dim" in found.stage.metrics:
            self._dims[_width_source(found.stage)] = float(found.stage.metrics["dim"])

    def has_records(self, kind: str) -> bool:
        """Whether there is a record of this kind of stage; if not, its estimates are the prior's."""
        return bool(self._observations.get(kind))

    def seconds(self, stage: Stage, others: Mapping[str, Stage] | None = None) -> float:
        """Estimates the seconds of one stage, for the scheduler: a call takes 10 to 100 microseconds.

        A training starts from the last snapshot that is recorded or in `others`. Without records of its kind, as when a
        scheduler starts, the prior's seconds are scaled with the prior's exponents, to distinguish long from short stages.

        Args:
            others: key -> stage that is or will be computed, such as the stage's inputs.
        """
        others = others or {}
        there = (key for key in stage.resume_from if key in self._epochs or key in others)
        term = self._term(stage, self._share(stage, there, others), others)
        return math.exp(term.mean) if isinstance(term, _Term) else term * self._prior_growth(stage, others)

    def seconds_on(self, gpu: bool, stage: Stage, others: Mapping[str, Stage] | None = None) -> float:
        """Estimates the seconds of one stage, which is no training, on a GPU or on CPUs.

        Args:
            others: as for `seconds`.
        """
        learned = self._learn(stage.name)
        devices = learned.devices if learned else {}
        if gpu in devices:
            term = self._term(stage, 1.0, others or {}, devices[gpu])
            assert isinstance(term, _Term)  # there are records of its kind
            return math.exp(term.mean)
        if not gpu:
            return self.seconds_on(True, stage, others) * PRIOR_CPU_FACTOR
        return self.seconds_on(False, stage, others) / PRIOR_CPU_FACTOR if devices else self.seconds(stage, others)

    def _prior_growth(self, stage: Stage, others: Mapping[str, Stage]) -> float:
        """Ratio of the prior's expected seconds of this stage and of a typical one of its kind with the same epochs."""
        found = self._covariates(_DescribedStage(stage.name, stage.spec, stage.inputs, {}), None, others).numbers
        return float(
            math.prod((found[name] / typical) ** EXPONENTS[name][0] for name, typical in TYPICAL.items() if name in found)
        )

    def predict(self, stages: Iterable[Stage], made: Collection[str] = ()) -> dict[str, float]:
        """Key -> seconds of every stage that is not in `made`; for a kind without records the prior's.

        Args:
            made: keys of artifacts that exist or that are computed elsewhere.
        """
        terms = self._terms(stages, made)
        known = {key: math.exp(term.mean) for key, term in terms.items() if isinstance(term, _Term)}
        return known | {key: seconds for key, seconds in terms.items() if isinstance(seconds, float)}

    def estimate(self, stages: Iterable[Stage], made: Collection[str] = ()) -> _Estimate:
        """Total seconds of the stages not in `made`; each counts once, and a training only from its last snapshot on."""
        terms = self._terms(stages, made)
        known = [term for term in terms.values() if isinstance(term, _Term)]
        total = sum(math.exp(term.mean) for term in known)
        spread = INTERVAL * self._deviation(known) / total if total else 0.0
        return _Estimate(total, total * math.exp(-spread), total * math.exp(spread), len(known), len(terms) - len(known))

    def _terms(self, stages: Iterable[Stage], made: Collection[str]) -> dict[str, _Term | float]:
        planned = {stage.key: stage for stage in stages}
        found: dict[str, _Term | float] = {}
        for stage in planned.values():
            if stage.key not in made:
                there = (key for key in stage.resume_from if key in made or key in planned)
                found[stage.key] = self._term(stage, self._share(stage, there, planned), planned)
        return found

    def _share(self, stage: Stage, there: Iterable[str], planned: Mapping[str, Stage]) -> float:
        """The share of a training that remains after the last snapshot in `there`; 1 for every other stage."""
        epoch = stage.spec.get("epoch", 0)
        if not epoch:
            return 1.0
        begun = (planned[key].spec["epoch"] if key in planned else self._epochs.get(key, 0) for key in there)
        return float((epoch - max(begun, default=0)) / epoch)

    def _term(self, stage: Stage, share: float, planned: Mapping[str, Stage], device: str | None = None) -> _Term | float:
        """The term of one stage in a sum of seconds; for a kind without records the prior's seconds.

        Args:
            device: by its name in records; None for that of the latest record.
        """
        learned = self._learn(stage.name)
        if learned is None:
            counted = passes(stage.spec)
            each = PRIOR_SECONDS_PER_EPOCH.get(stage.name, PRIOR_SECONDS)
            if stage.name == "evaluation" and "steps" in stage.spec:
                each = PRIOR_SECONDS_PER_STEP
            return share * each * (1.0 if counted is None else counted)
        found = self._covariates(_DescribedStage(stage.name, stage.spec, stage.inputs, {}), device or learned.device, planned)
        row, expected, unseen = learned.design.row(found)
        mean = expected + learned.posterior.mean(row) + math.log(max(share, 1e-6))
        return _Term(stage.name, mean, row, unseen + learned.posterior.noise**2)

    def _deviation(self, terms: Iterable[_Term]) -> float:
        """Standard deviation of a sum in seconds; the error in the weights of a kind is common to all stages of that kind."""
        variance = 0.0
        gradients: dict[str, tuple[float, ...]] = {}  # kind -> derivative of the sum by the weights
        for term in terms:
            seconds = math.exp(term.mean)
            variance += seconds**2 * term.variance
            before = gradients.get(term.kind, (0.0,) * len(term.row))
            gradients[term.kind] = tuple(sum_ + seconds * value for sum_, value in zip(before, term.row, strict=True))
        for kind, gradient in gradients.items():
            variance += self._learned[kind].posterior.variance(gradient)
        return math.sqrt(variance)

    def _learn(self, kind: str) -> _LearnedKind | None:
        """The fit for a kind of stage; None without records."""
        kept, learned = self._observations.get(kind, {}), self._learned.get(kind)
        if kept and (learned is None or min(len(kept), MOST_RECORDS) >= GROWTH * learned.count):
            found = [kept[key] for key in sorted(kept)[:MOST_RECORDS]]
            self._learned[kind] = learned = _fitted(found, [self._covariates(each.stage, each.device or "") for each in found])
        return learned

    def _covariates(
        self, stage: _DescribedStage, device: str | None, planned: Mapping[str, Stage] | None = None
    ) -> _Covariates:
        """The covariates of a stage with inputs that are recorded or planned."""

        def find(key: str) -> _DescribedStage | None:
            recorded = self._observations.get(kind_of(key), {}).get(key)
            if recorded is not None:
                return recorded.stage
            other = (planned or {}).get(key)
            return None if other is None else _DescribedStage(other.name, other.spec, other.inputs, {})

        return _covariates(stage, find, self._dims, device)


# ---- covariates: what determines how long a stage runs


class _DescribedStage(NamedTuple):
    """The description of a stage, from the stage itself or from its artifact's record."""

    kind: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, str]
    metrics: Mapping[str, float]


class _Observation(NamedTuple):
    """The part of a record that is kept; `seconds` are for a run from the beginning, without other stages on the device."""

    stage: _DescribedStage
    seconds: float
    device: str | None
    published: str


class _Covariates(NamedTuple):
    """Numbers above 0 that seconds grow with, and categories; unknown ones are absent."""

    numbers: Mapping[str, float]
    categories: Mapping[str, str]


def _observation(key: str, record: Record) -> _Observation:
    stage = _DescribedStage(
        record.get("stage") or kind_of(key), record.get("spec", {}), record.get("inputs", {}), record.get("metrics", {})
    )
    alone = record["seconds_alone"] if "seconds_alone" in record else record["seconds"]
    return _Observation(stage, float(alone), record.get("device"), str(record.get("published", "")))


def _covariates(
    stage: _DescribedStage, find: Callable[[str], _DescribedStage | None], dims: Mapping[str, float], device: str | None
) -> _Covariates:
    """The covariates of one stage.

    Args:
        find: key -> its stage, None if unknown.
        dims: `_width_source` of features -> their width D.
    """
    spec = stage.spec
    judged = (spec.get("judged") or {}) if spec.get("of") == "student" else {}
    backbone = spec.get("backbone") or (spec.get("descriptor") or judged).get("backbone") or {}
    plugin = next((name for name in map(_plugin_of, (spec.get("pretext"), spec.get("descriptor"), spec)) if name), None)
    read = _read_by(stage, find)
    images = [stage] if stage.kind == "images" else [each for each in read if each.kind == "images"]
    counts = [count for count in map(_count, images) if count]
    sources = [_width_source(each) for each in read if each.kind == "features"]
    numbers = {
        "epochs": passes(spec),
        "width": backbone.get("width"),
        "depth": backbone.get("depth"),
        "k": spec.get("k") if stage.kind == "clusters" else None,
        "images": max(counts, default=None),
        "size": max((each.spec["size"] for each in images if _is_positive(each.spec.get("size"))), default=None),
        "dim": max((dims[source] for source in sources if source in dims), default=None),
    }
    categories = {"device": device, "of": spec.get("of"), "plugin": plugin, "backbone": _plugin_of(backbone)}
    return _Covariates(
        {name: float(value) for name, value in numbers.items() if value is not None and _is_positive(value)},
        {name: value for name, value in categories.items() if value},
    )


def passes(spec: Mapping[str, Any]) -> float | None:
    """The epochs of a training; of an evaluation that trains, its epochs or steps times its seeds; None of other stages."""
    if "epoch" in spec:
        return float(spec["epoch"])
    own = spec.get("steps", spec.get("epochs"))
    seeds = spec.get("seeds", 1)
    return float(own * seeds) if _is_positive(own) and _is_positive(seeds) else None


def _width_source(features: _DescribedStage) -> str:
    """Identity of what determines the width of features: layer and pool, or the descriptor, but not the teacher's weights."""
    return fingerprint({name: value for name, value in features.spec.items() if name != "dtype"})


def _read_by(stage: _DescribedStage, find: Callable[[str], _DescribedStage | None]) -> list[_DescribedStage]:
    """The inputs of a stage, and the inputs of the features among them."""
    direct = [found for found in map(find, stage.inputs.values()) if found]
    behind = [each for found in direct if found.kind == "features" for each in map(find, found.inputs.values()) if each]
    return [*direct, *behind]


def _count(images: _DescribedStage) -> float | None:
    """Number of images; before they are decoded, the number in the data set's spec."""
    found = images.metrics.get("count", images.spec.get("count"))
    return float(found) if found is not None and _is_positive(found) else None


def _plugin_of(spec: object) -> str | None:
    return spec.get("kind") if isinstance(spec, Mapping) else None


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


# ---- one kind of stage


class _Term(NamedTuple):
    """The term of one stage in a sum: the mean of its log seconds, its features, and its own variance."""

    kind: str
    mean: float
    row: tuple[float, ...]
    variance: float


@dataclass(frozen=True)
class _Design:
    """The features of a kind of stage: centred logarithms of numbers, and one column per known value of a category."""

    centres: Mapping[str, float]
    columns: tuple[tuple[str, str], ...]

    def row(self, found: _Covariates) -> tuple[tuple[float, ...], float, float]:
        """Features with the intercept, the prior's mean for the numbers, and the variance due to unseen categories."""
        logs = {name: math.log(value) - self.centres[name] for name, value in found.numbers.items() if name in self.centres}
        own = [(name, found.categories[name]) for name in CATEGORY_DEVIATIONS if name in found.categories]
        unseen = sum(CATEGORY_DEVIATIONS[category[0]] ** 2 for category in own if category not in self.columns)
        effects = (float(column in own) for column in self.columns)
        row = (1.0, *(logs.get(name, 0.0) for name in EXPONENTS), *effects)
        return row, sum(EXPONENTS[name][0] * value for name, value in logs.items()), unseen


@dataclass(frozen=True)
class _LearnedKind:
    """The fit of one kind of stage to `count` records.

    Attributes:
        device: of the latest record.
        devices: is it a GPU? -> that of the latest record on such a device.
    """

    design: _Design
    posterior: Posterior
    device: str | None
    devices: Mapping[bool, str]
    count: int


def _fitted(observations: list[_Observation], found: list[_Covariates]) -> _LearnedKind:
    """The fit to the records of one kind, given their covariates."""
    import numpy as np

    from ktray.cost_model import bayesian_regression

    logs = [{name: math.log(value) for name, value in each.numbers.items()} for each in found]
    centres: dict[str, float] = {}
    for name in EXPONENTS:
        values = [each[name] for each in logs if name in each]
        centres |= {name: float(np.mean(values))} if values else {}
    columns = tuple(sorted({item for each in found for item in each.categories.items()}))
    design = _Design(centres, columns)
    rows = [design.row(each) for each in found]
    seconds = [max(SHORTEST, each.seconds) for each in observations]
    beyond_prior = np.log(seconds) - np.array([expected for _, expected, _ in rows])
    deviations = [*(deviation for _, deviation in EXPONENTS.values()), *(CATEGORY_DEVIATIONS[name] for name, _ in columns)]
    posterior = bayesian_regression.fit(np.array([row for row, _, _ in rows])[:, 1:], beyond_prior, np.array(deviations))
    in_order = [each.device for each in sorted(observations, key=lambda each: each.published)]
    devices = {not device.startswith("cpu"): device for device in in_order if device}
    return _LearnedKind(design, posterior, in_order[-1], devices, len(observations))


# ---- from a store


def sample_records(store: Store) -> dict[str, Record]:
    """Key -> record in a store; of each kind only as many as the model learns from, since reading each opens a file."""
    counts: Counter[str] = Counter()
    records: dict[str, Record] = {}
    for key in store.keys():  # noqa: SIM118 - a store is no dict
        counts[kind_of(key)] += 1
        found = store.find(key) if counts[kind_of(key)] <= MOST_RECORDS else None
        if found:
            records[key] = found.record
    return records


def learn_from(store: Store) -> CostModel:
    """The model learned from the records of a store."""
    return CostModel(sample_records(store))

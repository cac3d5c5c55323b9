"""What stages will cost in seconds, learned from the records of artifacts.

For each kind of stage, such as ``student``, a Bayesian linear regression of log seconds on its covariates: the logarithms of
epochs, images, image size, network width and depth, k and feature width, and an effect of each plugin, backbone and device.
With few records an estimate stays near the median of its kind, scaled with the prior's exponents. Each estimate says how far it
may be off.

numpy is imported with the first record that is learned from: the broker, which imports this module, starts without it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ktray.artifact import Stage
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
# Where there is no record of a kind at all: seconds of training per epoch, and of any other stage.
PRIOR_SECONDS_PER_EPOCH = {"teacher": 3.0, "student": 3.0}
PRIOR_SECONDS = 5.0
TYPICAL = {"images": 10_000, "size": 32, "width": 1.0, "depth": 18, "k": 100, "dim": 512}  # covariates that these are meant for

SHORTEST = 0.02  # seconds; below that the clock and the machine decide
MOST_RECORDS = 400  # of a kind that are learned from; keys are hashes, so the first of them are a fair sample
MOST_KEPT = 2 * MOST_RECORDS
GROWTH = 1.2  # a kind is learned anew once its records are so many times as many
RELATIVE_ERROR = 0.4  # standard deviation of what one stage takes, as a share of its estimate, where no interval is known
INTERVAL = 1.645  # standard deviations to either side of the mean that hold 90 % of a normal distribution


def kind_of(key: str) -> str:
    """The kind of stage that a key names: ``clusters`` of ``clusters-3f9a1c0b2d44``."""
    return key.rpartition("-")[0]


@dataclass(frozen=True)
class Estimate:
    """Seconds that stages will run, one after the other.

    Attributes:
        low: 90 % of such estimates turn out between `low` and `high`.
        known: stages of a kind that has records.
        unknown: stages of a kind that has none; they are not counted in the seconds.
    """

    seconds: float
    low: float
    high: float
    known: int
    unknown: int


class CostModel:
    """A model of the seconds of stages, kept up to date with `add`.

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
        """One more record; each counts once. Of a kind that has enough of them, no more than the epoch is kept."""
        if "epoch" in record.get("spec", {}):
            self._epochs[key] = int(record["spec"]["epoch"])
        kept = self._observations.setdefault(kind_of(key), {})
        if key in kept or len(kept) >= MOST_KEPT:
            return
        kept[key] = found = _observation(key, record)
        if found.stage.kind == "features" and "dim" in found.stage.metrics:
            self._dims[_width_source(found.stage)] = float(found.stage.metrics["dim"])

    def has_records(self, kind: str) -> bool:
        """Whether anything was recorded of this kind of stage; without that, estimates are the prior's."""
        return bool(self._observations.get(kind))

    def seconds(self, stage: Stage, others: Mapping[str, Stage] | None = None) -> float:
        """What one stage will take, for whoever schedules it: 10 to 100 microseconds a call.

        A training starts from the last snapshot that is recorded or among `others`. Without records of its kind, which is where
        a scheduler begins, the prior's seconds grow with the prior's exponents, so that long stages are told from short ones.

        Args:
            others: key -> stages that are made or will be made, such as those that it reads.
        """
        others = others or {}
        there = (key for key in stage.resume_from if key in self._epochs or key in others)
        term = self._term(stage, self._share(stage, there, others), others)
        return math.exp(term.mean) if isinstance(term, _Term) else term * self._prior_growth(stage, others)

    def _prior_growth(self, stage: Stage, others: Mapping[str, Stage]) -> float:
        """How many times as long as a typical stage of its kind the prior expects this one to run, for the same epochs."""
        found = self._covariates(_DescribedStage(stage.name, stage.spec, stage.inputs, {}), None, others).numbers
        return float(
            math.prod((found[name] / typical) ** EXPONENTS[name][0] for name, typical in TYPICAL.items() if name in found)
        )

    def predict(self, stages: Iterable[Stage], made: Collection[str] = ()) -> dict[str, float]:
        """Key -> seconds of every stage that is not made; of a kind without records the prior's.

        Args:
            made: keys of artifacts that are there, or that somebody else makes.
        """
        terms = self._terms(stages, made)
        known = {key: math.exp(term.mean) for key, term in terms.items() if isinstance(term, _Term)}
        return known | {key: seconds for key, seconds in terms.items() if isinstance(seconds, float)}

    def estimate(self, stages: Iterable[Stage], made: Collection[str] = ()) -> Estimate:
        """How long the stages that are not made run in all; each counts once, a training only from its last snapshot on."""
        terms = self._terms(stages, made)
        known = [term for term in terms.values() if isinstance(term, _Term)]
        total = sum(math.exp(term.mean) for term in known)
        spread = INTERVAL * self._deviation(known) / total if total else 0.0
        return Estimate(total, total * math.exp(-spread), total * math.exp(spread), len(known), len(terms) - len(known))

    def _terms(self, stages: Iterable[Stage], made: Collection[str]) -> dict[str, _Term | float]:
        planned = {stage.key: stage for stage in stages}
        found: dict[str, _Term | float] = {}
        for stage in planned.values():
            if stage.key not in made:
                there = (key for key in stage.resume_from if key in made or key in planned)
                found[stage.key] = self._term(stage, self._share(stage, there, planned), planned)
        return found

    def _share(self, stage: Stage, there: Iterable[str], planned: Mapping[str, Stage]) -> float:
        """The part of a training that is left from the last snapshot `there` on; 1 of every other stage."""
        epoch = stage.spec.get("epoch", 0)
        if not epoch:
            return 1.0
        begun = (planned[key].spec["epoch"] if key in planned else self._epochs.get(key, 0) for key in there)
        return float((epoch - max(begun, default=0)) / epoch)

    def _term(self, stage: Stage, share: float, planned: Mapping[str, Stage]) -> _Term | float:
        """What one stage adds to a sum; of a kind without records the prior's seconds."""
        learned = self._learn(stage.name)
        if learned is None:
            return float(share * PRIOR_SECONDS_PER_EPOCH.get(stage.name, PRIOR_SECONDS) * stage.spec.get("epoch", 1))
        found = self._covariates(_DescribedStage(stage.name, stage.spec, stage.inputs, {}), learned.device, planned)
        row, expected, unseen = learned.design.row(found)
        mean = expected + learned.posterior.mean(row) + math.log(max(share, 1e-6))
        return _Term(stage.name, mean, row, unseen + learned.posterior.noise**2)

    def _deviation(self, terms: Iterable[_Term]) -> float:
        """Standard deviation of a sum in seconds: what was learned wrong of a kind is wrong for all of its stages."""
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
        """What is known of a kind of stage; None without records of it."""
        kept, learned = self._observations.get(kind, {}), self._learned.get(kind)
        if kept and (learned is None or min(len(kept), MOST_RECORDS) >= GROWTH * learned.count):
            found = [kept[key] for key in sorted(kept)[:MOST_RECORDS]]
            self._learned[kind] = learned = _fitted(found, [self._covariates(each.stage, each.device or "") for each in found])
        return learned

    def _covariates(
        self, stage: _DescribedStage, device: str | None, planned: Mapping[str, Stage] | None = None
    ) -> _Covariates:
        """Of a stage whose inputs are recorded or planned."""

        def find(key: str) -> _DescribedStage | None:
            recorded = self._observations.get(kind_of(key), {}).get(key)
            if recorded is not None:
                return recorded.stage
            other = (planned or {}).get(key)
            return None if other is None else _DescribedStage(other.name, other.spec, other.inputs, {})

        return _covariates(stage, find, self._dims, device)


# ---- covariates: what of a stage decides how long it runs


class _DescribedStage(NamedTuple):
    """What is known of a stage, from itself or from its artifact's record."""

    kind: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, str]
    metrics: Mapping[str, float]


class _Observation(NamedTuple):
    """What is kept of a record; `seconds` are those of a run from the beginning and of nothing beside it."""

    stage: _DescribedStage
    seconds: float
    device: str | None
    published: str


class _Covariates(NamedTuple):
    """Numbers above 0 that seconds grow with, and categories; what is not known is absent."""

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
        find: key -> the stage of this key, if it is known.
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
        "epochs": spec.get("epoch"),
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


def _width_source(features: _DescribedStage) -> str:
    """What decides the width of features: the layer and its pool or the descriptor, whatever the teacher has learned."""
    return fingerprint({name: value for name, value in features.spec.items() if name != "dtype"})


def _read_by(stage: _DescribedStage, find: Callable[[str], _DescribedStage | None]) -> list[_DescribedStage]:
    """What a stage reads, and what the features among that were made of."""
    direct = [found for found in map(find, stage.inputs.values()) if found]
    behind = [each for found in direct if found.kind == "features" for each in map(find, found.inputs.values()) if each]
    return [*direct, *behind]


def _count(images: _DescribedStage) -> float | None:
    """How many images there are; before they were decoded as many as the data set's spec says."""
    found = images.metrics.get("count", images.spec.get("count"))
    return float(found) if found is not None and _is_positive(found) else None


def _plugin_of(spec: object) -> str | None:
    return spec.get("kind") if isinstance(spec, Mapping) else None


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


# ---- one kind of stage


class _Term(NamedTuple):
    """What one stage adds to a sum: the mean of its log seconds, its features, and the variance that is its own."""

    kind: str
    mean: float
    row: tuple[float, ...]
    variance: float


@dataclass(frozen=True)
class _Design:
    """Which features describe a kind of stage; numbers are centred, and each known value of a category has a column."""

    centres: Mapping[str, float]
    columns: tuple[tuple[str, str], ...]

    def row(self, found: _Covariates) -> tuple[tuple[float, ...], float, float]:
        """Features with the intercept, what the prior expects of the numbers, and the variance of values never seen."""
        logs = {name: math.log(value) - self.centres[name] for name, value in found.numbers.items() if name in self.centres}
        own = [(name, found.categories[name]) for name in CATEGORY_DEVIATIONS if name in found.categories]
        unseen = sum(CATEGORY_DEVIATIONS[category[0]] ** 2 for category in own if category not in self.columns)
        effects = (float(column in own) for column in self.columns)
        row = (1.0, *(logs.get(name, 0.0) for name in EXPONENTS), *effects)
        return row, sum(EXPONENTS[name][0] * value for name, value in logs.items()), unseen


@dataclass(frozen=True)
class _LearnedKind:
    """What was learned of one kind of stage from `count` records, and the device that it was last run on."""

    design: _Design
    posterior: Posterior
    device: str | None
    count: int


def _fitted(observations: list[_Observation], found: list[_Covariates]) -> _LearnedKind:
    """What records of one kind teach, given their covariates."""
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
    device = max(observations, key=lambda each: each.published).device
    return _LearnedKind(design, posterior, device, len(observations))


# ---- from a store


def sample_records(store: Store) -> dict[str, Record]:
    """Key -> record in a store; of each kind at most as many as the model learns from, since each is a file to read."""
    counts: Counter[str] = Counter()
    records: dict[str, Record] = {}
    for key in store.keys():  # noqa: SIM118 - a store is no dict
        counts[kind_of(key)] += 1
        found = store.find(key) if counts[kind_of(key)] <= MOST_RECORDS else None
        if found:
            records[key] = found.record
    return records


def learn_from(store: Store) -> CostModel:
    """The model that the records of a store teach."""
    return CostModel(sample_records(store))

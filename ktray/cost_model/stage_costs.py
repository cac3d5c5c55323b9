"""What stages will cost: seconds, learned from the records that artifacts keep.

Per kind of stage a line through the logarithms: how seconds grow with epochs, images, their size, a network's width and depth,
k and the width of features, and how much faster or slower each kind of task, network and device is. With few records it stays
near the median of the kind, scaled by what the work obviously grows with; it says how far it may be off.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray.artifact import Stage
from ktray.cost_model import regression
from ktray.cost_model.covariates import EXPONENTS, PACES, Covariates, StageFacts, covariates, view
from ktray.stores import Store

Records = Mapping[str, Mapping[str, Any]]
SHORTEST = 0.02  # seconds; below that the clock and the machine decide
MOST = 400  # records of a kind that are learned from; keys are hashes, so the first of them are a fair sample
GROWTH = 1.2  # a kind is learned anew once its records are so many times as many
NINETY = 1.645  # standard deviations to either side that hold 90 %
FIRST = {"teacher": 3.0, "student": 3.0}  # seconds, of training per epoch, where there is no record at all
ELSE, BLIND = 5.0, 2.0  # seconds of any other stage then, and the log of how far that may be off


def kind(key: str) -> str:
    """The kind of stage that a key names: ``clusters`` of ``clusters-3f9a1c0b2d44``."""
    return key.rpartition("-")[0]


@dataclass(frozen=True)
class Estimate:
    """Seconds that stages will run, one after the other.

    Attributes:
        low: 90 % of such estimates turn out between `low` and `high`.
        known: stages of a kind with a past.
        unknown: stages of a kind without one; they are not counted in the seconds.
    """

    seconds: float
    low: float
    high: float
    known: int
    unknown: int


@dataclass(frozen=True)
class _Kind:
    """What was learned of one kind of stage; numbers are centred, and a column per pace of `columns`."""

    fit: regression.Posterior
    centres: Mapping[str, float]
    columns: tuple[tuple[str, str], ...]
    device: str | None
    learned_from: int

    def row(self, found: Covariates) -> tuple[NDArray[np.float64], float, float]:
        """Features with the intercept, what the prior says beyond them, and the variance of paces never seen."""
        logs = {name: math.log(value) - self.centres[name] for name, value in found.numbers.items() if name in self.centres}
        ours = {(name, found.kinds.get(name)) for name in PACES}
        paces = [float(column in ours) for column in self.columns]
        strange = sum(PACES[name] ** 2 for name, value in ours if value and (name, value) not in self.columns)
        row = np.array([1.0, *(logs.get(name, 0.0) for name in EXPONENTS), *paces])
        return row, sum(EXPONENTS[name][0] * value for name, value in logs.items()), strange


class CostModel:
    """A model of the seconds of stages, kept up to date with `add`.

    Args:
        records: key -> record of past artifacts.
    """

    def __init__(self, records: Records | None = None) -> None:
        self._records: dict[str, Mapping[str, Any]] = {}
        self._of: dict[str, list[str]] = {}
        self._dims: dict[str, float] = {}
        self._kinds: dict[str, _Kind] = {}
        for key in sorted(records or {}):
            self.add(key, (records or {})[key])

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """One more artifact; each is learned from once."""
        if key in self._records:
            return
        self._records[key] = record
        self._of.setdefault(kind(key), []).append(key)
        facts = _facts(key, record)
        if facts.stage == "features" and "dim" in facts.metrics:
            self._dims[view(facts)] = float(facts.metrics["dim"])

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def seconds(self, key: str) -> float | None:
        """What the run that published an artifact took; None if its record is not known."""
        record = self._records.get(key)
        return None if record is None else float(record["seconds"])

    def each(self, stages: Iterable[Stage], made: Collection[str] = ()) -> dict[str, float]:
        """Key -> seconds of every stage that is not made; of a kind without any past a guess.

        Args:
            made: keys of artifacts that are there, or that somebody else makes.
        """
        found = _Sum(self, stages, made)
        return {stage.key: math.exp(mean) for stage, mean, _, _ in found.terms} | found.blind

    def estimate(self, stages: Iterable[Stage], made: Collection[str] = ()) -> Estimate:
        """How long the stages that are not made run in all; each counts once, a training only from its last snapshot on."""
        found = _Sum(self, stages, made)
        total = sum(math.exp(mean) for _, mean, _, _ in found.terms)
        spread = NINETY * found.deviation() / total if total else 0.0
        return Estimate(total, total * math.exp(-spread), total * math.exp(spread), len(found.terms), len(found.blind))

    def learned(self, name: str) -> _Kind | None:
        """What is known of a kind of stage; None without records of it."""
        keys, known = self._of.get(name, []), self._kinds.get(name)
        if keys and (known is None or min(len(keys), MOST) >= GROWTH * known.learned_from):
            self._kinds[name] = known = self._learn(keys)
        return known

    def _learn(self, keys: list[str]) -> _Kind:
        found = [self._records[key] for key in sorted(keys)[:MOST]]
        described = [self.traits(_facts(record.get("key", ""), record), str(record.get("device", ""))) for record in found]
        logs = [{name: math.log(value) for name, value in each.numbers.items()} for each in described]
        centres: dict[str, float] = {}
        for name in EXPONENTS:
            values = [each[name] for each in logs if name in each]
            centres |= {name: float(np.mean(values))} if values else {}
        columns = tuple(sorted({item for each in described for item in each.kinds.items()}))
        device = max(found, key=lambda record: str(record.get("published", ""))).get("device")
        nothing = regression.Posterior(np.zeros(0), np.zeros((0, 0)), 0.0)
        blank = _Kind(nothing, centres, columns, device, len(found))
        rows = [blank.row(each) for each in described]
        seconds = [max(SHORTEST, float(record.get("seconds_alone", record["seconds"]))) for record in found]
        values = np.log(seconds) - np.array([expected for _, expected, _ in rows])
        spread = np.array([*(give for _, give in EXPONENTS.values()), *(PACES[name] for name, _ in columns)])
        posterior = regression.fit(np.array([row for row, _, _ in rows])[:, 1:], values, spread)
        return _Kind(posterior, centres, columns, device, len(found))

    def traits(self, facts: StageFacts, device: str | None, planned: Mapping[str, Stage] | None = None) -> Covariates:
        """Traits of a stage whose inputs are recorded or planned."""

        def look(key: str) -> StageFacts | None:
            if key in self._records:
                return _facts(key, self._records[key])
            stage = (planned or {}).get(key)
            return None if stage is None else StageFacts(stage.name, stage.spec, stage.inputs, {})

        return covariates(facts, look, self._dims, device)

    def epoch(self, key: str) -> int:
        """Epoch of a recorded training; 0 if there is none."""
        return int(self._records.get(key, {}).get("spec", {}).get("epoch", 0))


class _Sum:
    """The logarithms of what single stages will take, and how far their sum may be off."""

    def __init__(self, costs: CostModel, stages: Iterable[Stage], made: Collection[str]) -> None:
        self.terms: list[tuple[Stage, float, NDArray[np.float64], float]] = []  # stage, mean, row, variance of its own
        self.blind: dict[str, float] = {}
        self.costs = costs
        planned = {stage.key: stage for stage in stages}
        for stage in planned.values():
            if stage.key in made:
                continue
            begun = [
                planned[key].spec["epoch"] if key in planned else costs.epoch(key)
                for key in stage.starts
                if _there(key, made, planned)
            ]
            epoch = stage.spec.get("epoch", 0)
            share = (epoch - max(begun, default=0)) / epoch if epoch else 1.0
            self._add(stage, share, planned)

    def _add(self, stage: Stage, share: float, planned: Mapping[str, Stage]) -> None:
        learned = self.costs.learned(stage.name)
        if learned is None:
            self.blind[stage.key] = share * FIRST.get(stage.name, ELSE) * stage.spec.get("epoch", 1)
            return
        facts = StageFacts(stage.name, stage.spec, stage.inputs, {})
        row, expected, strange = learned.row(self.costs.traits(facts, learned.device, planned))
        mean = expected + float(row @ learned.fit.weights) + math.log(max(share, 1e-6))
        self.terms.append((stage, mean, row, strange + learned.fit.noise**2))

    def deviation(self) -> float:
        """Standard deviation of the sum in seconds: what was learned wrong of a kind is wrong for all of its stages."""
        variance = 0.0
        pulls: dict[str, NDArray[np.float64]] = {}
        for stage, mean, row, own in self.terms:
            seconds = math.exp(mean)
            variance += seconds**2 * own
            pulls[stage.name] = pulls.get(stage.name, np.zeros_like(row)) + seconds * row
        for name, pull in pulls.items():
            learned = self.costs.learned(name)
            assert learned is not None
            variance += float(pull @ learned.fit.covariance @ pull)
        return math.sqrt(variance)


def _there(key: str, made: Collection[str], planned: Mapping[str, Stage]) -> bool:
    return key in made or key in planned


def _facts(key: str, record: Mapping[str, Any]) -> StageFacts:
    stage = record.get("stage") or kind(key)
    return StageFacts(stage, record.get("spec", {}), record.get("inputs", {}), record.get("metrics", {}))


def sample(store: Store) -> dict[str, Mapping[str, Any]]:
    """Key -> record in a store; of each kind of stage at most as many as the model learns from: each is a file to read."""
    counts: dict[str, int] = {}
    records: dict[str, Mapping[str, Any]] = {}
    for key in store.keys():  # noqa: SIM118 - a store is no dict
        counts[kind(key)] = counts.get(kind(key), 0) + 1
        found = store.find(key) if counts[kind(key)] <= MOST else None
        if found:
            records[key] = found.record
    return records


def learned(store: Store) -> CostModel:
    """What the records of a store teach."""
    return CostModel(sample(store))

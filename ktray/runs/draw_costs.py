"""What draws and legs cost: stages that nobody has made or ordered yet, at the seconds that the records make expect."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ktray.artifact import Artifact, Stage
from ktray.cost_model.stage_costs import CostModel
from ktray.errors import UserError
from ktray.pipeline.pair_graph import Graph
from ktray.search.budget import AttributedCosts, DrawCost, Spending
from ktray.search.space_tree import Params
from ktray.stores import Store


class DrawCosts:
    """Prices at the present state of a store.

    Args:
        costs: learned from the past; learns on from `paid`.
        spending: what is ordered already, by any trial.
    """

    def __init__(self, costs: CostModel, store: Store, spending: Spending) -> None:
        self._costs, self._store, self._spending = costs, store, spending
        self._made: set[str] = set()
        self._ahead: set[str] = set()

    def order_ahead(self, keys: Iterable[str]) -> None:
        """These are made before any trial asks for them; whoever does first is charged, unless they were there before."""
        self._ahead |= {key for key in keys if not self.is_made(key)}

    def charges(self, graph: Graph) -> AttributedCosts:
        """Expected seconds of stages that are missing and that no trial is charged with yet, before and from the student on."""
        free = {stage.key for stage in graph.stages if stage.key in self._spending or self._is_free(stage.key)}
        seconds = self._costs.each(graph.stages, made=free)
        late = of_student(graph)
        return {
            "prefix": {key: value for key, value in seconds.items() if key not in late},
            "suffix": {key: value for key, value in seconds.items() if key in late},
        }

    def quote(self, build: Callable[[Params], Graph]) -> Callable[[Params], DrawCost | None]:
        """A function that says what a draw would add; `build` makes its first leg, or raises UserError for no pair."""

        def price(params: Params) -> DrawCost | None:
            try:
                charges = self.charges(build(params))
            except UserError:
                return None
            return DrawCost(*(sum(charges[part].values()) for part in DrawCost._fields))

        return price

    def paid(self, graph: Graph, keys: Iterable[str]) -> dict[str, float]:
        """Key -> seconds that the run took which made it; keys without an artifact are absent. The model learns from each."""
        stages = {stage.key: stage for stage in graph.stages}
        found = {key: artifact for key in keys if (artifact := self._store.find(key))}
        for key, artifact in found.items():
            self._costs.add(key, _described(artifact, stages.get(key)))
        return {key: float(artifact.record["seconds"]) for key, artifact in found.items()}

    def is_ordered(self, key: str) -> bool:
        """Whether it was to be made before any trial asked for it; whoever does first is charged for it."""
        return key in self._ahead

    def _is_free(self, key: str) -> bool:
        return not self.is_ordered(key) and self.is_made(key)

    def is_made(self, key: str) -> bool:
        """Whether the store has had an artifact since the search began."""
        if key not in self._made and self._store.find(key) is not None:
            self._made.add(key)
        return key in self._made


def of_student(graph: Graph) -> set[str]:
    """Keys of the student of a graph, from its first segment on, and of all that reads it; not of a student that teaches."""
    own = next((stage for stage in graph.stages if stage.key == graph.keys.get("student")), None)
    late = {own.key, *own.starts} & {stage.key for stage in graph.stages} if own else set()
    for stage in graph.stages:
        if late & set(stage.inputs.values()):
            late.add(stage.key)
    return late


def _described(artifact: Artifact, stage: Stage | None) -> dict[str, object]:
    own = {} if stage is None else {"stage": stage.name, "spec": stage.spec, "inputs": stage.inputs}
    return {"metrics": artifact.metrics, **own, **artifact.record}

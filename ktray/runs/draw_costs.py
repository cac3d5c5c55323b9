"""What draws and trials cost: the seconds that the cost model expects of stages that nobody has made or ordered yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ktray.cost_model.stage_costs import CostModel
from ktray.errors import UserError
from ktray.pipeline.pair_graph import Graph
from ktray.search.budget import AttributedCosts, DrawCost, Spending
from ktray.search.space_tree import Params
from ktray.stores import Store


class DrawCosts:
    """Costs at the present state of a store.

    Args:
        model: learned from past records; learns on from those that `recorded_seconds` reads.
        spending: the stages that are charged to a trial already.
    """

    def __init__(self, model: CostModel, store: Store, spending: Spending) -> None:
        self._model, self._store, self._spending = model, store, spending
        self._made: set[str] = set()
        self._prefetched: set[str] = set()

    def prefetch(self, keys: Iterable[str]) -> None:
        """These are made before any trial needs them. The first trial that does is charged, unless they were there before."""
        self._prefetched |= {key for key in keys if not self.is_made(key)}

    def expected_costs(self, graph: Graph) -> AttributedCosts:
        """Expected seconds of stages that are missing and that no trial is charged with yet, before and from the student on."""
        free = {stage.key for stage in graph.stages if stage.key in self._spending or self._is_free(stage.key)}
        seconds = self._model.predict(graph.stages, made=free)
        of_student = graph.student_keys()
        return {
            "prefix": {key: value for key, value in seconds.items() if key not in of_student},
            "suffix": {key: value for key, value in seconds.items() if key in of_student},
        }

    def estimator(self, build: Callable[[Params], Graph]) -> Callable[[Params], DrawCost | None]:
        """A function that estimates what a draw would add to the spending; None for a draw that is no valid pair.

        Args:
            build: the stages that a draw begins with; raises UserError where it is no valid pair.
        """

        def estimate(params: Params) -> DrawCost | None:
            try:
                costs = self.expected_costs(build(params))
            except UserError:
                return None
            return DrawCost(*(sum(costs[part].values()) for part in DrawCost._fields))

        return estimate

    def recorded_seconds(self, keys: Iterable[str]) -> dict[str, float]:
        """Key -> seconds of the run that made it; keys without an artifact are absent. The model learns from each record."""
        found = {key: artifact for key in keys if (artifact := self._store.find(key))}
        for key, artifact in found.items():
            self._model.add(key, artifact.record)
        return {key: float(artifact.record["seconds"]) for key, artifact in found.items()}

    def is_prefetched(self, key: str) -> bool:
        """Whether it was ordered before any trial needed it; the first trial that does is charged for it."""
        return key in self._prefetched

    def _is_free(self, key: str) -> bool:
        return not self.is_prefetched(key) and self.is_made(key)

    def is_made(self, key: str) -> bool:
        """Whether its artifact has been in the store at any time since the search began."""
        if key not in self._made and self._store.find(key) is not None:
            self._made.add(key)
        return key in self._made

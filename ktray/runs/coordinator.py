"""Between the study and whoever runs stages: what a trial needs next, and what its artifacts say."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from ktray.artifact import Stage
from ktray.cost_model.stage_costs import CostModel
from ktray.errors import StoppedEarly, UserError
from ktray.pipeline import pair_graph, pair_metrics
from ktray.pipeline.pair_graph import Graph, Identity
from ktray.runs.draw_costs import DrawCosts
from ktray.runs.trial_logger import TrialLogger
from ktray.search import halving
from ktray.search.space import Space
from ktray.search.space_tree import Params
from ktray.search.study import MAX_FAILURES, Assignment, Study, too_many_failures
from ktray.search.trial import Trial
from ktray.spec import PairSpec
from ktray.stores import Store
from ktray.tracking import Tracker

Tell = Callable[[str, Trial, str], None]
"""(event, trial, text): ``("paused", trial, "knn/top1 0.713 at epoch 2")``."""


@dataclass(frozen=True)
class TrialSegment:
    """What one trial needs next: stages up to an epoch of its student, and how it is judged there."""

    trial: Trial
    epoch: int
    final: bool
    graph: Graph

    @property
    def priority(self) -> int:
        """Of its stages: what is promoted to the end goes first, since its result is the nearest."""
        return 1 if self.final else 0


class TrialCoordinator:
    """Draws from the study, builds the stages, and settles what came out; knows neither Ray nor a clock.

    Args:
        tell: called with what a person wants to read.
        costs: what stages are expected to cost; None: only what this search's own stages will teach.
    """

    def __init__(
        self,
        space: Space,
        study: Study,
        store: Store,
        identity: Identity,
        tracker: Tracker,
        tell: Tell,
        costs: CostModel | None = None,
    ) -> None:
        self.space, self.study, self.store, self.identity = space, study, store, identity
        self.prices = DrawCosts(costs or CostModel(), store, study.spending)
        study.set_cost_estimate(self.prices.quote(self._first_leg))
        self.account, self.tracker, self.tell = TrialLogger(tracker, space), tracker, tell
        self.demanded: set[str] = set()
        self._failed: dict[str, str] = {}
        self._milestones = _milestones(space)
        self._drawn = len(study.trials())

    def first(self, count: int) -> tuple[deque[TrialSegment], StoppedEarly | None]:
        """Up to `count` legs to begin with, and why there will be no more if that is known already."""
        ahead: deque[TrialSegment] = deque()
        try:
            while len(ahead) < count and not isinstance(leg := self.next(), str):
                ahead.append(leg)
        except StoppedEarly as stop:
            return ahead, stop
        return ahead, None

    def certain(self) -> list[Stage]:
        """Stages that planned draws yet to be made begin with, unless the sampler still has a choice there.

        Up to their features; where teachers are judged first, up to that.
        """
        found: dict[str, Stage] = {}
        drawn = {trial.planned for trial in self.study.trials()}
        for index, start in enumerate(self.space.start_with[: self.study.target]):
            params = self.space.complete(start)
            if index in drawn:
                continue
            if self.space.teacher_parameters & (params.keys() - start.keys()):
                continue
            with suppress(UserError):  # no valid pair: its trial will say so
                pair = self.space.pair(params)
                graph = self._without_passed(self._graph(pair, str(params.get("teacher", ""))))
                found |= {stage.key: stage for stage in self._beginning(pair, graph)}
        self.demanded |= found.keys()
        self.prices.order_ahead(found)
        return list(found.values())

    def _beginning(self, pair: PairSpec, graph: Graph) -> Iterable[Stage]:
        stop = self.space.early_stop
        return graph.up_to(self._judge(0)).stages if stop and stop.teacher and pair.teacher else _up_to_features(graph)

    def next(self) -> TrialSegment | Literal["wait", "done"]:
        """The next leg that has something to compute; what the store answers whole is settled on the way.

        Raises:
            StoppedEarly: ten draws in a row need what has failed before, or the study says so.
        """
        vain: list[Trial] = []
        while True:
            assignment = self._assignment()
            if isinstance(assignment, str):
                return assignment
            leg = self._leg(assignment.trial, assignment.until, assignment.final)
            known = self._known_to_fail(leg)
            if known:  # it would raise again: a resume tries it once more
                vain.append(self.fail(leg, self._failed[known], known))
                if len(vain) >= MAX_FAILURES:
                    raise too_many_failures(vain)
                continue
            if pair_metrics.finished(leg.graph, self.store) is None:
                self.study.attribute_costs(leg.trial.number, self.prices.charges(leg.graph))
                return leg
            self.settle(leg, computed=[])
            vain.clear()

    def _known_to_fail(self, leg: TrialSegment) -> str | None:
        """Key of a stage of this leg that failed in this search; another search on the store may have made it since."""
        for key in [stage.key for stage in leg.graph.stages if stage.key in self._failed]:
            if self.store.find(key) is None:
                return key
            del self._failed[key]
        return None

    def _assignment(self) -> Assignment | Literal["wait", "done"]:
        try:
            return self.study.next()
        finally:
            for trial in self.study.trials(self._drawn):
                self._drawn += 1
                if trial.state != "running":  # the study has settled it by itself
                    self.account.refused(trial)

    def _leg(self, trial: Trial, epoch: int, final: bool) -> TrialSegment:
        graph = self.graph(trial, epoch, None if final else [self._judge(epoch)])
        if epoch == 0:
            graph = graph.up_to(self._judge(epoch))
        self.account.begin(trial, graph.keys)
        return TrialSegment(trial, epoch, final, graph)

    def graph(self, trial: Trial, epoch: int | None = None, evaluations: list[str] | None = None) -> Graph:
        """The stages of a trial up to `epoch` of its student, its last by default, and of these evaluations, or of all."""
        graph = self._without_passed(self._graph_of(trial, epoch, evaluations))
        self.demanded |= {stage.key for stage in graph.stages}
        return graph

    def untold(self) -> set[str]:
        """Keys that the tracker does not know of what trials were charged with or, if it does not know them whole, rest on.

        An earlier session that was killed may have settled a trial, or a leg of it, and told nobody what it had computed. A
        later one that was killed, too, may have told of the rest. What was made ahead of all trials is charged to none.
        """
        charged = [trial.attributed_costs.values() for trial in self.study.trials()]
        found = {key for charges in charged for part in charges for key in part}
        for trial in self.study.trials():
            if all(map(self.tracker.has_stage, trial.artifacts)):
                continue
            rungs_reached = [*trial.scores, *([0] if trial.teacher_score is not None else [])]
            for epoch in {*rungs_reached, *([trial.epochs] if trial.state == "completed" else [])}:
                wanted = None if epoch == trial.epochs else [self._judge(epoch)]
                found |= {stage.key for stage in self._graph_of(trial, epoch, wanted).stages}
        return {key for key in found if not self.tracker.has_stage(key)}

    def _graph_of(self, trial: Trial, epoch: int | None, evaluations: list[str] | None) -> Graph:
        pair = PairSpec.model_validate(dict(trial.pair))
        return self._graph(pair, str(trial.params.get("teacher", "")), epoch, evaluations)

    def _first_leg(self, params: Params) -> Graph:
        pair = self.space.pair(params)
        until = halving.rung_epochs(self.space.early_stop, pair.student.schedule.epochs)[0]
        wanted = None if until == pair.student.schedule.epochs else [self._judge(until)]
        return self._without_passed(self._graph(pair, str(params.get("teacher", "")), until, wanted))

    def _graph(self, pair: PairSpec, branch: str, epoch: int | None = None, evaluations: list[str] | None = None) -> Graph:
        milestones = self._milestones.get(branch, {})
        return pair_graph.build(pair, self.identity, epoch=epoch, evaluations=evaluations, milestones=milestones)

    def _without_passed(self, graph: Graph) -> Graph:
        """The graph less the segments that only led to a snapshot which is there, made where nothing cut its training."""
        wanted = {key for stage in graph.stages for key in stage.inputs.values()} | set(graph.metric_prefixes())
        cuts = {stage.key for stage in graph.stages if not self.prices.is_ordered(stage.key)} - wanted
        later = [stage for stage in graph.stages if not cuts.isdisjoint(stage.starts)]
        passed = cuts & {start for stage in later if self.prices.is_made(stage.key) for start in stage.starts}
        return Graph(tuple(stage for stage in graph.stages if stage.key not in passed), graph.keys)

    def _judge(self, epoch: int) -> str:
        """Name of the evaluation that a rung is judged by."""
        assert self.space.early_stop is not None
        return str(self.space.early_stop.judged_by(epoch).split("/")[0])

    def settle(self, leg: TrialSegment, computed: list[str]) -> None:
        """Tell the study and the tracker what the leg's artifacts say.

        Args:
            computed: keys that this trial caused to be computed; what it added to the cost.
        """
        artifacts = pair_metrics.finished(leg.graph, self.store)
        if artifacts is None:
            self.fail(leg, "an artifact vanished from the store before the trial could read it")
            return
        self._pay(leg)
        added = sum(float(artifacts[key].record["seconds"]) for key in set(computed) & set(artifacts))
        marginal = leg.trial.cost.get("marginal_seconds", 0.0) + added
        metrics = pair_metrics.metrics(leg.graph, artifacts)
        self.account.reused(leg.trial, leg.graph.metric_prefixes(), set(computed))
        self.tracker.log_curve(leg.trial.number, _student_curve(leg.graph, artifacts))
        if leg.final:
            self._finish(leg, {**metrics, "cost/marginal_seconds": marginal})
        else:
            self._pause(leg, metrics, marginal)

    def _pause(self, leg: TrialSegment, metrics: Mapping[str, float], marginal: float) -> None:
        assert self.space.early_stop is not None
        name = self.space.early_stop.judged_by(leg.epoch)
        cost = {"marginal_seconds": marginal}
        trial = self.study.report(leg.trial.number, leg.epoch, metrics[name], leg.graph.keys, cost)
        where = f"at epoch {leg.epoch}" if leg.epoch else "of its teacher"
        self._tell_end(trial, f"{name} {metrics[name]:.4f} {where}")
        self.tracker.log_metrics(trial.number, {name: metrics[name]}, leg.epoch)
        self.account.ended(trial, leg.graph.keys, {})

    def _finish(self, leg: TrialSegment, metrics: dict[str, float]) -> None:
        number = leg.trial.number
        objectives = {name: metrics[name] for name, _ in self.space.objectives}
        cost = {"seconds": metrics["cost/seconds"], "marginal_seconds": metrics["cost/marginal_seconds"]}
        trial = self.study.finish(number, metrics, objectives, dict(leg.graph.keys), cost)
        self._tell_end(trial, " ".join(f"{name} {value:.4f}" for name, value in objectives.items()))
        self.account.judged(trial, leg.graph.keys, metrics, leg.epoch)

    def _tell_end(self, trial: Trial, text: str) -> None:
        """What became of a leg whose stages are all there; a score that is not finite has failed its trial."""
        self.tell(trial.state, trial, (trial.cause or "") if trial.state == "failed" else text)

    def fail(self, leg: TrialSegment, cause: str, stage: str = "") -> Trial:
        """The leg could not be computed.

        Args:
            stage: key of the stage that raised. Its cause is told once, and what needs it fails without asking again.
        """
        self._pay(leg)
        trial = self.study.fail(leg.trial.number, cause, stage)
        self.tell("failed", trial, f"needs {stage}, too" if stage in self._failed else cause)
        self.account.ended(trial, leg.graph.keys, {})
        if stage:
            self._failed[stage] = cause
        return trial

    def _pay(self, leg: TrialSegment) -> None:
        """What the trial was charged becomes what was recorded, before the study is told what became of it."""
        charged = {key for stages in self.study.attributed_costs(leg.trial.number).values() for key in stages}
        self.study.record_costs(leg.trial.number, self.prices.paid(leg.graph, sorted(charged)))

    def prune(self) -> None:
        """The study has met its target: what is still paused becomes pruned. It stays ours, for what is yet to compute."""
        for trial in self.study.prune():
            self.tell("pruned", trial, trial.cause or "")
            self.account.ended(trial, trial.keys, {})

    def leave(self) -> None:
        """The search ends before its target: what is open goes on in another session, but nothing of it runs now."""
        for trial in self.study.trials():
            if trial.state == "running":
                self.account.ended(trial, trial.keys, {})


def _up_to_features(graph: Graph) -> list[Stage]:
    """Images, teachers and features with all that they read: where a student teaches, also what made that student."""
    kept: set[str] = set()
    for stage in reversed(graph.stages):
        if stage.name in ("images", "teacher", "features") or stage.key in kept:
            kept |= {stage.key, *stage.inputs.values()}
    return [stage for stage in graph.stages if stage.key in kept]


def _student_curve(graph: Graph, artifacts: Mapping[str, Any]) -> list[dict[str, float]]:
    rows = pair_metrics.curve(artifacts[graph.keys["student"]]) if "student" in graph.keys else []
    return [
        {"epoch": row["epoch"], **{f"student/{name}": value for name, value in row.items() if name != "epoch"}} for row in rows
    ]


def _milestones(space: Space) -> dict[str, dict[str, list[int]]]:
    """Teacher branch -> epochs where its training, and the students' of each generation, may be asked for."""
    found: dict[str, dict[str, set[int]]] = {}
    rungs = set(space.early_stop.rungs) if space.early_stop else set()
    for _, params in space.boundary_draws():
        entry = found.setdefault(str(params.get("teacher", "")), {"student": set(rungs)})
        for place, pair in enumerate(pair_graph.generations(space.pair(params))):
            before = "pair." * place
            entry.setdefault(f"{before}student", set()).add(pair.student.schedule.epochs)
            schedule = getattr(pair.teacher, "schedule", None)
            if schedule is not None:
                entry.setdefault(f"{before}teacher", set()).add(schedule.epochs)
    return {branch: {name: sorted(epochs) for name, epochs in entry.items()} for branch, entry in found.items()}

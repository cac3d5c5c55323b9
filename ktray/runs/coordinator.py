"""Between the study and whoever runs its stages: which stages a trial needs next, and what their artifacts say."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from ktray.artifact import Stage, numbered
from ktray.cost_model.stage_costs import CostModel
from ktray.errors import SearchStopped, UserError
from ktray.pipeline import pair_graph, pair_metrics
from ktray.pipeline.pair_graph import Graph, Identity
from ktray.runs.study_logger import TrialLogger
from ktray.search import halving
from ktray.search.budget import AttributedCosts, PrefixSuffixSeconds, Spending
from ktray.search.space import Space
from ktray.search.space_tree import Params
from ktray.search.study import MAX_FAILURES, Assignment, Study, too_many_failures_error
from ktray.search.trial import Trial
from ktray.spec import PairSpec, teachers_of
from ktray.stores import Store
from ktray.tracking import Tracker
from ktray.tracking.mlflow_names import shown_value


class _DrawCosts:
    """Costs at the present state of a store.

    Args:
        model: learned from past records; learns on from those that `recorded_seconds` reads.
        spending: the stages that are attributed to a trial already.
    """

    def __init__(self, model: CostModel, store: Store, spending: Spending) -> None:
        self._model, self._store, self._spending = model, store, spending
        self._made: set[str] = set()
        self._prefetched: set[str] = set()

    def prefetch(self, keys: Iterable[str]) -> None:
        """Note what is made before any trial needs it. It is attributed to the first that does, unless it was there before."""
        self._prefetched |= {key for key in keys if not self.is_made(key)}

    def expected_costs(self, graph: Graph) -> AttributedCosts:
        """Expected seconds of stages that are missing and attributed to no trial yet, before and from the student on."""
        free = {stage.key for stage in graph.stages if stage.key in self._spending or self._is_free(stage.key)}
        seconds = self._model.predict(graph.stages, made=free)
        of_student = graph.student_keys()
        return {
            "prefix": {key: value for key, value in seconds.items() if key not in of_student},
            "suffix": {key: value for key, value in seconds.items() if key in of_student},
        }

    def estimator(self, build: Callable[[Params], Graph]) -> Callable[[Params], PrefixSuffixSeconds | None]:
        """A function that estimates what a draw would add to the spending; None for a draw that is no valid pair.

        Args:
            build: the stages that a draw begins with; raises UserError where it is no valid pair.
        """

        def estimate(params: Params) -> PrefixSuffixSeconds | None:
            try:
                costs = self.expected_costs(build(params))
            except UserError:
                return None
            return PrefixSuffixSeconds(*(sum(costs[part].values()) for part in PrefixSuffixSeconds._fields))

        return estimate

    def recorded_seconds(self, keys: Iterable[str]) -> dict[str, float]:
        """Key -> seconds of the run that made it; keys without an artifact are absent. The model learns from each record."""
        found = {key: artifact for key in keys if (artifact := self._store.find(key))}
        for key, artifact in found.items():
            self._model.add(key, artifact.record)
        return {key: float(artifact.record["seconds"]) for key, artifact in found.items()}

    def is_prefetched(self, key: str) -> bool:
        """Whether it was ordered before any trial needed it; it is attributed to the first trial that does."""
        return key in self._prefetched

    def _is_free(self, key: str) -> bool:
        return not self.is_prefetched(key) and self.is_made(key)

    def is_made(self, key: str) -> bool:
        """Whether its artifact has been in the store at any time since the search began."""
        if key not in self._made and self._store.find(key) is not None:
            self._made.add(key)
        return key in self._made


ShowTrial = Callable[[str, Trial, str], None]
"""(event, trial, text): ``("paused", trial, "knn/top1 0.713 at epoch 2")``."""


@dataclass(frozen=True)
class TrialSegment:
    """One trial up to its next rung: the stages up to an epoch of its student, and their evaluation there.

    Attributes:
        epoch: 0 at the rung where the teacher itself is judged.
        final: whether this is the trial's full budget.
        graph: stages to be published.
    """

    trial: Trial
    epoch: int
    final: bool
    graph: Graph

    @property
    def priority(self) -> int:
        """Of its stages: trials on their last segment go first, because they complete soonest."""
        return 1 if self.final else 0


class TrialCoordinator:
    """Draws trials from the study, builds their stages, and reports the results back; knows neither Ray nor a clock.

    Args:
        show: called with news of trials for the user.
        costs: predicts what stages cost; None starts one that learns from this search alone.

    Attributes:
        demanded: keys of all stages that this session has asked for.
    """

    def __init__(
        self,
        space: Space,
        study: Study,
        store: Store,
        identity: Identity,
        tracker: Tracker,
        show: ShowTrial,
        costs: CostModel | None = None,
    ) -> None:
        self.space, self.study, self.store, self.identity = space, study, store, identity
        self.draw_costs = _DrawCosts(costs or CostModel(), store, study.spending)
        study.set_cost_estimate(self.draw_costs.estimator(self._first_graph))
        self.trial_logger, self.tracker, self.show = TrialLogger(tracker, space), tracker, show
        self.demanded: set[str] = set()
        self._failed: dict[str, str] = {}
        self._milestones = _milestones(space)
        self._drawn = len(study.trials())

    def first_segments(self, count: int) -> tuple[deque[TrialSegment], SearchStopped | None]:
        """Up to `count` segments to begin with, and why the search stops early if that is known already."""
        segments: deque[TrialSegment] = deque()
        try:
            while len(segments) < count and not isinstance(segment := self.next(), str):
                segments.append(segment)
        except SearchStopped as stop:
            return segments, stop
        return segments, None

    def planned_stages(self) -> list[Stage]:
        """First stages of `start_with` draws that are still to come, to be computed before their trials ask for them.

        Only of draws whose data and teacher leave the sampler no choice; up to their features or, where teachers are judged
        first, up to that evaluation.
        """
        found: dict[str, Stage] = {}
        drawn = {trial.planned for trial in self.study.trials()}
        for index, start in enumerate(self.space.start_with[: self.study.target]):
            params = self.space.fill_with_first_values(start)
            if index in drawn:
                continue
            if self.space.teacher_parameters & (params.keys() - start.keys()):
                continue
            with suppress(UserError):  # no valid pair: its trial will report that
                pair = self.space.pair(params)
                graph = self._without_bypassed(self._graph(pair, str(params.get("teacher", ""))))
                found |= {stage.key: stage for stage in self._first_stages(pair, graph)}
        self.demanded |= found.keys()
        self.draw_costs.prefetch(found)
        return list(found.values())

    def _first_stages(self, pair: PairSpec, graph: Graph) -> Iterable[Stage]:
        stop = self.space.early_stop
        return graph.up_to(self._evaluation_of(0)).stages if stop and stop.teacher and pair.teacher else _up_to_features(graph)

    def next(self) -> TrialSegment | Literal["wait", "done"]:
        """The next segment that has something to compute; segments whose artifacts are all in the store are settled on the way.

        Raises:
            SearchStopped: ten draws in a row need a stage that has failed before, or the study stops.
        """
        failed_in_a_row: list[Trial] = []
        while True:
            assignment = self._assignment()
            if isinstance(assignment, str):
                return assignment
            segment = self._segment(assignment.trial, assignment.until, assignment.final)
            failed_stage = self._failed_stage(segment)
            if failed_stage:  # it would raise again; only a later session tries it once more
                failed_in_a_row.append(self.fail(segment, self._failed[failed_stage], failed_stage))
                if len(failed_in_a_row) >= MAX_FAILURES:
                    raise too_many_failures_error(failed_in_a_row)
                continue
            if pair_metrics.published_artifacts(segment.graph, self.store) is None:
                self.study.attribute_expected_costs(segment.trial.number, self.draw_costs.expected_costs(segment.graph))
                return segment
            self.settle(segment, computed=[])
            failed_in_a_row.clear()

    def _failed_stage(self, segment: TrialSegment) -> str | None:
        """Key of a stage of this segment that failed in this session and that no other search has published since."""
        for key in [stage.key for stage in segment.graph.stages if stage.key in self._failed]:
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
                if trial.state != "running":  # the study has settled it on its own
                    self.trial_logger.log_unrun_draw(trial)

    def _segment(self, trial: Trial, epoch: int, final: bool) -> TrialSegment:
        graph = self.graph(trial, epoch, None if final else [self._evaluation_of(epoch)])
        if epoch == 0:
            graph = graph.up_to(self._evaluation_of(epoch))
        self.trial_logger.begin_trial(trial, graph.keys)
        return TrialSegment(trial, epoch, final, graph)

    def graph(self, trial: Trial, epoch: int | None = None, evaluations: list[str] | None = None) -> Graph:
        """The stages of a trial up to `epoch` of its student, its last by default, and of these evaluations, or of all."""
        graph = self._without_bypassed(self._graph_of(trial, epoch, evaluations))
        self.demanded |= {stage.key for stage in graph.stages}
        return graph

    def untracked(self) -> set[str]:
        """Keys of stages that the tracker should know of and does not.

        An earlier session may have been killed after it settled a trial, or a segment of it, and before it logged the stages
        that it had computed; a later one, killed as well, may have logged some of them. So this asks for all stages that trials
        need first and, of each trial that is not known completely, for all stages that it rests on: those that were
        computed before any trial asked for them are attributed to none.
        """
        attributed = [trial.attributed_costs.values() for trial in self.study.trials()]
        found = {key for parts in attributed for part in parts for key in part}
        for trial in self.study.trials():
            if all(map(self.tracker.has_stage, trial.artifact_keys)):
                continue
            rungs_reached = [*trial.scores, *([0] if trial.teacher_score is not None else [])]
            for epoch in {*rungs_reached, *([trial.total_epochs] if trial.state == "completed" else [])}:
                evaluations = None if epoch == trial.total_epochs else [self._evaluation_of(epoch)]
                found |= {stage.key for stage in self._graph_of(trial, epoch, evaluations).stages}
        return {key for key in found if not self.tracker.has_stage(key)}

    def _graph_of(self, trial: Trial, epoch: int | None, evaluations: list[str] | None) -> Graph:
        pair = PairSpec.model_validate(dict(trial.pair))
        return self._graph(pair, str(trial.params.get("teacher", "")), epoch, evaluations)

    def _first_graph(self, params: Params) -> Graph:
        """The stages of the first segment of a draw."""
        pair = self.space.pair(params)
        until = halving.rung_epochs(self.space.early_stop, pair.student.schedule.epochs)[0]
        evaluations = None if until == pair.student.schedule.epochs else [self._evaluation_of(until)]
        return self._without_bypassed(self._graph(pair, str(params.get("teacher", "")), until, evaluations))

    def _graph(self, pair: PairSpec, branch: str, epoch: int | None = None, evaluations: list[str] | None = None) -> Graph:
        milestones = self._milestones.get(branch, {})
        return pair_graph.build(pair, self.identity, epoch=epoch, evaluations=evaluations, milestones=milestones)

    def _without_bypassed(self, graph: Graph) -> Graph:
        """The graph less training segments that only lead to a later snapshot which is in the store already.

        Another study with other rungs may have trained to that snapshot in one go, without publishing them.
        """
        needed = {key for stage in graph.stages for key in stage.inputs.values()} | set(graph.metric_prefixes())
        intermediate = {stage.key for stage in graph.stages if not self.draw_costs.is_prefetched(stage.key)} - needed
        later = [stage for stage in graph.stages if not intermediate.isdisjoint(stage.resume_from)]
        computed = [stage for stage in later if self.draw_costs.is_made(stage.key)]
        bypassed = intermediate & {key for stage in computed for key in stage.resume_from}
        return Graph(tuple(stage for stage in graph.stages if stage.key not in bypassed), graph.keys)

    def _evaluation_of(self, epoch: int) -> str:
        """Name of the evaluation that judges a trial at this rung."""
        assert self.space.early_stop is not None
        return str(self.space.early_stop.metric_at(epoch).split("/")[0])

    def is_published(self, segment: TrialSegment) -> bool:
        """Whether all artifacts of a segment are in the store."""
        return pair_metrics.published_artifacts(segment.graph, self.store) is not None

    def settle(self, segment: TrialSegment, computed: list[str]) -> None:
        """Report a segment's results to the study and the tracker.

        Args:
            computed: keys that this trial caused to be computed; their seconds are what it added.
        """
        artifacts = pair_metrics.published_artifacts(segment.graph, self.store)
        if artifacts is None:
            self.fail(segment, "an artifact vanished from the store before the trial could read it")
            return
        self._record_cost(segment)
        added = segment.trial.cost.get("marginal_seconds", 0.0)
        added += sum(float(artifacts[key].record["seconds"]) for key in set(computed) & set(artifacts))
        metrics = pair_metrics.metrics(segment.graph, artifacts)
        self.trial_logger.note_reused_stages(segment.trial, segment.graph.metric_prefixes(), set(computed))
        self.tracker.log_curve(segment.trial.number, _student_curve(segment.graph, artifacts))
        if segment.final:
            self._finish(segment, {**metrics, "cost/marginal_seconds": added})
        else:
            self._pause(segment, metrics, added)

    def _pause(self, segment: TrialSegment, metrics: Mapping[str, float], added: float) -> None:
        assert self.space.early_stop is not None
        name = self.space.early_stop.metric_at(segment.epoch)
        cost = {"marginal_seconds": added}
        trial = self.study.pause_at_rung(segment.trial.number, segment.epoch, metrics[name], segment.graph.keys, cost)
        where = f"at epoch {segment.epoch}" if segment.epoch else "of its teacher"
        self._show_end(trial, f"{name} {metrics[name]:.4f} {where}")
        self.tracker.log_metrics(trial.number, {name: shown_value(metrics[name])}, segment.epoch)
        self.trial_logger.end_trial(trial, segment.graph.keys, {})

    def _finish(self, segment: TrialSegment, metrics: dict[str, float]) -> None:
        number = segment.trial.number
        objectives = {name: metrics[name] for name, _ in self.space.objectives}
        cost = {"seconds": metrics["cost/seconds"], "marginal_seconds": metrics["cost/marginal_seconds"]}
        trial = self.study.finish(number, metrics, objectives, dict(segment.graph.keys), cost)
        self._show_end(trial, " ".join(f"{name} {value:.4f}" for name, value in objectives.items()))
        self.trial_logger.complete_trial(trial, segment.graph.keys, metrics, segment.epoch)

    def _show_end(self, trial: Trial, text: str) -> None:
        """Show the end of a segment whose stages are all published; a score that is not finite has failed its trial."""
        self.show(trial.state, trial, (trial.cause or "") if trial.state == "failed" else text)

    def fail(self, segment: TrialSegment, cause: str, stage: str = "") -> Trial:
        """Report that a segment could not be computed.

        Args:
            stage: key of the stage that raised. Its cause is shown once; later segments that need it fail without asking again.
        """
        self._record_cost(segment)
        trial = self.study.fail(segment.trial.number, cause, stage)
        self.show("failed", trial, f"needs {stage}, too" if stage in self._failed else cause)
        self.trial_logger.end_trial(trial, segment.graph.keys, {})
        if stage:
            self._failed[stage] = cause
        return trial

    def _record_cost(self, segment: TrialSegment) -> None:
        """Replace the expected cost of the trial's stages by the recorded one, before the study learns of its result."""
        attributed = {key for stages in self.study.attributed_costs(segment.trial.number).values() for key in stages}
        self.study.record_costs(segment.trial.number, self.draw_costs.recorded_seconds(sorted(attributed)))

    def prune(self) -> None:
        """The study has met its target: paused trials become pruned. The study stays open for what is still to compute."""
        for trial in self.study.prune_paused():
            self.show("pruned", trial, trial.cause or "")
            self.trial_logger.end_trial(trial, trial.keys, {})

    def leave(self) -> None:
        """The search ends before its target: running trials are logged as interrupted and go on in another session."""
        for trial in self.study.trials():
            if trial.state == "running":
                self.trial_logger.end_trial(trial, trial.keys, {})


def _up_to_features(graph: Graph) -> list[Stage]:
    """Images, teachers and features with all that they read; where a student teaches, that includes its own stages."""
    kept: set[str] = set()
    for stage in reversed(graph.stages):
        if stage.name in ("images", "teacher", "features") or stage.key in kept:
            kept |= {stage.key, *stage.inputs.values()}
    return [stage for stage in graph.stages if stage.key in kept]


def _student_curve(graph: Graph, artifacts: Mapping[str, Any]) -> list[dict[str, float]]:
    return pair_metrics.prefixed_curve(artifacts[graph.keys["student"]], "student") if "student" in graph.keys else []


def _milestones(space: Space) -> dict[str, dict[str, list[int]]]:
    """Teacher branch -> training -> epochs where a snapshot may be needed, of the teacher and of each generation's student."""
    found: dict[str, dict[str, set[int]]] = {}
    rungs = set(space.early_stop.rungs) if space.early_stop else set()
    for _, params in space.boundary_draws():
        entry = found.setdefault(str(params.get("teacher", "")), {"student": set(rungs)})
        for path, pair in pair_graph.generations_with_paths(space.pair(params)):
            prefix = pair_graph.milestone_prefix(path)
            entry.setdefault(f"{prefix}student", set()).add(pair.student.schedule.epochs)
            for index, teacher in enumerate(teachers_of(pair)):
                schedule = getattr(teacher, "schedule", None)
                if schedule is not None:
                    entry.setdefault(f"{prefix}{numbered('teacher', index)}", set()).add(schedule.epochs)
    return {branch: {name: sorted(epochs) for name, epochs in entry.items()} for branch, entry in found.items()}

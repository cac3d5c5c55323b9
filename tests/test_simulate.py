"""A search on a virtual clock follows the same logic as one on Ray, in no time."""

from statistics import mean

import pytest
from threadpoolctl import threadpool_limits

from ktray.errors import SearchStopped
from ktray.fingerprint import seed_of
from ktray.runs.simulation import SimulatedCluster, VirtualClock, _Simulation, simulate
from ktray.search.draws import fixed_draw_source, random_search_source
from ktray.search.space import Space
from ktray.search.space_check import check_and_fill_modes
from ktray.search.study import Study
from tests.toys import DATA, ROTATION

COST = {
    "images": 5.0,
    "teacher": 30.0,
    "features": 8.0,
    "clusters": 4.0,
    "pseudo_labels": 1.0,
    "student": 6.0,
    "evaluation": 2.0,
}


def seconds(stage, epochs):
    return COST[stage.name] * (epochs or 1)


def metrics(stage):
    return {"top1": (seed_of(stage.key) % 1000) / 1000} if stage.name == "evaluation" else {"loss": 1.0}


def space(trials=12, early_stop=True):
    content = {
        "study": "simulated",
        "objectives": [{"metric": "knn/top1"}],
        "budget": {"trials": trials, "concurrent": 4},
        "early_stop": {"metric": "knn/top1", "rungs": [2, 4, 8], "reduction": 2} if early_stop else None,
        "pair": {
            "data": DATA,
            "teacher": {**ROTATION, "layer": {"choice": ["conv3", "conv4"]}},
            "transfer": {"kind": "clusters", "k": {"choice": [5, 10, 20]}},
            "student": {
                "backbone": {"kind": "alexnet", "width": 0.125},
                "schedule": {"epochs": 8, "lr": {"log_float": [0.01, 0.1]}},
            },
            "evals": [{"kind": "knn"}],
        },
    }
    return check_and_fill_modes(Space.from_content(content, "simulated.yaml"))


def run(home, workers, draws=None, **how):
    clock = VirtualClock()
    searched = space(**how)
    study = Study.open(home, searched, clock=clock, draws=draws(searched) if draws else None)
    return simulate(searched, study, clock, seconds, metrics, workers)


def pairs(count):
    options = [(layer, k, 0.02) for layer in ("conv3", "conv4") for k in (5, 10, 20)]
    names = ("teacher.layer", "transfer.k", "student.schedule.lr")
    return [dict(zip(names, option, strict=True)) for option in options[:count]]


def test_every_distinct_stage_is_computed_once_and_the_target_is_met(tmp_path):
    timeline = run(tmp_path, workers=4)
    keys = [key for _, key in timeline.computed]
    assert len(keys) == len(set(keys))
    settled = [trial for trial in timeline.trials if trial.state in ("completed", "pruned")]
    assert len(settled) == 12
    assert any(trial.state == "completed" for trial in settled)
    assert sum(key.startswith("teacher-") for key in keys) == 1


def test_one_worker_is_busy_all_the_time_and_more_are_faster(tmp_path):
    one = run(tmp_path / "one", workers=1)
    four = run(tmp_path / "four", workers=4)
    assert one.makespan == pytest.approx(one.busy)
    assert four.makespan < one.makespan


def test_sharing_makes_the_search_cheaper_than_its_trials_alone(tmp_path):
    timeline = run(tmp_path, workers=4, early_stop=False)
    assert timeline.unshared > 1.5 * timeline.busy


def test_stopping_early_is_cheaper_than_training_all_students(tmp_path):
    stopped = run(tmp_path / "rungs", workers=2)
    full = run(tmp_path / "full", workers=2, early_stop=False)
    assert stopped.busy < 0.8 * full.busy


def test_a_segment_is_charged_only_for_the_epochs_beyond_its_snapshot(tmp_path):
    timeline = run(tmp_path, workers=1)
    best = next(trial for trial in timeline.trials if trial.state == "completed")
    alone = 5 + 2 * 30 + 8 + 4 + 1 + 8 * 6 + 2
    assert best.cost["seconds"] == pytest.approx(alone)


def test_the_same_study_simulated_twice_makes_the_same_draws(tmp_path):
    one, two = run(tmp_path / "a", workers=3), run(tmp_path / "b", workers=3)
    assert [trial.params for trial in one.trials] == [trial.params for trial in two.trials]
    assert one.makespan == two.makespan


def test_a_fixed_list_is_run_in_its_order_each_pair_once_and_costs_its_distinct_stages(tmp_path):
    twice = [*pairs(6), *pairs(2)]
    timeline = run(tmp_path, 2, lambda searched: fixed_draw_source(searched, twice), trials=20, early_stop=False)
    assert [dict(trial.params) for trial in timeline.trials] == twice
    assert [trial.state for trial in timeline.trials] == ["completed"] * 6 + ["duplicate"] * 2
    assert [trial.duplicate_of for trial in timeline.trials[6:]] == [0, 1]
    one_teacher, one_pass_for_two_layers, six_pairs = 2 * 30, 8, 6 * (4 + 1 + 8 * 6 + 2)
    assert timeline.busy == pytest.approx(5 + one_teacher + one_pass_for_two_layers + six_pairs)


def test_chance_draws_the_same_pairs_again_and_not_the_samplers(tmp_path):
    one, two = (run(tmp_path / name, 3, random_search_source, early_stop=False) for name in "ab")
    assert [trial.params for trial in one.trials] == [trial.params for trial in two.trials]
    assert [trial.params for trial in one.trials] != [trial.params for trial in run(tmp_path / "c", 3, early_stop=False).trials]


def listed_run(home, cluster, count=4):
    return run(home, cluster, lambda searched: fixed_draw_source(searched, pairs(count)), trials=count, early_stop=False)


def test_a_stage_whose_worker_died_is_run_again_by_a_new_worker_and_costs_what_was_lost(tmp_path):
    def dies(key, attempts):
        return 0.5 if key.startswith("teacher-") and attempts == 0 else None

    calm = listed_run(tmp_path / "calm", SimulatedCluster(2))
    disturbed = listed_run(tmp_path / "disturbed", SimulatedCluster(2, startup_seconds=7.0, dies=dies))
    assert [trial.state for trial in disturbed.trials] == ["completed"] * 4
    assert (calm.lost, disturbed.lost) == (0.0, 30.0)
    assert disturbed.busy == calm.busy + 30.0
    assert sorted(key for _, key in disturbed.computed) == sorted(key for _, key in calm.computed)
    kept = listed_run(tmp_path / "kept", SimulatedCluster(2, dies=dies, checkpoint_seconds=20.0))
    assert (kept.lost, kept.busy) == (10.0, calm.busy + 10.0)


def test_a_stage_that_kills_three_workers_fails_its_trials(tmp_path):
    def dies(key, attempts):
        return 0.1 if key.startswith("student-") else None

    assert [trial.state for trial in listed_run(tmp_path / "few", SimulatedCluster(2, dies=dies)).trials] == ["failed"] * 4
    with pytest.raises(SearchStopped, match="10 trials failed"):
        run(tmp_path / "many", SimulatedCluster(2, dies=dies), trials=12, early_stop=False)


def test_hiring_and_handing_over_take_time(tmp_path):
    quick, slow = (
        listed_run(tmp_path / "quick", SimulatedCluster(1)),
        listed_run(tmp_path / "slow", SimulatedCluster(1, 1, 7.0, 0.5)),
    )
    assert slow.makespan == pytest.approx(
        quick.makespan + 7.0 + 0.5 * (len(quick.computed) - 1)
    )  # two layers are handed over as one


def test_machines_hold_all_workers_and_no_more():
    nodes = SimulatedCluster(20, per_node=8).nodes()
    assert [node.cpus for node in nodes.values()] == [8, 8, 4]


def test_every_decision_is_timed(tmp_path):
    timeline = listed_run(tmp_path, 2)
    assert len(timeline.decisions["draw"]) == len(timeline.decisions["settle"]) == 4
    assert len(timeline.decisions["dispatch"]) >= len(timeline.computed)


def test_what_trials_are_charged_adds_up_to_what_workers_computed(tmp_path):
    clock, searched = VirtualClock(), space()
    study = Study.open(tmp_path, searched, clock=clock)
    timeline = simulate(searched, study, clock, seconds, metrics, 3)
    assert sum(study.spending.spent) == pytest.approx(timeline.busy)
    of_student = sum(COST["evaluation"] if "evaluation" in key else 0 for _, key in timeline.computed)
    assert study.spending.spent.suffix > of_student
    assert study.spending.spent.prefix == pytest.approx(5 + 2 * 30 + sum(_before_the_student(timeline)))
    assert sum(Study.open(tmp_path, searched).spending.spent) == pytest.approx(timeline.busy)


def _before_the_student(timeline):
    made = [(at, key.rpartition("-")[0]) for at, key in timeline.computed]
    passes = {at for at, kind in made if kind == "features"}  # layers of one network come out of one pass
    return [COST["features"]] * len(passes) + [COST[kind] for _, kind in made if kind in ("clusters", "pseudo_labels")]


def test_stages_that_are_ordered_count_before_they_are_computed(tmp_path):
    clock, searched = VirtualClock(), space()
    study = Study.open(tmp_path, searched, clock=clock)
    coordinator = _Simulation(searched, study, clock, seconds, metrics, SimulatedCluster(1)).coordinator
    coordinator.next()
    ordered = study.spending.spent
    assert ordered.prefix > 0
    coordinator.next()  # the same teacher: it is charged once
    assert study.spending.spent.prefix - ordered.prefix < ordered.prefix


def test_what_was_promoted_to_the_end_goes_before_any_longer_work_that_waits(tmp_path):
    """On one worker, so that the order of publication is that of the rule; an epoch is cheap, so that its path is short."""
    clock, searched = VirtualClock(), space(trials=24)
    study = Study.open(tmp_path, searched, clock=clock)
    cost = {**COST, "student": 0.5}
    simulation = _Simulation(
        searched, study, clock, lambda stage, epochs: cost[stage.name] * (epochs or 1), metrics, SimulatedCluster(1)
    )
    given, overtaken = [], 0
    begin = simulation._begin

    def watched(assignment):
        nonlocal overtaken
        final = {stage.key for segment in simulation.running.values() if segment.final for stage in segment.graph.stages}
        begun = {key for _, key in simulation.timeline.computed} | set(given)
        others = [segment for segment in simulation.running.values() if not segment.final]
        if final - begun:
            assert assignment.stage.key in final
            overtaken += bool(others)
        given.append(assignment.stage.key)
        begin(assignment)

    simulation._begin = watched
    simulation.run()
    assert overtaken > 2
    study.prune_and_close()


def test_idle_workers_prepare_what_planned_draws_will_need(tmp_path):
    content = space(trials=2).document.model_dump(mode="json", exclude_unset=True)
    content["budget"] = {"trials": 2, "concurrent": 1}
    content["pair"]["teacher"]["seed"] = {"choice": [0, 1]}
    content["start_with"] = [{"teacher.seed": seed, "teacher.layer": "conv3"} for seed in (0, 1)]
    searched, clock = (
        check_and_fill_modes(Space.from_content({**content, "early_stop": None}, "simulated.yaml")),
        VirtualClock(),
    )
    timeline = simulate(searched, Study.open(tmp_path, searched, clock=clock), clock, seconds, metrics, 2)
    made = {key: at for at, key in timeline.computed}
    first, second = (trial.keys["teacher"] for trial in timeline.trials)
    assert made[first] == made[second] == 5 + 2 * 30
    assert timeline.makespan == 5 + 2 * 30 + 8 + 2 * (4 + 1 + 8 * 6 + 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_decision_is_quick_and_takes_no_longer_after_a_thousand_pairs(tmp_path):
    """CPU time: 5 ms are the target, and five times that allow for a machine that is busy; growth shows on any machine."""
    with threadpool_limits(1):  # threads that wait for each other on a busy machine would count as work
        timeline = run(tmp_path, SimulatedCluster(8), trials=1000)
    assert len(timeline.decisions["draw"]) > 1000
    for what, took in timeline.decisions.items():
        tenth = len(took) // 10
        first, last = mean(took[:tenth]), mean(took[-tenth:])
        assert mean(took) < 0.025, what
        assert last < 3 * max(first, 0.001), what

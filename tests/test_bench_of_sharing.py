"""What the two experiments about sharing rest on: their arithmetic, their lists of pairs, and how CPU time is counted."""

import sys

import pytest

from experiments import simulate_search as simulated
from experiments.bench import naive_tune
from ktray.pipeline import pair_graph
from ktray.runs.simulation import SimulatedCluster


@pytest.mark.parametrize("model", simulated.MODELS)
def test_a_fixed_list_costs_its_distinct_stages_and_ends_near_its_bound(model):
    costs, entries, gpus = simulated.MODELS[model], simulated.pairs_of(40), 6
    ideal = simulated.Ideal.of(entries, costs, gpus)
    timeline, _ = simulated.run(costs, SimulatedCluster(gpus), len(entries), entries)
    assert [trial.state for trial in timeline.trials] == ["completed"] * len(entries)
    assert timeline.unshared == pytest.approx(ideal.naive)
    assert 0.85 * timeline.busy <= ideal.shared <= timeline.busy * 1.000001
    assert ideal.bound <= timeline.makespan * 1.000001
    assert timeline.makespan <= 1.3 * max(ideal.path, ideal.shared / gpus)


def test_the_ideal_of_three_pairs_by_hand():
    costs = simulated.Costs(teacher=20.0, features=1.0, clusters=(2.0, 2.0), student=8.0)
    entry = dict(zip(simulated.pairs_of(1)[0], (0, "conv3", 50, 1.0, 0), strict=True))
    entries = [entry, {**entry, "student.seed": 1}, {**entry, "teacher.layer": "conv4", "transfer.k": 100}]
    ideal = simulated.Ideal.of(entries, costs, gpus=2)
    hours = [each / simulated.HOUR for each in (ideal.naive, ideal.shared, ideal.path, ideal.bound)]
    assert hours == pytest.approx([93.0, 20 + 1 + 2 * 2 + 3 * 8, 31.0, 23 + 24 / 2])


def test_a_stated_share_of_the_stages_dies_once_and_costs_half_of_its_work_on_average():
    costs, entries = simulated.MODELS["teacher 20 h, student 8 h"], simulated.pairs_of(120)
    calm, _ = simulated.run(costs, SimulatedCluster(8), 120, entries)
    died, _ = simulated.run(costs, SimulatedCluster(8, dies=simulated.deaths(0.2)), 120, entries)
    assert [trial.state for trial in died.trials] == ["completed"] * 120
    assert died.busy == pytest.approx(calm.busy + died.lost, rel=0.01)  # another set of layers may share a pass
    assert 0.05 < died.lost / calm.busy < 0.16


def test_the_list_of_the_bench_is_32_pairs_over_4_teachers():
    pairs = naive_tune.pairs().values()
    keys = [pair_graph.build(pair, lambda spec: "content").keys for pair in pairs]
    distinct = {name: len({each[name] for each in keys}) for name in ("teacher", "features", "clusters", "student")}
    assert distinct == {"teacher": 4, "features": 8, "clusters": 16, "student": 32}


@pytest.mark.slow
def test_cpu_time_of_a_process_and_of_its_children_is_counted_and_waiting_is_not():
    # Each stays a while after it has burned: what a process spends after the last look at it is not seen.
    burn = "import time\nend = time.process_time() + 0.7\nwhile time.process_time() < end: pass\ntime.sleep(1)\n"
    child = (
        f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {burn!r}])\ntime.sleep(1)\n{burn}print('done')"
    )
    spent, wall, said = naive_tune.cpu_seconds([sys.executable, "-c", child], {})
    assert said == "done"
    assert wall > 3.0
    assert 1.3 < sum(spent.values()) < 2.5

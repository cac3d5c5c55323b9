"""The stages of a pair share exactly what they may share."""

import pytest
import torch
from safetensors.torch import save_file

from ktray.pipeline import pair_graph
from ktray.pipeline.pair_graph import build, final_epoch
from tests.toys import DATA, HOG, ROTATION, STUDENT, toy_pair


def identity(spec):
    return f"content of {spec.kind} {getattr(spec, 'seed', 0)}"


def keys(**changes):
    return build(toy_pair(**changes), identity).keys


def test_a_handcrafted_teacher_has_no_teacher_stage():
    graph = build(toy_pair(), identity)
    names = [stage.name for stage in graph.stages]
    assert names == ["images", "features", "clusters", "pseudo_labels", "student", "evaluation"]
    assert "teacher" not in graph.keys


def test_inputs_come_before_those_who_read_them():
    graph = build(toy_pair(teacher=ROTATION), identity, milestones={"student": [1, 2], "teacher": [1]})
    seen = set()
    for stage in graph.stages:
        assert set(stage.inputs.values()) <= seen
        seen.add(stage.key)


def test_another_student_seed_changes_the_student_and_nothing_before_it():
    one, two = keys(), keys(student={**STUDENT, "seed": 1})
    assert one["pseudo_labels"] == two["pseudo_labels"]
    assert one["student"] != two["student"]
    assert one["evaluation"]["knn"] != two["evaluation"]["knn"]


def test_another_k_shares_teacher_and_features():
    one = keys(teacher=ROTATION)
    two = keys(teacher=ROTATION, transfer={"kind": "clusters", "k": 7, "iterations": 5})
    assert (one["teacher"], one["features"]) == (two["teacher"], two["features"])
    assert one["clusters"] != two["clusters"]


def test_min_size_changes_pseudo_labels_but_not_clusters():
    one = keys(transfer={"kind": "clusters", "k": 5, "min_size": 2})
    two = keys(transfer={"kind": "clusters", "k": 5, "min_size": 3})
    assert one["clusters"] == two["clusters"]
    assert one["pseudo_labels"] != two["pseudo_labels"]


def test_another_layer_shares_the_teacher_only():
    one, two = keys(teacher=ROTATION), keys(teacher={**ROTATION, "layer": "conv4"})
    assert one["teacher"] == two["teacher"]
    assert one["features"] != two["features"]


def test_the_name_of_an_evaluation_is_no_part_of_its_identity():
    one = keys(evals=[{"kind": "knn"}])["evaluation"]["knn"]
    two = keys(evals=[{"kind": "knn", "name": "neighbours"}])["evaluation"]["neighbours"]
    assert one == two


def test_cutting_a_training_into_segments_changes_no_key():
    pair = toy_pair(teacher=ROTATION)
    whole = build(pair, identity)
    cut = build(pair, identity, milestones={"teacher": [1], "student": [1, 2]})
    assert whole.keys == cut.keys
    assert len(cut.stages) == len(whole.stages) + 3


def test_a_longer_training_begins_at_the_shorter_ones_snapshot():
    short = build(toy_pair(student={**STUDENT, "schedule": {"epochs": 2, "lr": 0.02}}), identity).keys["student"]
    graph = build(toy_pair(student={**STUDENT, "schedule": {"epochs": 6, "lr": 0.02}}), identity)
    student = next(stage for stage in graph.stages if stage.name == "student")
    assert short in student.resume_from
    assert graph.keys["student"] not in student.resume_from


def test_a_schedule_that_reads_its_total_shares_no_snapshot_with_another_total():
    def student(epochs):
        schedule = {"kind": "cosine", "epochs": epochs, "lr": 0.02}
        graph = build(toy_pair(student={**STUDENT, "schedule": schedule}), identity)
        return next(stage for stage in graph.stages if stage.name == "student")

    assert student(2).key not in student(6).resume_from
    assert not set(student(4).resume_from) & set(student(6).resume_from)


def test_a_decay_is_a_branch_from_the_trunk():
    schedule = {"epochs": 10, "lr": 0.02, "decay": 0.2}
    trunk = build(toy_pair(student={**STUDENT, "schedule": {"epochs": 8, "lr": 0.02}}), identity).keys["student"]
    graph = build(toy_pair(student={**STUDENT, "schedule": schedule}), identity)
    student = next(stage for stage in graph.stages if stage.name == "student")
    assert trunk in student.resume_from
    longer = build(toy_pair(student={**STUDENT, "schedule": {**schedule, "epochs": 20}}), identity)
    assert student.key not in next(s for s in longer.stages if s.name == "student").resume_from


def test_the_place_of_a_checkpoint_is_no_part_of_the_identity(tmp_path):
    def teacher(folder):
        folder.mkdir()
        save_file({"weight": torch.zeros(2)}, folder / "weights.safetensors")
        loaded = {"checkpoint": str(folder / "weights.safetensors"), "backbone": {"kind": "alexnet", "width": 0.125}}
        return keys(teacher=loaded)["teacher"]

    assert teacher(tmp_path / "here") == teacher(tmp_path / "there")


def test_all_four_data_roles_may_differ():
    roles = {role: {**DATA, "seed": seed} for seed, role in enumerate(("pretext", "cluster", "transfer", "target"))}
    graph = build(toy_pair(data=roles, teacher=ROTATION), identity)
    assert sum(stage.name == "images" for stage in graph.stages) == 4
    assert sum(stage.name == "features" for stage in graph.stages) == 2


def test_a_random_student_depends_on_no_data_and_no_schedule():
    def student(**changes):
        return keys(teacher=None, transfer={"kind": "none"}, **changes)["student"]

    other = {**STUDENT, "schedule": {"epochs": 9, "lr": 0.3}}
    assert student() == student(student=other) == student(data={**DATA, "seed": 5})
    assert final_epoch(toy_pair(teacher=None, transfer={"kind": "none"})) == 0


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_rung_asks_for_the_snapshot_and_only_the_named_evaluation(epoch):
    pair = toy_pair(evals=[{"kind": "knn"}, {"kind": "linear_probe"}])
    graph = build(pair, identity, epoch=epoch, evaluations=["knn"])
    student = next(stage for stage in graph.stages if stage.name == "student")
    assert student.spec["epoch"] == epoch
    assert list(graph.keys["evaluation"]) == ["knn"]


def test_a_teachers_evaluation_is_shared_by_all_students():
    evals = [{"kind": "knn", "of": "teacher"}]
    one = keys(teacher=ROTATION, evals=evals)
    two = keys(teacher=ROTATION, evals=evals, student={**STUDENT, "seed": 4}, transfer={"kind": "clusters", "k": 9})
    assert one["evaluation"] == two["evaluation"]


def test_hog_and_its_teacher_are_distinct_keys_per_parameter():
    assert keys()["features"] != keys(teacher={"descriptor": {**HOG["descriptor"], "orientations": 12}})["features"]


def test_a_chain_that_was_built_before_with_other_cuts_is_built_as_if_it_were_the_first():
    def built(milestones):
        return build(toy_pair(teacher=ROTATION), identity, milestones=milestones).stages

    pair_graph._chain_cache.clear()
    plain, cut, again = built({}), built({"teacher": [1], "student": [1]}), built({})
    pair_graph._chain_cache.clear()
    assert plain == again == built({})
    assert {stage.key for stage in cut} > {stage.key for stage in plain}


def test_several_k_share_the_clusters_of_each_k_with_pairs_that_have_it_alone():
    several = keys(transfer={"kind": "clusters", "k": [5, 9, 7], "iterations": 5})
    for k, place in ((5, ""), (9, "_2"), (7, "_3")):
        alone = keys(transfer={"kind": "clusters", "k": k, "iterations": 5})
        for stage in ("clusters", "pseudo_labels"):
            assert several[f"{stage}{place}"] == alone[stage]
        assert several["student"] != alone["student"]
    assert several.keys() == {*alone, "clusters_2", "pseudo_labels_2", "clusters_3", "pseudo_labels_3"}
    graph = build(toy_pair(transfer={"kind": "clusters", "k": [5, 9]}), identity)
    assert {"clusters", "clusters_2", "pseudo_labels_2"} <= set(graph.metric_prefixes().values())
    assert sum(stage.name == "features" for stage in graph.stages) == 1


def test_soft_clusters_share_the_clusters_of_hard_ones():
    hard = keys(transfer={"kind": "clusters", "k": 20})
    soft = keys(transfer={"kind": "soft_clusters", "k": 20})
    warm = keys(transfer={"kind": "soft_clusters", "k": 20, "temperature": 1.0})
    assert hard["clusters"] == soft["clusters"]
    assert soft["pseudo_labels"] == warm["pseudo_labels"]
    assert soft["student"] != warm["student"]


def test_how_clusters_are_sampled_is_the_students_business_alone():
    one, two = (keys(transfer={"kind": "clusters", "k": 5, "sampling": sampling}) for sampling in ("none", "uniform"))
    assert one["pseudo_labels"] == two["pseudo_labels"]
    assert one["student"] != two["student"]


def test_regression_and_similarity_read_features_of_the_transfer_data_and_cluster_nothing():
    roles = {role: {**DATA, "seed": seed} for seed, role in enumerate(("pretext", "cluster", "transfer", "target"))}
    for kind in ("regression", "similarity"):
        graph = build(toy_pair(data=roles, transfer={"kind": kind}), identity)
        names = [stage.name for stage in graph.stages]
        assert names == ["images", "features", "student", "images", "evaluation"]
        features = next(stage for stage in graph.stages if stage.name == "features")
        assert features.inputs["images"] == graph.stages[0].key
        assert graph.stages[0].spec["seed"] == 2
        assert graph.keys["features"] == features.key

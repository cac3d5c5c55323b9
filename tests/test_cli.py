"""The commands, as a user types them."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import yaml

from ktray import plugins
from ktray.cli import main
from ktray.stores.locks import lock_store_shared
from tests.source import ROOT
from tests.toys import toy_spec

DAMAGE = "centroids.npy does not match its checksum"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write(path, spec):
    path.write_text(yaml.safe_dump(spec))
    return str(path)


def test_a_pair_runs_locally_and_the_second_time_nothing_is_computed(home, tmp_path, capsys):
    pair = write(tmp_path / "pair.yaml", toy_spec())
    assert main(["run", pair, "--local", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first[0]["computed"]["student"] == 1
    assert "knn/top1" in first[0]["metrics"]
    assert main(["run", pair, "--local", "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second[0]["computed"] == {}
    assert second[0]["keys"] == first[0]["keys"]


def test_set_changes_what_is_computed(home, tmp_path, capsys):
    pair = write(tmp_path / "pair.yaml", toy_spec())
    main(["run", pair, "--local", "--json", "-q"])
    one = json.loads(capsys.readouterr().out)[0]
    main(["run", pair, "--local", "--json", "-q", "--set", "transfer.k=4"])
    two = json.loads(capsys.readouterr().out)[0]
    assert two["keys"]["features"] == one["keys"]["features"]
    assert two["keys"]["clusters"] != one["keys"]["clusters"]


def test_plan_tells_done_from_run(home, tmp_path, capsys):
    pair = write(tmp_path / "pair.yaml", toy_spec())
    assert main(["plan", pair, "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert {row["state"] for row in before["stages"]} == {"run"}
    assert before["estimate"]["seconds"] is None
    main(["run", pair, "--local", "-q"])
    capsys.readouterr()
    main(["plan", pair, "--json"])
    after = json.loads(capsys.readouterr().out)
    assert {row["state"] for row in after["stages"]} == {"done"}
    assert after["estimate"] == {"seconds": 0, "low": 0, "high": 0, "bytes": 0}


def test_plan_says_in_words_what_would_run_and_with_v_names_each_stage(home, tmp_path, capsys):
    pair = write(tmp_path / "pair.yaml", toy_spec())
    assert main(["plan", pair]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert main(["plan", pair, "-v"]) == 0
    before = capsys.readouterr().out
    count = len(before.split("\n\n")[1].splitlines()) - 2
    assert line == before.splitlines()[0]
    assert f"Valid: 1 pair. All {count} stages would run; no time estimate until each kind of stage has run once" in line
    assert "evaluation knn" in before
    main(["run", pair, "--local", "-q"])
    capsys.readouterr()
    main(["plan", pair])
    assert f"Valid: 1 pair. All {count} stages are done." in capsys.readouterr().out
    main(["plan", pair, "--set", "transfer.k=4"])
    assert re.search(
        rf"Valid: 1 pair\. \d of {count} stages would run; about .* one after the other\.", capsys.readouterr().out
    )


def test_plan_of_a_space_answers_first_with_trials_and_time(home, tmp_path, capsys):
    pair = toy_spec()
    main(["run", write(tmp_path / "pair.yaml", pair), "--local", "-q"])
    drawn = {**pair, "transfer": {"kind": "clusters", "k": {"choice": [2, 3, 4]}}}
    space = write(
        tmp_path / "space.yaml",
        {"study": "s", "objectives": [{"metric": "knn/top1", "mode": "max"}], "budget": {"trials": 9}, "pair": drawn},
    )
    capsys.readouterr()
    assert main(["plan", space]) == 0
    assert re.match(r"3 trials: about \d+ s \(\d+ s to \d+ s\) on this machine, \d+ MB\n", capsys.readouterr().out)
    assert main(["plan", space, "--json"]) == 0
    search = json.loads(capsys.readouterr().out)["search"]
    assert (search["trials"], search["done"]) == (3, 0)
    assert search["low"] < search["seconds"] < search["high"]


NEAR = {
    "a verb": (["serach", "x"], "there is no verb 'serach'. Did you mean 'search'?"),
    "an action": (["data", "chek", "x"], "Did you mean 'check'?"),
    "a file": (["plan", "space.yml"], "Did you mean space.yaml?"),
    "a shipped space": (["plan", "search_spaces/quickstart.yaml"], "ktray init --example quickstart writes it."),
    "a kind": (["show", "kinds/rotatoin"], "Did you mean 'rotation'?"),
}


@pytest.mark.parametrize(("command", "said"), NEAR.values(), ids=NEAR.keys())
def test_a_misspelt_word_is_answered_with_the_nearest(home, tmp_path, capsys, monkeypatch, command, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text("")
    assert main(command) == 2
    assert said in capsys.readouterr().err


def test_a_misspelt_study_is_answered_with_the_nearest(home, capsys):
    (home / "studies" / "quickstart").mkdir(parents=True)
    (home / "studies" / "quickstart" / "journal.log").write_text("")
    for verb in ("best", "show", "status", "report"):
        assert main([verb, "quikstart"]) == 2
        assert "Did you mean 'quickstart'?" in capsys.readouterr().err


def test_a_kind_is_shown_with_ranges_layers_a_minimal_line_and_its_source(home, capsys):
    assert main(["show", "alexnet"]) == 0
    out = capsys.readouterr().out
    assert "layers: conv1, conv2, conv3, conv4, conv5" in out
    assert "> 0, <= 8" in out
    assert "Source: Krizhevsky" in out
    assert "student: {backbone: {kind: alexnet}, schedule: {epochs: 20}}" in out


@pytest.mark.parametrize("kind", [kind for group in plugins.GROUPS for kind in plugins.kinds(group)])
def test_the_minimal_line_of_every_kind_is_yaml_that_its_spec_accepts(home, capsys, kind):
    assert main(["show", kind, "--json"]) == 0
    for found in json.loads(capsys.readouterr().out):
        line = yaml.safe_load(found["minimal"])
        entry = next(iter(line.values()))
        entry = entry[0] if isinstance(entry, list) else entry
        field = {"backbone": "backbone", "pretext": "pretext", "descriptor": "descriptor"}.get(found["group"])
        plugins.parse(found["group"], entry[field] if field else entry)


COMPLETIONS = {
    "verbs": ("ktray sea", {"search"}),
    "studies": ("ktray best q", {"quickstart"}),
    "kinds": ("ktray show rotat", {"rotation"}),
    "paths of --set": ("ktray plan space.yaml --set teacher.", {"teacher.hog.cell=", "teacher.rot.layer="}),
    "options": ("ktray init --ex", {"--example"}),
}


@pytest.mark.parametrize(("line", "wanted"), COMPLETIONS.values(), ids=COMPLETIONS.keys())
def test_a_shell_completes(home, tmp_path, line, wanted):
    (home / "studies" / "quickstart").mkdir(parents=True)
    (home / "studies" / "quickstart" / "journal.log").write_text("")
    teacher = {"one_of": {"hog": {"cell": {"choice": [4, 8]}}, "rot": {"layer": "conv3"}}}
    write(tmp_path / "space.yaml", {"study": "s", "pair": {"teacher": teacher, "transfer": {"k": 5}}})
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    environment = {**os.environ, **asked, "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "KTRAY_HOME": str(home)}
    code = "import sys; sys.argv[0] = 'ktray'; from ktray.cli import run_program; run_program()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**environment, "PYTHONPATH": str(ROOT)}, check=False)
    assert {each.strip() for each in answer.read_text().split("\n")} == wanted


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_code_for_a_shell_is_printed(home, capsys, shell):
    assert main(["completion", shell]) == 0
    assert "ktray" in capsys.readouterr().out


BAD = {
    "a HOG teacher with a schedule": ({"teacher": {"descriptor": {"kind": "hog"}, "schedule": {"epochs": 3}}}, "schedule"),
    "a misspelt kind": ({"teacher": {"descriptor": {"kind": "hogg"}}}, "Did you mean 'hog'"),
    "more clusters than images": ({"transfer": {"kind": "clusters", "k": 100000}}, "transfer.k"),
    "a misspelt field": ({"transfer": {"kind": "clusters", "kk": 5}}, "kk"),
    "an unknown data path": ({"data": "folder:/no/such/place"}, "/no/such/place"),
    "a layer that the backbone lacks": ({"evals": [{"kind": "knn", "layer": "conv9"}]}, "conv9"),
}


@pytest.mark.parametrize(("changes", "said"), BAD.values(), ids=BAD.keys())
def test_a_mistake_gets_one_paragraph_and_exit_2(home, tmp_path, capsys, changes, said):
    pair = write(tmp_path / "pair.yaml", toy_spec(**changes))
    assert main(["plan", pair]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert printed.err.startswith("ktray: ")
    assert printed.out == ""


@pytest.mark.parametrize("spec", ["absent", "a wrong pair", "a wrong space", "broken YAML"])
def test_plan_in_json_says_of_what_is_not_valid_why_with_all_that_is_known_of_others(home, tmp_path, capsys, spec):
    good = write(tmp_path / "good.yaml", toy_spec())
    assert main(["plan", good, "--json"]) == 0
    valid = json.loads(capsys.readouterr().out)
    assert valid["valid"] is True
    assert valid["problem"] is None
    source = tmp_path / "it.yaml"
    if spec == "a wrong pair":
        write(source, toy_spec(teacher={"descriptor": "hogg"}))
    elif spec == "a wrong space":
        write(source, {"study": "toy", "pair": toy_spec(teacher={"descriptor": "hogg"})})
    elif spec == "broken YAML":
        source.write_text("teacher: [\n")
    assert main(["plan", str(source), "--json"]) == 2
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert answer["valid"] is False
    assert said.err == f"ktray: {answer['problem']}\n"
    assert answer.keys() == valid.keys()
    assert answer["estimate"].keys() == valid["estimate"].keys()
    assert answer["sharing"].keys() == valid["sharing"].keys()
    assert not any(answer["stages"] + answer["notes"] + [answer["pairs"]] + list(answer["estimate"].values()))
    assert main(["plan", str(source)]) == 2
    assert capsys.readouterr().out == ""


def test_a_store_that_is_none_says_nothing_about_the_input(home, tmp_path, capsys):
    pair = write(tmp_path / "pair.yaml", toy_spec())
    assert main(["plan", pair, "--json", "--store", "s3://bucket"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "s3://bucket" in said.err


def test_broken_yaml_is_named_with_its_line(home, tmp_path, capsys):
    path = tmp_path / "pair.yaml"
    path.write_text("teacher: {descriptor: {kind: hog}\ndata: [")
    assert main(["plan", str(path)]) == 2
    assert "pair.yaml" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(home, capsys):
    assert main(["plan", "no-such.yaml"]) == 2
    assert "no-such.yaml" in capsys.readouterr().err


def test_plan_of_a_mistake_takes_under_five_seconds_and_starts_no_ray(home, tmp_path):
    pair = write(tmp_path / "pair.yaml", toy_spec(teacher={"descriptor": {"kind": "hogg"}}))
    program = "import sys; from ktray.cli import main; c = main(sys.argv[1:]); assert 'ray' not in sys.modules; sys.exit(c)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, "plan", pair], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert time.perf_counter() - began < 15, "three times the target, for a busy machine"


def test_the_cache_lists_and_verifies_what_a_run_left(home, tmp_path, capsys):
    pair = write(tmp_path / "pair.yaml", toy_spec())
    main(["run", pair, "--local", "-q"])
    capsys.readouterr()
    main(["cache", "list", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert {row["stage"] for row in rows} == {"images", "features", "clusters", "pseudo_labels", "student", "evaluation"}
    key = next(row["key"] for row in rows if row["stage"] == "clusters")
    path = home / "store" / key / "centroids.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    running = lock_store_shared(f"file://{home / 'store'}")  # a run that finds it gone computes it again
    main(["cache", "verify", "--json"])
    running.release()
    assert json.loads(capsys.readouterr().out) == {"damaged": {key: DAMAGE}, "moved_aside": [key]}
    assert not path.exists()
    assert [kept.name.rpartition(".")[0] for kept in (home / "store/.damaged").iterdir()] == [key]
    main(["cache", "verify"])
    assert capsys.readouterr().out == "0 damaged artifacts\n"
    main(["run", pair, "--local", "-q"])
    assert path.is_file()
    main(["cache", "prune", "--yes"])
    assert not (home / "store/.damaged").exists()


def test_kinds_are_listed_with_one_line_and_their_source_each(home, capsys):
    assert main(["show", "kinds", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {group: sorted(found) for group, found in answer.items()} == {each: plugins.kinds(each) for each in plugins.GROUPS}
    for group, found in answer.items():
        for kind, said in found.items():
            assert said["what"], kind
            assert said["source"] != "not said", (
                f"the docstring of the {group} {kind} has no paragraph that begins with 'Source: '"
            )
    assert "1805.00385" in answer["transfer"]["clusters"]["source"]
    assert answer["pretext"]["rotation"]["source"].startswith("Gidaris, Singh, Komodakis, ICLR 2018")
    assert main(["show", "kinds"]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = next(index for index, line in enumerate(lines) if line.split()[:1] == ["jigsaw_pp"])
    assert answer["pretext"]["jigsaw_pp"]["what"] in lines[place]
    assert lines[place + 1].strip() == answer["pretext"]["jigsaw_pp"]["source"].split("; ")[0]


@pytest.mark.parametrize(("group", "kind"), [(group, kind) for group in plugins.GROUPS for kind in plugins.kinds(group)])
def test_every_kind_is_shown_with_its_fields_and_their_defaults(group, kind, home, capsys):
    assert main(["show", f"kinds/{kind}", "--json"]) == 0
    answer = next(each for each in json.loads(capsys.readouterr().out) if each["group"] == group)
    fields = plugins.module(group, kind).Spec.model_fields
    assert ["kind", *(field["name"] for field in answer["fields"])] == list(fields)
    assert [field["name"] for field in answer["fields"] if "default" not in field] == [
        name for name, field in fields.items() if field.is_required()
    ]
    assert main(["show", f"kinds/{kind}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{group} {kind}: {answer['what']}"


def test_a_field_is_shown_with_its_type_default_and_description(home, capsys):
    main(["show", "kinds/knn"])
    lines = {line.split()[0]: " ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line}
    number = "number of neighbours, all training images if there are fewer; of several, top1 is of the first"
    assert lines["k"] == f"k int | list of int 20 {number}"
    assert lines["of"] == "of student | teacher student"
    assert lines["layer"].startswith("layer text | null null layer to read")
    assert main(["show", "kinds/nearest"]) == 2
    assert "there is no kind 'nearest'" in capsys.readouterr().err


def test_a_pickled_checkpoint_is_refused_and_never_run(home, tmp_path, capsys):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    (tmp_path / "teacher.pt").write_bytes(pickle.dumps(Evil()))
    teacher = {"checkpoint": str(tmp_path / "teacher.pt"), "backbone": {"kind": "alexnet", "width": 0.125}}
    pair = write(tmp_path / "pair.yaml", toy_spec(teacher=teacher))
    for verb in (["plan"], ["run", "--local"]):
        assert main([*verb, pair]) == 2
        assert (
            "teacher.checkpoint: teacher.pt is a Python pickle of io.open that torch.save did not write"
            in capsys.readouterr().err
        )
    assert not (tmp_path / "pwned").exists()


def test_plan_of_a_space_shows_one_draw_of_every_branch_wherever_it_branches(home, tmp_path, capsys):
    space = {"study": "branches", "objectives": [{"metric": "knn/top1"}], "pair": toy_spec()}
    student = space["pair"]["student"]
    narrow, wide = ({**student, "backbone": {**student["backbone"], "width": width}} for width in (0.125, 0.25))
    space["pair"]["student"] = {"one_of": {"narrow": narrow, "wide": wide}}
    assert main(["plan", write(tmp_path / "space.yaml", space), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert sum(row["stage"] == "student" for row in stages) == 2


def test_a_list_in_a_record_does_not_differ_from_the_same_list_in_a_pair():
    from ktray.cli.show_command import _differences

    wanted, record = {"spec": {"hidden": (64,), "loss": "l2"}}, {"spec": {"hidden": [64], "loss": "cosine"}}
    assert _differences(wanted, record) == [["spec.loss", "cosine", "l2"]]

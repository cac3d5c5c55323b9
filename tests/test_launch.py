"""`ktray launch`: the files for Kubernetes, Slurm, `ray up` and Docker, judged by shells, schemas and stubs of the programs."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from ktray.cli import main
from ktray.cli.terminal import words_without_places
from ktray.runs import launch_files
from ktray.runs.launch import LaunchNote, RemoteSearch, read_note, read_search, write_note
from tests.searches import toy_space
from tests.source import ROOT

SHARED = ["--shared", "/mnt/shared/k"]
RAYJOB = ["rayjob", *SHARED, "--image", "lab/ktray:1", "--claim", "photos"]
OFFLINE = "KTRAY_TEST_NETWORK" not in os.environ  # then pip's own index serves PyTorch, too
# What every form needs beside the space.
FORMS = {
    "job": ["job", *SHARED],
    "rayjob": RAYJOB,
    "slurm": ["slurm", *SHARED],
    "up": ["up", *SHARED, "--hosts", "10.0.0.1,10.0.0.2"],
}


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return toy_space(tmp_path / "spaces")


def launched(form: str, space: Path, *more: str) -> int:
    return main(["launch", FORMS[form][0], str(space), *FORMS[form][1:], *more])


def documents(text: str) -> list[Any]:
    return list(yaml.safe_load_all(text))


def stub(folder: Path, name: str, script: str) -> None:
    """A program of this name that is found first."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def search_of(space: Path, shared: Path, **changes: Any) -> RemoteSearch:
    return read_search(space, str(shared), overrides=[], **changes)


# ---- the script


KTRAY = 'echo "$*" >> "$CALLS"\n[ "$1" != search ] || { mkdir -p "$STUDY"; exit "${CODE:-0}"; }'


@pytest.mark.parametrize(("code", "seen"), [(0, 0), (3, 0), (5, 5), (2, 2)])
def test_the_script_dries_the_space_run_once_and_may_be_run_again(space: Path, tmp_path: Path, code: int, seen: int) -> None:
    search = search_of(space, tmp_path / "shared", arguments=("--trials", "7"))
    for name, text in search.files.items():
        (tmp_path / name).write_text(text)
    stub(tmp_path / "bin", "ktray", KTRAY)
    calls, path = tmp_path / "calls", f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    variables = {
        **os.environ,
        "PATH": path,
        "CALLS": str(calls),
        "STUDY": str(tmp_path / "shared/studies/toy"),
        "CODE": str(code),
    }
    ends = [subprocess.run(["bash", str(tmp_path / "start.sh")], env=variables, check=False).returncode for _ in range(2)]
    assert ends == [seen, seen]
    verbs = [line.split()[0] for line in calls.read_text().splitlines()]
    assert verbs == ["plan", "search", "search"]
    last = calls.read_text().splitlines()[-1].split()
    assert last[:6] == ["search", "space.yaml", "--address", "auto", "--name", "toy"]
    assert last[-4:] == ["--trials", "7", "--home", str(tmp_path / "shared")]


def test_a_failed_dry_run_ends_the_script_before_the_search(space: Path, tmp_path: Path) -> None:
    (tmp_path / "start.sh").write_text(search_of(space, tmp_path / "shared").script)
    stub(tmp_path / "bin", "ktray", "[ $1 = search ] && touch searched; exit 4")
    variables = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    assert subprocess.run(["bash", "start.sh"], env=variables, cwd=tmp_path, check=False).returncode == 4
    assert not (tmp_path / "searched").exists()


def test_overrides_reach_the_plan_and_the_search(space: Path) -> None:
    script = read_search(space, "/s", overrides=["transfer.k=7"], name="other").script
    assert script.count("--set transfer.k=7") == 2
    assert "--name other" in script


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["job"], "needs SPACE"),
        (["job", "SPACE"], "needs --shared"),
        (["rayjob", "SPACE", *SHARED], "needs --image"),
        (["up", "SPACE", *SHARED], "needs --hosts"),
        (["slurm", "SPACE", *SHARED, "--queue", "q"], "--queue belongs to ktray launch rayjob"),
        (["job", "SPACE", "--shared", "here"], "no absolute path"),
        (["job", "SPACE", *SHARED, "--out", "x"], "a job is submitted"),
        (["slurm", "SPACE", *SHARED, "--set", "data={kind: folder, path: photos}"], "'photos' is a relative path"),
        (["slurm", "SPACE", *SHARED, "--set", "data=imagefolder:photos"], "'photos' is a relative path"),
        (["slurm", "SPACE", *SHARED, "--set", "tranfer.k=5"], "tranfer"),
        (["job", "SPACE", *SHARED, "--address", "127.0.0.1:6379"], "no address of a job server"),
        (["job", "SPACE", *SHARED, "--address", "http://127.0.0.1:1"], "nothing answers at 127.0.0.1:1"),
        (["slurm", "SPACE", *SHARED, "--out", "/nowhere/x"], "cannot be written"),
    ],
)
def test_a_wrong_launch_is_refused_with_one_sentence(
    words: list[str], said: str, space: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *(str(space) if word == "SPACE" else word for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_a_runtime_file_is_checked_here_and_sent_along(space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runtime = tmp_path / "r.yaml"
    runtime.write_text("{cpu: 8}")
    assert launched("slurm", space, "--runtime", str(runtime)) == 2
    assert "Did you mean cpus" in capsys.readouterr().err
    runtime.write_text("{cpus: 8}")
    assert launched("rayjob", space, "--runtime", str(runtime), "--dry-run") == 0
    files, _ = documents(capsys.readouterr().out)
    assert yaml.safe_load(files["data"]["runtime.yaml"]) == {"cpus": 8}
    assert "--runtime runtime.yaml" in files["data"]["start.sh"]


# ---- Kubernetes


def test_a_rayjob_holds_the_space_as_it_was_written_and_repeats_its_entrypoint(
    space: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launched("rayjob", space, "--dry-run", "--nodes", "3", "--gpus", "2", "--namespace", "lab") == 0
    files, job = documents(capsys.readouterr().out)
    assert files["data"]["space.yaml"] == space.read_text()
    assert job["metadata"] == {"name": "ktray-toy", "namespace": "lab"}
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__
    assert job["spec"]["backoffLimit"] > 0, "an evicted head is replaced, and the search goes on"
    assert job["spec"]["shutdownAfterJobFinishes"]
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 3
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    for template in (group["template"], cluster["headGroupSpec"]["template"]):
        (each,) = template["spec"]["containers"]
        assert [mount["mountPath"] for mount in each["volumeMounts"]] == ["/mnt/shared/k", "/ktray"]
    assert job["spec"]["entrypoint"] == "bash /ktray/start.sh"
    assert not (Path.cwd() / "toy.rayjob.yaml").exists(), "a dry run writes nothing"


def test_a_rayjob_for_kueue_is_suspended_until_its_queue_admits_it(space: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launched("rayjob", space, "--dry-run", "--queue", "lab-queue") == 0
    _, job = documents(capsys.readouterr().out)
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "lab-queue"}
    assert job["spec"]["suspend"] is True
    assert job["spec"]["shutdownAfterJobFinishes"] is True, "Kueue refuses others"
    assert "enableInTreeAutoscaling" not in job["spec"]["rayClusterSpec"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--queue", "lab"], ["--gpus", "1", "--nodes", "4"]])
def test_a_rayjob_is_valid_by_the_schema_of_kuberay(more: list[str], space: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Needs KUBERAY_CRD, the path of ray.io_rayjobs.yaml from KubeRay's repository (ray-operator/config/crd/bases)."""
    if "KUBERAY_CRD" not in os.environ:
        pytest.skip("KUBERAY_CRD does not name KubeRay's ray.io_rayjobs.yaml")
    crd = yaml.safe_load(Path(os.environ["KUBERAY_CRD"]).read_text())
    (found,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    assert launched("rayjob", space, "--dry-run", *more) == 0
    _, job = documents(capsys.readouterr().out)
    validator = jsonschema.Draft202012Validator(_closed(found["schema"]["openAPIV3Schema"]))
    assert [f"{'.'.join(map(str, each.path))}: {each.message}" for each in validator.iter_errors(job)] == []
    assert not validator.is_valid({**job, "spec": {**job["spec"], "backofLimit": 1}}), "it sees unknown fields"


def _closed(schema: Any) -> Any:
    """The schema of a custom resource as JSON schema in which unknown fields are errors, as for `kubectl --validate=strict`."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _closed(each) for name, each in schema.items()}
    if found.pop("x-kubernetes-int-or-string", False):
        found.pop("anyOf", None)
        found["type"] = ["integer", "string"]
    open_ended = found.pop("x-kubernetes-preserve-unknown-fields", False)
    if found.get("type") == "object" and found.get("properties") and not open_ended and "additionalProperties" not in found:
        found["additionalProperties"] = False
    if set(found) >= {"type"} and found.get("properties") and "metadata" in found["properties"]:
        found["properties"]["metadata"] = {"type": "object"}
    return found


# ---- Slurm


SRUN = 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"'  # on this machine, without its own options
RAY = 'echo "ray $*" >> "$CALLS"; while [ "$1" != -- ]; do shift; done; shift; exec "$@"'


def test_the_batch_script_runs_the_search_on_the_nodes_that_slurm_gives_it(space: Path, tmp_path: Path) -> None:
    assert launched("slurm", space, "--nodes", "2", "--cpus", "4", "--gpus", "1", "--partition", "gpu") == 0
    script = tmp_path / "toy.sbatch"
    text = script.read_text().replace("/mnt/shared/k", str(tmp_path / "shared"))
    script.write_text(text)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert options["nodes"] == "2"
    assert options["gpus-per-node"] == "1"
    assert options["partition"] == "gpu"
    for name, body in {"srun": SRUN, "ray": RAY, "ktray": KTRAY, "scontrol": "echo node7; echo node8"}.items():
        stub(tmp_path / "bin", name, body)
    given = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "4"}
    calls = tmp_path / "calls"
    variables = {**os.environ, **given, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls)}
    variables["STUDY"] = str(tmp_path / "shared/studies/toy")
    for _ in range(2):  # as after a requeue
        done = subprocess.run(["bash", str(script)], env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    started, plan, first, _, second = calls.read_text().splitlines()
    assert [line.split()[0] for line in (plan, first, second)] == ["plan", "search", "search"]
    words = started.split()
    assert words[1] == "symmetric-run"
    assert re.fullmatch(r"[\d.:a-f]+:22200", words[words.index("--address") + 1])
    assert words[words.index("--min-nodes") + 1] == "2"
    assert "--num-gpus=1" in words
    token = tmp_path / "shared/ray_token"
    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o077 == 0
    assert (tmp_path / "shared/launched/toy/space.yaml").read_text() == space.read_text()


@pytest.mark.parametrize("line", ["END_OF_FILE", "$(touch x)", "`touch x`", "'\"\\"])
def test_no_line_of_a_space_can_leave_the_batch_script(line: str, space: Path, tmp_path: Path) -> None:
    text = f"{space.read_text()}# {line}\n{line}\n"
    search = replace(search_of(space, tmp_path / "shared"), space=text)
    script = launch_files.slurm(search, launch_files.Machines(), time="1:00:00")
    body = script[script.index("set -euo") : script.index("# Ray with a token")]
    subprocess.run(["bash", "-c", body], check=True, cwd=tmp_path)
    assert (tmp_path / "shared/launched/toy/space.yaml").read_text() == text
    assert not (tmp_path / "x").exists()


# ---- ray up, Docker


def test_the_cluster_file_is_valid_by_the_schema_that_comes_with_ray(space: Path, tmp_path: Path) -> None:
    assert launched("up", space, "--ssh-user", "me") == 0
    cluster = yaml.safe_load((tmp_path / "toy.up.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["provider"] == {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]}
    starts = [line for part in ("head", "worker") for line in cluster[f"{part}_start_ray_commands"] if "ray start" in line]
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    (folder,) = cluster["file_mounts"].values()
    assert sorted(os.listdir(folder)) == ["space.yaml", "start.sh", "token"]
    assert (Path(folder) / "token").stat().st_mode & 0o077 == 0


def test_the_dockerfile_installs_the_versions_that_this_machine_has(tmp_path: Path, space: Path) -> None:
    assert main(["launch", "dockerfile", "--out", str(tmp_path / "D")]) == 0
    lines = [line for line in (tmp_path / "D").read_text().splitlines() if not line.startswith("#")]
    kinds = [line.split()[0] for line in lines]
    assert kinds[0] == "FROM"
    assert lines[0] == f"FROM python:{sys.version_info.major}.{sys.version_info.minor}-slim"
    assert f"ray=={ray.__version__}" in "\n".join(lines)
    assert kinds.index("COPY") < max(number for number, line in enumerate(lines) if "pip install" in line)
    assert kinds.index("USER") < len(kinds) - 1, "it is not run as root"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_steps_of_the_dockerfile_run_in_order_in_a_fresh_environment(
    space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stubs stand for what needs an image: apt-get, useradd, and the removal of apt's lists."""
    assert main(["launch", "dockerfile", "--dry-run"]) == 0
    steps = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    environment, image = tmp_path / "venv", tmp_path / "image"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    for name in ("apt-get", "useradd", "rm"):
        stub(tmp_path / "bin", name, "exit 0")
    path = f"{tmp_path / 'bin'}:{environment / 'bin'}:/usr/bin:/bin"
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    image.mkdir()
    folder, ran = image, list[str]()
    for kind, text in steps:
        if kind == "WORKDIR":
            folder = image / text.lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
        elif kind == "COPY":
            *sources, target = text.split()
            for source in sources:
                subprocess.run(["cp", "-r", str(ROOT / source), str(folder / target)], check=True)
        elif kind == "RUN":
            command = re.sub(r" --index-url \S+", "", text) if OFFLINE else text
            done = subprocess.run(
                ["bash", "-c", command], cwd=folder, env={**kept, "PATH": path}, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
            ran.append(done.stdout)
    assert "quickstart" in ran[-1], "the spaces are in the package"
    assert ray.__version__ in ran[-1]


# ---- the note, and asking there


def test_a_note_is_read_as_it_was_written_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    note = LaunchNote("a", "job", "/s", {"address": "http://x:1", "job": "j"}, ["--store", "file:///x"])
    write_note(tmp_path, note)
    assert read_note(tmp_path, "a") == note
    (tmp_path / "launched/a.json").write_text("{")
    assert read_note(tmp_path, "a") is None


def test_the_places_of_this_machine_are_left_out_of_what_is_asked_there() -> None:
    command = "ktray best toy --home /h --top 3 --store=file:///x --json --tracking sqlite:///y"
    assert words_without_places(command) == ["best", "toy", "--top", "3", "--json"]


def test_a_batch_job_is_submitted_followed_and_asked(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "shared"
    stub(tmp_path / "bin", "sbatch", "echo 4711")
    stub(tmp_path / "bin", "squeue", "if [ -e running ]; then echo RUNNING; fi")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert main(["launch", "slurm", str(space), "--shared", str(shared), "--apply"]) == 0
    (tmp_path / "toy-4711.log").write_text("trial 0 of 6\n")
    capsys.readouterr()
    assert main(["logs", "toy"]) == 0
    said = capsys.readouterr()
    assert said.out == "trial 0 of 6\n"
    assert "Slurm job 4711: not queued any more" in said.err
    assert main(["logs", "nothing"]) == 2
    assert "Launched from here: toy" in capsys.readouterr().err


def test_a_rayjob_is_replaced_applied_followed_and_asked_by_kubectl(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = """
echo "$*" >> "$CALLS"
case "$*" in
  *rayClusterName*) echo toy-cluster;; *node-type=head*) echo head-pod;; *jobStatus*) echo "Running RUNNING";;
  "logs"*) echo line one;; "exec"*) echo "toy: 2 of 6 trials";;
esac"""
    stub(tmp_path / "bin", "kubectl", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    assert launched("rayjob", space, "--apply", "--namespace", "lab") == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("delete rayjob --namespace lab ktray-toy --ignore-not-found")
    assert calls[1] == "apply --namespace lab -f toy.rayjob.yaml"
    capsys.readouterr()
    assert main(["logs", "toy"]) == 0
    assert capsys.readouterr().out == "line one\n"
    assert main(["status", "toy"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == "toy: 2 of 6 trials"
    assert "RayJob ktray-toy: Running RUNNING" in said.err
    last = (tmp_path / "calls").read_text().splitlines()[-1]
    assert last == "exec --namespace lab head-pod -c ray-head -- bash -c ktray status toy --home /mnt/shared/k"


def test_a_student_is_fetched_whole_from_where_it_was_searched(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exports = 'mkdir -p "$4/inner"; printf weights > "$4/student.safetensors"; printf x > "$4/inner/card"'
    stub(tmp_path / "bin", "ktray", exports.replace("$4", "$3"))
    stub(tmp_path / "bin", "kubectl", 'case "$*" in exec*) exec bash -c "${@: -1}";; esac')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert launched("rayjob", space, "--apply") == 0
    assert main(["export", "toy/3", str(tmp_path / "student"), "--format", "onnx"]) == 0
    assert (tmp_path / "student/student.safetensors").read_text() == "weights"
    assert (tmp_path / "student/inner/card").read_text() == "x"
    assert main(["export", "toy", str(tmp_path / "student")]) == 2
    assert "is not empty" in capsys.readouterr().err
    stub(tmp_path / "bin", "ktray", "echo 'ktray: no trial is complete' >&2; exit 2")
    assert main(["export", "toy", str(tmp_path / "other")]) == 2
    assert "no trial is complete" in capsys.readouterr().err


# ---- addresses


def test_an_address_that_is_found_but_dead_is_said_at_once(space: Path) -> None:
    """RAY_ADDRESS, as in a shell that was used with a cluster that is gone: Ray itself would retry for minutes."""
    command = [sys.executable, "-m", "ktray", "search", str(space), "--address", "auto"]
    done = subprocess.run(
        command, env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert re.search(r"nothing answers at [\d.]+:1 ", done.stderr), done.stderr  # Ray gives 127.0.0.1 another name

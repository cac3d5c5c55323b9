"""Following a search that was launched elsewhere: its log, the answers of reading verbs there, and its student brought here."""

from __future__ import annotations

import base64
import io
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ktray.errors import PreflightFailed, UserError
from ktray.runs import ray_jobs
from ktray.runs.launch import LaunchNote, RemoteSearch
from ktray.text import visible

POLL_SECONDS = 2.0
_BEGIN, _END = "--- archive ---", "--- end of archive ---"


def follow_log(note: LaunchNote, write: Callable[[str], None], until_end: bool) -> bool:
    """Pass on what a search prints; whether it succeeded, or is still running.

    Args:
        until_end: whether to wait for what is still to come, until the search ends.

    Raises:
        UserError: it cannot be found any more.
        PreflightFailed: the place where it runs does not answer.
    """
    if note.form == "job":
        return ray_jobs.follow(note.place["address"], note.place["job"], write, until_end) in (
            "SUCCEEDED",
            "RUNNING",
            "PENDING",
        )
    if note.form == "slurm":
        return _follow_file(note, write, until_end)
    follow = ["-f"] if until_end else []
    if note.form == "rayjob":
        return _passed_on(["kubectl", "logs", *follow, *_namespace(note), f"job/{note.place['name']}"], write)
    command = f"tail -n +1 {'-f ' if until_end else ''}{shlex.quote(f'{note.shared}/launched/{note.study}.log')}"
    return _passed_on(["ray", "exec", note.place["file"], command], write)


def _follow_file(note: LaunchNote, write: Callable[[str], None], until_end: bool) -> bool:
    """The log of a Slurm job, which lies where it was submitted."""
    path, job = Path(note.place["log"]), note.place["job"]
    position = 0
    while True:
        runs = bool(_output(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], check=False).strip())
        if path.exists():
            with open(path, encoding="utf-8", errors="replace") as file:
                file.seek(position)
                write(file.read())
                position = file.tell()
        elif not runs:
            raise UserError(f"the Slurm job {job} has ended, and there is no {path}")
        if not runs or not until_end:
            return True
        time.sleep(POLL_SECONDS)


def state(note: LaunchNote) -> str:
    """One line about the process that searches there: a Ray job, a RayJob, a Slurm job."""
    if note.form == "job":
        place = f"Ray job {note.place['job']} at {note.place['address']}"
        return f"{place}: {ray_jobs.state(note.place['address'], note.place['job'])}"
    if note.form == "rayjob":
        columns = "jsonpath={.status.jobDeploymentStatus} {.status.jobStatus}"
        found = _output(["kubectl", "get", "rayjob", *_namespace(note), note.place["name"], "-o", columns], check=False)
        return f"RayJob {note.place['name']}: {found.strip() or 'gone'}"
    if note.form == "slurm":
        found = _output(["squeue", "--noheader", f"--jobs={note.place['job']}", "--format=%T %R"], check=False)
        return f"Slurm job {note.place['job']}: {found.strip() or 'not queued any more'}"
    return f"cluster of {note.place['file']}"


def run_in_place(note: LaunchNote, command: str) -> tuple[bool, str]:
    """Run a shell command where the search is, and return whether it succeeded and what it printed.

    Raises:
        UserError: the place cannot be reached.
        PreflightFailed: it does not answer.
    """
    if note.form == "job":
        return ray_jobs.run_there(note.place["address"], command)
    if note.form == "slurm":
        if not Path(note.shared).is_dir():
            raise UserError(f"{note.shared} is not there", instead="Ask on a machine of the Slurm cluster.")
        command = command.replace("ktray ", f"{shlex.quote(sys.executable)} -m ktray ", 1)
        return _ran(["bash", "-c", command])
    if note.form == "rayjob":
        name, space = note.place["name"], _namespace(note)
        cluster = _output(["kubectl", "get", "rayjob", *space, name, "-o", "jsonpath={.status.rayClusterName}"]).strip()
        label = f"ray.io/cluster={cluster},ray.io/node-type=head"
        pod = _output(["kubectl", "get", "pod", *space, "-l", label, "-o", "jsonpath={.items[0].metadata.name}"]).strip()
        return _ran(["kubectl", "exec", *space, pod, "-c", "ray-head", "--", "bash", "-c", command])
    return _ran(["ray", "exec", note.place["file"], command])


def answer_in_place(note: LaunchNote, words: Sequence[str]) -> tuple[bool, str]:
    """The answer of a verb such as ``["status", "photos"]`` in the home of the search."""
    return run_in_place(note, shlex.join(["ktray", *words, "--home", note.shared, *note.everywhere]))


def fetch_student(note: LaunchNote, words: Sequence[str], directory: Path) -> list[Path]:
    """Export a student there, and unpack it into a folder here that does not exist yet, or is empty.

    Args:
        words: arguments of `ktray export` beside the folder, such as ``["photos/3", "--format", "onnx"]``.

    Raises:
        UserError: the folder is occupied, or the export failed there.
        PreflightFailed: the place does not answer, or the archive did not arrive whole.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not empty", "DIR", "Choose another folder.")
    name, *options = words
    export = f"ktray export {shlex.quote(name)}"
    there = shlex.join([*options, "--home", note.shared, *note.everywhere])
    ok, text = run_in_place(
        note,
        f'{export} "${{TMPDIR:-/tmp}}/ktray-$$/student" {there} && echo "{_BEGIN}" '
        f'&& tar -C "${{TMPDIR:-/tmp}}/ktray-$$/student" -czf - . | base64 && echo "{_END}"; '
        'code=$?; rm -rf "${TMPDIR:-/tmp}/ktray-$$"; (exit $code)',
    )
    head, _, rest = text.partition(f"{_BEGIN}\n")
    body, end, _ = rest.partition(_END)
    if not ok or not end:
        raise UserError(f"the student could not be exported there: {visible(head.strip()) or 'it said nothing'}")
    try:
        archive = base64.b64decode("".join(body.split()), validate=True)
        directory.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            packed.extractall(directory, filter="data")  # no path outside of the folder, no devices, no links out of it
    except (ValueError, tarfile.TarError, EOFError, OSError) as error:
        raise PreflightFailed(f"The student did not arrive whole: {error}") from error
    return sorted(path for path in directory.rglob("*") if path.is_file())


# ---- handing over


def apply(search: RemoteSearch, form: str, file: Path, place: dict[str, str], command: str = "") -> dict[str, str]:
    """Hand a written file over to kubectl, sbatch or `ray up`; what then finds the search.

    Args:
        command: of `ray up` alone, which begins the search.

    Raises:
        UserError: the program is not there, or refuses the file.
    """
    if form == "rayjob":
        space = ["--namespace", place["namespace"]] if place.get("namespace") else []
        # A RayJob that has ended is not started again by applying it once more.
        _output(["kubectl", "delete", "rayjob", *space, place["name"], "--ignore-not-found", "--wait=true"])
        _output(["kubectl", "apply", *space, "-f", str(file)])
    elif form == "slurm":
        job = _output(["sbatch", "--parsable", str(file)]).strip().partition(";")[0]
        place = {"job": job, "log": str(Path.cwd() / f"{search.study}-{job}.log")}
    else:
        _output(["ray", "up", "--yes", str(file)])
        log = f"{search.shared}/launched/{search.study}.log"
        logged = f"mkdir -p {shlex.quote(search.shared + '/launched')} && ({command}) >> {shlex.quote(log)} 2>&1"
        _output(["ray", "exec", "--tmux", str(file), logged])
    return place


def _namespace(note: LaunchNote) -> list[str]:
    return ["--namespace", note.place["namespace"]] if note.place.get("namespace") else []


def _ran(command: Sequence[str]) -> tuple[bool, str]:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except FileNotFoundError:
        raise _missing(command) from None
    return done.returncode == 0, done.stdout


def _output(command: Sequence[str], check: bool = True) -> str:
    ok, text = _ran(command)
    if check and not ok:
        raise UserError(f"`{shlex.join(command)}` failed: {' '.join(visible(text).split())[:500]}")
    return text if ok else ""


def _passed_on(command: Sequence[str], write: Callable[[str], None]) -> bool:
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout or ():
                write(line)
            return process.wait() == 0
    except FileNotFoundError:
        raise _missing(command) from None


def _missing(command: Sequence[str]) -> UserError:
    return UserError(f"there is no program {command[0]} here", instead=f"Install it, or run this where {command[0]} is.")

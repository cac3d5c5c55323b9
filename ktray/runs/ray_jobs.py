"""Ray Jobs: submit a search to the job server of a cluster, follow what it prints, and run commands there."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ktray.errors import PreflightFailed, UserError
from ktray.runs.launch import SCRIPT_FILE, RemoteSearch
from ktray.runs.launch_files import object_name
from ktray.text import shown

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
POLL_SECONDS = 1.0
COMMAND_SECONDS = 180.0  # for a command such as `ktray status`, with the start of its process
_MARK = "--- ktray ---"
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
_WAIT_FOR_SERVER = 60.0  # of a follower, for a job server that does not answer


def client(address: str) -> JobSubmissionClient:
    """A client of the job server at `address`, with our token if there is one.

    Raises:
        UserError: nothing answers there, or it refuses our token.
    """
    from ray.job_submission import JobSubmissionClient

    from ktray.scheduler.ray_session import require_reachable, use_token_of_user

    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"{shown(address)} is no address of a job server", "--address", f"Write it as {DEFAULT_ADDRESS}, Ray's dashboard."
        )
    host = address.split("://")[1].strip("/")
    if "/" not in host:
        default = "443" if address.startswith("https") else "80"
        require_reachable(host if ":" in host.rpartition("]")[2] else f"{host}:{default}", "Ray's dashboard has port 8265.")
    use_token_of_user()
    logging.getLogger("ray").setLevel(logging.WARNING)  # it says which packages it sends
    try:
        return JobSubmissionClient(address)
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise _refused(address, error) from None


def _refused(address: str, error: Exception) -> UserError:
    text = " ".join(str(error).split())[:300]
    if any(word in text.lower() for word in ("authenticat", "token", "401", "403")):
        return UserError(
            f"the job server at {address} refuses our token",
            "--address",
            "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token.",
        )
    return UserError(f"the job server at {address} does not take the job: {text}", "--address", "Start Ray with its dashboard.")


def submit(address: str, search: RemoteSearch) -> str:
    """Submit a search; the id of its job. The same study may be submitted again once its job has ended.

    Raises:
        UserError: the job server cannot be used, or the study runs there already.
    """
    jobs = client(address)
    name = object_name(search.study)
    earlier = [job for job in jobs.list_jobs() if (job.submission_id or "").startswith(f"{name}.")]
    running = [job.submission_id for job in earlier if job.status not in _ENDED]
    if running:
        raise UserError(
            f"the study {search.study!r} runs there already, as the job {running[0]}",
            instead=f"Follow it: ktray logs {search.study}.",
        )
    number = 1 + max((int(str(job.submission_id).rpartition(".")[2]) for job in earlier), default=0)
    with tempfile.TemporaryDirectory(prefix="ktray-launch-") as folder:
        write_files(search, Path(folder))
        try:
            return jobs.submit_job(
                entrypoint=f"bash {SCRIPT_FILE}",
                submission_id=f"{name}.{number}",
                runtime_env={"working_dir": folder},
                metadata={"ktray_study": search.study},
            )
        except (RuntimeError, ValueError) as error:
            raise _refused(address, error) from None


def write_files(search: RemoteSearch, folder: Path) -> None:
    """Write what the search needs into a folder: its files, and the plugins that are sent along."""
    for name, text in search.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    for package in map(Path, search.packages):
        ignored = shutil.ignore_patterns("__pycache__")
        if package.is_dir():
            shutil.copytree(package, folder / package.name, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy(package, folder / package.name)


def has_token() -> bool:
    """Whether this process sends a token to Ray."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def state(address: str, job: str) -> str:
    """The state of a job in Ray's words, such as ``RUNNING``; ``GONE`` if the cluster does not know it (any more)."""
    try:
        return str(client(address).get_job_status(job).value)
    except RuntimeError:
        return "GONE"


def follow(address: str, job: str, write: Callable[[str], None], until_end: bool = True) -> str:
    """Pass on what a job prints, from the beginning, until it ends; its state then.

    A job server that stops answering, as while a head is replaced, is asked again for a minute.

    Args:
        until_end: whether to wait for what is still to come.

    Raises:
        PreflightFailed: the job server does not answer any more.
        UserError: there is no such job there.
    """
    jobs, written, silent_since = client(address), 0, time.monotonic()
    while True:
        try:
            now = str(jobs.get_job_status(job).value)
            text = jobs.get_job_logs(job)
        except RuntimeError as error:
            if "404" in str(error) or "does not exist" in str(error):
                raise UserError(f"the cluster at {address} has no job {job}; it may be another cluster by now") from None
            now, text = "", ""
        except OSError:
            now, text = "", ""
        if now:
            write(text[written:])
            written, silent_since = max(written, len(text)), time.monotonic()
            if now in _ENDED or not until_end:
                return now
        elif time.monotonic() - silent_since > _WAIT_FOR_SERVER:
            raise PreflightFailed(f"The job server at {address} has not answered for {_WAIT_FOR_SERVER:.0f} s")
        time.sleep(POLL_SECONDS)


def run_there(address: str, command: str) -> tuple[bool, str]:
    """Run a shell command on the cluster's head, and return whether it succeeded and what it printed.

    Raises:
        UserError: the job server cannot be used.
        PreflightFailed: it takes too long.
    """
    jobs = client(address)
    # Ray writes lines of its own around those of the command.
    job = jobs.submit_job(entrypoint=f"echo '{_MARK}'; {command}; code=$?; echo; echo '{_MARK}'; exit $code")
    deadline = time.monotonic() + COMMAND_SECONDS
    while str(jobs.get_job_status(job).value) not in _ENDED:
        if time.monotonic() > deadline:
            jobs.stop_job(job)
            raise PreflightFailed(f"The cluster at {address} has not answered for {COMMAND_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)
    succeeded, text = str(jobs.get_job_status(job).value) == "SUCCEEDED", jobs.get_job_logs(job)
    return succeeded, text.partition(f"{_MARK}\n")[2].partition(f"\n{_MARK}")[0] or text

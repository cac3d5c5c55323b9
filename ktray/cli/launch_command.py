"""Run a search on a cluster: submit it to a Ray that runs, or write a file for Kubernetes, Slurm or `ray up`.

What is launched may be launched again after any end: the search goes on in the shared folder. `ktray logs`, `status`, `best`,
`show` and `export` of the study then ask there.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ktray.cli.terminal import path_argument, positive_int, print_result, settings_of
from ktray.errors import UserError

if TYPE_CHECKING:
    from ktray.runs.launch import RemoteSearch
    from ktray.runs.launch_files import Machines
    from ktray.runs.settings import Settings

HELP = "a search on a cluster: a Ray job, Kubernetes, Slurm, ray up"
FORMS = ("job", "rayjob", "slurm", "up", "dockerfile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("form", choices=FORMS, help="how it gets there")
    parser.add_argument("space", nargs="?", type=path_argument, metavar="SPACE", help="a search space (.yaml)")
    parser.add_argument(
        "--shared", metavar="FOLDER", help="a folder that all nodes see under this path: the search's home there"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent or written, and do nothing")
    parser.add_argument("--apply", action="store_true", help="rayjob, slurm, up: hand the file over (kubectl, sbatch, ray up)")
    parser.add_argument("--out", type=path_argument, metavar="FILE", help="where the file is written")
    parser.add_argument("--no-preflight", action="store_true", help="do not send a few images through every stage first")
    search = parser.add_argument_group("the search, as for ktray search")
    search.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE", help="change the space")
    search.add_argument("--name", default=None, help="the study's name (default: the space's)")
    search.add_argument("--trials", default=None, metavar="50|+50")
    search.add_argument("--concurrent", type=positive_int, default=None, metavar="C")
    search.add_argument("--retry", action="store_true")
    job = parser.add_argument_group("job")
    job.add_argument("--address", default=None, metavar="URL", help="Ray's dashboard (default: http://127.0.0.1:8265)")
    machines = parser.add_argument_group("rayjob, slurm, up: machines")
    machines.add_argument("--nodes", type=positive_int, default=1, help="machines that compute (default: 1)")
    machines.add_argument("--cpus", type=positive_int, default=8, help="of each (default: 8)")
    machines.add_argument("--gpus", type=positive_int, default=None, help="of each (default: none)")
    machines.add_argument("--memory", type=positive_int, default=32, metavar="GIB", help="of each (default: 32)")
    kubernetes = parser.add_argument_group("rayjob")
    kubernetes.add_argument("--image", help="an image with ktray, see ktray launch dockerfile")
    kubernetes.add_argument("--claim", help="the PersistentVolumeClaim of the shared folder")
    kubernetes.add_argument("--namespace")
    kubernetes.add_argument("--queue", help="the LocalQueue of Kueue that admits it")
    batch = parser.add_argument_group("slurm")
    batch.add_argument("--time", default="12:00:00", help="limit of one job (default: 12:00:00)")
    batch.add_argument("--partition")
    batch.add_argument("--account")
    up = parser.add_argument_group("up")
    up.add_argument("--hosts", help="addresses of the machines, the head first: 10.0.0.1,10.0.0.2")
    up.add_argument("--ssh-user", default=os.environ.get("USER", "root"))
    up.add_argument("--ssh-key", type=path_argument, metavar="FILE")


_NEEDED = {"rayjob": ("image", "claim"), "up": ("hosts",)}
_ONLY_OF = {"image": "rayjob", "claim": "rayjob", "namespace": "rayjob", "queue": "rayjob", "partition": "slurm"}
_ONLY_OF |= {"account": "slurm", "hosts": "up", "ssh_key": "up", "address": "job"}


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: the space, the runtime file or an argument is wrong, or the cluster cannot be used.
    """
    from ktray.runs import launch_files

    settings = settings_of(args)
    if args.form == "dockerfile":
        return _write(args, Path("Dockerfile"), launch_files.dockerfile(bool(args.gpus)), "Build it in a clone of ktray.")
    _check_arguments(args)
    search = _search(args, settings)
    if args.form == "job":
        return _submit(args, settings, search)
    machines = launch_files.Machines(args.nodes, args.cpus, args.gpus or 0, args.memory)
    return _hand_over(args, settings, search, machines)


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse what is missing, and what the form has no use for."""
    needed = ("space", "shared", *_NEEDED.get(args.form, ()))
    missing = [name for name in needed if getattr(args, name) is None]
    if missing:
        words = "SPACE" if missing[0] == "space" else f"--{missing[0]}"
        raise UserError(f"ktray launch {args.form} needs {words}", instead="See ktray launch --help.")
    for name, form in _ONLY_OF.items():
        if getattr(args, name) is not None and form != args.form:
            raise UserError(f"--{name.replace('_', '-')} belongs to ktray launch {form}", instead="Leave it out.")
    if args.form == "job" and (args.apply or args.out):
        raise UserError("a job is submitted, not written", "--apply, --out", "Leave them out; --dry-run shows what is sent.")


def _search(args: argparse.Namespace, settings: Settings) -> RemoteSearch:
    from ktray.runs.launch import read_search

    arguments = [*(["--trials", args.trials] if args.trials else []), *(["--retry"] if args.retry else [])]
    arguments += ["--concurrent", str(args.concurrent)] if args.concurrent else []
    everywhere = [*(["--store", args.store] if args.store else []), *(["--tracking", args.tracking] if args.tracking else [])]
    everywhere += [word for package in args.allow_plugins for word in ("--allow-plugins", package)]
    packages: tuple[str, ...] = ()
    if args.allow_plugins:
        from ktray.scheduler.ray_session import plugin_paths

        packages = tuple(plugin_paths())
        if args.form != "job":
            raise UserError(
                "plugins are sent along only by ktray launch job",
                "--allow-plugins",
                f"Install {args.allow_plugins[0]} where the search runs, set KTRAY_ALLOW_PLUGINS there, and leave this out.",
            )
    return read_search(
        args.space,
        args.shared,
        name=args.name,
        overrides=args.overrides,
        runtime=settings.runtime,
        arguments=tuple(arguments),
        everywhere=tuple(everywhere),
        preflight=not args.no_preflight,
        packages=packages,
    )


def _submit(args: argparse.Namespace, settings: Settings, search: RemoteSearch) -> int:
    from ktray.runs import ray_jobs
    from ktray.runs.launch import LaunchNote, write_note

    address = (args.address or os.environ.get("RAY_API_SERVER_ADDRESS") or ray_jobs.DEFAULT_ADDRESS).rstrip("/")
    if args.dry_run:
        print_result(args, {"address": address, "files": search.files}, _shown_files(search))
        return 0
    job = ray_jobs.submit(address, search)
    place = {"address": address, "job": job}
    write_note(settings.home, LaunchNote(search.study, "job", search.shared, place, search.everywhere))
    if not ray_jobs.has_token():
        settings.print_info(
            f"ktray: the cluster at {address} took the job without a token: everybody who reaches it can run code there. "
            "Start Ray with RAY_AUTH_MODE=token."
        )
    text = (
        f"submitted as {job}\n"
        f"ktray logs {search.study}      what it prints\n"
        f"ktray status {search.study}    how far it is\n"
        f"the same ktray launch          goes on with it after its end"
    )
    print_result(args, {"study": search.study, "job": job, "address": address, "shared": search.shared}, text)
    return 0


def _shown_files(search: RemoteSearch) -> str:
    return "\n".join(f"--- {name}\n{text.rstrip()}" for name, text in search.files.items())


def _hand_over(args: argparse.Namespace, settings: Settings, search: RemoteSearch, machines: Machines) -> int:
    """Write the file of the form, and apply it where asked."""
    from ktray.runs import launch_files
    from ktray.runs.launch import LaunchNote, write_note
    from ktray.runs.launch_following import apply

    place, command = dict[str, str](), ""
    if args.form == "rayjob":
        options = {"image": args.image, "claim": args.claim, "namespace": args.namespace, "queue": args.queue}
        text = launch_files.rayjob(search, machines, **options)
        file, place = Path(f"{search.study}.rayjob.yaml"), {"name": launch_files.object_name(search.study)}
        place |= {"namespace": args.namespace} if args.namespace else {}
        command = f"kubectl apply -f {args.out or file}"
    elif args.form == "slurm":
        text = launch_files.slurm(search, machines, time=args.time, partition=args.partition, account=args.account)
        file = Path(f"{search.study}.sbatch")
        command = f"sbatch {args.out or file}"
    else:
        return _up(args, settings, search, machines)
    file = args.out or file
    if args.dry_run or not args.apply:
        return _write(args, file, text, f"Start it with: {command}, or add --apply.")
    _write_text(file, text)
    place = apply(search, args.form, file, place)
    write_note(settings.home, LaunchNote(search.study, args.form, search.shared, place, search.everywhere))
    print_result(args, {"file": str(file), **place}, f"wrote {file} and started it; ktray logs {search.study} follows it")
    return 0


def _up(args: argparse.Namespace, settings: Settings, search: RemoteSearch, machines: Machines) -> int:
    """The file of `ray up`, with the folder of what it copies to the machines."""
    import secrets

    from ktray.runs import launch_files
    from ktray.runs.launch import LaunchNote, write_note
    from ktray.runs.launch_following import apply
    from ktray.runs.ray_jobs import write_files

    file = args.out or Path(f"{search.study}.up.yaml")
    folder, command = settings.home / "launched" / f"{search.study}.files", launch_files.up_command(search)
    hosts = tuple(host.strip() for host in args.hosts.split(",") if host.strip())
    key = str(args.ssh_key) if args.ssh_key else None
    text = launch_files.ray_up(search, machines, hosts=hosts, user=args.ssh_user, key=key, folder=str(folder))
    if not args.dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        write_files(search, folder)
        if not (folder / "token").exists():
            with open(os.open(folder / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as token:
                token.write(secrets.token_hex(32))
    if args.dry_run or not args.apply:
        start = f"Start it with: ray up -y {file}; ray exec --tmux {file} '{command}'. Or add --apply."
        return _write(args, file, text, start)
    _write_text(file, text)
    place = apply(search, "up", file, {"file": str(file.absolute())}, command)
    write_note(settings.home, LaunchNote(search.study, "up", search.shared, place, search.everywhere))
    print_result(args, {"file": str(file), **place}, f"wrote {file} and started it; ktray logs {search.study} follows it")
    return 0


def _write(args: argparse.Namespace, file: Path, text: str, then: str) -> int:
    if args.dry_run:
        print_result(args, {"file": str(args.out or file), "text": text}, text.rstrip())
        return 0
    _write_text(args.out or file, text)
    print_result(args, {"file": str(args.out or file), "text": text}, f"wrote {args.out or file}. {then}")
    return 0


def _write_text(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(
            f"{file} cannot be written: {error.strerror}", "--out", "Give a file in a folder that exists."
        ) from error

"""Files that bring a search to a cluster: a KubeRay RayJob, a Slurm batch script, a cluster file for `ray up`, a Dockerfile.

Each has token authentication, and each may be used again: the search goes on where it ended.
"""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from ktray.runs.launch import SCRIPT_FILE, RemoteSearch
from ktray.runs.preflight import PACKAGES
from ktray.scheduler.ray_session import OBJECT_STORE_BYTES

_LONGEST_NAME = 40  # KubeRay refuses names of RayJobs above 47 characters
_USER = 1000  # of the image that `dockerfile` makes
_MOUNT = "/ktray"  # where a pod sees the files of the search
_REPEATS = 5  # new clusters after an eviction or a failure, before KubeRay gives up
_PENDING_SECONDS = 1800  # until a RayJob without a queue that finds no room has failed
_PORTS = 200  # per Slurm job, of those from 20,000 on


@dataclass(frozen=True)
class Machines:
    """What a search asks of a cluster that is started for it.

    Attributes:
        nodes: machines that compute: workers on Kubernetes, all nodes of a Slurm job.
        cpus, gpus: of each.
        memory_gib: of each.
    """

    nodes: int = 1
    cpus: int = 8
    gpus: int = 0
    memory_gib: int = 32


def object_name(study: str) -> str:
    """The study's name in the letters that Kubernetes and Ray allow."""
    return re.sub(r"[^a-z0-9]+", "-", f"ktray-{study.lower()}")[:_LONGEST_NAME].strip("-")


# ---- Kubernetes


def rayjob(
    search: RemoteSearch, machines: Machines, *, image: str, claim: str, namespace: str | None = None, queue: str | None = None
) -> str:
    """A ConfigMap with the search's files, and the KubeRay RayJob that runs it, as YAML.

    Args:
        image: with this ktray in it, such as `dockerfile` makes.
        claim: a PersistentVolumeClaim that many nodes may write at once; it becomes the shared folder.
        queue: the LocalQueue of Kueue that admits the job; None starts it at once.
    """
    name = object_name(search.study)
    metadata: dict[str, Any] = {"name": name, **({"namespace": namespace} if namespace else {})}
    labels = {"labels": {"kueue.x-k8s.io/queue-name": queue}} if queue else {}
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {**metadata, **labels},
        "spec": {
            "entrypoint": f"bash {_MOUNT}/{SCRIPT_FILE}",
            "backoffLimit": _REPEATS,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            **({"suspend": True} if queue else {"preRunningDeadlineSeconds": _PENDING_SECONDS}),
            "rayClusterSpec": _ray_cluster(search, machines, image, claim, name),
        },
    }
    files = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": search.files}
    return _yaml(files) + "---\n" + _yaml(job)


def _ray_cluster(search: RemoteSearch, machines: Machines, image: str, claim: str, name: str) -> dict[str, Any]:
    head = Machines(1, max(2, min(4, machines.cpus)), 0, min(16, machines.memory_gib))
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},  # KubeRay makes the token and gives it to every pod
        "headGroupSpec": {
            # The head computes no stage, and artifacts are files: Ray's own store of objects may be small.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0", "object-store-memory": str(OBJECT_STORE_BYTES)},
            "template": _pod("ray-head", head, search, image, claim, name),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": machines.nodes,
                "minReplicas": machines.nodes,
                "maxReplicas": machines.nodes,
                "rayStartParams": {"object-store-memory": str(OBJECT_STORE_BYTES)},
                "template": _pod("ray-worker", machines, search, image, claim, name),
            }
        ],
    }


def _pod(container: str, machine: Machines, search: RemoteSearch, image: str, claim: str, files: str) -> dict[str, Any]:
    gpus = {"nvidia.com/gpu": str(machine.gpus)} if machine.gpus else {}
    resources = {"cpu": str(machine.cpus), "memory": f"{machine.memory_gib}Gi", **gpus}
    mounts = [{"name": "shared", "mountPath": search.shared}, {"name": "search", "mountPath": _MOUNT, "readOnly": True}]
    ports = [{"containerPort": 6379, "name": "gcs"}, {"containerPort": 8265, "name": "dashboard"}]
    return {
        "spec": {
            "securityContext": {"fsGroup": _USER},
            "containers": [
                {
                    "name": container,
                    "image": image,
                    **({"ports": ports} if container == "ray-head" else {}),
                    "resources": {"limits": resources, "requests": dict(resources)},
                    "volumeMounts": mounts,
                }
            ],
            "volumes": [
                {"name": "shared", "persistentVolumeClaim": {"claimName": claim}},
                {"name": "search", "configMap": {"name": files}},
            ],
        }
    }


# ---- Slurm


def slurm(
    search: RemoteSearch, machines: Machines, *, time: str, partition: str | None = None, account: str | None = None
) -> str:
    """A batch script: the same command on every node of the job starts Ray there, and the search on the first one.

    Args:
        time: limit of the job, as Slurm writes it: ``12:00:00``. A search that it ends goes on with the next job.
    """
    options = {
        "job-name": object_name(search.study),
        "nodes": machines.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": machines.cpus,
        **({"gpus-per-node": machines.gpus} if machines.gpus else {}),
        "mem": f"{machines.memory_gib}G",
        "time": time,
        **({"partition": partition} if partition else {}),
        **({"account": account} if account else {}),
        "output": f"{search.study}-%j.log",
        "signal": "TERM@120",  # two minutes before the limit; the search then ends in order
    }
    head = [f"#SBATCH --{name}={value}" for name, value in options.items()] + ["#SBATCH --exclusive", "#SBATCH --requeue"]
    return "\n".join(["#!/usr/bin/env bash", *head, "", _SLURM.format(**_slurm_values(search, machines))])


def _slurm_values(search: RemoteSearch, machines: Machines) -> dict[str, Any]:
    texts = [_here_document(name, text) for name, text in search.files.items()]
    return {
        "shared": shlex.quote(search.shared),
        "study": shlex.quote(search.study),
        "texts": "\n".join(texts),
        "ports": _PORTS,
        "gpus": f" --num-gpus={machines.gpus}" if machines.gpus else "",
        "store": OBJECT_STORE_BYTES,
    }


def _here_document(name: str, text: str) -> str:
    end = "END_OF_FILE"
    while end in text.splitlines():
        end += "_"
    return f"cat > \"$files/{name}\" <<'{end}'\n{_line(text)}{end}"


_SLURM = """\
# Submit it again, or let Slurm requeue it: the search goes on where it ended. Activate ktray's environment before, or here.
set -euo pipefail
shared={shared}
files="$shared/launched/"{study}
mkdir -p "$files"
{texts}

# Ray with a token: without it, every user of these nodes could run code as you.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$shared/ray_token"
if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
  (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n' > "$RAY_AUTH_TOKEN_PATH")
fi

# The first node is Ray's head. Its address is one of its interfaces: a name may lead to 127.0.1.1 on the node itself.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk 'NR == 1')
address=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname -I | awk '{{print $1}}')
port=$((20000 + SLURM_JOB_ID % 100 * {ports}))  # and the ports after it, so that two jobs on one network do not meet
export RAY_ADDRESS="$address:$port" RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 RAY_USAGE_STATS_ENABLED=0

everywhere() {{ srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=0 "$@"; }}
trap 'everywhere rm -rf "/tmp/ktray-$SLURM_JOB_ID" || true' EXIT
everywhere \\
  ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" \\
  --num-cpus="$SLURM_CPUS_PER_TASK"{gpus} --include-dashboard=false --temp-dir="/tmp/ktray-$SLURM_JOB_ID" \\
  --object-store-memory={store} \\
  --node-manager-port=$((port + 1)) --object-manager-port=$((port + 2)) --metrics-export-port=$((port + 3)) \\
  --dashboard-agent-grpc-port=$((port + 4)) --dashboard-agent-listen-port=$((port + 5)) \\
  --runtime-env-agent-port=$((port + 6)) --min-worker-port=$((port + 10)) --max-worker-port=$((port + {ports} - 1)) \\
  -- bash "$files/start.sh"
"""


# ---- ray up


def ray_up(search: RemoteSearch, machines: Machines, *, hosts: tuple[str, ...], user: str, key: str | None, folder: str) -> str:
    """A cluster file for `ray up` on machines that are reached by SSH, the first of them the head.

    Args:
        key: file of the private SSH key; None lets SSH choose.
        folder: of the search's files here, with the token; it is copied to every machine.
    """
    there = f"~/ktray-launched/{search.study}"
    token = f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={there}/token"
    gpus = f" --num-gpus={machines.gpus}" if machines.gpus else ""
    start = (
        f"{token} ray start --disable-usage-stats --num-cpus={machines.cpus}{gpus} --object-store-memory={OBJECT_STORE_BYTES}"
    )
    return _yaml(
        {
            "cluster_name": object_name(search.study),
            "max_workers": len(hosts) - 1,
            "provider": {"type": "local", "head_ip": hosts[0], "worker_ips": list(hosts[1:])},
            "auth": {"ssh_user": user, **({"ssh_private_key": key} if key else {})},
            "file_mounts": {there: folder},
            "initialization_commands": [],
            "setup_commands": [f"chmod 600 {there}/token", "ktray --version"],
            "head_start_ray_commands": [
                "ray stop",
                f"{start} --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
            ],
            "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379"],
        }
    )


def up_command(search: RemoteSearch) -> str:
    """The shell command with which the head of `ray_up`'s cluster begins the search, or goes on with it."""
    there = f"~/ktray-launched/{search.study}"
    return f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={there}/token bash {there}/{SCRIPT_FILE}"


# ---- Docker


def dockerfile(gpus: bool) -> str:
    """A Dockerfile whose build context is a clone of ktray, with the versions that this process has.

    Args:
        gpus: whether PyTorch is the build for CUDA.
    """
    pins = " ".join(f"{name}=={found}" for name, found in _versions().items() if name not in ("torch", "torchvision"))
    python = ".".join(platform.python_version_tuple()[:2])
    versions = {name: version(name).partition("+")[0] for name in ("torch", "torchvision")}
    torch = " ".join(f"{name}=={found}" for name, found in versions.items())
    index = "" if gpus else " --index-url https://download.pytorch.org/whl/cpu"
    return _DOCKERFILE.format(python=python, torch=torch, index=index, pins=pins, user=_USER)


def _versions() -> dict[str, str]:
    """Versions that must be equal on all nodes, and Ray's."""
    found = {}
    for name in (*PACKAGES, "ray", "optuna"):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return found


_DOCKERFILE = """\
# An image for every node of a cluster on which ktray searches; the versions are those of the machine that wrote this file.
# Build it in a clone of ktray:  docker build -f Dockerfile -t ktray .
FROM python:{python}-slim
RUN apt-get update && apt-get install -y --no-install-recommends wget procps && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir {torch}{index}
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY search_spaces search_spaces
COPY ktray ktray
RUN pip install --no-cache-dir . {pins}
RUN useradd --create-home --uid {user} ray
USER {user}
WORKDIR /home/ray
RUN ktray --version && ktray init --example && ray --version
"""


# ---- texts


def _yaml(content: Mapping[str, Any]) -> str:
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True)
    return text


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, so that people can read them, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _line(text: str) -> str:
    return text if text.endswith("\n") else f"{text}\n"

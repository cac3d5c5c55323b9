"""Hosts that are network namespaces of this machine, joined by a bridge: each has its own addresses, processes and /tmp/ray.

Needs root. Everything is gone when the `with` block ends.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

NETWORK = "10.77.0"


def available() -> bool:
    """Whether this process may make network and process namespaces."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-mpfn", "--mount-proc", "true"], capture_output=True, check=False).returncode == 0


@dataclass
class Network:
    """A bridge in a namespace of its own, and the hosts at it."""

    folder: Path
    environment: dict[str, str]
    prefix: str = field(default_factory=lambda: f"kt{secrets.token_hex(2)}")
    hosts: dict[str, str] = field(default_factory=dict)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def add(self, name: str) -> str:
        """Join a new host to the network; its address."""
        space, address = f"{self.prefix}-{name}", f"{NETWORK}.{len(self.hosts) + 1}"
        _ip("netns", "add", space)
        self.hosts[name] = address
        outer, switch = f"{self.prefix}v{len(self.hosts)}", f"{self.prefix}-switch"
        _ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", outer, "netns", switch)
        _ip("-n", switch, "link", "set", outer, "master", "br0", "up")
        _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", space, "link", "set", device, "up")
        return address

    def cut(self, name: str) -> None:
        """Take a host off the network; its processes run on."""
        _ip("-n", f"{self.prefix}-{name}", "link", "set", "eth0", "down")

    def start(self, name: str, words: Sequence[str]) -> tuple[subprocess.Popen[bytes], Path]:
        """Start a command on a host; the process, and the file with what it prints."""
        log = self.folder / f"{name}-{len(self.running)}.log"
        inside = 'mkdir -p /tmp/ray && mount -t tmpfs ray /tmp/ray && exec "$@"'
        wrapped = ["ip", "netns", "exec", f"{self.prefix}-{name}", "unshare", "-mpf", "--mount-proc", "--kill-child"]
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [*wrapped, "bash", "-c", inside, "host", *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,
            )
        self.running.append(process)
        return process, log

    def run(self, name: str, words: Sequence[str], timeout: float = 600.0) -> str:
        """Run a command on a host to its end; what it printed. It must succeed."""
        process, log = self.start(name, words)
        code = process.wait(timeout)
        assert code == 0, f"{' '.join(words)} ended with {code}: {log.read_text()}"
        return log.read_text()


@contextmanager
def network(folder: Path, environment: dict[str, str]) -> Iterator[Network]:
    """An empty network."""
    found = Network(folder, environment)
    switch = f"{found.prefix}-switch"
    _ip("netns", "add", switch)
    try:
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        yield found
    finally:
        for process in found.running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in (*found.hosts, "switch"):
            subprocess.run(["ip", "netns", "delete", f"{found.prefix}-{name}"], check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)

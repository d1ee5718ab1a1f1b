"""Pods without Kubernetes: processes with a network, a file system and a process table of their own.

They are as restricted as the chart asks for. Needs root, and a Linux that lets it make namespaces.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chart import ROOT

BRIDGE, SUBNET = "tailserve0", "10.93.0"

SET_UP = """
set -eu
mount --make-rprivate /
for point in $(awk '$5 !~ "^/(proc|sys|dev)" {{print $5}}' /proc/self/mountinfo); do
  mount -o remount,bind,ro "$point" 2> {own}/ro.log || true
done
mount --bind {work} {work} && mount -o remount,bind,rw {work}
# What is read, and lies where the pod has a volume of its own.
for path in {needed}; do mkdir -p {tmp}${{path#/tmp}} && mount --rbind $path {tmp}${{path#/tmp}}; done
mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm
mount --rbind {tmp} /tmp
until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip link set lo up && ip address add {ip}/24 dev eth0 && ip link set eth0 up && ip route add default via {gateway}
cd {home}
exec unshare -U --map-user=1000 --map-group=1000 setpriv --no-new-privs {command}
"""


def can_make_namespaces() -> bool:
    """Whether there is all that pods need: tools, root, and a kernel that lets it."""
    if os.geteuid() != 0 or not all(shutil.which(tool) for tool in ("ip", "unshare", "setpriv")):
        return False
    tries = (
        ["unshare", "-n", "-m", "-p", "-f", "--mount-proc", "unshare", "-U", "--map-user=1000", "--map-group=1000", "true"],
        ["unshare", "-n", "ip", "link", "add", BRIDGE, "type", "bridge"],
        ["unshare", "-n", "ip", "link", "add", "pod0", "type", "veth", "peer", "name", "pod1"],
    )
    return all(subprocess.run(command, capture_output=True).returncode == 0 for command in tries)


@contextlib.contextmanager
def bridge() -> Iterator[None]:
    """The pods' network; the machine itself is a host of it."""
    _ip("link", "add", BRIDGE, "type", "bridge")
    try:
        _ip("address", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        yield
    finally:
        _ip("link", "delete", BRIDGE)


class Pod:
    """A pod of a group of the rendered chart."""

    def __init__(self, name: str, number: int, spec: dict[str, Any], arguments: list[str], work: Path, **env: str) -> None:
        """`spec`: of the pod; `arguments`: of ray start."""
        self.name, self.ip = name, f"{SUBNET}.{number}"
        self._link = f"pod{number}"
        tmp, home = work / name / "tmp", work / name / "home"
        for path in (tmp, home):
            path.mkdir(parents=True, exist_ok=True)
        self.log = work / name / "log"
        needed = {Path(sys.prefix), ROOT, Path(os.environ.get("TAILSERVE_CACHE", "/var/empty")), work}
        command = ["ray", "start", "--block", f"--node-ip-address={self.ip}", "--object-store-memory=200000000", *arguments]
        script = SET_UP.format(
            needed=" ".join(str(path) for path in needed if Path("/tmp") in path.parents and path.exists()),
            tmp=tmp,
            work=work,
            own=work / name,
            ip=self.ip,
            gateway=f"{SUBNET}.1",
            home=home,
            command=shlex.join(command),
        )
        own = {entry["name"]: entry["value"] for entry in spec["containers"][0]["env"] if "value" in entry}
        own |= {"HOME": str(home), "HF_HOME": str(home), "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"} | env
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "TAILSERVE_CACHE") if name in os.environ}
        own["TAILSERVE_CACHE"] = os.environ.get("TAILSERVE_CACHE") or str(Path.home() / ".cache" / "tailserve")
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                ["unshare", "-n", "-m", "-p", "-f", "--mount-proc", "--kill-child", "bash", "-c", script],
                env=kept | own,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        self._join()

    def _join(self) -> None:
        outside = f"{self._link}o"
        _ip("link", "add", outside, "type", "veth", "peer", "name", self._link)
        _ip("link", "set", outside, "master", BRIDGE, "up")
        # The namespace is there a moment after the process.
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self._process.pid}/ns/net") == own:
            time.sleep(0.01)
        _ip("link", "set", self._link, "netns", str(self._process.pid), "name", "eth0")

    def cut_off(self) -> None:
        """Nothing reaches it any more, and it reaches nobody."""
        _ip("link", "set", f"{self._link}o", "down")

    def terminate(self) -> None:
        """What the kubelet does first."""
        os.kill(self._first(), signal.SIGTERM)

    def kill(self) -> None:
        """It is gone, with all that ran in it."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        # Its end of the cable went with it; the other one goes a moment later.
        subprocess.run(["ip", "link", "delete", f"{self._link}o"], capture_output=True)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def _first(self) -> int:
        """The process with number 1 in it."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0])


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)

"""Servers to be measured against each other on one machine: started once, stopped (SIGSTOP) while another is measured."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))

from harness import free_port

from tailserve.cluster.settings import PROXY_PORTS, settings
from tailserve.deployments.demo import demo_model

PEERS = settings().cache_directory / "peers"
"""Where `install_peers` puts the virtual environments."""
_MARK = "TAILSERVE_CONTESTANT"
_START_TIMEOUT_S = 600.0


@dataclass
class Contestant:
    name: str
    url: str
    ready_path: str
    process: subprocess.Popen[bytes]
    mark: str

    def pids(self) -> list[int]:
        """All its processes: those of its session, and daemons that left it, found by a mark in their environment."""
        found, mark = [], f"{_MARK}={self.mark}".encode()
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit():
                    continue
                session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
                if session == self.process.pid or mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def send(self, number: signal.Signals) -> None:
        for pid in self.pids():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    @contextmanager
    def awake(self) -> Iterator[str]:
        """Its URL, while it runs."""
        self.send(signal.SIGCONT)
        _wait_until_ready(self)
        try:
            yield self.url
        finally:
            self.send(signal.SIGSTOP)

    def counter(self, name: str) -> float:
        """What one of its metrics counts, all labels together; 0 if there is none of that name yet."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as page:
            values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page.read().decode(), re.MULTILINE)
        return sum(map(float, values))

    def cpu_seconds(self) -> dict[str, float]:
        """Seconds of CPU each kind of process has used."""
        seconds: dict[str, float] = {}
        for pid in self.pids():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()[:40]
            except OSError:
                continue
            used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            seconds[name] = seconds.get(name, 0.0) + used
        return seconds


@contextmanager
def _started(
    name: str, command: Sequence[str], url: str, ready_path: str, environment: Mapping[str, str], log: Path
) -> Iterator[Contestant]:
    mark = uuid.uuid4().hex
    inherited = {key: value for key, value in os.environ.items() if key not in PROXY_PORTS}
    full = inherited | dict(environment) | {_MARK: mark}
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=full, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    contestant = Contestant(name, url, ready_path, process, mark)
    try:
        begin = time.monotonic()
        _wait_until_ready(contestant)
        print(f"{name} was ready after {time.monotonic() - begin:.0f} s", flush=True)
        contestant.send(signal.SIGSTOP)
        yield contestant
    finally:
        contestant.send(signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            print(f"{name} did not stop by itself", flush=True)
        contestant.send(signal.SIGKILL)


def _wait_until_ready(contestant: Contestant) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if contestant.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{contestant.url}{contestant.ready_path}", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    raise SystemExit(f"{contestant.name} did not start; its log is beside the others in the output folder")


@contextmanager
def tailserve(logs: Path, *flags: str, environment: Mapping[str, str] | None = None) -> Iterator[Contestant]:
    """The demo model on this checkout, as `tailserve serve` starts it. SystemExit if its verifier died meanwhile."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("tailserve")), "serve", "--port", str(port), *flags]
    url = f"http://127.0.0.1:{port}"
    log = logs / "tailserve.log"
    with _started("tailserve", command, url, "/ready", environment or {}, log) as contestant:
        yield contestant
    if "the verifier is lost" in log.read_text(errors="replace"):
        raise SystemExit(f"the verifier had to be restarted while it was measured, so no figure counts: see {log}")


@contextmanager
def vllm(logs: Path, *flags: str) -> Iterator[Contestant]:
    """The demo model on vLLM's CPU build, all cores its own. SystemExit if it is not installed."""
    program = PEERS / "vllm" / "bin" / "vllm"
    if not program.exists():
        raise SystemExit(f"vLLM is not in {PEERS}: run tests/benchmarks/install_peers first")
    model = demo_model(settings().cache_directory)
    port = free_port()
    # Fastest of what was tried: one thread on each core and none held back, which its default does for its front end.
    environment = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [
        str(program),
        "serve",
        str(model),
        "--port",
        str(port),
        "--dtype",
        "bfloat16",
        "--max-model-len",
        "4096",
        *flags,
    ]
    url = f"http://127.0.0.1:{port}"
    with _started("vllm", command, url, "/health", environment, logs / "vllm.log") as contestant:
        yield contestant

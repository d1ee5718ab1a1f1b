"""The `tailserve` command."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

from tailserve.cluster import placement
from tailserve.cluster.config import TailserveConfig, parse_config
from tailserve.cluster.files import read_config_file, with_tenants_of_file
from tailserve.cluster.settings import prepare_serve, settings
from tailserve.cluster.tenants import hash_key, new_key
from tailserve.deployments import chat, distill
from tailserve.deployments.bench import command as bench
from tailserve.engine.errors import ConfigError, TailserveError

logger = logging.getLogger("tailserve")

READY_TIMEOUT_S = 1800.0
_APP = "tailserve"
_FLAGS: list[tuple[str, dict[str, Any]]] = [
    ("--dtype", {"help": "auto, bfloat16, float16 or float32 (default: the checkpoint's own)"}),
    ("--quantization", {"help": "none, or int8: faster on CPUs, and not quite the same answers"}),
    ("--device", {"help": "auto, cpu or cuda"}),
    ("--draft-model", {"help": "ngram, none, demo, or a directory or hub name: of a small model, or of what distill made"}),
    (
        "--speculation",
        {"help": "auto, off, or the number of draft tokens per step", "type": lambda v: int(v) if v.isdigit() else v},
    ),
    ("--max-model-len", {"help": "tokens of prompt and answer (default: the model's own)", "type": int}),
    ("--max-num-seqs", {"help": "sequences that run at once", "type": int}),
    ("--max-num-batched-tokens", {"help": "tokens computed in one step", "type": int}),
    ("--max-mixed-tokens", {"help": "the same while others generate (default: 48 on CPUs)", "type": int}),
    ("--num-kv-blocks", {"help": "KV blocks of the verifier (default: from the memory that is free)", "type": int}),
    ("--kv-offloading-size", {"help": "GiB of host memory for sessions' KV (default: none)", "type": float}),
    ("--tensor-parallel-size", {"help": "processes, each on a GPU, that share the verifier's layers", "type": int}),
    ("--gpu-memory-utilization", {"help": "share of a GPU's memory to use, 0 to 1", "type": float}),
    ("--otlp-traces-endpoint", {"help": "URL of a collector that traces go to, http://host:4318/v1/traces say"}),
    ("--served-model-name", {"help": "the name clients use"}),
    ("--cpu-threads", {"help": "threads of the verifier (default: all cores)", "type": int}),
]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        status: int = args.run(args)
        return status
    except TailserveError as error:
        sys.stderr.write(f"tailserve: {error.message}\n")
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tailserve", description="Latency-first LLM serving on Ray Serve.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a model over the OpenAI API")
    serve.set_defaults(run=_serve)
    _add_configuration(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on")
    serve.add_argument("--port", type=_port, default=8000, help="port to listen on")
    check = commands.add_parser("check", help="say what a configuration would run where, and what memory it takes")
    check.set_defaults(run=_check)
    _add_configuration(check)
    chat.add_arguments(commands.add_parser("chat", help="talk to a server in the terminal"))
    bench.add_arguments(commands.add_parser("bench", help="measure any OpenAI-compatible server under load"))
    distill.add_arguments(commands.add_parser("distill", help="make a draft for a model out of the model itself"))
    key = commands.add_parser("key", help="make an API key, and the hash of it that a configuration's tenants hold")
    key.set_defaults(run=_key)
    return parser


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="directory or hub name of a transformers model (default: a small demo model)"
    )
    parser.add_argument("--config", help="YAML file with the fields of the configuration; flags win over it")
    for flag, options in _FLAGS:
        parser.add_argument(flag, default=argparse.SUPPRESS, **options)


def _check(args: argparse.Namespace) -> int:
    config = with_tenants_of_file(resolve_config(args))
    # Ray takes its time to import: after the arguments are known to be right.
    from tailserve.deployments.check import describe

    for line in describe(config):
        sys.stdout.write(line + "\n")
    return 0


def _key(_: argparse.Namespace) -> int:
    key = new_key()
    sys.stdout.write(f"key:  {key}\nhash: {hash_key(key)}\n")
    return 0


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port < 1 << 16:
        raise argparse.ArgumentTypeError(f"{port} is no port: give 1 to 65535")
    return port


def resolve_config(args: argparse.Namespace) -> TailserveConfig:
    """Flags win over the file, the file over the defaults."""
    data = read_config_file(args.config) if args.config else {}
    if args.model is not None:
        data["model"] = args.model
    for flag, _ in _FLAGS:
        name = flag.removeprefix("--").replace("-", "_")
        if hasattr(args, name):
            data[name] = getattr(args, name)
    return parse_config(data)


def _serve(args: argparse.Namespace) -> int:
    config = resolve_config(args)
    # Ray and Serve take their time to import: after the arguments are known to be right.
    from tailserve.deployments.draft_kinds import find_draft
    from tailserve.deployments.models import resolve_model

    resolve_model(config.model)
    find_draft(config)

    prepare_serve()
    import ray
    from ray import serve

    from tailserve.deployments.app import build_app

    # Until the deployment is up both signals interrupt whatever is being waited for.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    address = settings().ray_address
    if address is None:
        # Logical CPUs decide placement only; a small machine must not refuse a deployment for want of them.
        cpus = max(os.cpu_count() or 1, int(placement.total_cpus(config)) + 1)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=True)
    else:
        ray.init(address=address)
    try:
        serve.start(http_options={"host": args.host, "port": args.port})
        _deploy(build_app(config))
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        url = f"http://{args.host}:{args.port}"
        if not _wait_until_ready(url, stopped):
            return 1 if not stopped.is_set() else 0
        logger.info("ready: %s/v1 (POST /v1/chat/completions, model %s)", url, _served_name(config))
        # A signal that another thread happened to take is handled here, once the main thread runs.
        while not stopped.wait(1.0):
            pass
        logger.info("shutting down")
        return 0
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def _deploy(app: Any) -> None:
    """Waits until all replicas run. ConfigError with the reason as soon as a replica says that it never will."""
    from ray import serve

    serve.run_many([serve.RunTarget(app, name=_APP, route_prefix="/")], wait_for_applications_running=False)
    while True:
        status = serve.status().applications[_APP]
        if status.status == "RUNNING":
            return
        # Ray reports a traceback as text, and tries again whatever it says. The last line that names an error of ours which
        # no attempt will mend is the reason.
        messages = "\n".join(deployment.message for deployment in status.deployments.values())
        reasons = re.findall(r"tailserve\.engine\.errors\.(?:Config|UnsupportedModel)Error: (.*)", messages)
        if reasons:
            raise ConfigError(reasons[-1].strip())
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise TailserveError(f"the deployment failed: {status.message}\n{messages}".rstrip())
        time.sleep(0.2)


def _served_name(config: TailserveConfig) -> str:
    from tailserve.deployments.models import model_name

    return config.served_model_name or model_name(config.model)


def _wait_until_ready(url: str, stopped: threading.Event) -> bool:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and not stopped.is_set():
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return True
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            stopped.wait(0.1)
    return False

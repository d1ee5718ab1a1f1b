"""An engine step in its parts, against the floor that memory bandwidth sets, before and after each optimisation.

Run: python tests/benchmarks/engine_step.py [--json FILE] [--only NAME ...] [--model FOLDER]

In process, demo model or another, no server; on a GPU if there is one. Each variant in a process of its own, one after the
other. The floor of a step is one reading of the weights and of the keys and values; the bandwidth is measured in the same
run, with as many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import gpu_step

VARIANTS = {
    "reference": "transformers' modules, attention in float32 torch operations",
    "modules": "transformers' modules with prepacked weights, attention by a Numba kernel that reads blocks in place",
    "portable": "one compiled function for the step, LLVM's own choice of instructions",
    "avx2": "its products in AVX2 assembly",
    "avx512": "the same in AVX-512",
    "amx": "its products in matrix tiles (AMX)",
    "graphs": "transformers' modules as CUDA graphs, attention in Triton",
    "fused": "the same with single kernels between products, and products of one input made at once",
    "int8": "weights and activations of products as 8-bit integers (AVX512-VNNI): other answers",
}
GPU_VARIANTS = ("graphs", "fused")
SHAPES = {
    "decode B=1": (1, 300, 1),
    "decode B=8": (8, 300, 1),
    "decode B=32": (32, 300, 1),
    "verify 5 B=8": (8, 300, 5),
    "prompt 128": (1, 0, 128),
    "prompt 512": (1, 0, 512),
}
"""Name to (sequences, context behind them, tokens each)."""
ATTENTION_CONTEXTS = (300, 1000, 2000)
SLOW = {"reference": {"decode B=1", "decode B=8", "decode B=32", "prompt 128"}}
ROUNDS = 9


def child(variant: str, folder: str | None) -> dict[str, Any]:
    """Measures one variant in this process. The instructions are chosen before the kernels are imported."""
    from tailserve.engine.model import amx, avx2, avx512

    if variant != "amx":
        amx.HAS_AMX = False
    if variant in ("portable", "avx2"):
        avx512.HAS_AVX512 = avx512.HAS_BF16_DOT = False
    if variant == "portable":
        avx2.HAS_AVX2 = False
    import numpy as np
    import torch

    from tailserve.engine.model.loading import load_model
    from tailserve.engine.model.spans import Span
    from tailserve.engine.options import LoadOptions

    on_gpu = torch.cuda.is_available()
    if variant == "graphs":
        gpu_step.use_modules()
    path = folder or _demo()
    backend = {"reference": "reference", "modules": "cpu", "graphs": "cuda", "fused": "cuda"}.get(variant, "compiled")
    model, info = load_model(
        LoadOptions(
            path=path,
            dtype="bfloat16",
            max_model_len=4096,
            attention_backend=backend,
            quantization="int8" if variant == "int8" else "none",
            num_blocks=32 * 130,
        )
    )
    chance = np.random.default_rng(0)

    def spans(batch: int, context: int, tokens: int) -> list[Span]:
        each = -(-(context + tokens) // info.block_size)
        # Blocks lie anywhere, as they do after an hour of use.
        blocks = chance.permutation(info.num_blocks)[: batch * each].reshape(batch, each)
        return [Span(chance.integers(0, 10_000, tokens).tolist(), context, row.tolist(), 1) for row in blocks]

    def best(work: list[Span]) -> tuple[float, list[int]]:
        """Seconds of the fastest of some rounds: the others were disturbed. And the ticks of its parts."""
        times = []
        for _ in range(ROUNDS):
            before = model.ticks.copy() if hasattr(model, "ticks") else None
            begin = time.perf_counter()
            model.forward(work)
            if on_gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            times.append((seconds, [] if before is None else (model.ticks - before).tolist()))
        return min(times)

    weights = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    result: dict[str, Any] = {
        "bandwidth": gpu_step.bandwidth(ROUNDS) if on_gpu else _bandwidth(torch),
        "per_token": info.kv_bytes_per_token,
        "weights": weights,
    }
    result["shapes"] = {}
    for name, shape in SHAPES.items():
        if name not in SLOW.get(variant, SHAPES):
            continue
        result["shapes"][name] = best(spans(*shape))
        if on_gpu:
            result.setdefault("kernels", {})[name] = gpu_step.kernels(model, spans(*shape), ROUNDS)
    if hasattr(model, "ticks"):
        result["attention"] = {str(n): best(spans(32, n, 1)) for n in ATTENTION_CONTEXTS}
        work = spans(32, 300, 1)
        logits = model.forward(work)
        for kind, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
            keys = np.arange(64, dtype=np.int32).reshape(32, 2)
            times = []
            for _ in range(ROUNDS):
                begin = time.perf_counter()
                model.pick(logits, [temperature] * 32, keys)
                times.append(time.perf_counter() - begin)
            result.setdefault("sampling", {})[kind] = min(times)
    return result


def _demo() -> str:
    from tailserve.cluster.settings import settings
    from tailserve.deployments.demo import demo_model

    return str(demo_model(settings().cache_directory))


def _bandwidth(torch: Any) -> float:
    """Bytes a second, read by all cores."""
    memory = torch.ones(1 << 27, dtype=torch.int64)
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        memory.sum()
        times.append(time.perf_counter() - begin)
    torch.set_num_threads(before)
    return memory.numel() * 8 / min(times)


def measure(variant: str, folder: str | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", variant, *(["--model", folder] if folder else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def available() -> list[str]:
    import torch

    from tailserve.engine.model import amx, avx2, avx512

    if torch.cuda.is_available():
        return ["reference", *GPU_VARIANTS]
    has = {
        "amx": amx.HAS_AMX,
        "avx2": avx2.HAS_AVX2,
        "avx512": avx512.HAS_BF16_DOT,
        "int8": avx512.HAS_INT8_DOT,
    }
    return [name for name in VARIANTS if name not in GPU_VARIANTS and has.get(name, True)]


def router_parts() -> dict[str, float]:
    """Milliseconds that the rest of a step takes at 32 sequences: not of the model's, but on the same machine."""
    import asyncio

    import router_step

    row = asyncio.run(router_step.measure(32, 300, speculate=False, steps=120))
    return {"schedule, encode, decode, commit, publish": row["p50_ms"], "channel, there and back": _channel_ms()}


def _channel_ms() -> float:
    import tempfile
    import threading

    from tailserve.deployments.channel import Channel, serve_channel
    from tailserve.engine.types import Batch

    with tempfile.TemporaryDirectory() as folder:
        endpoint, stop = f"ipc://{folder}/channel", threading.Event()
        channel: Channel[Batch, Batch] = Channel(endpoint, Batch, bind=True)
        other = threading.Thread(
            target=serve_channel, args=(endpoint, Batch, lambda batch: batch), kwargs={"alive": lambda: not stop.is_set()}
        )
        other.start()
        batch = Batch(0, list(range(32)), [300] * 32, [1] * 32, [True] * 32, {}, {}, [], [])
        times = []
        for _ in range(300):
            begin = time.perf_counter()
            channel.send(batch)
            channel.receive(5.0)
            times.append(time.perf_counter() - begin)
        stop.set()
        other.join()
        channel.close()
    return sorted(times)[len(times) // 2] * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=VARIANTS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", help="folder of another model than the demo's")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.model)))
        return
    from tailserve.engine.model.layer import PARTS

    results = {}
    print(f"{'ms':10}" + "".join(f"{name:>14}" for name in SHAPES))
    for variant in args.only or available():
        result = results[variant] = measure(variant, args.model)
        cells = [f"{result['shapes'][name][0] * 1e3:.2f}" if name in result["shapes"] else "-" for name in SHAPES]
        print(f"{variant:10}" + "".join(f"{cell:>14}" for cell in cells), flush=True)
    last = results[[name for name in results if name != "int8"][-1]]
    size, bandwidth, per_token = last["weights"], last["bandwidth"], last["per_token"]
    floors = [(size + batch * context * per_token) / bandwidth * 1e3 for batch, context, _ in SHAPES.values()]
    print(f"{'floor':10}" + "".join(f"{floor:>14.2f}" for floor in floors))
    print(
        f"memory moves {bandwidth / 1e9:.1f} GB/s; weights {size / 1e6:.0f} MB, bfloat16; {per_token} bytes of KV a token\n"
    )
    for name, text in VARIANTS.items():
        if name in results:
            print(f"{name:10} {text}")
    for variant, result in results.items():
        if "kernels" in result:
            gpu_step.report(variant, result["kernels"])
        if "attention" not in result:
            continue
        print(f"\n{variant}: parts of a step, ms")
        print(f"{'':14}" + "".join(f"{part:>14}" for part in PARTS))
        for name, (seconds, ticks) in result["shapes"].items():
            print(f"{name:14}" + "".join(f"{seconds * 1e3 * t / sum(ticks):>14.2f}" for t in ticks))
        for context, (seconds, ticks) in result["attention"].items():
            own = seconds * ticks[PARTS.index("attention")] / sum(ticks)
            floor = 32 * int(context) * per_token / result["bandwidth"]
            print(f"attention, B=32, context {context}: {own * 1e3:.2f} ms, floor {floor * 1e3:.2f} ms: {own / floor:.2f}x")
        print("choosing 32 tokens: " + ", ".join(f"{k} {v * 1e3:.2f} ms" for k, v in result["sampling"].items()))
    print(
        "\nthe router's part of a step at 32 sequences: " + ", ".join(f"{k} {v:.2f} ms" for k, v in router_parts().items())
    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

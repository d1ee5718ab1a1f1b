"""What the demo model does without a server: transformers' own generate, with and without drafts, and OpenVINO GenAI.

Run: python tests/benchmarks/in_process.py [--json FILE]
     (OpenVINO, as the ceiling of what this CPU can do, after tests/benchmarks/install_peers openvino)

128 random tokens in, 128 out, greedy, one at a time; OpenVINO also 8 and 32 at once, with the 4-bit weights of the demo
model's file. Our own engine in the same process is there to compare with, in bfloat16 and with --quantization int8.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from contestants import PEERS

TOKENS = 128
OPENVINO = r"""
import json, random, sys, time
import openvino_genai as genai

path, tokens = sys.argv[1], int(sys.argv[2])
scheduler = genai.SchedulerConfig()
scheduler.cache_size = 2
pipe = genai.LLMPipeline(path, "CPU", scheduler_config=scheduler)
config = genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
words = "time year people way day man thing woman life child world school state family student group".split()
chance = random.Random(0)
rates = {}
for users in (1, 8, 32):
    prompts = [" ".join(chance.choices(words, k=tokens)) for _ in range(users)]
    pipe.generate(prompts, config)
    begin = time.perf_counter()
    pipe.generate(prompts, config)
    rates[users] = users * tokens / (time.perf_counter() - begin)
print(json.dumps(rates))
"""


def transformers_rates(path: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    model, again = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for _ in range(2))
    prompt = torch.randint(10_000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    ways: dict[str, dict[str, Any]] = {
        "transformers generate": {},
        "transformers generate, prompt lookup": {"prompt_lookup_num_tokens": 4},
        # There is no smaller model of this vocabulary; one that always agrees shows what the method costs.
        "transformers generate, assistant_model (itself)": {"assistant_model": again},
    }
    rates = {}
    for name, more in ways.items():
        settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False} | more
        model.generate(prompt, **(settings | {"max_new_tokens": 8, "min_new_tokens": 8}))
        begin = time.perf_counter()
        model.generate(prompt, **settings)
        rates[name] = TOKENS / (time.perf_counter() - begin)
    return rates


def own_rates(path: str, quantization: str) -> dict[str, float]:
    import numpy as np
    from fakes import make_request, run_to_end
    from local import Models

    models = Models(path, dtype="bfloat16", max_model_len=1024, attention_backend="compiled", quantization=quantization)
    chance = np.random.default_rng(0)
    rates = {}
    for users in (1, 8, 32):
        for seconds_of in ("warm-up", "measured"):
            engine = models.engine(max_num_seqs=32, max_num_batched_tokens=512, max_mixed_tokens=48)
            for n in range(users):
                engine.add(
                    make_request(chance.integers(0, 10_000, TOKENS).tolist(), id=f"{seconds_of}{n}", max_tokens=TOKENS)
                )
            begin = time.perf_counter()
            run_to_end(engine, max_steps=10_000)
            seconds = time.perf_counter() - begin
        rates[f"our engine, {'bfloat16' if quantization == 'none' else quantization}, c={users}"] = users * TOKENS / seconds
    return rates


def openvino_rates() -> dict[str, float]:
    python = PEERS / "openvino" / "bin" / "python"
    if not python.exists():
        return {}
    model = next((PEERS / "openvino" / "model").rglob("SmolLM2*.gguf"))
    done = subprocess.run(
        [str(python), "-c", OPENVINO, str(model), str(TOKENS)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"OpenVINO failed: {done.stderr.strip().splitlines()[-1:]}")
        return {}
    return {f"OpenVINO GenAI, 4-bit, c={users}": rate for users, rate in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    from tailserve.cluster.settings import settings
    from tailserve.deployments.demo import demo_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=["transformers", "none", "int8"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = str(demo_model(settings().cache_directory))
    if args.part:
        print(json.dumps(transformers_rates(path) if args.part == "transformers" else own_rates(path, args.part)))
        return
    rates: dict[str, float] = {}
    # Each in a process of its own: thread teams of one would slow the next.
    for part in ("transformers", "none", "int8"):
        done = subprocess.run(
            [sys.executable, __file__, "--part", part],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
        rates |= json.loads(done.stdout.splitlines()[-1])
    rates |= openvino_rates()
    for name, rate in rates.items():
        print(f"{name:50} {rate:8.1f} tok/s")
    if args.json:
        args.json.write_text(json.dumps(rates, indent=1) + "\n")


if __name__ == "__main__":
    main()

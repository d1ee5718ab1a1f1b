"""What speculation could bring at best: a draft that knows the answer and costs nothing, on the demo model in one process.

Run: python tests/benchmarks/speculation_ceiling.py [--tokens 192] [--json FILE]

What is left between the step's own limit and the figures is the machinery.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lone import KnownAnswers, LonePrompts

from tailserve.deployments.bench.report import table

NUM_PROMPTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prompts = LonePrompts(NUM_PROMPTS, args.tokens)
    plain = prompts.run("off", None)
    rows = [{"draft tokens": "off", "acceptance": "", "accepted": "", "tokens_per_s": plain.tokens_per_s, "times": "1.00"}]
    for acceptance in (1.0, 0.8, 0.6):
        for speculation in (1, 2, 4, 8, "auto"):
            run = prompts.run(speculation, KnownAnswers(plain.answers, acceptance, acceptance))
            if run.answers != plain.answers:
                print("answers differ: near-ties in bfloat16")
            rows.append(
                {
                    "draft tokens": str(speculation),
                    "acceptance": f"{acceptance}",
                    "accepted": f"{run.accepted:.2f}",
                    "tokens_per_s": run.tokens_per_s,
                    "times": f"{run.tokens_per_s / plain.tokens_per_s:.2f}",
                }
            )
    print(table(rows, ["draft tokens", "acceptance", "accepted", "tokens_per_s", "times"]))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

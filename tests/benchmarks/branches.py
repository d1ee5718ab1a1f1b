"""What it brings to verify several drafts of a sequence together, on the demo model in one process.

Run: python tests/benchmarks/branches.py [--tokens 128] [--head DIR] [--json FILE]

With n-grams, with n-grams and a head (the demo model's own), and with a stand-in whose first draft begins right in half of
the cases and each further one in half of the rest; what follows a right token is right in 6 of 10 cases. Widths of drafts of
up to four tokens against what the cost rule picks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lone import InlineDrafts, KnownAnswers, LonePrompts

from tailserve.deployments.bench.report import table
from tailserve.deployments.draft_kinds import DEMO_DRAFT
from tailserve.engine.model.combined_drafter import CombinedDrafter
from tailserve.engine.model.eagle import load_eagle
from tailserve.engine.model.eagle_loading import load_eagle_drafter
from tailserve.engine.speculation.ngram import NgramDrafter

NUM_PROMPTS = 10
FIRST, FOLLOWS = 0.5, 0.6
"""Acceptance of the stand-in."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--head", type=Path, default=DEMO_DRAFT)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prompts = LonePrompts(NUM_PROMPTS, args.tokens)
    plain = prompts.run("off", None)
    kinds: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
        "stand-in": lambda: (KnownAnswers(plain.answers, FIRST, FOLLOWS), {}),
        "n-grams": lambda: (InlineDrafts(NgramDrafter()), {}),
    }
    prompts.model.tap(load_eagle(args.head).config.feature_layers)

    def with_head() -> tuple[Any, dict[str, Any]]:
        both = CombinedDrafter(NgramDrafter(), load_eagle_drafter(args.head, prompts.options, num_blocks=1024))
        return InlineDrafts(both), {"publish": both.take}

    kinds["n-grams and head"] = with_head
    rows = []
    for kind, make in kinds.items():
        for speculation, width in ((4, 1), (4, 2), (4, 4), ("auto", 1), ("auto", 2), ("auto", 4)):
            drafter, options = make()
            run = prompts.run(speculation, drafter, width=width, **options)
            if run.answers != plain.answers:
                print("answers differ: near-ties in bfloat16")
            rows.append(
                {
                    "draft": kind,
                    "draft tokens": str(speculation),
                    "width": str(width),
                    "accepted": f"{run.accepted:.2f}",
                    "tokens_per_s": run.tokens_per_s,
                    "times": f"{run.tokens_per_s / plain.tokens_per_s:.2f}",
                }
            )
            print(rows[-1], flush=True)
    print(table(rows, ["draft", "draft tokens", "width", "accepted", "tokens_per_s", "times"]))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""`tailserve distill`: a draft for a verifier that has none."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tailserve.engine.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("model", nargs="?", help="directory or hub name of the verifier (default: the demo model)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the draft; run again to go on from there")
    parser.add_argument("--prompts", type=Path, help="a file with one prompt a line (default: the model writes its own)")
    parser.add_argument("--num-prompts", type=int, default=3072, help="prompts to write")
    parser.add_argument("--passes", type=int, default=3, help="times that the draft sees everything")
    parser.add_argument("--draft-vocab", type=int, default=8192, help="tokens that can be drafted")


def run(args: argparse.Namespace) -> int:
    """Makes the draft and prints what it is worth."""
    prompts: tuple[str, ...] = ()
    if args.prompts is not None:
        try:
            prompts = tuple(line for line in args.prompts.read_text().splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the prompts in {args.prompts}: {error}", param="prompts") from None
    # torch and transformers: after the arguments are known to be right.
    from tailserve.deployments.models import resolve_model
    from tailserve.engine.distill.costs import WORTH
    from tailserve.engine.distill.job import DistillOptions, distill

    report = distill(
        DistillOptions(
            model=str(resolve_model(args.model)),
            out=args.out,
            prompts=prompts,
            num_prompts=args.num_prompts,
            passes=args.passes,
            draft_vocab_size=args.draft_vocab,
        )
    )
    agreement = report.agreement
    lines = [
        f"{report.distinct_prompts} distinct prompts, {report.distinct_answers} distinct answers, "
        f"{report.corpus_tokens} tokens",
        f"draft of {report.parameters / 1e6:.1f} M parameters in {args.out}",
        f"held out: {agreement.examples} prompts, {agreement.tokens} tokens, {agreement.covered:.1%} of them draftable",
        "agreement of the n-th token in a row, greedy: " + ", ".join(f"{share:.1%}" for share in agreement.greedy),
        "the same, sampled at temperature 1:           " + ", ".join(f"{share:.1%}" for share in agreement.sampled),
        "expected accepted tokens by draft length:     " + ", ".join(f"{count:.2f}" for count in agreement.accepted),
    ]
    costs, best = report.costs, max(report.speed_ups)
    length = report.speed_ups.index(best) + 1
    lines += [
        f"a step takes {1e3 * costs.verify[0]:.1f} ms, verifying {length} draft tokens {1e3 * costs.verify[length]:.1f} ms, "
        f"drafting them {1e3 * costs.draft[length - 1]:.1f} ms",
        "predicted speed-up by draft length, greedy:    " + ", ".join(f"{value:.2f}x" for value in report.speed_ups),
        f"worth using: --draft-model {args.out}"
        if best >= WORTH
        else "not worth using: more prompts (--num-prompts) and passes would make it better",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0

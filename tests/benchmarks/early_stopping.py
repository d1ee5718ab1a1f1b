"""What each early stop saves on the demo model's own answers, and whether it cuts what was not finished.

Run: python tests/benchmarks/early_stopping.py [--prompts 100] [--tokens 384] [--json FILE]

Answers are generated once without any heuristic (greedily, in process), then read token by token through each heuristic by
itself. "Loops" are prompts that make the model repeat itself, "chat" ordinary ones. "Mid-sentence" counts answers cut
where no sentence, line or code block had ended, though one would have; "endless" those whose rest has no such end, either:
cycles that the limit of tokens would cut in mid-sentence, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from chat_prompts import CHAT_PROMPTS
from fakes import engine_config, make_request
from msgspec.structs import replace

from tailserve.cluster.early_stop import EarlyStopConfig
from tailserve.deployments.bench.report import table
from tailserve.deployments.early_stop import EarlyStop
from tailserve.deployments.models import resolve_model
from tailserve.deployments.text import Detokenizer, TextModel
from tailserve.engine.engine import Engine
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.local import LocalExecutor
from tailserve.engine.options import LoadOptions

LOOPS = [
    "Write the word hello over and over.",
    "Count to one million, one number at a time, in words.",
    "Repeat after me without ever stopping: all work and no play makes Jack a dull boy.",
    "List every even number there is.",
    "Write a poem in which every line is the same.",
    "Say yes for ever.",
    "Sing a song that never ends.",
    "Tell me again and again that everything will be fine.",
    "Write a chant that goes on all night.",
    "Recite the alphabet a thousand times.",
]
TOPICS = ["the moon", "bread", "bicycles", "rain", "bees", "chess", "volcanoes", "paper", "coffee", "whales"]
FORMS = ["What is {} good for?", "Explain {} to a child.", "Write a short story about {}.", "Give me five facts about {}."]
SETTINGS = {
    "repetition": EarlyStopConfig(repetition=True),
    "soft_length 128": EarlyStopConfig(soft_max_tokens=128),
    "complete above 0.2": EarlyStopConfig(complete_above=0.2),
    "closing": EarlyStopConfig(closing=True),
}
FINISHED = (".", "!", "?", ":", '"', ")", "*", "`", "\n")


def generate(text: TextModel, path: str, prompts: list[str], num_tokens: int) -> list[list[tuple[int, float | None]]]:
    """Each prompt's answer: tokens, and how likely the end was in the place of each."""
    model, info = load_model(LoadOptions(path=path, num_blocks=2048, max_model_len=1024, attention_backend="compiled"))
    config = engine_config(
        max_model_len=1024,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        classes=tuple(replace(slo, ttft_s=600.0, tpot_s=60.0, speculation="off") for slo in engine_config().classes),
    )
    engine = Engine(config, LocalExecutor(model, num_blocks=info.num_blocks))
    answers: dict[str, list[tuple[int, float | None]]] = {}
    for prompt in prompts:
        ids = text.encode(text.render_chat([{"role": "user", "content": prompt}]), add_special_tokens=False)
        watch: dict[str, Any] = {"logprobs": 0, "watch_end": True, "eos_token_ids": text.eos_token_ids}
        request = make_request(ids, max_tokens=num_tokens, **watch)
        answers[request.id] = []
        engine.add(request)
    done = 0
    while engine.has_work:
        for chunk in engine.step():
            entries = chunk.logprobs or ()
            answers[chunk.request_id] += [(entry.token_id, entry.end) for entry in entries]
            done += chunk.finish_reason is not None
        sys.stderr.write(f"\r{done} of {len(prompts)} answers")
    sys.stderr.write("\n")
    return list(answers.values())


def read(text: TextModel, config: EarlyStopConfig, answer: list[tuple[int, float | None]]) -> tuple[int, str, str | None]:
    """Tokens until the stop, what is shown, and the reason."""
    detokenizer, early, shown = Detokenizer(text.decode), EarlyStop(config), ""
    for place, (token_id, end) in enumerate(answer, 1):
        if token_id in text.eos_token_ids:
            break
        piece, reason = early.push(token_id, detokenizer.push([token_id]), end)
        shown += piece
        if reason:
            return place, shown, reason
    return len(answer), shown, None


def _has_end(text: TextModel, rest: list[tuple[int, float | None]]) -> bool:
    """Whether what was cut off would have come to an end of any kind."""
    ids = [token_id for token_id, _ in rest]
    said = text.decode(ids)
    return any(mark in said for mark in FINISHED) or not set(ids).isdisjoint(text.eos_token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--show", action="store_true", help="print the end of every answer that was cut")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chat = [*CHAT_PROMPTS, *(form.format(topic) for form in FORMS for topic in TOPICS)][: args.prompts]
    path = resolve_model(None)
    text = TextModel(path)
    answers = generate(text, str(path), [*LOOPS, *chat], args.tokens)
    rows = []
    for name, config in SETTINGS.items():
        for kind, group in (("loops", answers[: len(LOOPS)]), ("chat", answers[len(LOOPS) :])):
            total = sum(map(len, group))
            read_out = [read(text, config, answer) for answer in group]
            cut = [(shown, reason) for _, shown, reason in read_out if reason]
            unfinished = [
                _has_end(text, answer[count:])
                for answer, (count, shown, reason) in zip(group, read_out, strict=True)
                if reason and not shown.rstrip(" ").endswith(FINISHED)
            ]
            saved = 100 * (1 - sum(count for count, _, _ in read_out) / total)
            rows.append(
                {
                    "heuristic": name,
                    "prompts": kind,
                    "answers": len(group),
                    "cut": len(cut),
                    "saved_%": saved,
                    "mid-sentence": sum(unfinished),
                    "endless": len(unfinished) - sum(unfinished),
                }
            )
            for shown, reason in cut if args.show else ():
                print(f"[{kind}, {reason}] ...{shown[-120:]!r}")
    print(table(rows, list(rows[0])))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

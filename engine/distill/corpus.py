"""What a draft learns from: prompts and answers that the verifier writes itself.

Prompts come from the user's turn of the chat template, as in Magpie (Xu et al., arXiv 2406.08464), or from a file; answers
are sampled at several temperatures. Both go to files line by line, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from tailserve.engine.config import EngineConfig
from tailserve.engine.engine import Engine
from tailserve.engine.errors import ConfigError
from tailserve.engine.model.loading import load_model
from tailserve.engine.model.local import LocalExecutor
from tailserve.engine.options import LoadOptions
from tailserve.engine.types import FinishReason, Request, SamplingParams, SloClass

TEMPERATURES = (0.0, 0.7, 0.0, 0.7, 1.0)
"""Of the answers, in turn: what users ask for."""
AT_ONCE = 512
"""Requests between two times that a file is written."""
NUM_SEQS = 96
MAX_PROMPT, MAX_ANSWER = 128, 320
"""Tokens."""
_HELD_OUT = 32
"""One prompt in so many is for the report only."""
_HERE = "\x00here\x00"


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt with its answer."""

    prompt: str
    """The user's turn. No two examples share one."""
    token_ids: tuple[int, ...]
    """Rendered prompt, then answer."""
    prompt_len: int
    """Tokens of the former."""
    temperature: float
    """Of the answer."""

    @property
    def held_out(self) -> bool:
        """Decided by the prompt's text alone."""
        return sum(self.prompt.encode()) % _HELD_OUT == 0


class Writer:
    """The verifier as an author. Loads it once; `tokenizer` is transformers'."""

    def __init__(self, options: LoadOptions, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        longest = MAX_ANSWER + 4 * MAX_PROMPT
        options = msgspec.structs.replace(options, max_model_len=longest, num_blocks=NUM_SEQS * longest // 16)
        self._model, self._info = load_model(options)
        if tokenizer.chat_template is None:
            raise ConfigError("the model has no chat template, so there is no user's turn to learn from", param="model")
        self._before = self._encode(self._render(_HERE).partition(_HERE)[0])
        """A prompt up to where its user begins to write."""

    def prompts(self, path: Path, count: int) -> list[str]:
        """`count` distinct prompts, those in the file first. Fewer if the model hardly ever writes a new one."""
        found = dict.fromkeys(_read(path, str))
        tries = len(found)
        with tqdm(total=count, initial=len(found), desc="prompts", unit="") as bar, path.open("ab") as file:
            while len(found) < count and tries < 4 * count:
                seeds = range(tries, tries + AT_ONCE)
                tries += AT_ONCE
                requests = [self._request(seed, self._before, 1.0, MAX_PROMPT) for seed in seeds]
                for tokens, ended in self._run(requests).values():
                    text = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
                    if ended and len(tokens) > 3 and text not in found:
                        found[text] = None
                        file.write(msgspec.json.encode(text) + b"\n")
                        bar.update()
        return list(found)[:count]

    def answers(self, path: Path, prompts: Sequence[str]) -> list[Example]:
        """An example for each prompt, those in the file first."""
        examples = list(_read(path, Example))
        done = {example.prompt for example in examples}
        left = [(n, prompt) for n, prompt in enumerate(prompts) if prompt not in done]
        with tqdm(total=len(prompts), initial=len(done), desc="answers", unit="") as bar, path.open("ab") as file:
            for begin in range(0, len(left), AT_ONCE):
                asked = {n: (prompt, self._encode(self._render(prompt))) for n, prompt in left[begin : begin + AT_ONCE]}
                asked = {n: (prompt, ids) for n, (prompt, ids) in asked.items() if len(ids) <= 4 * MAX_PROMPT}
                requests = [
                    self._request(n, ids, TEMPERATURES[n % len(TEMPERATURES)], MAX_ANSWER) for n, (_, ids) in asked.items()
                ]
                for name, (tokens, _) in self._run(requests).items():
                    n = int(name)
                    prompt, ids = asked[n]
                    example = Example(
                        prompt=prompt,
                        token_ids=(*ids, *tokens),
                        prompt_len=len(ids),
                        temperature=TEMPERATURES[n % len(TEMPERATURES)],
                    )
                    examples.append(example)
                    file.write(msgspec.json.encode(example) + b"\n")
                    bar.update()
        return [example for example in examples if len(example.token_ids) > example.prompt_len + 1]

    def _render(self, prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        text: str = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _request(self, number: int, ids: Sequence[int], temperature: float, max_tokens: int) -> Request:
        sampling = SamplingParams(
            max_tokens=max_tokens, seed=number, temperature=temperature, eos_token_ids=(self._tokenizer.eos_token_id,)
        )
        return Request(id=str(number), prompt_token_ids=tuple(ids), sampling=sampling, slo_class="normal", scope="distill")

    def _run(self, requests: Sequence[Request]) -> dict[str, tuple[list[int], bool]]:
        """Request id to its tokens, and whether they end by themselves."""
        info = self._info
        config = EngineConfig(
            classes=(SloClass(name="normal", priority=0, ttft_s=60, tpot_s=60, max_queued=AT_ONCE),),
            max_num_seqs=NUM_SEQS,
            max_model_len=info.max_model_len,
            num_blocks=info.num_blocks,
            block_size=info.block_size,
        )
        engine = Engine(config, LocalExecutor(self._model))
        for request in requests:
            engine.add(request)
        tokens: dict[str, list[int]] = {request.id: [] for request in requests}
        ended = set()
        while engine.has_work:
            for chunk in engine.step():
                tokens[chunk.request_id] += chunk.token_ids
                if chunk.finish_reason == FinishReason.STOP:
                    ended.add(chunk.request_id)
        return {name: (ids, name in ended) for name, ids in tokens.items()}


def _read(path: Path, kind: Any) -> Iterator[Any]:
    """Lines of a file, but for a last one that was not written to its end."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        whole = 0
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(whole)
                return
            whole += len(line)
            yield msgspec.json.decode(line, type=kind)

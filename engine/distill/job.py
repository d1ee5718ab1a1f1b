"""From a verifier to a draft for it, in stages that each go on where they were interrupted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoTokenizer, PreTrainedModel

from tailserve.engine.distill.corpus import Example, Writer
from tailserve.engine.distill.costs import Costs, measure_costs
from tailserve.engine.distill.report import Agreement, measure_agreement
from tailserve.engine.distill.states import StateFile
from tailserve.engine.distill.training import train
from tailserve.engine.distill.unroll import Frozen
from tailserve.engine.errors import UnsupportedModelError
from tailserve.engine.model.avx512 import HAS_AVX512
from tailserve.engine.model.eagle import EagleConfig, EagleHead
from tailserve.engine.model.loading import read_model
from tailserve.engine.options import LoadOptions

REPORT_DEPTH = 6


class DistillOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to make."""

    model: str
    """Directory of the verifier."""
    out: Path
    """Where the draft goes; its folder `work` holds what an interrupted run goes on from."""
    prompts: tuple[str, ...] = ()
    """The user's own; empty lets the verifier write them."""
    num_prompts: int = 3072
    passes: int = 3
    draft_vocab_size: int = 8192


class DistillReport(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it; written as report.json beside the weights."""

    distinct_prompts: int
    distinct_answers: int
    corpus_tokens: int
    parameters: int
    agreement: Agreement
    costs: Costs
    speed_ups: list[float]
    """Predicted at batch 1, for drafts of 1, 2, ... tokens."""


def distill(options: DistillOptions) -> DistillReport:
    """Writes prompts and answers, reads the verifier's states, trains, and measures."""
    torch.set_num_threads(os.cpu_count() or 1)
    work = options.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    load = LoadOptions(path=options.model, dtype="bfloat16")
    examples = _corpus(options, load, work)
    # CPUs without AVX-512 take several times as long for bfloat16, which they have no instructions for.
    verifier = read_model(load, torch.bfloat16 if HAS_AVX512 else torch.float32, torch.device("cpu"))
    layers = _feature_layers(verifier)
    states = StateFile(work / "states.bin", examples, len(layers) * verifier.config.get_text_config().hidden_size)
    states.fill(load, layers, examples)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    head = new_head(verifier, layers, _frequent(examples, options.draft_vocab_size))
    frozen, lm_head = borrow(verifier, head)
    train(head, frozen, examples, states, passes=options.passes, folder=work)
    head.save(options.out)
    agreement = measure_agreement(head, frozen, lm_head, examples, states, depth=REPORT_DEPTH)
    costs = measure_costs(load, options.out, REPORT_DEPTH)
    report = DistillReport(
        distinct_prompts=len({example.prompt for example in examples}),
        distinct_answers=len({example.token_ids[example.prompt_len :] for example in examples}),
        corpus_tokens=sum(len(example.token_ids) for example in examples),
        parameters=sum(weight.numel() for weight in head.parameters()),
        agreement=agreement,
        costs=costs,
        speed_ups=costs.speed_ups(agreement.accepted),
    )
    (options.out / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return report


def _corpus(options: DistillOptions, load: LoadOptions, work: Path) -> list[Example]:
    writer = Writer(load, AutoTokenizer.from_pretrained(options.model))
    prompts = list(dict.fromkeys(options.prompts)) or writer.prompts(work / "prompts.jsonl", options.num_prompts)
    return writer.answers(work / "answers.jsonl", prompts)


def _frequent(examples: Sequence[Example], count: int) -> torch.Tensor:
    """The tokens that answers use most, in order of their ids."""
    uses = Counter(
        token for example in examples if not example.held_out for token in example.token_ids[example.prompt_len :]
    )
    return torch.tensor(sorted(token for token, _ in uses.most_common(count)))


def _feature_layers(verifier: PreTrainedModel) -> tuple[int, ...]:
    """An early, a middle and the last layer."""
    count: int = verifier.config.get_text_config().num_hidden_layers
    return (count // 3 - 1, 2 * count // 3 - 1, count - 1) if count >= 6 else (count - 1,)


def new_head(verifier: PreTrainedModel, layers: Sequence[int], draft_tokens: torch.Tensor) -> EagleHead:
    """An untrained head in the verifier's proportions, which begins by passing the last layer's state on."""
    text = verifier.config.get_text_config()
    heads = text.num_attention_heads
    config = EagleConfig(
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        num_verifier_layers=text.num_hidden_layers,
        feature_layers=tuple(layers),
        intermediate_size=text.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        draft_vocab_size=len(draft_tokens),
    )
    head = EagleHead(config)
    head.draft_tokens.copy_(draft_tokens)
    for name, weight in head.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.02 if name not in ("output.weight", "down.weight") else 0.005)
    with torch.no_grad():
        head.fuse.weight[:, -text.hidden_size :] += torch.eye(text.hidden_size)
        head.final_norm.weight.copy_(_final_norm(verifier).weight)
    return head


def borrow(verifier: PreTrainedModel, head: EagleHead) -> tuple[Frozen, torch.Tensor]:
    """What a head uses of the verifier; and the verifier's whole head [vocab, C]."""
    lm_head: Any = verifier.get_output_embeddings()  # type: ignore[no-untyped-call]
    if getattr(lm_head, "bias", None) is not None:
        raise UnsupportedModelError("the model's head has a bias, which drafts do not know")
    weight: torch.Tensor = lm_head.weight
    embedding: torch.Tensor = verifier.get_input_embeddings().weight  # type: ignore[assignment]
    return Frozen(embedding, weight[head.draft_tokens], _final_norm(verifier)), weight


def _final_norm(verifier: PreTrainedModel) -> Any:
    body: Any = verifier.get_decoder()  # type: ignore[no-untyped-call]
    return body.norm

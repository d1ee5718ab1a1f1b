"""Which kind of draft an instance runs, and what the verifier must do for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import msgspec

from tailserve.cluster.config import NEEDS_MODEL, TailserveConfig
from tailserve.cluster.settings import settings
from tailserve.deployments.draft import DraftOptions
from tailserve.deployments.models import resolve_model
from tailserve.deployments.verifier import VerifierOptions
from tailserve.engine.errors import ConfigError
from tailserve.engine.options import EAGLE_MODEL_TYPE, LoadOptions, spare_blocks

DEMO_DRAFT = Path(__file__).with_name("demo_draft")
"""The demo model's own, an EAGLE-style head: what `tailserve distill --num-prompts 4096` made."""


class DraftPlan(NamedTuple):
    verifier: VerifierOptions
    draft: DraftOptions | None
    """None: no draft at all."""
    num_outcomes: int = 0
    """See `EngineConfig`."""


def find_draft(config: TailserveConfig) -> Path | None:
    """The directory of a draft, or None where it is not a model. ConfigError if there is none, or it is another model's."""
    if not config.drafts or config.draft_model == "ngram":
        return None
    if config.draft_model != "demo":
        return resolve_model(config.draft_model)
    if config.model is not None:
        raise ConfigError(
            "demo is the demo model's own draft: serve that (no `model`), or make one for yours with `tailserve distill`",
            param="draft_model",
        )
    return DEMO_DRAFT


def plan_draft(config: TailserveConfig, options: LoadOptions, directory: str) -> DraftPlan:
    """`options` are the verifier's; sockets go into `directory`."""
    load = options
    options = msgspec.structs.replace(options, host_bytes=0, tensor_parallel_size=1)
    if config.drafts and config.draft_branches > 1:
        load = msgspec.structs.replace(load, num_spare_blocks=spare_blocks(options.block_size))
    traces = config.otlp_traces_endpoint or settings().otlp_traces_endpoint
    verifier = VerifierOptions(load=load, block_verification=config.verification == "block", traces_endpoint=traces)
    if not config.drafts:
        return DraftPlan(verifier, None)
    folder = find_draft(config)
    if folder is None:
        return DraftPlan(verifier, DraftOptions(traces_endpoint=traces))
    description = json.loads((folder / "config.json").read_text())
    if description.get("model_type") != EAGLE_MODEL_TYPE:
        load = msgspec.structs.replace(options, path=str(folder), noise=config.draft_noise, num_blocks=None)
        draft = DraftOptions(
            kind="model",
            load=load,
            verifier=options.path,
            max_num_batched_tokens=config.max_num_batched_tokens,
            traces_endpoint=traces,
        )
        return DraftPlan(verifier, draft, config.num_outcomes)
    if config.has_prefixes:
        raise ConfigError(NEEDS_MODEL.format("a head"), param="speculative_prefix")
    if config.resources.placement != "STRICT_PACK":
        raise ConfigError(
            "a head reads the verifier's states on its own node: use STRICT_PACK, or a draft model",
            param="resources.placement",
        )
    endpoint = f"ipc://{directory}/states"
    layers = tuple(description["feature_layers"])
    return DraftPlan(
        msgspec.structs.replace(verifier, feature_layers=layers, states_endpoint=endpoint),
        DraftOptions(kind="eagle", load=options, folder=str(folder), states_endpoint=endpoint, traces_endpoint=traces),
    )

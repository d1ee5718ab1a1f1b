"""From the configuration to what a verifier loads and an engine runs with."""

from __future__ import annotations

from tailserve.cluster.config import TailserveConfig
from tailserve.deployments.models import resolve_model
from tailserve.engine.config import EngineConfig
from tailserve.engine.options import LoadOptions
from tailserve.engine.types import ModelInfo

_CPU_MIXED_TOKENS = 48
"""Where every token costs time. Beside generating sequences prompts are read as fast in small chunks as in large ones, since
the weights are read for the others anyway."""


def load_options(config: TailserveConfig) -> LoadOptions:
    """How the verifier loads its model."""
    return LoadOptions(
        path=str(resolve_model(config.model)),
        dtype=config.dtype,
        quantization=config.quantization,
        device=config.device,
        attention_backend=config.attention_backend,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        num_blocks=config.num_kv_blocks,
        host_bytes=int(config.kv_offloading_size * (1 << 30)),
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_num_seqs=config.max_num_seqs,
        num_threads=config.cpu_threads,
        tensor_parallel_size=config.tensor_parallel_size,
    )


def engine_settings(config: TailserveConfig, info: ModelInfo, *, num_outcomes: int = 0) -> EngineConfig:
    """The engine's configuration, once the model is known. ConfigError for sizes that cannot work together.

    `num_outcomes`: see there.
    """
    mixed = config.max_mixed_tokens or (_CPU_MIXED_TOKENS if info.device == "cpu" else config.max_num_batched_tokens)
    return EngineConfig(
        classes=config.classes(),
        scheduling_policy=config.scheduling_policy,
        max_wait_s=config.max_wait_s,
        max_mixed_tokens=mixed,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        num_blocks=info.num_blocks,
        num_host_blocks=info.num_host_blocks,
        block_size=info.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        session_ttl_s=config.session_ttl_s,
        session_share=config.session_share,
        step_profile=info.step_profile,
        num_outcomes=num_outcomes,
        draft_branches=config.draft_branches,
        sampled_drafts=config.verification != "one_hot",
        draft_timeout_s=config.timeouts.draft_s,
    )

"""Tensor parallelism: the ranks of one model, each a process with a part of every layer.

Sharding is transformers' own, by the plan of the model. What crosses ranks is the sum behind attention and behind the MLP of
each layer, and the logits; every rank has all logits then, draws the same tokens from them, and so keeps the same rows.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from msgspec.structs import replace
from transformers import PreTrainedConfig

from tailserve.engine.errors import ConfigError, UnsupportedModelError
from tailserve.engine.options import LoadOptions

PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others, one of which may have to fetch its weights; transformers' own choice. The router
notices much sooner when one is dead or hangs."""


def share(options: LoadOptions) -> LoadOptions:
    """What is an instance's, dealt out to its ranks."""
    size = options.tensor_parallel_size
    if size == 1:
        return options
    threads = options.num_threads or max((os.cpu_count() or 1) // size, 1)
    return replace(options, num_threads=threads, host_bytes=options.host_bytes // size)


def join(options: LoadOptions, device: torch.device) -> None:
    """Meets the other ranks at `options.rendezvous`. Does nothing for a model of one rank."""
    if options.tensor_parallel_size == 1:
        return
    if device.type == "cpu" and options.rendezvous.startswith("file:"):
        # On one machine, and its name need not lead back to it.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=options.rendezvous,
        rank=options.rank,
        world_size=options.tensor_parallel_size,
        timeout=PATIENCE,
    )


def loading_arguments(options: LoadOptions) -> dict[str, Any]:
    """What `from_pretrained` needs to load this rank's part of the weights."""
    if options.tensor_parallel_size == 1:
        return {}
    from transformers.distributed.configuration_utils import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=options.tensor_parallel_size)}


def check(config: PreTrainedConfig, text: PreTrainedConfig, size: int) -> None:
    """ConfigError if the model's heads cannot be dealt out to so many ranks, UnsupportedModelError without a plan for it."""
    if size == 1:
        return
    if not (getattr(config, "base_model_tp_plan", None) or getattr(text, "base_model_tp_plan", None)):
        raise UnsupportedModelError(
            f"{config.model_type}: transformers has no tensor-parallel plan for this model; set tensor_parallel_size to 1"
        )
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % size or kv_heads % size:
        raise ConfigError(
            f"tensor_parallel_size={size}, but the model has {heads} heads and {kv_heads} of keys and values: "
            "choose a divisor of both",
            param="tensor_parallel_size",
        )


def smallest(value: int, size: int) -> int:
    """The least that any rank says. All ranks must call it."""
    if size == 1:
        return value
    values: list[int] = [0] * size
    dist.all_gather_object(values, value)
    return min(values)

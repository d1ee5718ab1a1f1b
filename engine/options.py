"""How a model process loads its model. Free of torch: routers fill it in."""

from __future__ import annotations

import msgspec

MAX_BRANCHES = 16
"""Further drafts, beside the rows' first ones, that one step verifies at most."""
BRANCH_TOKENS = 8
"""Tokens of each, at most."""

EAGLE_MODEL_TYPE = "tailserve-eagle"
"""`model_type` in the config.json of a draft head; see `tailserve.engine.model.eagle`."""


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to load a model. Sizes in tokens unless they say otherwise."""

    path: str
    """A local directory with a config.json and safetensors."""
    dtype: str = "auto"
    """auto (the checkpoint's own), bfloat16, float16 or float32."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda."""
    attention_backend: str = "auto"
    """auto, compiled, cpu, cuda or reference; see `tailserve.engine.model.loading`."""
    quantization: str = "none"
    """none, or int8: see `tailserve.engine.model.int8`."""
    max_model_len: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    """None: from the memory that is free; see `tailserve.engine.model.memory`."""
    host_bytes: int = 0
    """Host memory for a second tier of blocks."""
    num_spare_blocks: int = 0
    """More blocks, behind those, which the scheduler knows nothing of."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that weights and KV may take together."""
    max_num_seqs: int = 64
    num_threads: int | None = None
    """CPU threads; None: all cores, shared by the ranks."""
    tensor_parallel_size: int = 1
    """Processes that the model is spread over; see `tailserve.engine.model.parallel`."""
    rank: int = 0
    """This one's number."""
    rendezvous: str = ""
    """URL where the ranks meet: file:// and a path that does not exist yet, or tcp:// and a free port of the first one's."""
    noise: float = 0.0
    """Standard deviation, relative to each weight's own, of noise added to the weights: a stand-in for a draft that
    agrees some of the time."""


def spare_blocks(block_size: int) -> int:
    """Blocks that the branches of a step may need; see `tailserve.engine.model.fork`."""
    # The token before a draft is computed again, wherever in its block it is.
    return MAX_BRANCHES * -(-(block_size + BRANCH_TOKENS) // block_size)

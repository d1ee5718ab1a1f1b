"""The `check` command: what a configuration will run where, and what memory it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tailserve.cluster import placement
from tailserve.cluster.config import TailserveConfig
from tailserve.deployments.draft_kinds import find_draft, plan_draft
from tailserve.deployments.models import resolve_model
from tailserve.deployments.sizes import load_options
from tailserve.engine.errors import ConfigError
from tailserve.engine.options import EAGLE_MODEL_TYPE

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def describe(config: TailserveConfig) -> Iterator[str]:
    """Lines for somebody who is about to deploy it. ConfigError for what could not be loaded."""
    model = resolve_model(config.model)
    draft = find_draft(config)
    # Refuses what cannot go together.
    plan_draft(config, load_options(config), "")
    wanted, size = config.resources, config.tensor_parallel_size
    where = "on one node" if wanted.placement == "STRICT_PACK" else "on as few nodes as have room"
    if config.autoscaling is None:
        yield f"instances   {config.num_instances}, each {where}:"
    else:
        scaling = config.autoscaling
        yield f"instances   {scaling.min_instances} to {scaling.max_instances}, each {where}:"
    yield f"  router    {_resources(wanted.router_cpus, 0)}"
    ranks = f"{size} ranks, each " if size > 1 else ""
    yield f"  verifier  {ranks}{_resources(wanted.verifier_cpus, wanted.verifier_gpus)}; {_model(model, config, size)}"
    if not config.drafts:
        yield "  draft     none"
    elif draft is None:
        yield f"  draft     {_resources(wanted.draft_cpus, wanted.draft_gpus)}; n-grams"
    else:
        yield f"  draft     {_resources(wanted.draft_cpus, wanted.draft_gpus)}; {_model(draft, config, 1)}"
    yield f"ingresses   {config.num_ingresses}, each {_resources(wanted.ingress_cpus, 0)}"
    yield f"together    {_together(config)}"
    for slo in config.classes():
        yield (
            f"class       {slo.name}: priority {slo.priority}, first token within {slo.ttft_s:g} s,"
            f" then {1000 * slo.tpot_s:g} ms a token"
        )
    names = ", ".join(tenant.name for tenant in config.tenants)
    if config.tenants_file:
        yield f"tenants     those of {config.tenants_file}"
    else:
        yield f"tenants     {names or 'none: anybody who reaches it may use it'}"


def _together(config: TailserveConfig) -> str:
    scaling = config.autoscaling
    counts = [config.num_instances] if scaling is None else [scaling.min_instances, scaling.max_instances]
    found = []
    for count in counts:
        whole = config.model_copy(update={"num_instances": count})
        gpus = count * sum(bundle.get("GPU", 0.0) for bundle in placement.bundles(whole))
        found.append(_resources(placement.total_cpus(whole), gpus))
    return " to ".join(found)


def _model(folder: Path, config: TailserveConfig, size: int) -> str:
    """Its weights and KV, by the files and the architecture's numbers."""
    description = json.loads((folder / "config.json").read_text())
    text = description.get("text_config") or description
    # As the loader takes what says nothing.
    stored = str(description.get("dtype") or description.get("torch_dtype") or "bfloat16")
    dtype = stored if config.dtype == "auto" else config.dtype
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    kept = 1 if config.quantization == "int8" else BYTES.get(dtype, 4)
    weights = on_disk * kept / BYTES.get(stored, 4)
    if description.get("model_type") == EAGLE_MODEL_TYPE:
        return f"a head of {_size(weights)}"
    token = _kv_bytes(text) * BYTES.get(dtype, 4)
    longest = config.max_model_len or text.get("max_position_embeddings") or 0
    blocks = f"{config.num_kv_blocks * config.block_size} tokens" if config.num_kv_blocks else "what is free"
    return (
        f"{folder.name} in {dtype}: weights about {_size(weights / size)}, KV {_size(token / size)} a token,"
        f" {_size(token * longest / size)} for one sequence of {longest}; KV pool: {blocks}"
    )


def _kv_bytes(text: dict[str, Any]) -> float:
    """Numbers for each token: keys and values of all layers."""
    if "num_attention_heads" not in text:
        raise ConfigError("the model's config.json names no attention heads: it is no causal language model", param="model")
    heads = text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    return 2.0 * int(text["num_hidden_layers"]) * int(kv_heads) * int(head_dim)


def _resources(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError

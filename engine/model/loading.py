"""Loads a transformers causal language model, checks that it can run in packed batches, and makes it ready to."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tailserve.engine.errors import ConfigError, UnsupportedModelError
from tailserve.engine.model import attention, parallel
from tailserve.engine.model.attention import AttentionBackend, KVCache
from tailserve.engine.model.compiled import DecoderSettings, compile_model, is_cached, wants_compiled
from tailserve.engine.model.cpu import CpuBackend
from tailserve.engine.model.linear import prepack
from tailserve.engine.model.memory import free_host_memory, num_kv_blocks
from tailserve.engine.model.paged import PagedModel, TransformersModel
from tailserve.engine.model.reference import ReferenceBackend
from tailserve.engine.model.selfcheck import check_packed, eager_logits
from tailserve.engine.model.upgrade import UpgradingModel
from tailserve.engine.options import LoadOptions
from tailserve.engine.types import ModelInfo

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PAGED_LAYERS = {"full_attention", "sliding_attention"}


def load_model(options: LoadOptions) -> tuple[PagedModel, ModelInfo]:
    """Loads, checks and prepares a model.

    Raises ConfigError for options that cannot work and UnsupportedModelError for models that would be silently wrong in a
    packed batch.
    """
    options = parallel.share(options)
    device = resolve_device(options.device)
    if device.type == "cpu":
        # OpenMP keeps this for each thread: the thread that loads a model is the one to run it. A Ray actor starts with
        # OMP_NUM_THREADS by its logical CPUs, which say nothing about the machine.
        torch.set_num_threads(options.num_threads or os.cpu_count() or 1)
    config = AutoConfig.from_pretrained(options.path)
    text = config.get_text_config(decoder=True)
    max_model_len = _max_model_len(options, text)
    refuse_unsupported(config, max_model_len)
    size = options.tensor_parallel_size
    parallel.check(config, text, size)
    parallel.join(options, device)
    dtype = resolve_dtype(options, text)
    model = read_model(options, dtype, device)
    layers, kv_heads, head_dim = _kv_shape(text, size)
    per_token = 2 * layers * kv_heads * head_dim * dtype.itemsize
    num_blocks = options.num_blocks or parallel.smallest(num_kv_blocks(options, device, per_token, max_model_len), size)
    expected = eager_logits(model)
    # Graphs hold what a model's windows were when they were captured.
    with_own_windows = eager_logits(model, window=None) if device.type == "cuda" else expected
    num_laid_out, num_blocks = num_blocks, num_blocks + options.num_spare_blocks
    settings = DecoderSettings.of(options, num_blocks, max_model_len)
    wanted = wants_compiled(model, options)
    paged: PagedModel | None = None
    kv_bytes = num_blocks * options.block_size * per_token
    weight_bytes = sum(weight.nbytes for weight in model.parameters())
    num_host_blocks = options.host_bytes // (options.block_size * per_token)
    if options.host_bytes > (free := free_host_memory()):
        raise ConfigError(
            f"kv_offloading_size asks for {options.host_bytes / (1 << 30):.1f} GiB of host memory, of which "
            f"{free / (1 << 30):.1f} are free: lower it",
            param="kv_offloading_size",
        )
    # A change later needs the weights twice more, and the keys and values once; and the second tier's blocks would be of no
    # use behind it.
    must = options.attention_backend == "compiled" or settings.int8 or num_host_blocks > 0
    at_once = must or is_cached(dtype, settings.int8)
    if wanted and (at_once or free_host_memory() < 2 * weight_bytes + kv_bytes):
        paged = compile_model(model, settings, expected)
        wanted = False
    if paged is None:
        plain = _interpreted(model, options, num_blocks, max_model_len, expected)
        plain.prepare()
        if plain.backend == "cuda":
            # Short batches run as graphs from now on.
            check_packed(plain, model, with_own_windows, window=None)
        paged = plain
        if wanted:
            paged = UpgradingModel(plain, settings, lambda: (read_model(options, dtype, device), expected))
    info = ModelInfo(
        vocab_size=text.vocab_size,
        max_model_len=max_model_len,
        num_blocks=num_laid_out,
        num_host_blocks=num_host_blocks,
        block_size=options.block_size,
        kv_bytes_per_token=per_token,
        attention_backend=paged.backend,
        device=device.type,
    )
    return paged, info


def read_model(options: LoadOptions, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The checkpoint as transformers loads it, for inference."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        options.path, dtype=dtype, attn_implementation="eager", **parallel.loading_arguments(options)
    )
    model.eval()  # type: ignore[no-untyped-call]
    if options.tensor_parallel_size == 1:
        model.to(device)  # type: ignore[arg-type]
    model.requires_grad_(False)
    if options.noise:
        _add_noise(model, options.noise)
    return model


def _interpreted(
    model: PreTrainedModel, options: LoadOptions, num_blocks: int, max_model_len: int, expected: list[torch.Tensor]
) -> TransformersModel:
    """The fastest that answers as `expected`, of those that no other process has to compile."""
    layers, kv_heads, head_dim = _kv_shape(model.config.get_text_config(decoder=True), options.tensor_parallel_size)
    backend = choose_backend(options, model.device, model.dtype)
    on_cuda = backend.name == "cuda"
    cache = KVCache(
        num_layers=layers,
        num_blocks=num_blocks + on_cuda,
        block_size=options.block_size,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=model.dtype,
        device=model.device,
    )
    model.set_attn_implementation(attention.NAME)
    if model.device.type == "cpu" and options.tensor_parallel_size == 1:
        prepack(model)
    if on_cuda:
        # Imported where there is a GPU only, and with it Triton.
        from tailserve.engine.model.fused import graphed_model

        whole = options.tensor_parallel_size == 1
        return graphed_model(model, cache, backend, expected, max_model_len=max_model_len, whole=whole)
    plain = TransformersModel(model, cache, backend)
    check_packed(plain, model, expected)
    return plain


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}, but torch sees no CUDA device: use cpu or auto", param="device")
    return torch.device(name)


def refuse_unsupported(config: PreTrainedConfig, max_model_len: int) -> None:
    """UnsupportedModelError for architectures whose state or masks do not fit packed paged attention."""
    text = config.get_text_config(decoder=True)
    kind = config.model_type
    other = set(getattr(text, "layer_types", None) or ()) - _PAGED_LAYERS
    if other:
        raise UnsupportedModelError(
            f"{kind}: layers of type {', '.join(sorted(other))} keep state or masks that packed batches do not carry; only "
            "full and sliding-window attention layers can be served"
        )
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{kind}: multi-head latent attention has keys and values of different widths, which the KV cache does not hold"
        )
    if getattr(text, "attention_chunk_size", None):
        raise UnsupportedModelError(f"{kind}: chunked attention lives in the mask only, and packed batches have no mask")
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or text.max_position_embeddings
    if rope.get("rope_type") in ("dynamic", "longrope") and max_model_len > original:
        raise UnsupportedModelError(
            f"{kind}: {rope['rope_type']} rotary scaling looks at the longest position of the whole batch, so one request's "
            f"answer would depend on its neighbours; set max_model_len to {original} or less, where it does not apply"
        )


def resolve_dtype(options: LoadOptions, text: PreTrainedConfig) -> torch.dtype:
    """The type of weights and KV. ConfigError if the options name none."""
    if options.dtype == "auto":
        own = text.dtype
        return own if isinstance(own, torch.dtype) else torch.bfloat16
    if options.dtype not in _DTYPES:
        raise ConfigError(f"dtype={options.dtype!r}: use auto or one of {', '.join(_DTYPES)}", param="dtype")
    return _DTYPES[options.dtype]


def choose_backend(options: LoadOptions, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """What computes attention where no whole decoder is compiled. ConfigError if the options name what cannot."""
    name = options.attention_backend
    if name == "auto":
        fast = find_spec("triton") if device.type == "cuda" else dtype in CpuBackend.dtypes
        name = device.type if fast else "reference"
    if name == "cpu" and device.type == "cpu" and dtype in CpuBackend.dtypes:
        return CpuBackend(options.num_threads)
    if name == "cuda" and device.type == "cuda":
        # Imported where there is a GPU only, and with it Triton.
        from tailserve.engine.model.cuda import CudaBackend

        return CudaBackend(torch.cuda.get_device_properties(device).multi_processor_count)
    if name == "reference":
        return ReferenceBackend()
    raise ConfigError(f"attention_backend={name!r} does not run {dtype} on {device}: use auto", param="attention_backend")


def _kv_shape(text: PreTrainedConfig, size: int) -> tuple[int, int, int]:
    """Layers, heads of keys and values at each of `size` ranks, and their width."""
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return text.num_hidden_layers, kv_heads // size, head_dim


def _max_model_len(options: LoadOptions, text: PreTrainedConfig) -> int:
    own: int = text.max_position_embeddings
    if options.max_model_len is None:
        return own
    if options.max_model_len > own:
        raise ConfigError(
            f"max_model_len={options.max_model_len} is above the {own} positions of the model: lower it",
            param="max_model_len",
        )
    return options.max_model_len


def _add_noise(model: PreTrainedModel, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            noise = torch.randn(weight.shape, generator=generator).to(weight.device)
            weight.add_((noise * weight.float().std() * scale).to(weight.dtype))

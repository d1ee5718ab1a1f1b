"""Which models get the compiled decoder, and whether its code is there already.

Compiling takes half a minute. The code depends on the type of the weights, not on the model, and is kept on disk.
Run as a program (python -m tailserve.engine.model.compiled bfloat16|float32 none|int8|head) it fills that cache: for models,
quantized or not, or for EAGLE heads.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numba
import torch
from filelock import FileLock
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tailserve.engine.errors import ConfigError, UnsupportedModelError
from tailserve.engine.model.avx512 import HAS_INT8_DOT
from tailserve.engine.model.decoder import CompiledDecoder, can_compile
from tailserve.engine.model.eagle_compiled import compile_head
from tailserve.engine.model.selfcheck import check_packed, eager_logits
from tailserve.engine.model.tiles import PAGE
from tailserve.engine.options import LoadOptions
from tailserve.engine.speculation.sampling import noise_keys

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecoderSettings:
    """How to build a compiled decoder."""

    num_blocks: int
    """Those to spare among them."""
    num_spare_blocks: int
    block_size: int
    max_model_len: int
    num_threads: int
    int8: bool

    @classmethod
    def of(cls, options: LoadOptions, num_blocks: int, max_model_len: int) -> DecoderSettings:
        threads = options.num_threads or os.cpu_count() or 1
        return cls(
            num_blocks, options.num_spare_blocks, options.block_size, max_model_len, threads, options.quantization == "int8"
        )


def wants_compiled(model: PreTrainedModel, options: LoadOptions) -> bool:
    """Whether the options ask for a compiled decoder, or leave it open and the model fits one.

    ConfigError where they ask for what cannot be.
    """
    if options.tensor_parallel_size > 1:
        return False
    wanted, int8 = options.attention_backend, options.quantization == "int8"
    if int8 and not HAS_INT8_DOT:
        raise ConfigError("quantization='int8' needs a CPU with AVX512-VNNI: use none", param="quantization")
    if int8 and wanted not in ("auto", "compiled"):
        raise ConfigError(
            f"quantization='int8' does not go with attention_backend={wanted!r}: use auto", param="quantization"
        )
    if wanted not in ("auto", "compiled"):
        return False
    if can_compile(model, options.block_size):
        return True
    if wanted == "auto" and not int8:
        return False
    raise ConfigError(
        f"attention_backend='compiled' and quantization='int8' need a CPU, bfloat16 or float32, a model built like Llama, "
        f"and block_size in multiples of {PAGE}: use auto, and none",
        param="quantization" if int8 else "attention_backend",
    )


def compile_model(model: PreTrainedModel, settings: DecoderSettings, expected: list[torch.Tensor]) -> CompiledDecoder | None:
    """The model as a compiled decoder, compared with what is `expected` of it; None if it answers otherwise.

    UnsupportedModelError instead where it is to be quantized.
    """
    paged = CompiledDecoder(
        model,
        num_blocks=settings.num_blocks,
        num_spare_blocks=settings.num_spare_blocks,
        block_size=settings.block_size,
        max_model_len=settings.max_model_len,
        num_threads=settings.num_threads,
        int8=settings.int8,
    )
    try:
        check_packed(paged, model, expected, quantized=settings.int8)
    except UnsupportedModelError as error:
        if settings.int8:
            raise
        logger.info("the compiled decoder does not fit this model, so transformers' own modules run it: %s", error.message)
        return None
    # The only other code that a step runs.
    paged.pick(torch.zeros(1, 64), [1.0], noise_keys([0], [0]))
    _mark(model.dtype, settings.int8).touch()
    # The compiled code has threads of its own, and two teams would take the cores from each other.
    torch.set_num_threads(1)
    return paged


def is_cached(dtype: torch.dtype, int8: bool) -> bool:
    """Whether code for such weights is on disk."""
    return _mark(dtype, int8).exists()


def head_is_cached(dtype: torch.dtype) -> bool:
    """Whether code for an EAGLE head of a verifier of this type is on disk."""
    return _mark(dtype, HAS_INT8_DOT, "-head").exists()


def may_run_beside() -> bool:
    """Whether two threads of this process may run compiled code at once: with Numba's last resort for threads, where neither
    libgomp nor TBB is installed, that ends the process. Known once compiled code has run."""
    return bool(numba.threading_layer() != "workqueue")  # type: ignore[attr-defined]


def compile_elsewhere(dtype: torch.dtype, what: str) -> None:
    """Puts code on disk by this module as a program, in a process of its own. RuntimeError says what it says at its end."""
    command = [sys.executable, "-m", "tailserve.engine.model.compiled", str(dtype).removeprefix("torch."), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def _mark(dtype: torch.dtype, int8: bool, what: str = "") -> Path:
    kind = str(dtype).removeprefix("torch.") + ("-int8" if int8 else "") + what
    folder = Path(numba.config.CACHE_DIR)  # type: ignore[attr-defined]
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{kind}.done"


def fill_cache(dtype: torch.dtype, *, int8: bool) -> None:
    """Compiles, by way of a small random model. Others that do so at the same time are waited for."""
    mark = _mark(dtype, int8)
    with FileLock(mark.with_suffix(".lock")):
        if mark.exists():
            return
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            LlamaForCausalLM(config).save_pretrained(folder)
            model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        model.requires_grad_(False)
        compile_model(model, DecoderSettings(8, 0, PAGE, 64, 1, int8), eager_logits(model))


def fill_head_cache(dtype: torch.dtype) -> None:
    """The same for EAGLE heads."""
    mark = _mark(dtype, HAS_INT8_DOT, "-head")
    with FileLock(mark.with_suffix(".lock")):
        if not mark.exists():
            compile_head(dtype, int8=HAS_INT8_DOT)
            mark.touch()


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind = getattr(torch, sys.argv[1])
    if sys.argv[2] == "head":
        fill_head_cache(kind)
    else:
        fill_cache(kind, int8=sys.argv[2] == "int8")

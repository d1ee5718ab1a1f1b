"""From a head's folder and its verifier's to a drafter."""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from queue import SimpleQueue

import msgspec
import torch
from safetensors import safe_open
from transformers import AutoConfig

from tailserve.engine.errors import ConfigError
from tailserve.engine.model.avx512 import HAS_INT8_DOT
from tailserve.engine.model.compiled import compile_elsewhere, head_is_cached, may_run_beside
from tailserve.engine.model.eagle import EagleHead, load_eagle
from tailserve.engine.model.eagle_compiled import CompiledHead, can_compile_head
from tailserve.engine.model.eagle_drafter import WINDOW, EagleDrafter, HeadModel
from tailserve.engine.model.eagle_torch import TorchHead
from tailserve.engine.model.loading import choose_backend, resolve_device, resolve_dtype
from tailserve.engine.model.spans import Span
from tailserve.engine.options import LoadOptions

logger = logging.getLogger(__name__)


def load_eagle_drafter(folder: Path, verifier: LoadOptions, *, num_blocks: int) -> EagleDrafter:
    """A drafter for the verifier that is loaded so. ConfigError if the head was made for another."""
    head = load_eagle(folder)
    device = resolve_device(verifier.device)
    text = AutoConfig.from_pretrained(verifier.path).get_text_config(decoder=True)
    head.check_fits(text.hidden_size, text.vocab_size, text.num_hidden_layers)
    dtype = resolve_dtype(verifier, text)
    embedding, lm_head = (weight.to(device) for weight in borrowed_weights(Path(verifier.path), dtype))
    max_model_len = verifier.max_model_len or text.max_position_embeddings
    num_features = head.fuse.in_features
    successors: SimpleQueue[Callable[[], HeadModel]] = SimpleQueue()

    def succeed(model: HeadModel) -> None:
        _warm_up(model, num_features, device)
        # Again in the thread that is to use it, for the sake of its number of threads.
        successors.put(lambda: _warm_up(model, num_features, device))

    model = make_head_model(
        head.to(device), embedding, lm_head, verifier, succeed, num_blocks=num_blocks, max_model_len=max_model_len
    )
    return EagleDrafter(_warm_up(model, num_features, device), head.draft_tokens.tolist(), successors)


def _warm_up(model: HeadModel, num_features: int, device: torch.device) -> HeadModel:
    """The first step reads compiled code from disk, which a request's first draft should not wait for."""
    model.step([Span([0], 0, [0], 1)], model.fuse(torch.zeros(1, num_features, device=device)))
    if isinstance(model, CompiledHead):
        # Behind that step, with which Numba sets the threads of all OpenMP to those of the machine. Two would wait for each
        # other in every small operation between steps, and spin on the verifier's cores behind it.
        torch.set_num_threads(1)
    return model


def make_head_model(
    head: EagleHead,
    embedding: torch.Tensor,
    lm_head: torch.Tensor,
    options: LoadOptions,
    succeed: Callable[[HeadModel], None] | None = None,
    *,
    num_blocks: int,
    max_model_len: int,
) -> HeadModel:
    """The fastest that takes the head and is there. `embedding` and `lm_head` [vocab, C] are the verifier's.

    `succeed`: given a faster one once its code is compiled, in a thread of its own.
    """
    rows = lm_head[head.draft_tokens]
    threads = options.num_threads or os.cpu_count() or 1
    wanted = options.attention_backend in ("auto", "compiled") and embedding.device.type == "cpu"
    compiles = wanted and can_compile_head(head, embedding.dtype, options.block_size)
    make = functools.partial(
        CompiledHead,
        embedding=embedding,
        lm_head=rows,
        num_blocks=num_blocks,
        block_size=options.block_size,
        max_model_len=max_model_len,
        window=WINDOW,
        # A team would still spin on the verifier's cores when its step begins.
        num_threads=1,
        int8=HAS_INT8_DOT,
    )
    if compiles and head_is_cached(embedding.dtype):
        return make(head)
    if compiles:
        logger.info("the draft's code is being compiled; until it is there PyTorch runs the draft")
        # PyTorch's changes the layers that it takes.
        another = deepcopy(head)

        def compile_head() -> None:
            _compile_head(embedding.dtype, lambda: make(another), succeed)

        threading.Thread(target=compile_head, name="head compiler", daemon=True).start()
    if embedding.device.type == "cpu":
        torch.set_num_threads(threads)
    # A whole decoder is compiled for verifiers only.
    options = msgspec.structs.replace(options, attention_backend=options.attention_backend.replace("compiled", "auto"))
    backend = choose_backend(options, embedding.device, embedding.dtype)
    return TorchHead(head, embedding, rows, backend, num_blocks=num_blocks, block_size=options.block_size, window=WINDOW)


def _compile_head(dtype: torch.dtype, make: Callable[[], HeadModel], succeed: Callable[[HeadModel], None] | None) -> None:
    try:
        compile_elsewhere(dtype, "head")
        if succeed is not None and may_run_beside():
            succeed(make())
    except Exception:
        logger.exception("compiling the draft's code failed, so PyTorch goes on")


def borrowed_weights(folder: Path, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A checkpoint's embedding and head [vocab, C], and nothing else of it. ConfigError if it names them unusually."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    else:
        file = folder / "model.safetensors"
        with safe_open(file, "pt") as tensors:
            places = dict.fromkeys(tensors.keys(), file)
    found: list[torch.Tensor] = []
    for ending in ("embed_tokens.weight", "lm_head.weight"):
        name = next((name for name in places if name.endswith(ending)), None)
        if name is None and not found:
            raise ConfigError(f"{folder} has no tensor named ...{ending}, which an EAGLE draft needs", param="draft_model")
        if name is not None:
            with safe_open(places[name], "pt") as tensors:
                found.append(tensors.get_tensor(name).to(dtype))
    return found[0], found[-1]

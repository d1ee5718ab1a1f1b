"""A model that answers at once, and faster once its compiled code is there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from tailserve.engine.model.compiled import DecoderSettings, compile_elsewhere, compile_model, may_run_beside
from tailserve.engine.model.decoder import CompiledDecoder
from tailserve.engine.model.paged import PagedModel, TransformersModel
from tailserve.engine.model.spans import Span

logger = logging.getLogger(__name__)


class UpgradingModel:
    """A `PagedModel`: transformers' modules while another process compiles, then the compiled decoder.

    The change comes between two steps and takes the keys and values along, so nobody who uses the model need know.
    """

    def __init__(
        self,
        plain: TransformersModel,
        settings: DecoderSettings,
        read: Callable[[], tuple[PreTrainedModel, list[torch.Tensor]]],
    ) -> None:
        """`read` loads the model again, as `compile_model` takes it: `plain` has changed the layers of its own."""
        self.num_blocks, self.block_size = plain.num_blocks, plain.block_size
        self.backend = plain.backend
        self._model: PagedModel = plain
        self._tapped: tuple[int, ...] = ()
        self._plain: TransformersModel | None = plain
        self._used = np.zeros(plain.num_blocks, bool)
        """Blocks that hold something."""
        self._ready: CompiledDecoder | None = None
        self._thread = threading.Thread(target=self._prepare, args=(settings, read), name="compile", daemon=True)
        self._thread.start()

    def forward(self, spans: Sequence[Span]) -> torch.Tensor:
        """See `PagedModel.forward`."""
        if self._plain is not None:
            if self._ready is not None:
                self._change(self._plain, self._ready)
            for span in spans:
                self._used[list(span.block_ids)] = True
        return self._model.forward(spans)

    @property
    def features(self) -> torch.Tensor | None:
        """See `PagedModel.features`."""
        return self._model.features

    def tap(self, layers: Sequence[int]) -> None:
        """See `PagedModel.tap`."""
        self._tapped = tuple(layers)
        self._model.tap(layers)

    def copy_block(self, source: int, target: int) -> None:
        """See `PagedModel.copy_block`."""
        self._used[target] = True
        self._model.copy_block(source, target)

    def kv_parts(self) -> list[torch.Tensor]:
        """See `PagedModel.kv_parts`. After the change these are others."""
        return self._model.kv_parts()

    def pick(self, logits: torch.Tensor, temperatures: Sequence[float], keys: np.ndarray) -> torch.Tensor:
        """See `PagedModel.pick`."""
        return self._model.pick(logits, temperatures, keys)

    def wait(self, timeout_s: float) -> bool:
        """Whether the compiled decoder is ready for the next step, or never will be."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _change(self, plain: TransformersModel, ready: CompiledDecoder) -> None:
        ready.take_over(plain.cache, np.flatnonzero(self._used))
        ready.tap(self._tapped)
        self._model, self._plain, self._ready = ready, None, None
        self.backend = ready.backend
        # For this thread: see `compile_model`.
        torch.set_num_threads(1)
        logger.info("the compiled decoder takes over")

    def _prepare(self, settings: DecoderSettings, read: Callable[[], tuple[PreTrainedModel, list[torch.Tensor]]]) -> None:
        try:
            # This thread's share: a second team of threads would take the cores from the model's.
            torch.set_num_threads(1)
            model, expected = read()
            compile_elsewhere(model.dtype, "int8" if settings.int8 else "none")
            if not may_run_beside():
                # The new decoder is checked while the plain one serves.
                logger.info("the compiled decoder serves from the next start on; with libgomp installed it could at once")
                return
            self._ready = compile_model(model, settings, expected)
        except Exception:
            logger.exception("compiling failed, so transformers' own modules go on")

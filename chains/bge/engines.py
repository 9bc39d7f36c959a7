"""What runs a BGE encoder: torch everywhere, and which engine `auto` takes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from chains.bge.directory import ModelDirectory
from chains.bge.tokenizer import BgeTokenizer
from chains.embeddings import Vectors

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "torch"]


@dataclass(frozen=True)
class BatchLimits:
    """How much an engine takes at once."""

    token_budget: int
    """Tokens, padding included."""
    rows: int


class Engine(Protocol):
    """Something that turns token ids into vectors."""

    name: str
    limits: BatchLimits

    def embed(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Vectors of one batch of token ids, (n, dimensions) float32."""


# bge-base shape, 2 cores: 1,024 to 2,048 tokens are within 3 %, 8,192 are a third slower (activations leave the cache)
CPU_LIMITS = BatchLimits(token_budget=2048, rows=32)
# enough to fill an accelerator; at bge-large's width about 2 GB of activations in 16 bits
GPU_LIMITS = BatchLimits(token_budget=65536, rows=1024)


class TorchEngine:
    """The reference: torch on CPU in float32, on a GPU in 16 bits."""

    def __init__(
        self, encoder: torch.nn.Module, directory: ModelDirectory, *, pad_id: int, name: str = "torch"
    ) -> None:
        """Args are an encoder from `load_encoder`, its directory and the id that pads."""
        self.name = name
        self._encoder = encoder
        self._directory = directory
        self._pad_id = pad_id
        self._device = next(encoder.parameters()).device
        self.limits = CPU_LIMITS if self._device.type == "cpu" else GPU_LIMITS

    def embed(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Vectors of one batch of token ids, (n, dimensions) float32."""
        import torch

        from chains.bge.encoder import embed, pad

        ids, mask = pad(rows, self._pad_id)
        was_training = self._encoder.training
        self._encoder.eval()
        try:
            with torch.inference_mode():
                mask = None if mask is None else mask.to(self._device)
                vectors = embed(self._encoder, ids.to(self._device), mask, self._directory)
        finally:
            self._encoder.train(was_training)
        return np.asarray(vectors.float().cpu().numpy(), dtype=np.float32)


def open_engine(
    name: EngineName,
    directory: ModelDirectory,
    adapter: Path | None,
    tokenizer: BgeTokenizer,
    *,
    device: str | None = None,
) -> Engine:
    """The engine of that name, its weights loaded."""
    from chains.bge.encoder import load_encoder

    encoder = load_encoder(directory, adapter, device=device or "cpu", merge=True)
    return TorchEngine(encoder, directory, pad_id=tokenizer.pad_id)

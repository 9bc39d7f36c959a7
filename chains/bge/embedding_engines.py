"""Engines of embedders: texts become vectors, which are held to those of float32 by their cosine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from chains.bge.directory import ModelDirectory
from chains.bge.engines import (
    CPU_LIMITS,
    DtypeName,
    Engine,
    EngineFactory,
    EngineName,
    SimpleEngine,
    TorchEngine,
    has_vnni,
    is_installed,
)
from chains.bge.tokenizer import BgeTokenizer
from chains.embeddings import Vectors

if TYPE_CHECKING:
    import torch

    from chains.bge.onnx_graph import Part

Ids = Sequence[int]

LEAST_COSINE = 0.999
"""Of an engine's vectors to the reference's, the lowest over the probe; an engine below it refuses itself."""

_PROBE_TOKENS = 128


class TorchEncoder(TorchEngine[Ids]):
    """An encoder in torch."""

    def __init__(self, encoder: torch.nn.Module, directory: ModelDirectory, *, pad_id: int) -> None:
        """Args are an encoder from `load_encoder`, its directory and the id that pads."""
        super().__init__(encoder, pad_id=pad_id)
        self._encoder = encoder
        self._directory = directory

    def _forward(self, rows: Sequence[Ids]) -> torch.Tensor:
        from chains.bge.encoder import embed

        return embed(self._encoder, *self._padded(rows, self._pad_id), self._directory)


class EncoderFactory(EngineFactory[Ids]):
    """Opens engines over an embedder; OpenVINO's are among them."""

    def __init__(
        self,
        directory: ModelDirectory,
        adapter: Path | None,
        tokenizer: BgeTokenizer,
        *,
        dimensions: int | None = None,
        device: str = "cpu",
        dtype: DtypeName = "auto",
    ) -> None:
        """Args are as of `BGEEmbeddings`, with one device; engines are held to the `dimensions` that are served."""
        super().__init__(directory, adapter, tokenizer, device=device, dtype=dtype)
        self._dimensions = dimensions or directory.dimensions

    def _load(self, device: str) -> torch.nn.Module:
        from chains.bge.encoder import load_encoder

        return load_encoder(self._directory, self._adapter, device=device, merge=True)

    def _torch_engine(self, model: torch.nn.Module) -> Engine[Ids]:
        return TorchEncoder(model, self._directory, pad_id=self._tokenizer.pad_id)

    def _write_graph(self, path: Path, *, wide_sums: bool, exact_parts: Collection[Part]) -> None:
        from chains.bge.onnx_graph import write_graph

        write_graph(path, self._model, self._directory, wide_sums=wide_sums, exact_parts=exact_parts)

    @property
    def _inputs(self) -> Callable[[Ids], Mapping[str, Ids]]:
        return _inputs

    @property
    def _candidates(self) -> tuple[EngineName, ...]:
        # without VNNI OpenVINO computes 8-bit weights in float32, which takes twice as long
        openvino: tuple[EngineName, ...] = ("openvino_int8",) if has_vnni() and is_installed("openvino_int8") else ()
        return super()._candidates + openvino

    @property
    def _chosen_for(self) -> tuple[object, ...]:
        # an engine may agree in whole vectors and not in their first numbers
        return (*super()._chosen_for, self._dimensions)

    def _forms(self, name: EngineName) -> Iterator[Engine[Ids]]:
        return iter([self._openvino(name)]) if name.startswith("openvino") else super()._forms(name)

    def _openvino(self, name: EngineName) -> Engine[Ids]:
        import torch

        from chains.bge.openvino import OpenVinoEngine, exported_model

        graph = exported_model(self._directory, self._digest, lambda: self._model, int8=name == "openvino_int8")
        engine = OpenVinoEngine(graph, pad_id=self._tokenizer.pad_id, threads=torch.get_num_threads())
        return SimpleEngine(name, engine.embed, parallel=False, limits=CPU_LIMITS)

    def _probe_rows(self) -> list[Ids]:
        """Four short texts and two of a passage's length."""
        limit = min(self._directory.max_tokens, _PROBE_TOKENS)
        texts = [*_PROBE, "".join(_PROBE * 4), "".join(reversed(_PROBE * 4))]
        return list(self._tokenizer.encode(texts, limit))

    def _apart(self, found: Vectors, expected: Vectors) -> str:
        """The lowest cosine where it is below the bar; it is 0 where vectors are no numbers."""
        found, expected = found[:, : self._dimensions], expected[:, : self._dimensions]
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        cosines = (found * expected).sum(axis=1) / np.maximum(lengths, 1e-12)
        lowest = float(np.nan_to_num(cosines, nan=0.0).min())
        return "" if lowest >= LEAST_COSINE else f"cosine {lowest:.5f} to float32, below {LEAST_COSINE}"


# Made up for this purpose: prose, figures, Latin words, a question.
_PROBE = (
    "知识库的备份怎样做？把整个目录复制到别处即可，数据库文件 kb.sqlite 是唯一需要保留的。",
    "2023年第一季度营业收入为1,284.5万元，同比增长12.3%；毛利率由38%升至41%，主要因为原材料价格下降。",
    "The encoder returns one vector per passage; cosine similarity ranks them, and BM25 finds exact terms.",
    "患者三天前出现发热、咳嗽，体温最高39度，自行服用退烧药后缓解，无胸痛，无呼吸困难，既往体健。",
)


def _inputs(row: Ids) -> Mapping[str, Ids]:
    return {"ids": row}

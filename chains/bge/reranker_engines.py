"""Engines of rerankers: pairs become logits, which are held to those of float32 by their order and their sigmoid."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from chains.bge.cross_encoder import PairIds, load_cross_encoder
from chains.bge.engines import CPU_LIMITS, BatchLimits, Engine, EngineFactory, TorchEngine
from chains.embeddings import Vectors

if TYPE_CHECKING:
    import torch

    from chains.bge.onnx_graph import Part

MOST_APART = 0.01
"""What a score in [0, 1] may be from that of float32: hardly any meets `min_relevance` that would not else."""

MOST_OF_SPREAD = 0.02
"""What a logit may be from that of float32, as a share of the probe's spread, from which passages take their order.

A sigmoid says nothing of that above 5 or below -5, where trained rerankers put most passages. One that was trained here
(4 layers, logits from -6 to 7) is 0.6% apart in 8 bits; 2% leaves passages in their order that are 4% apart.
"""

LEAST_SPREAD = 1.0
"""What a spread counts as where it is less: odds of 3 to 1 between an answer and a text from elsewhere.

A reranker below that has hardly begun to learn. Its logits may be 0.02 apart, 2% of the odds; random weights, whose
whole spread is a few hundredths, would otherwise refuse what no order hangs on.
"""

_PROBE_TOKENS = 128


class TorchCrossEncoder(TorchEngine[PairIds]):
    """A reranker in torch."""

    def __init__(self, network: Any, *, pad_id: int) -> None:
        """Args are a network from `load_cross_encoder` and the id that pads."""
        super().__init__(network, pad_id=pad_id)
        self._network = network
        self._typed = reads_types(network.config.model_type)

    def _forward(self, rows: Sequence[PairIds]) -> torch.Tensor:
        import torch

        ids, mask = self._padded([row.ids for row in rows], self._pad_id)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
        if self._typed:
            inputs["token_type_ids"] = self._padded([row.types for row in rows], 0)[0]
        logits: torch.Tensor = self._network(**inputs).logits
        return logits


class CrossEncoderFactory(EngineFactory[PairIds]):
    """Opens engines over a reranker; each computes (n, 1) logits."""

    _kind: ClassVar[str] = "reranker-"
    # it computes pair by pair in any case, and the candidates of one question should reach every core
    _onnx_limits: ClassVar[BatchLimits] = BatchLimits(CPU_LIMITS.token_budget, rows=1)

    def _load(self, device: str) -> torch.nn.Module:
        return load_cross_encoder(self._directory, self._adapter, device=device)

    def _torch_engine(self, model: torch.nn.Module) -> Engine[PairIds]:
        return TorchCrossEncoder(model, pad_id=self._tokenizer.pad_id)

    def _write_graph(self, path: Path, *, wide_sums: bool, exact_parts: Collection[Part]) -> None:
        from chains.bge.onnx_graph import write_cross_encoder_graph

        write_cross_encoder_graph(path, self._model, wide_sums=wide_sums, exact_parts=exact_parts)

    @property
    def _inputs(self) -> Callable[[PairIds], Mapping[str, Sequence[int]]]:
        return _typed_inputs if reads_types(self._directory.model_type) else _inputs

    def _probe_rows(self) -> list[PairIds]:
        limit = min(self._directory.max_tokens, _PROBE_TOKENS)
        pairs = [(query, passage) for query, passages in _PROBE.items() for passage in passages]
        return [PairIds(*row) for row in self._tokenizer.encode_pairs(pairs, limit)]

    def _apart(self, found: Vectors, expected: Vectors) -> str:
        return disagreement(found, expected)


def disagreement(found: Vectors, expected: Vectors) -> str:
    """In which way logits are not those of float32, both (n, 1); empty where they agree."""
    apart = float(np.abs(sigmoid(found) - sigmoid(expected)).max())
    error, spread = float(np.abs(found - expected).max()), float(np.ptp(expected))
    allowed = MOST_OF_SPREAD * max(spread, LEAST_SPREAD)
    if apart <= MOST_APART and error <= allowed:  # neither holds of what is no number
        return ""
    return (
        f"scores {apart:.4f} from float32 (at most {MOST_APART}),"
        f" logits {error:.4f} (at most {allowed:.4f}, their spread is {spread:.2f})"
    )


def sigmoid(logits: Vectors) -> Vectors:
    """Scores in [0, 1], float32; in float64 between, where -100 does not overflow."""
    return np.asarray(1 / (1 + np.exp(-logits.astype(np.float64))), dtype=np.float32)


def reads_types(model_type: str) -> bool:
    """Whether a model tells question and passage apart by token types: XLM-RoBERTa knows one only."""
    return model_type == "bert"


def _inputs(row: PairIds) -> Mapping[str, Sequence[int]]:
    return {"ids": row.ids}


def _typed_inputs(row: PairIds) -> Mapping[str, Sequence[int]]:
    return {"ids": row.ids, "types": row.types}


# Made up for this purpose: of each question a passage that answers it, one that is near, one from elsewhere, one long.
_PROBE = {
    "知识库的备份怎样做？": (
        "知识库的备份：把整个目录复制到别处即可，数据库文件 kb.sqlite 是唯一需要保留的。",
        "备份之前不需要停止服务。",
        "患者三天前出现发热、咳嗽，体温最高39度，自行服用退烧药后缓解。",
        "",
    ),
    "2023年第一季度的毛利率是多少？": (
        "2023年第一季度营业收入为1,284.5万元，同比增长12.3%；毛利率由38%升至41%，主要因为原材料价格下降。",
        "毛利率等于毛利除以营业收入。",
        "The encoder returns one vector per passage; cosine similarity ranks them.",
        "第一季度营业收入同比增长，毛利率上升，主要因为原材料价格下降；" * 6,
    ),
    "How are passages ranked?": (
        "Passages are ranked by cosine similarity; BM25 adds what has the exact terms.",
        "BM25 finds exact terms.",
        "第一条 为了惩罚犯罪，保护人民，根据宪法，制定本法。",
        "The encoder returns one vector per passage, and an index holds them all. " * 10,
    ),
}

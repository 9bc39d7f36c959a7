"""Relevance: the probability, in [0, 1], that a passage answers a question, whatever embedder found it.

Two estimates, the better one counts. What a passage *mentions* of the question needs no embedder. How *near* it is, by
cosine, means something else with every embedder, so the knowledge base itself is the measure: a passage is near when it
stands out from a sample of the knowledge base's chunks by more than the best of that many chunks does by chance.
The lexical embedder counts the same words, so for it the first estimate says all.

`benchmarks/fit_relevance.py` fits the weights and tells how far to trust them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence

import numpy as np
from langchain_core.documents import Document

from chains.embeddings import Vectors, embed_documents
from chains.extraction import shares_mentioned
from chains.lexical_embeddings import LexicalEmbeddings
from chains.vectorstores import FaissVectorStore
from loaders.splitters import context_lines

# Logistic regression: what each adds to the logarithm of the odds that the passage answers.
MENTION_WEIGHTS = {
    "constant": -7.3,
    "pairs": 10.9,  # share of the question's information in Han pairs and words that passage and headings mention
    "characters": 5.1,  # likewise over single characters, which a rephrased question still shares
}
NEARNESS_WEIGHTS = {
    "constant": -1.8,
    "excess": 0.88,  # standard deviations above what the nearest of all chunks reaches by chance
}

_SAMPLE = 256  # chunks; the spread is then known to 5 %
_SAMPLE_LEAST = 64  # with fewer chunks the sentences below stand in
_LEAST_SPREAD = 0.01  # an embedder that puts everything in one place tells nothing
_GROWTH = 1.25  # of the knowledge base, from which on another sample is drawn

# About anything: a small knowledge base is no measure of itself. None asks or answers what documents are kept for.
_ELSEWHERE = (
    "昨天下午的雨一直下到深夜。", "他把自行车停在楼下的树旁边。", "这道菜要用小火慢慢炖两个小时。",
    "孩子们在操场上踢足球。", "火车晚点了二十分钟。", "她最喜欢的颜色是浅蓝色。", "山顶的积雪到五月才融化。",
    "老人每天清晨去公园打太极拳。", "这首歌在八十年代非常流行。", "蜜蜂在花丛中飞来飞去。", "他们打算明年去海边度假。",
    "书架上摆满了旧杂志。", "厨房的灯坏了。", "月亮绕着地球转。", "球队在最后一分钟进球获胜。", "猫趴在窗台上晒太阳。",
    "这座桥建于一百多年前。", "妈妈给我织了一条围巾。", "股票市场今天小幅上涨。", "演员们正在后台化妆。",
    "细胞是生物体的基本单位。", "农民在田里插秧。", "新手机的屏幕更大了。", "小说的结尾出人意料。",
    "法院下周开庭审理此案。", "医生建议他多喝水。", "沙漠里白天很热，夜里很冷。", "飞机在跑道上滑行。",
    "画家用油彩描绘了日落。", "学校门口新开了一家面包店。", "The train leaves at noon.", "She painted the fence green.",
)  # fmt: skip


def mention_relevance(question: str, document: Document) -> float:
    """The probability that a passage answers, by what it, its title and headings mention of the question; 0 to 1.

    0.0 for a question that tells nothing, and where nothing of it is mentioned.
    """
    features = mention_features(question, document)
    return logistic(MENTION_WEIGHTS, features) if features["pairs"] or features["characters"] else 0.0


def mention_features(question: str, document: Document) -> dict[str, float]:
    """What `MENTION_WEIGHTS` weighs."""
    pairs, characters = shares_mentioned(question, document.page_content, " ".join(context_lines(document)))
    return {"pairs": pairs, "characters": characters}


def nearness_relevance(cosines: Sequence[float], background: Vectors, chunks: int) -> list[float]:
    """The probability that each passage answers, by its cosine to the question.

    Args:
        cosines: of the passages and the question.
        background: cosines of the question and chunks that are not known to have to do with it, (n,).
        chunks: in the knowledge base.
    """
    return [logistic(NEARNESS_WEIGHTS, {"excess": above}) for above in excess(cosines, background, chunks)]


def excess(cosines: Sequence[float], background: Vectors, chunks: int) -> list[float]:
    """By how many standard deviations of the background cosines are above what the nearest chunk reaches by chance.

    The largest of n normal deviates lies at about sqrt(2 ln n).
    """
    mean, spread = float(background.mean()), max(float(background.std()), _LEAST_SPREAD)
    return [(cosine - mean) / spread - math.sqrt(2 * math.log(max(chunks, 2))) for cosine in cosines]


class Background:
    """Vectors of a sample of a store's chunks, kept until the knowledge base has changed its size or its embedder."""

    def __init__(self, store: FaissVectorStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._revision = ""
        self._generation = -1
        self._counted = 0  # chunks at that revision
        self._chunks = 0  # when the sample was drawn
        self._vectors: Vectors | None = None

    def relevances(self, query: Vectors, vectors: Mapping[int, Vectors]) -> dict[int, float]:
        """`nearness_relevance` of each chunk whose vector is given.

        Empty with the lexical embedder, where mentions say all, and in an empty knowledge base.
        """
        if isinstance(self._store.embeddings, LexicalEmbeddings):
            return {}
        with self._lock:
            self._refresh()
            sample, chunks = self._vectors, self._chunks
        if sample is None:
            return {}
        cosines = [float(vector @ query) for vector in vectors.values()]
        return dict(zip(vectors, nearness_relevance(cosines, sample @ query, chunks), strict=True))

    def _refresh(self) -> None:
        knowledge_base = self._store.knowledge_base
        revision = knowledge_base.revision()
        generation = self._store.check_embedder()
        if generation is None or (revision == self._revision and generation.id == self._generation):
            return
        changes = knowledge_base.changes_since(self._revision)
        if changes is None:
            self._revision, self._counted = revision, knowledge_base.chunk_count()
        else:  # to count all anew would take a tenth of a second at 1M chunks
            self._revision, self._counted = changes.revision, self._counted + len(changes.shown) - len(changes.hidden)
        chunks = self._counted
        alike = self._chunks / _GROWTH <= chunks <= self._chunks * _GROWTH
        if self._vectors is not None and alike and generation.id == self._generation:
            return
        ids = knowledge_base.chunk_ids()
        chosen = np.random.default_rng(0).choice(ids, min(_SAMPLE, len(ids)), replace=False)
        parts = [rows for _, rows in knowledge_base.vectors(generation.id, chosen)]
        if len(ids) < _SAMPLE_LEAST:
            parts.append(embed_documents(self._store.embeddings, _ELSEWHERE))
        self._generation, self._chunks = generation.id, len(ids)
        self._vectors = np.concatenate(parts)


def logistic(weights: Mapping[str, float], values: Mapping[str, float]) -> float:
    """The probability whose log odds are the constant and the weighted values."""
    logit = weights["constant"] + sum(weights[name] * value for name, value in values.items())
    return 1 / (1 + math.exp(-logit))

"""Recall of the dense, lexical and hybrid retrievers on every question set, each through the component that serves.

    python -m benchmarks.retrieval_quality                    # every set whole: 15 minutes on 2 cores
    python -m benchmarks.retrieval_quality --questions 1000   # at most so many of each
    python -m benchmarks.retrieval_quality --work DIR         # keep the knowledge bases

A passage ranks where its first chunk does. The questions of `cmrc2018_devtest` are also asked in traditional characters
(OpenCC s2t), in full width and in capitals. Tune on the other sets, not on `cmrc2018_devtest`.

Terms of the lexical leg, chosen in November 2026 by BM25 in memory over the same chunks, recall@1 / @5 (1,200 questions
of the larger sets; words by jieba, which is no dependency):

| terms | cmrc2018_trial | ..._train_substitute | dureader2_demo_train | medfaq_train |
|---|---|---|---|---|
| pairs | .957 / .989 | .962 / .997 | .469 / 1.0 | .142 / .240 |
| pairs, question words left out | .964 / .991 | .972 / .998 | .448 / 1.0 | .148 / .250 |
| words, question words left out | .970 / .988 | .973 / .993 | .438 / .990 | .148 / .247 |
| words and pairs, likewise | .972 / .992 | .974 / .995 | .500 / 1.0 | .150 / .256 |
| words and characters, likewise | .974 / .993 | .974 / .995 | .375 / 1.0 | .165 / .277 |
| **pairs and characters, likewise** | .980 / .996 | .982 / .998 | .469 / 1.0 | .171 / .276 |
| pairs and triples, likewise | .954 / .978 | .948 / .983 | .427 / 1.0 | .129 / .228 |
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from opencc import OpenCC

from benchmarks.machine import RESULTS, Report
from benchmarks.measuring import latency
from chains import build_retrieval_qa, load_config
from chains.evaluation import Question, evaluate, read_questions
from chains.fulltext import FullTextIndex
from chains.ingestion import Ingestor
from chains.metrics import mrr_at_k, recall_at_k
from chains.retrieval_qa import build_vectorstore
from chains.retrievers import ChunkRetriever, DenseRetriever, HybridRetriever, LexicalRetriever
from chains.vectorstores import FaissVectorStore

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
POOLS = {
    "cmrc2018": [f"cmrc2018_{part}" for part in ("cluetest", "dev", "trial")],
    "dureader2": [f"dureader2_demo_{part}" for part in ("dev", "train", "test")],
    "medfaq": ["medfaq_train"],
    "statutes": ["statutes_core"],
}
SETS = {
    "cmrc2018_trial": "cmrc2018",
    "cmrc2018_train_substitute": "cmrc2018",
    "dureader2_demo_train": "dureader2",
    "medfaq_train": "medfaq",
    "cmrc2018_devtest": "cmrc2018",
    "dureader2_demo_dev": "dureader2",
}
DEPTHS = (1, 5, 10)
_CHUNKS = 60  # enough for ten passages
_BARS = {
    "cmrc2018_devtest": {1: 0.965, 5: 0.998},
    "dureader2_demo_dev": {1: 0.46, 5: 0.98},
}
_CONTAINS_GOLD_BAR, _CHARACTERS_BAR = 0.78, 120.0
_SAMPLE = 256


@dataclass
class Pool:
    """A knowledge base of passages with its retrievers."""

    store: FaissVectorStore
    fulltext: FullTextIndex
    passages: dict[int, frozenset[str]]
    """ids of the records that hold a chunk"""

    @property
    def hybrid(self) -> HybridRetriever:
        """The default retriever."""
        return HybridRetriever(store=self.store, fulltext=self.fulltext)

    def legs(self) -> dict[str, ChunkRetriever]:
        """The three retrievers."""
        return {
            "dense": DenseRetriever(store=self.store),
            "lexical": LexicalRetriever(store=self.store, fulltext=self.fulltext),
            "hybrid": self.hybrid,
        }

    @cached_property
    def vectors(self) -> dict[int, NDArray[np.float32]]:
        """Every chunk's vector."""
        generation = self.store.check_embedder()
        assert generation is not None
        found = self.store.knowledge_base.vectors(generation.id, self.store.knowledge_base.chunk_ids())
        return {int(i): row for ids, rows in found for i, row in zip(ids, rows, strict=True)}

    @cached_property
    def sample(self) -> NDArray[np.float32]:
        """Vectors of some chunks, (n, dimensions)."""
        chosen = random.Random(0).sample(sorted(self.vectors), min(_SAMPLE, len(self.vectors)))
        return np.array([self.vectors[i] for i in chosen])


def open_pool(name: str, work: Path) -> Pool:
    """The knowledge base of a pool below `work`, made where it is not there yet."""
    config = load_config(None, [f"kb={work / name}"])
    store = build_vectorstore(config, create=True)
    fulltext = FullTextIndex(store.knowledge_base)
    paths = [DATA / f"{part}_passages.jsonl" for part in POOLS[name]]
    Ingestor(store, fulltext, loader=config.loader, splitter=config.splitter).ingest(paths)
    chunks = store.knowledge_base.chunks(store.knowledge_base.chunk_ids().tolist())
    holders = {i: [chunk.metadata, *chunk.duplicates] for i, chunk in chunks.items()}
    return Pool(store, fulltext, {i: frozenset(str(holder["id"]) for holder in held) for i, held in holders.items()})


def read(name: str, at_most: int | None) -> list[Question]:
    """The questions of a set that name a passage; some of them, where there are more than asked for."""
    rows = [row for row in read_questions(DATA / f"{name}.jsonl") if row.gold and row.question.strip()]
    return rows if at_most is None or len(rows) <= at_most else random.Random(0).sample(rows, at_most)


def recall(pool: Pool, retriever: ChunkRetriever, asked: Iterable[tuple[str, Sequence[str]]]) -> dict[str, float]:
    """Recall@1, 5, 10 and MRR@10 of (question, gold ids) pairs."""
    rows: list[list[float]] = []
    for question, gold in asked:
        wanted = set(gold)
        found = [pool.passages[i] for i, _ in retriever.rank(question, _CHUNKS)]
        ranked = [next(iter(sorted(held & wanted)), min(held)) for held in found]
        rows.append([*(recall_at_k(ranked, gold, k) for k in DEPTHS), mrr_at_k(ranked, gold, 10)])
    means = np.array(rows).mean(axis=0)
    return {**{f"recall@{k}": float(means[n]) for n, k in enumerate(DEPTHS)}, "mrr@10": float(means[-1])}


def wide(text: str) -> str:
    """Letters, digits and punctuation in full width."""
    return "".join(chr(ord(character) + 0xFEE0) if "!" <= character <= "~" else character for character in text)


def forms() -> dict[str, Callable[[str], str]]:
    """Ways of writing the same question."""
    return {"traditional": OpenCC("s2t").convert, "full width": wide, "capitals": str.upper}


def main() -> None:
    """Measure, judge, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, help="of each set, at most")
    parser.add_argument("--work", type=Path, help="keep the knowledge bases here")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with (
        TemporaryDirectory() as temporary,
        Report("retrieval_quality", {"questions": options.questions}, options.results) as report,
    ):
        work = options.work or Path(temporary)
        pools = {name: open_pool(name, work) for name in POOLS if name in SETS.values()}
        for name, home in SETS.items():
            measure(report, name, pools[home], read(name, options.questions))
        devtest = read("cmrc2018_devtest", options.questions)
        measure_answers(report, work / "cmrc2018", devtest)
        measure_forms(report, pools["cmrc2018"], devtest)
        measure_latency(report, pools["medfaq"], [row.question for row in devtest[:200]])


def measure(report: Report, name: str, pool: Pool, rows: Sequence[Question]) -> None:
    """A set asked of every retriever, and the hybrid one held to its legs."""
    asked = [(row.question, row.gold) for row in rows]
    found: dict[str, dict[str, float]] = {}
    for leg, retriever in pool.legs().items():
        found[leg] = recall(pool, retriever, asked)
        report.add("recall", set=name, questions=len(asked), retriever=leg, **found[leg])
    for k in DEPTHS:
        legs = max(found["dense"][f"recall@{k}"], found["lexical"][f"recall@{k}"])
        report.bar(f"{name}: hybrid recall@{k}", found["hybrid"][f"recall@{k}"], legs - 0.005, "", at_least=True)
    for k, bar in _BARS.get(name, {}).items():
        report.bar(f"{name}: promised recall@{k}", found["hybrid"][f"recall@{k}"], bar, "", at_least=True)


def measure_answers(report: Report, path: Path, rows: Sequence[Question]) -> None:
    """What the default chain answers, through `ragproj evaluate`."""
    answer = evaluate(build_retrieval_qa(load_config(None, [f"kb={path}"])), rows)["answer"]
    report.add("answers", set="cmrc2018_devtest", questions=len(rows), **answer)
    report.bar("promised contains_gold", answer["contains_gold"], _CONTAINS_GOLD_BAR, "", at_least=True)
    report.bar("at so many characters", answer["mean_chars"], _CHARACTERS_BAR, "characters")


def measure_forms(report: Report, pool: Pool, rows: Sequence[Question]) -> None:
    """Other ways of writing the questions, held to the plain one."""
    plain = recall(pool, pool.hybrid, [(row.question, row.gold) for row in rows])
    for form, convert in forms().items():
        found = recall(pool, pool.hybrid, [(convert(row.question), row.gold) for row in rows])
        changed = sum(convert(row.question) != row.question for row in rows)
        report.add("forms", form=form, changed=changed, **found)
        report.bar(f"{form}: recall@1", found["recall@1"], plain["recall@1"] - 0.01, "", at_least=True)


def measure_latency(report: Report, pool: Pool, questions: Sequence[str]) -> None:
    """Milliseconds of a ranking, the query vector given, and of the whole retrieval."""
    retriever = pool.hybrid
    vectors = {question: pool.store.embed_query(question) for question in questions}
    tasks: dict[str, Callable[[str], Any]] = {
        "rank, vector given": lambda question: retriever.rank(question, 5, vector=vectors[question]),
        "retrieve": retriever.invoke,
    }
    for task, function in tasks.items():
        report.add("latency", task=task, chunks=len(pool.passages), **vars(latency(function, questions)))


if __name__ == "__main__":
    main()

"""Retrieval by `LexicalEmbeddings` alone: exact cosine over chunks, a passage scored by its best chunk.

    python -m benchmarks.lexical_recall ../shared/data --chunk-sizes 128 192 256 --dimensions 1024
    python -m benchmarks.lexical_recall ../shared/data --test      # once, after tuning

Without --test the questions of cmrc2018_train_substitute, cmrc2018_trial and DuReader's train part are asked; with it
those of cmrc2018_devtest and DuReader's dev part. A chunk is embedded as the product embeds it: title, then text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from langchain_core.documents import Document
from numpy.typing import NDArray

from chains.lexical_embeddings import LexicalEmbeddings
from loaders.splitters import SplitterConfig, embedding_text, split_document

POOLS = {
    "cmrc2018": [f"cmrc2018_{part}_passages" for part in ("dev", "trial", "cluetest")],
    "dureader2": [f"dureader2_demo_{part}_passages" for part in ("train", "dev", "test")],
}
TUNING = ("cmrc2018_train_substitute", "cmrc2018_trial", "dureader2_demo_train")
TEST = ("cmrc2018_devtest", "dureader2_demo_dev")


def main() -> None:
    """Print one line per chunk size, dimensions and question set."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("source", type=Path)
    arguments.add_argument("--chunk-sizes", type=int, nargs="+", default=[128, 192, 256, 384])
    arguments.add_argument("--dimensions", type=int, nargs="+", default=[1024])
    arguments.add_argument("--test", action="store_true")
    options = arguments.parse_args()
    for size in options.chunk_sizes:
        for dimensions in options.dimensions:
            for stem in TEST if options.test else TUNING:
                report(options.source, stem, LexicalEmbeddings(dimensions=dimensions), size)


def report(source: Path, stem: str, embeddings: LexicalEmbeddings, chunk_size: int) -> None:
    """Print recall and MRR of the questions `stem` over the pool they belong to."""
    passages = [row for name in POOLS[stem.split("_")[0]] for row in rows(source / f"{name}.jsonl")]
    config = SplitterConfig(chunk_size=chunk_size)
    chunks, owners = [], []
    for owner, passage in enumerate(passages):
        document = Document(page_content=passage["text"], metadata={"title": passage["title"]})
        for chunk in split_document(document, config, embeddings.count_tokens):
            chunks.append(embedding_text(chunk))
            owners.append(owner)
    start = time.perf_counter()
    vectors = embeddings.embed_documents_array(chunks)
    seconds = time.perf_counter() - start
    places = {passage["id"]: place for place, passage in enumerate(passages)}
    questions, gold = [], []
    for row in rows(source / f"{stem}.jsonl"):
        wanted = [places[id_] for id_ in row.get("pos_ids") or [row.get("context_id")] if id_ in places]
        if wanted:
            questions.append(row["question"])
            gold.append(wanted)
    ranks = gold_ranks(embeddings.embed_documents_array(questions), vectors, np.array(owners), gold)
    recalls = " ".join(f"R@{k} {(ranks <= k).mean():.3f}" for k in (1, 5, 10))
    print(
        f"{stem} n={len(ranks)} chunk={chunk_size} d={embeddings.dimensions} chunks={len(chunks)} {recalls} "
        f"MRR@10 {np.where(ranks <= 10, 1 / ranks, 0).mean():.3f} embed {seconds:.1f} s",
        flush=True,
    )


def gold_ranks(
    queries: NDArray[np.float32], vectors: NDArray[np.float32], owners: NDArray[np.int64], gold: Sequence[list[int]]
) -> NDArray[np.int64]:
    """Rank, from 1, of the best gold passage of each question; `owners` is ascending and names each chunk's passage."""
    firsts = np.flatnonzero(np.diff(owners, prepend=-1))
    ranks = []
    for query, wanted in zip(queries, gold, strict=True):
        scores = np.maximum.reduceat(vectors @ query, firsts)
        ranks.append(1 + int((scores > scores[wanted].max()).sum()))
    return np.array(ranks)


def rows(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    with path.open(encoding="utf-8") as lines:  # not splitlines(): texts contain U+2028
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    main()

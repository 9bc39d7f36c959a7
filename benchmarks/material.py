"""What benchmarks work on: real passages, as many more made of their sentences as are asked for, and questions."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from langchain_core.embeddings import Embeddings

from chains.lexical_embeddings import LexicalEmbeddings

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

_PASSAGE_FILES = (
    "statutes_core",
    "cmrc2018_dev",
    "cmrc2018_trial",
    "cmrc2018_cluetest",
    "medfaq_train",
    "dureader2_demo_dev",
    "dureader2_demo_train",
    "dureader2_demo_test",
)
_QUESTION_FILES = {"cmrc2018_devtest": 150, "medfaq_train": 100, "dureader2_demo_dev": 50}
_CHUNK_CHARACTERS = 256  # of the default splitter: a passage is one chunk
_SENTENCES = re.compile(r"(?<=[。！？；])")
_BATCH = 20_000


@dataclass(frozen=True)
class Passage:
    """A record to ingest; about one chunk."""

    title: str
    text: str


class GivenVectors(Embeddings):
    """LexicalEmbeddings that looks questions up: what a query costs when its vector is there already."""

    def __init__(self, questions: Sequence[str]) -> None:
        self._embeddings = LexicalEmbeddings()
        self.fingerprint = self._embeddings.fingerprint
        self._vectors = {question: self._embeddings.embed_query(question) for question in questions}

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Computed."""
        return self._embeddings.embed_documents(texts)

    def embed_query(self, text: str) -> list[float]:
        """Looked up."""
        return self._vectors[text]


def passages(count: int) -> Iterator[Passage]:
    """The first `count` passages: 28,791 real ones, shuffled and cut to a chunk, then mixtures of their sentences.

    A mixture takes about half of its sentences, and its title, from one real passage, so that neighbours stay near,
    the others from anywhere.
    """
    real = [row for name in _PASSAGE_FILES for row in _rows(f"{name}_passages")]
    chosen = random.Random(0)
    chosen.shuffle(real)
    groups = []
    for row in real:
        title = row["title"] or row["text"][:12]
        sentences = [sentence for sentence in _SENTENCES.split(row["text"]) if 8 < len(sentence) < 120]
        if sentences:
            groups.append((title, sentences))
    everywhere = [sentence for _, sentences in groups for sentence in sentences]

    def endless() -> Iterator[Passage]:
        yield from (Passage(row["title"] or row["text"][:12], row["text"][:_CHUNK_CHARACTERS]) for row in real)
        while True:
            title, sentences = chosen.choice(groups)
            length = chosen.randint(2, 5)
            own = chosen.sample(sentences, min(len(sentences), length // 2 + 1))
            text = "".join(own + chosen.sample(everywhere, length - length // 2))
            yield Passage(title, text[:_CHUNK_CHARACTERS])

    return islice(endless(), count)


def questions() -> list[str]:
    """300 questions people asked, of three data sets."""
    return [row["question"] for name, count in _QUESTION_FILES.items() for row in islice(_rows(name), count)]


def write_records(path: Path, records: Iterable[Passage], *, first: int = 0) -> Path:
    """Passages as JSON lines with ids counted from `first`."""
    with path.open("w", encoding="utf-8") as file:
        for number, record in enumerate(records, first):
            row = {"id": f"p{number}", "title": record.title, "text": record.text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def lexical_vectors(work: Path, count: int) -> npt.NDArray[np.float16]:
    """Vectors of the first `count` passages, (count, 1024), made once and kept in `work`."""
    path = work / f"vectors-{count}.npy"
    if not path.exists():
        embeddings = LexicalEmbeddings()
        shape = (count, embeddings.dimensions)
        temporary = path.with_suffix(".part")
        made = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
        texts = (f"{passage.title}\n{passage.text}" for passage in passages(count))
        for start in range(0, count, _BATCH):
            batch = list(islice(texts, _BATCH))
            made[start : start + len(batch)] = embeddings.embed_documents_array(batch)
        made.flush()
        temporary.replace(path)
    vectors: npt.NDArray[np.float16] = np.load(path, mmap_mode="r")
    return vectors


def clustered_vectors(
    count: int, dimensions: int, asked: int, *, seed: int = 0
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """Random unit vectors shaped like a semantic embedder's, (count, dimensions), and queries (asked, dimensions).

    Points scatter around topics, topics around a common mean (anisotropy), and the variance of dimensions falls like
    1 / rank; queries are points moved by half a scatter.
    """
    draw = np.random.default_rng(seed)
    scale = np.arange(1, dimensions + 1, dtype=np.float32) ** -0.5
    rotation = np.linalg.qr(draw.standard_normal((dimensions, dimensions)).astype(np.float32))[0]
    mean = draw.standard_normal(dimensions).astype(np.float32) * scale
    topics = mean + draw.standard_normal((max(1, count // 60), dimensions)).astype(np.float32) * scale
    made = np.empty((count, dimensions), np.float16)
    for start in range(0, count, _BATCH):
        size = min(_BATCH, count - start)
        points = topics[draw.integers(len(topics), size=size)]
        points = points + 0.6 * draw.standard_normal(points.shape).astype(np.float32) * scale
        made[start : start + size] = _unit(points @ rotation)
    chosen = topics[draw.integers(len(topics), size=asked)]
    moved = chosen + 0.6 * draw.standard_normal(chosen.shape).astype(np.float32) * scale
    return made, _unit(moved @ rotation)


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    unit: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def _rows(name: str) -> Iterator[dict[str, str]]:
    with (DATA / f"{name}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)

"""BGEEmbeddings: LangChain's Embeddings over a BGE model, exactly as it was trained."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from langchain_core.embeddings import Embeddings

from chains.bge.directory import ModelDirectory, digest, read_model_directory, resolve_model, trained_prefixes
from chains.bge.embedding_engines import EncoderFactory, Ids, TorchEncoder
from chains.bge.engines import DtypeName, Engine, EngineName, devices
from chains.bge.pool import EnginePool, ahead
from chains.bge.tokenizer import BgeTokenizer, truncated
from chains.embeddings import Vectors, unit_length
from chains.lora import resolve_adapter
from loaders.errors import UsageError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# texts tokenized at once, while those before them are computed; their lengths are sorted together
_WINDOW = 8192


class BGEEmbeddings(Embeddings):
    """Vectors of a BGE encoder: bge-small, -base and -large v1.5 in Chinese and English, bge-m3's dense ones.

    The constructor reads the directory; weights load with the first text. One object may serve many threads.
    """

    def __init__(
        self,
        model: str | Path,
        adapter: str | Path | None = None,
        engine: EngineName = "auto",
        *,
        query_instruction: str | None = None,
        max_length: int | None = None,
        dimensions: int | None = None,
        device: str | None = None,
        dtype: DtypeName = "auto",
    ) -> None:
        """The embedder in a model directory.

        Args:
            model: directory of the model, or a model id that is fetched once.
            adapter: directory of a LoRA adapter trained on it.
            engine: what computes; `auto` takes the fastest that agrees with the reference and logs why.
            query_instruction: put before queries; the directory's own without one, "" for none.
            max_length: tokens of a text, [CLS] and [SEP] included; the directory's own limit without one.
            dimensions: numbers of a vector that are kept, its first ones, brought to unit length again where the
                directory normalises; all without one. For models whose training had this length in `matryoshka`.
            device: "cpu", "cuda" for every GPU, or some of them ("cuda:0,cuda:1"); GPUs where there are any without it.
            dtype: of the engine `torch`; `auto` is float32 on a CPU and float16 on a GPU.

        Raises:
            ModelDirectoryError: there is no such model, or it is no BGE.
            UsageError: the model has no vectors or texts of such a length.
        """
        directory = read_model_directory(resolve_model(model))
        self._setup(directory, query_instruction=query_instruction, max_length=max_length, dimensions=dimensions)
        self.adapter = None if adapter is None else resolve_adapter(adapter)
        _report_untrained(self.adapter or directory.path, self.dimensions, whole=directory.dimensions)
        self._factories += [
            EncoderFactory(
                directory, self.adapter, self.tokenizer, dimensions=self.dimensions, device=name, dtype=dtype
            )
            for name in devices(device)
        ]
        self._engine_name: EngineName = engine

    @classmethod
    def from_encoder(cls, encoder: torch.nn.Module, directory: ModelDirectory) -> BGEEmbeddings:
        """An embedder over weights in memory, such as those of a training under way; it sees every later change."""
        embeddings = cls.__new__(cls)
        embeddings._setup(directory, query_instruction=None, max_length=None, dimensions=None)
        embeddings.adapter = None
        embeddings._encoder = encoder
        embeddings._pool = EnginePool([TorchEncoder(encoder, directory, pad_id=embeddings.tokenizer.pad_id)])
        return embeddings

    def _setup(
        self,
        directory: ModelDirectory,
        *,
        query_instruction: str | None,
        max_length: int | None,
        dimensions: int | None,
    ) -> None:
        if max_length is not None and not 3 <= max_length <= directory.max_tokens:
            raise UsageError(
                f"max_length 是 {max_length}；模型 {directory.path} 最多 {directory.max_tokens} 个 token，最少 3 个",
                f"max_length is {max_length}; the model in {directory.path} takes 3 to {directory.max_tokens} tokens",
            )
        if dimensions is not None and not 1 <= dimensions <= directory.dimensions:
            raise UsageError(
                f"dimensions 是 {dimensions}；模型 {directory.path} 的向量有 {directory.dimensions} 维，"
                f"请写 1 到 {directory.dimensions}，不写就用全长",
                f"dimensions is {dimensions}; vectors of the model in {directory.path} have {directory.dimensions}"
                f" numbers: give 1 to {directory.dimensions}, or none for all",
            )
        self.directory = directory
        self.query_instruction = directory.query_instruction if query_instruction is None else query_instruction
        self.max_length = max_length or directory.max_tokens
        self.dimensions = dimensions or directory.dimensions
        self.tokenizer = BgeTokenizer.from_directory(directory)
        self._encoder: torch.nn.Module | None = None
        self._pool: EnginePool[Ids] | None = None
        self._factories: list[EncoderFactory] = []
        self._cut_texts = 0
        self._lock = threading.Lock()

    @property
    def engine(self) -> Engine[Ids]:
        """What computes (the first, where several GPUs do), its weights loaded."""
        return self._opened().engines[0]

    def _opened(self) -> EnginePool[Ids]:
        with self._lock:
            if self._pool is None:
                self._pool = EnginePool([factory.open(self._engine_name) for factory in self._factories])
                self._factories = []  # and with them weights that only the choice of an engine needed
            return self._pool

    @property
    def fingerprint(self) -> str:
        """What made the vectors: weights, adapter, tokenizer, pooling, normalisation, instruction, lengths.

        The engine is not part of it: each agrees with float32 to a cosine of .999 or refuses itself, so a knowledge
        base may be filled on a GPU and asked on a CPU.
        """
        weights = _state_digest(self._encoder) if self._encoder is not None else digest(self.directory.path)
        adapter = "" if self.adapter is None else digest(self.adapter)
        rules = (self.directory.pooling, self.directory.normalize, self.query_instruction, self.max_length)
        # whole vectors say nothing of their length: knowledge bases older than `dimensions` stay valid
        cut = () if self.dimensions == self.directory.dimensions else (self.dimensions,)
        whole = hashlib.sha256(repr((weights, adapter, self.directory.lower_case, *rules, *cut)).encode())
        return f"bge-{self.dimensions}-{whole.hexdigest()[:24]}"

    @property
    def max_tokens(self) -> int:
        """Most tokens of a text that reach its vector, [CLS] and [SEP] not counted."""
        return self.max_length - 2

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, [CLS] and [SEP] not counted."""
        return self.tokenizer.count(text)

    @property
    def cut_texts(self) -> int:
        """How many texts so far were longer than the model sees: their ends are in no vector."""
        return self._cut_texts

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector per text, in order; an empty list for no texts."""
        vectors: list[list[float]] = self.embed_documents_array(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question, the model's instruction before it."""
        vector: list[float] = self.embed_queries_array([text])[0].tolist()
        return vector

    def embed_documents_array(self, texts: Sequence[str]) -> Vectors:
        """Vectors of passages, (n, dimensions) float32; how many were too long is logged."""
        return self._embed(texts)

    def embed_queries_array(self, texts: Sequence[str]) -> Vectors:
        """Vectors of questions, (n, dimensions) float32, the instruction before each."""
        return self._embed([self.query_instruction + text for text in texts])

    def _embed(self, texts: Sequence[str]) -> Vectors:
        unique = list(dict.fromkeys(texts))  # equal texts are computed once
        vectors = np.zeros((len(unique), self.dimensions), np.float32)
        start = 0
        windows = [unique[at : at + _WINDOW] for at in range(0, len(unique), _WINDOW)]
        with _evaluating(self._encoder):
            # a thread that tokenizes ahead is worth starting where there is something ahead
            for rows in ahead(self._token_ids, windows) if len(windows) > 1 else map(self._token_ids, windows):
                found = self._opened().compute(rows, self.directory.dimensions)
                vectors[start : start + len(rows)] = self._shortened(found)
                start += len(rows)
        if len(unique) == len(texts):
            return vectors
        place = {text: index for index, text in enumerate(unique)}
        return vectors[[place[text] for text in texts]]

    def _shortened(self, vectors: Vectors) -> Vectors:
        """The first numbers of whole vectors, (n, dimensions); of unit length where the directory normalises."""
        if self.dimensions == self.directory.dimensions:
            return vectors
        cut = vectors[:, : self.dimensions]
        return unit_length(cut) if self.directory.normalize else cut

    def _token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        whole = self.tokenizer.encode_whole(texts)
        self._report_long(texts, whole)
        return [truncated(ids, self.max_length) for ids in whole]

    def _report_long(self, texts: Sequence[str], whole: Sequence[Sequence[int]]) -> None:
        """Count the texts that lose their end, and log by how much."""
        lengths = [len(ids) for ids in whole]
        long = [index for index, length in enumerate(lengths) if length > self.max_length]
        if long:
            with self._lock:
                self._cut_texts += len(long)
            longest = max(long, key=lengths.__getitem__)
            logger.warning(
                "%d of %d texts are longer than the %d tokens the model sees, their ends are not in the vectors;"
                " the longest has %d tokens: %r ...",
                len(long), len(texts), self.max_length, lengths[longest], texts[longest][:40],
            )  # fmt: skip


def _report_untrained(trained: Path, length: int, *, whole: int) -> None:
    """Log where vectors of this length are not what the model or adapter in a directory was trained for."""
    prefixes = trained_prefixes(trained)
    if prefixes is None:
        if length < whole:
            logger.info("%s does not say for which lengths it was trained; %d of %d numbers", trained, length, whole)
        return
    lengths = prefixes or (whole,)
    if length not in lengths:
        logger.warning(
            "vectors of %d numbers are not what %s was trained for, they may find less: set dimensions to one of %s,"
            " or train with %d in `matryoshka`",
            length, trained, ", ".join(map(str, sorted(lengths))), length,
        )  # fmt: skip


@contextmanager
def _evaluating(encoder: torch.nn.Module | None) -> Iterator[None]:
    """Dropout off in weights of a training under way, and then as it was."""
    training = encoder is not None and encoder.training
    if encoder is None or not training:
        yield
        return
    encoder.eval()
    try:
        yield
    finally:
        encoder.train()


def _state_digest(encoder: torch.nn.Module) -> str:
    """SHA-256 of weights in memory, 16 hex digits."""
    total = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]

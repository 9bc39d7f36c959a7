"""StoredEmbedders: the stores over one knowledge base, by the configured embedder and by those that made vectors."""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError

from chains.config import EmbeddingsConfig
from chains.faiss_index import FaissConfig
from chains.knowledge_base import FingerprintError, Generation, KnowledgeBaseError
from chains.retrieval_qa import build_embeddings
from chains.vectorstores import FaissVectorStore, made_by


class StoredEmbedders:
    """Opens a knowledge base with the embedder it needs, rebuilt from the config section kept with its vectors.

    A store stays with the generation it began with, so every method opens a new one.
    """

    def __init__(self, configured: FaissVectorStore, config: FaissConfig) -> None:
        """Args are the store by the configured embedder, not yet checked, and the config of the FAISS index."""
        self.configured = configured
        self._config = config
        self._kb = configured.knowledge_base

    def configured_store(self) -> FaissVectorStore:
        """A store by the configured embedder, not checked against the vectors."""
        return FaissVectorStore(
            self.configured.embeddings, self._kb, config=self._config, embedder=self.configured.embedder
        )

    def answering_store(self) -> FaissVectorStore:
        """A store by the embedder whose vectors answer.

        Raises:
            FingerprintError: it is not the configured one and cannot be rebuilt.
        """
        store = self.configured_store()
        try:
            store.check_embedder()
        except FingerprintError:
            generation = self._kb.generation()
            rebuilt = None if generation is None else self._rebuilt(generation)
            if rebuilt is None:
                raise
            rebuilt.check_embedder()
            return rebuilt
        return store

    def kept(self) -> str | None:
        """The embedder whose vectors are kept to go back to; None where there is none that can be had."""
        generation = self._kb.previous_generation()
        return None if generation is None or self._section(generation) is None else generation.fingerprint

    def kept_store(self) -> FaissVectorStore:
        """A store by the embedder whose vectors are kept.

        Raises:
            KnowledgeBaseError: there are none, or their embedder cannot be rebuilt.
        """
        generation = self._kb.previous_generation()
        store = None if generation is None else self._rebuilt(generation)
        if store is None:
            raise KnowledgeBaseError(
                f"知识库 {self._kb.path} 没有可以切换回去的旧向量",
                f"knowledge base {self._kb.path} keeps no older vectors to go back to",
            )
        return store

    def _rebuilt(self, generation: Generation) -> FaissVectorStore | None:
        """A store by a generation's embedder; None for one that came from Python or from a newer program."""
        section = self._section(generation)
        if section is None:
            return None
        if made_by(generation, self.configured.embeddings):  # loaded already
            return self.configured_store()
        return FaissVectorStore(build_embeddings(section), self._kb, config=self._config, embedder=generation.embedder)

    def _section(self, generation: Generation) -> EmbeddingsConfig | None:
        try:
            return TypeAdapter(EmbeddingsConfig).validate_python(generation.embedder)
        except ValidationError:
            return None

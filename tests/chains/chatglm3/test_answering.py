"""The whole chain with a tiny ChatGLM3: from a config, streamed, shortened to its context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chains import build_retrieval_qa
from chains.config import RagConfig
from chains.fulltext import FullTextIndex
from chains.ingestion import Ingestor
from chains.retrieval_qa import build_vectorstore

pytest.importorskip("transformers", reason="needs the extra [models]")


def config_of(kb: Path, model: Path, **options: Any) -> RagConfig:
    llm = {
        "_type": "chatglm3", "model": str(model), "device": "cpu", "dtype": "float32", "temperature": 0,
        "max_new_tokens": 16, **options,
    }  # fmt: skip
    return RagConfig.from_dict({"kb": str(kb), "llm": llm, "min_relevance": 0.0}, where="test")


@pytest.fixture(scope="module")
def kb(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    folder = tmp_path_factory.mktemp("answering")
    (folder / "leave.txt").write_text("入职满一年的员工每年享有十天带薪年假。\n" * 3, encoding="utf-8")
    for number in range(5):
        text = f"第{number}号设备的年假说明与保修规定，" + f"条款{number}。" * 80
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    config = config_of(folder / "kb", tiny)
    store = build_vectorstore(config, create=True)
    Ingestor(store, FullTextIndex(store.knowledge_base)).ingest([folder])
    return folder / "kb"


def test_the_chain_answers_through_chatglm3(kb: Path, tiny: Path) -> None:
    qa = build_retrieval_qa(config_of(kb, tiny).model_copy(update={"top_k": 1}))
    output = qa.invoke("员工有几天年假？")
    assert output["result"]
    assert set(output) >= {"query", "result", "source_documents", "citations", "refused"}
    pieces = [piece["result"] for piece in qa.stream("员工有几天年假？") if piece.get("result")]
    assert len(pieces) > 3, "it streams token by token"
    assert "".join(pieces) == output["result"]


async def test_the_chain_streams_without_blocking(kb: Path, tiny: Path) -> None:
    qa = build_retrieval_qa(config_of(kb, tiny).model_copy(update={"top_k": 1}))
    pieces = [piece["result"] async for piece in qa.astream("员工有几天年假？") if piece.get("result")]
    assert "".join(pieces) == qa.invoke("员工有几天年假？")["result"]


def test_references_that_do_not_fit_the_context_are_left_out(kb: Path, tiny: Path) -> None:
    """The tiny model reads 1,024 tokens; five passages of about 500 characters are more."""
    output = build_retrieval_qa(config_of(kb, tiny)).invoke("年假说明与保修规定？")
    assert len(output["source_documents"]) == 5
    used = output["references_used"]
    assert used == list(range(1, len(used) + 1))
    assert 1 <= len(used) < 5


def test_the_same_model_answers_by_its_template(kb: Path, tiny: Path) -> None:
    config = config_of(kb, tiny, _type="huggingface").model_copy(update={"top_k": 1})
    ours = config_of(kb, tiny).model_copy(update={"top_k": 1})
    question = "员工有几天年假？"
    theirs = build_retrieval_qa(config).invoke(question)["result"]
    assert theirs.strip() == build_retrieval_qa(ours).invoke(question)["result"].strip()

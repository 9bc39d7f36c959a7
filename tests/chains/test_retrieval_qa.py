"""RetrievalQA: one contract over invoke, stream, batch and async; run-time choices; refusals; citations; follow-ups."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.callbacks import BaseCallbackHandler, CallbackManagerForLLMRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models import BaseChatModel, FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableGenerator, RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore

from chains import KnowledgeBase, RagConfig, RetrievalQA, build_retrieval_qa, load_config
from chains.answerers import ExtractiveAnswerer
from chains.chat_models import EmptyAnswerError
from chains.fulltext import FullTextIndex
from chains.ingestion import Ingestor
from chains.knowledge_base import FingerprintError, KnowledgeBaseError
from chains.prompts import REFUSAL
from chains.retrieval_qa import QuestionError, build_vectorstore, read_history
from loaders.errors import RagProjError

TEXTS = {
    "leave.md": "入职满一年的员工每年享有十天带薪年假。年假须在当年十二月三十一日前休完。",
    "expenses.md": "差旅费用应在返回后三十天内报销，逾期不予受理。报销由财务部的李雷负责审批。",
    "device.txt": "XR-7 型离心机的最高转速是每分钟一万二千转。XR-7 的保修期为三年。",
    "canteen.txt": "公司食堂星期一至星期五供应午餐，菜单每周更新。",
    "parking.txt": "访客车辆请停放在地下二层停车场，停车费每小时五元。",
    "badge.txt": "工牌遗失后须到行政部补办，工本费二十元。",
}
LEAVE = "年假有几天？"
SPEED = "XR-7 的最高转速是多少？"
NONSENSE = "量子色动力学的渐近自由是谁发现的？"


class CountingModel(BaseChatModel):
    """Answers in ten pieces, counts the pieces it made and the calls it got, keeps the prompts."""

    reply: str = "每年十天年假。[1]"
    made: list[str]
    prompts: list[list[BaseMessage]]

    @property
    def _llm_type(self) -> str:
        return "counting"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        self.prompts.append(messages)
        return ChatResult(generations=[ChatGeneration(message=AIMessage(self.reply))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        self.prompts.append(messages)
        for character in self.reply:
            self.made.append(character)
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=character))
            if run_manager:
                run_manager.on_llm_new_token(character, chunk=chunk)
            yield chunk


def counting(reply: str = "每年十天年假。[1]") -> CountingModel:
    return CountingModel(reply=reply, made=[], prompts=[])


class Events(BaseCallbackHandler):
    """The names of the events it got, in order."""

    run_inline = True

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_chain_start(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(f"chain_start:{kwargs.get('name')}")

    def on_chain_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("chain_end")

    def on_chain_error(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("chain_error")

    def on_retriever_start(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("retriever_start")

    def on_retriever_end(self, documents: Any, **kwargs: Any) -> None:
        self.seen.append(f"retriever_end:{len(documents)}")

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("chat_model_start")

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        if token:  # langchain-core closes a stream with an empty one
            self.seen.append(f"token:{token}")

    def on_llm_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append("llm_end")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A knowledge base of six short documents, each one chunk."""
    path = tmp_path_factory.mktemp("qa") / "kb"
    store = build_vectorstore(load_config(None, [f"kb={path}"]), create=True)
    store.add_texts(list(TEXTS.values()), [{"source": name, "title": name} for name in TEXTS], ids=list(TEXTS))
    store.knowledge_base.close()
    return path


@pytest.fixture
def build(folder: Path) -> Generator[Callable[..., RetrievalQA], None, None]:
    """A chain over the six documents, with overrides and LangChain objects."""
    opened: list[KnowledgeBase] = []

    def make(*overrides: str, **objects: Any) -> RetrievalQA:
        config = load_config(None, [f"kb={folder}", *overrides])
        if not objects.keys() & {"vectorstore", "retriever"}:
            objects["vectorstore"] = build_vectorstore(config)
            opened.append(objects["vectorstore"].knowledge_base)
        return build_retrieval_qa(config, **objects)

    yield make
    for knowledge_base in opened:
        knowledge_base.close()


@pytest.fixture
def qa(build: Callable[..., RetrievalQA]) -> RetrievalQA:
    return build()


def total(pieces: list[Any]) -> Any:
    added = pieces[0]
    for piece in pieces[1:]:
        added = added + piece
    return added


def sources(output: Any) -> list[str]:
    return [document.metadata["source"] for document in output["source_documents"]]


# -- one contract --------------------------------------------------------------------------------------------------


def test_invoke_returns_the_keys_of_retrieval_qa_in_order(qa: RetrievalQA) -> None:
    output = qa.invoke({"query": SPEED})
    assert list(output) == ["query", "source_documents", "result", "citations", "refused"]
    assert output["query"] == SPEED
    assert "一万二千转" in output["result"]
    assert output["refused"] is False
    assert sources(output)[0] == "device.txt"
    assert isinstance(output["source_documents"][0], Document)


@pytest.mark.parametrize("question", [LEAVE, SPEED, NONSENSE])
@pytest.mark.parametrize("generator", ["extractive", "chat_model"])
async def test_every_way_of_calling_gives_the_same(
    build: Callable[..., RetrievalQA], question: str, generator: str
) -> None:
    qa = build(llm=counting() if generator == "chat_model" else None)
    expected = qa.invoke({"query": question})
    assert total(list(qa.stream({"query": question}))) == expected
    assert total([piece async for piece in qa.astream({"query": question})]) == expected
    assert await qa.ainvoke({"query": question}) == expected
    assert qa.batch([{"query": question}, {"query": LEAVE}])[0] == expected
    assert (await qa.abatch([{"query": question}]))[0] == expected
    assert qa.invoke(question) == expected
    assert list(qa.stream(question)) == list(qa.stream({"query": question}))


def test_stream_yields_sources_then_the_result_in_pieces_then_citations(build: Callable[..., RetrievalQA]) -> None:
    pieces = list(build(llm=counting()).stream(LEAVE))
    assert [sorted(piece) for piece in pieces[:1]] == [["query", "source_documents"]]
    assert all(list(piece) == ["result"] for piece in pieces[1:-1])
    assert sorted(pieces[-1]) == ["citations", "refused"]
    assert [piece["result"] for piece in pieces[1:-1] if piece["result"]] == list("每年十天年假。[1]")


async def test_astream_yields_in_the_same_order_and_pieces(build: Callable[..., RetrievalQA]) -> None:
    qa = build(llm=counting())
    assert [piece async for piece in qa.astream(LEAVE)] == list(qa.stream(LEAVE))


def test_source_documents_come_before_the_generator_starts(build: Callable[..., RetrievalQA]) -> None:
    model = counting()
    stream = build(llm=model).stream(LEAVE)
    assert sources(next(stream))[0] == "leave.md"
    assert model.made == []


def test_pieces_come_while_the_generator_still_works(build: Callable[..., RetrievalQA]) -> None:
    model = counting()
    stream = build(llm=model).stream(LEAVE)
    next(stream)
    assert next(stream)["result"] == "每"
    assert len(model.made) < 3


def test_batch_keeps_the_order_and_can_return_errors(qa: RetrievalQA) -> None:
    outputs = qa.batch([LEAVE, "", SPEED], return_exceptions=True)
    assert [type(output).__name__ for output in outputs] == ["AddableDict", "QuestionError", "AddableDict"]
    assert [sources(outputs[0])[0], sources(outputs[2])[0]] == ["leave.md", "device.txt"]


def test_source_documents_carry_what_a_citation_needs(qa: RetrievalQA) -> None:
    document = qa.invoke(SPEED)["source_documents"][0]
    assert document.id == "device.txt"
    metadata = document.metadata
    assert {"source", "title", "start", "end", "document_id", "score"} <= metadata.keys()
    assert (metadata["start"], metadata["end"]) == (0, len(document.page_content))
    assert 0 <= metadata["score"] <= 1


# -- in a pipe -----------------------------------------------------------------------------------------------------


async def test_a_pipe_into_the_chain_streams_what_it_invokes(qa: RetrievalQA) -> None:
    """A RunnableParallel streams one key at a time; together they are one question."""
    pipe = RunnableParallel(query=RunnablePassthrough(), chat_history=lambda _: [(SPEED, "一万二千转。")]) | qa
    expected = pipe.invoke("它的保修期是多久？")
    assert "三年" in expected["result"]
    assert total(list(pipe.stream("它的保修期是多久？"))) == expected
    assert total([piece async for piece in pipe.astream("它的保修期是多久？")]) == expected


def test_a_question_that_streams_into_the_chain_is_one_question(qa: RetrievalQA) -> None:
    model = GenericFakeChatModel(messages=iter([AIMessage("XR-7 的 最高转速")]))
    pieces = list((model | RunnableLambda(lambda m: m.text) | qa).stream("?"))
    assert [piece["query"] for piece in pieces if "query" in piece] == ["XR-7 的 最高转速"]

    def letters(questions: Iterator[str]) -> Iterator[str]:
        for question in questions:
            yield from question

    pieces = list((RunnableGenerator(letters) | qa).stream(SPEED))
    assert [piece["query"] for piece in pieces if "query" in piece] == [SPEED]


def test_what_follows_in_a_pipe_gets_the_pieces(build: Callable[..., RetrievalQA]) -> None:
    def only_results(pieces: Iterator[Any]) -> Iterator[str]:
        yield from (piece["result"] for piece in pieces if piece.get("result"))

    assert list((build(llm=counting()) | only_results).stream(LEAVE)) == list("每年十天年假。[1]")
    assert (build() | (lambda output: output["refused"])).invoke(NONSENSE) is True


# -- run-time choices ----------------------------------------------------------------------------------------------


def test_config_specs_list_what_can_be_chosen(qa: RetrievalQA) -> None:
    assert {spec.id: spec.default for spec in qa.config_specs} == {
        "llm": "extractive", "retriever": "hybrid", "top_k": 5,
    }  # fmt: skip
    properties = qa.get_config_jsonschema()["$defs"]["Configurable"]["properties"]
    assert set(properties) == {"llm", "retriever", "top_k"}
    assert {spec.id for spec in (RunnablePassthrough() | qa).config_specs} == {"llm", "retriever", "top_k"}


def test_choices_list_the_default_first(build: Callable[..., RetrievalQA]) -> None:
    qa = build("retriever._type=dense", "llms={small: {_type: chat_model, model: tiny}, long: {_type: extractive}}")
    assert qa.choices("llm") == ["extractive", "small", "long"]
    assert qa.choices("retriever") == ["dense", "lexical", "hybrid"]


def test_choosing_the_llm_changes_the_answer(build: Callable[..., RetrievalQA]) -> None:
    qa = build(llm=counting("生成的回答。"))
    assert qa.choices("llm") == ["chat_model", "extractive"]
    assert qa.invoke(LEAVE)["result"] == "生成的回答。"
    chosen = qa.with_config(configurable={"llm": "extractive"})
    assert "十天带薪年假" in chosen.invoke(LEAVE)["result"]
    assert qa.invoke(LEAVE)["result"] == "生成的回答。"


def test_choosing_a_named_llm_of_the_config_changes_the_answer(build: Callable[..., RetrievalQA]) -> None:
    qa = build("llms={short: {_type: extractive, max_chars: 20, max_quotes: 1}}", "llm.max_chars=400")
    long, short = (qa.with_config(configurable={"llm": name}).invoke(LEAVE) for name in ("extractive", "short"))
    assert len(short["result"]) < len(long["result"])


def test_configured_extractive_settings_hold_when_chosen_beside_a_model(build: Callable[..., RetrievalQA]) -> None:
    short = build("llm.max_chars=20", "llm.max_quotes=1").invoke(LEAVE)
    qa = build("llm.max_chars=20", "llm.max_quotes=1", llm=counting())
    assert qa.invoke(LEAVE, {"configurable": {"llm": "extractive"}})["result"] == short["result"]


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_choosing_top_k_changes_the_documents(qa: RetrievalQA, top_k: int) -> None:
    assert len(qa.invoke(LEAVE)["source_documents"]) == 5
    assert len(qa.with_config(configurable={"top_k": top_k}).invoke(LEAVE)["source_documents"]) == top_k


def test_choosing_the_retriever_changes_the_documents(qa: RetrievalQA) -> None:
    """BM25 finds only documents that share a character; the dense leg fills up to top_k with whatever is nearest."""
    found = {
        name: sources(qa.with_config(configurable={"retriever": name}).invoke("工牌遗失"))
        for name in ("lexical", "dense", "hybrid")
    }
    assert found["lexical"][0] == "badge.txt"
    assert len(found["lexical"]) < 5
    assert len(found["dense"]) == len(found["hybrid"]) == 5
    assert found["dense"][0] == found["hybrid"][0] == "badge.txt"


def test_choices_combine(build: Callable[..., RetrievalQA]) -> None:
    qa = build(llm=counting("生成。")).with_config(configurable={"llm": "extractive", "retriever": "dense", "top_k": 3})
    output = qa.invoke(LEAVE)
    assert len(output["source_documents"]) == 3
    assert output["result"] != "生成。"


@pytest.mark.parametrize("retriever", ["lexical", "dense", "hybrid"])
@pytest.mark.parametrize("default", ["lexical", "dense", "hybrid"])
def test_top_k_holds_with_every_retriever_whichever_is_the_default(
    build: Callable[..., RetrievalQA], default: str, retriever: str
) -> None:
    chosen: Any = {"configurable": {"retriever": retriever, "top_k": 1}}
    assert sources(build(f"retriever._type={default}").invoke("工牌遗失", chosen)) == ["badge.txt"]


async def test_choices_hold_in_stream_and_async(build: Callable[..., RetrievalQA]) -> None:
    qa = build(llm=counting("生成。")).with_config(configurable={"llm": "extractive", "top_k": 2})
    expected = qa.invoke(LEAVE)
    assert len(expected["source_documents"]) == 2
    assert "十天" in expected["result"]
    assert total(list(qa.stream(LEAVE))) == expected
    assert total([piece async for piece in qa.astream(LEAVE)]) == expected
    assert await qa.ainvoke(LEAVE) == expected


def test_choices_hold_inside_a_pipe(build: Callable[..., RetrievalQA]) -> None:
    pipe = RunnableParallel(query=RunnablePassthrough()) | build(llm=counting("生成。")) | (lambda output: output)
    output = pipe.with_config(configurable={"llm": "extractive", "top_k": 2}).invoke(LEAVE)
    assert len(output["source_documents"]) == 2
    assert "十天" in output["result"]
    assert pipe.invoke(LEAVE, {"configurable": {"top_k": 1}})["result"] == "生成。"


def test_choices_hold_for_each_input_of_a_batch(build: Callable[..., RetrievalQA]) -> None:
    qa = build(llm=counting("生成。"))
    choices: list[Any] = [{"configurable": {"top_k": k, "llm": llm}} for k in (1, 2) for llm in qa.choices("llm")]
    outputs = qa.batch([LEAVE] * 4, choices)
    assert [len(output["source_documents"]) for output in outputs] == [1, 1, 2, 2]
    assert [output["result"] == "生成。" for output in outputs] == [True, False, True, False]


def test_two_threads_choose_differently_at_once(build: Callable[..., RetrievalQA]) -> None:
    qa = build(llm=counting("生成。"))
    barrier = threading.Barrier(4)

    def run(number: int) -> list[tuple[int, bool]]:
        chosen: Any = {"configurable": {"top_k": number + 1, "llm": "extractive" if number % 2 else "chat_model"}}
        barrier.wait(10)
        outputs = [qa.invoke(LEAVE, chosen) for _ in range(8)]
        return [(len(output["source_documents"]), output["result"] == "生成。") for output in outputs]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(4)))
    assert results == [[(number + 1, number % 2 == 0)] * 8 for number in range(4)]


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ({"llm": "gpt-9"}, ["llm", "'gpt-9'", "extractive"]),
        ({"retriever": "bm26"}, ["retriever", "'bm26'", "hybrid", "dense", "lexical"]),
        ({"top_k": 0}, ["top_k", "0"]),
        ({"top_k": -3}, ["top_k", "-3"]),
        ({"top_k": "many"}, ["top_k", "many"]),
        ({"top_k": 10**9}, ["top_k", str(10**9)]),
        ({"top_k": True}, ["top_k", "True"]),
    ],
)
async def test_an_unknown_choice_is_refused_by_name(qa: RetrievalQA, chosen: dict[str, Any], named: list[str]) -> None:
    for call in (qa.with_config(configurable=chosen).invoke, lambda q: list(qa.stream(q, {"configurable": chosen}))):
        with pytest.raises(RagProjError) as caught:
            call(LEAVE)
        assert all(name in caught.value.zh and name in caught.value.en for name in named)
    with pytest.raises(RagProjError):
        await qa.with_config(configurable=chosen).ainvoke(LEAVE)


def test_keys_of_others_in_configurable_are_left_alone(qa: RetrievalQA) -> None:
    assert qa.invoke(LEAVE, {"configurable": {"thread_id": "7"}}) == qa.invoke(LEAVE)


# -- LangChain objects from Python ---------------------------------------------------------------------------------


class ListRetriever(BaseRetriever):
    """The same documents for every question."""

    documents: list[Document]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return self.documents


def test_any_embeddings_may_make_the_vectors(tmp_path: Path) -> None:
    embedder = DeterministicFakeEmbedding(size=32)
    config = load_config(None, [f"kb={tmp_path / 'kb'}", "retriever._type=dense", "min_relevance=0"])
    store = build_vectorstore(config, embedder, create=True)
    store.add_texts(list(TEXTS.values()), ids=list(TEXTS))
    output = build_retrieval_qa(config, embeddings=embedder).invoke(TEXTS["leave.md"])
    assert output["source_documents"][0].id == "leave.md"  # a text is nearest to itself
    with pytest.raises(FingerprintError, match="DeterministicFakeEmbedding"):
        build_retrieval_qa(config)


def test_a_list_model_and_an_iterator_model_answer(build: Callable[..., RetrievalQA]) -> None:
    listed = build(llm=FakeListChatModel(responses=["十天带薪年假。[1]"])).invoke(LEAVE)
    spoken = build(llm=GenericFakeChatModel(messages=iter([AIMessage("十天带薪年假。[1]")]))).invoke(LEAVE)
    assert listed == spoken
    assert [citation["source"] for citation in listed["citations"]] == ["leave.md"]


def test_an_answerer_of_ones_own_is_used(build: Callable[..., RetrievalQA]) -> None:
    qa = build(llm=ExtractiveAnswerer(max_chars=20, max_quotes=1))
    assert qa.choices("llm") == ["custom", "extractive"]
    assert len(qa.invoke(LEAVE)["citations"]) == 1


def test_another_vector_store_is_searched(build: Callable[..., RetrievalQA]) -> None:
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=32))
    store.add_texts(list(TEXTS.values()), [{"source": name} for name in TEXTS])
    qa = build("min_relevance=0", "top_k=3", vectorstore=store, llm=counting())
    output = qa.invoke(TEXTS["device.txt"])
    assert len(output["source_documents"]) == 3
    assert sources(output)[0] == "device.txt"


def test_top_k_can_be_chosen_with_another_vector_store(build: Callable[..., RetrievalQA]) -> None:
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=32))
    store.add_texts(list(TEXTS.values()))
    qa = build("min_relevance=0", vectorstore=store, llm=counting())
    assert len(qa.invoke(LEAVE, {"configurable": {"top_k": 2}})["source_documents"]) == 2


def test_an_empty_vector_store_refuses(build: Callable[..., RetrievalQA]) -> None:
    model = counting()
    output = build(vectorstore=InMemoryVectorStore(DeterministicFakeEmbedding(size=8)), llm=model).invoke(LEAVE)
    assert output["refused"] is True
    assert model.prompts == []


def test_a_retriever_of_ones_own_is_used_as_it_is(build: Callable[..., RetrievalQA]) -> None:
    document = Document(page_content="年假有二十天。", metadata={"source": "own"})
    qa = build(retriever=ListRetriever(documents=[document]))
    output = qa.invoke(LEAVE)
    assert output["source_documents"] == [document]
    assert [(c["source"], c["quote"]) for c in output["citations"]] == [("own", "年假有二十天。")]
    assert qa.choices("retriever") == []


@pytest.mark.parametrize("score", [0.01, 0, -5, "low", True])
def test_a_score_of_another_retriever_is_not_our_relevance(build: Callable[..., RetrievalQA], score: object) -> None:
    """A distance, a rating, a field of a record: it must not decide about refusing."""
    document = Document(page_content="年假有二十天。", metadata={"source": "own", "score": score})
    assert build(retriever=ListRetriever(documents=[document])).invoke(LEAVE)["refused"] is False


def test_what_another_retriever_found_is_left_to_the_generator_but_not_to_quotes(
    build: Callable[..., RetrievalQA],
) -> None:
    """A semantic retriever may be right without sharing a word with the question; quotes need shared words."""
    model = counting()
    own = ListRetriever(documents=[Document(page_content="年假有二十天。", metadata={"source": "own"})])
    assert build(retriever=own, llm=model).invoke(NONSENSE)["refused"] is False
    assert len(model.prompts) == 1
    assert build(retriever=own).invoke(NONSENSE)["refused"] is True


@pytest.mark.parametrize("metadata", [{}, {"start": None}, {"page": None}, {"source": None}])
def test_documents_without_places_can_be_cited(build: Callable[..., RetrievalQA], metadata: dict[str, Any]) -> None:
    document = Document(page_content="年假有二十天。", metadata=metadata)
    output = build(retriever=ListRetriever(documents=[document])).invoke(LEAVE)
    assert [citation["start"] for citation in output["citations"]] == [0]


def test_a_missing_knowledge_base_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeBaseError, match=r"ragproj ingest .* / .*ragproj ingest"):
        build_retrieval_qa(load_config(None, [f"kb={tmp_path / 'none'}"]))


def test_an_empty_knowledge_base_refuses_every_question(tmp_path: Path) -> None:
    config = load_config(None, [f"kb={tmp_path / 'kb'}"])
    build_vectorstore(config, create=True)
    output = build_retrieval_qa(config).invoke(LEAVE)
    assert (output["refused"], output["source_documents"]) == (True, [])


def test_a_document_added_later_is_found_by_an_open_chain(tmp_path: Path) -> None:
    config = load_config(None, [f"kb={tmp_path / 'kb'}"])
    store = build_vectorstore(config, create=True)
    qa = build_retrieval_qa(config, vectorstore=store)
    assert qa.invoke(LEAVE)["refused"] is True
    store.add_texts([TEXTS["leave.md"]])
    assert qa.invoke(LEAVE)["refused"] is False
    store.delete()
    assert qa.invoke(LEAVE)["refused"] is True


# -- callbacks -----------------------------------------------------------------------------------------------------


def test_events_reach_a_handler_in_order(build: Callable[..., RetrievalQA]) -> None:
    events = Events()
    build(llm=counting("十天。")).invoke(LEAVE, {"callbacks": [events]})
    assert events.seen == [
        "chain_start:RetrievalQA", "retriever_start", "retriever_end:5", "chat_model_start",
        "token:十", "token:天", "token:。", "llm_end", "chain_end",
    ]  # fmt: skip


async def test_events_reach_a_handler_in_async(build: Callable[..., RetrievalQA]) -> None:
    events = Events()
    await build(llm=counting("十天。")).ainvoke(LEAVE, {"callbacks": [events]})
    assert events.seen[0] == "chain_start:RetrievalQA"
    assert {"retriever_start", "retriever_end:5", "chat_model_start", "token:十", "llm_end"} <= set(events.seen)


async def test_astream_events_show_the_retriever_and_the_tokens(build: Callable[..., RetrievalQA]) -> None:
    names = [event["event"] async for event in build(llm=counting()).astream_events(LEAVE, version="v2")]
    assert names[0] == "on_chain_start"
    assert names.index("on_retriever_end") < names.index("on_chat_model_start")
    assert names.count("on_chat_model_stream") >= len("每年十天年假。[1]")
    assert names[-1] == "on_chain_end"


def test_an_error_reaches_the_handler(qa: RetrievalQA) -> None:
    events = Events()
    with pytest.raises(QuestionError):
        qa.invoke("", {"callbacks": [events]})
    assert events.seen[-1] == "chain_error"


def test_tags_metadata_and_run_id_reach_the_parts(build: Callable[..., RetrievalQA]) -> None:
    class Tags(BaseCallbackHandler):
        run_inline = True

        def __init__(self) -> None:
            self.tags: list[list[str]] = []

        def on_retriever_start(self, *args: Any, **kwargs: Any) -> None:
            self.tags.append(kwargs["tags"])

        def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
            self.tags.append(kwargs["tags"])

    handler = Tags()
    build(llm=counting()).invoke(LEAVE, {"callbacks": [handler], "tags": ["mine"], "run_id": uuid4()})
    assert len(handler.tags) == 2
    assert all("mine" in tags for tags in handler.tags)


# -- refusing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [NONSENSE, "明天北京会下雨吗？", "What is the capital of France?", "。。。", "😀"])
def test_a_question_the_documents_do_not_answer_is_refused_without_asking_the_generator(
    build: Callable[..., RetrievalQA], question: str
) -> None:
    model = counting()
    output = build(llm=model).invoke(question)
    assert output["result"] == REFUSAL["zh"]
    assert (output["refused"], output["citations"]) == (True, [])
    assert model.prompts == []
    assert model.made == []


@pytest.mark.parametrize("nothing", [" ", "\n \n", "<think>年假？</think>"])
async def test_a_generator_that_says_nothing_is_an_error_and_no_refusal(
    build: Callable[..., RetrievalQA], nothing: str
) -> None:
    qa = build(llm=counting(nothing))
    with pytest.raises(EmptyAnswerError, match="CountingModel"):
        qa.invoke(LEAVE)
    with pytest.raises(EmptyAnswerError, match="CountingModel"):
        await qa.ainvoke(LEAVE)


def test_refusal_speaks_the_configured_language(build: Callable[..., RetrievalQA]) -> None:
    assert build("language=en").invoke(NONSENSE)["result"] == REFUSAL["en"]


def test_min_relevance_zero_never_refuses_before_the_generator(build: Callable[..., RetrievalQA]) -> None:
    model = counting()
    assert build("min_relevance=0", llm=model).invoke(NONSENSE)["refused"] is False
    assert len(model.prompts) == 1


def test_min_relevance_one_refuses_what_is_not_wholly_covered(build: Callable[..., RetrievalQA]) -> None:
    assert build("min_relevance=1").invoke("年假怎样折算成加班工资？")["refused"] is True


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (LEAVE, "十天"),
        (SPEED, "一万二千转"),
        ("XR-7的保修期多长？", "三年"),
        ("报销由谁审批？", "李雷"),
        ("停车费每小时多少钱？", "五元"),
        ("工牌丢了到哪里补办？", "行政部"),
        ("ＸＲ－７ 的最高轉速是多少？", "一万二千转"),  # full width, traditional
        ("xr-7 最高转速", "一万二千转"),
    ],
)
def test_questions_the_documents_answer_are_answered(qa: RetrievalQA, question: str, answer: str) -> None:
    assert answer in qa.invoke(question)["result"]


# -- questions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "named"),
    [
        ("", "空|empty"),
        (" \n\u3000", "空|empty"),
        ({"query": ""}, "空|empty"),
        (None, "NoneType"),
        ({}, "NoneType"),
        ({"question": "年假？"}, "query"),
        (7, "int"),
        (["年假？"], "list"),
        ({"query": ["年假？"]}, "list"),
        (b"abc", "bytes"),
    ],
)
def test_a_question_that_is_none_is_a_clear_error(qa: RetrievalQA, question: Any, named: str) -> None:
    with pytest.raises(QuestionError, match=named):
        qa.invoke(question)


def test_a_hundred_thousand_characters_are_refused_at_once_with_the_limit(qa: RetrievalQA) -> None:
    with pytest.raises(QuestionError, match=r"100000.*4000.* / .*100000.*4000"):
        qa.invoke("年" * 100_000)


def test_a_hundred_thousand_characters_can_be_allowed(build: Callable[..., RetrievalQA]) -> None:
    output = build("max_question_chars=200000").invoke(LEAVE + "嗯" * 99_000)
    assert isinstance(output["refused"], bool)


def test_the_longest_question_is_the_limit_itself(build: Callable[..., RetrievalQA]) -> None:
    qa = build("max_question_chars=6")
    assert qa.invoke(LEAVE)["refused"] is False
    with pytest.raises(QuestionError):
        qa.invoke(LEAVE + "吗")


@pytest.mark.parametrize(
    "question",
    [
        "年假\udcff有几天？",
        "年假\x00有几天？",
        "年假\u2028有几天？",
        "年假有几天？' OR 1=1 --",
        'text:"年假" AND *',
        "年假 \\ [ ( ^2",
    ],
)
def test_odd_characters_in_a_question_do_no_harm(qa: RetrievalQA, question: str) -> None:
    assert sources(qa.invoke(question))[0] == "leave.md"


def test_white_space_around_a_question_is_not_part_of_it(qa: RetrievalQA) -> None:
    assert qa.invoke(f"\n {LEAVE}\u3000") == qa.invoke(LEAVE)


# -- conversations -------------------------------------------------------------------------------------------------

ASKED, ANSWERED = "XR-7 的最高转速是多少？", "每分钟一万二千转。"


@pytest.mark.parametrize(
    "history",
    [
        [HumanMessage(ASKED), AIMessage(ANSWERED)],
        (HumanMessage(ASKED), AIMessage(ANSWERED)),
        [(ASKED, ANSWERED)],
        [[ASKED, ANSWERED]],
        [("user", ASKED), ("assistant", ANSWERED)],
        [["human", ASKED], ["ai", ANSWERED]],
        [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}],
        [{"role": "user", "content": [{"type": "text", "text": ASKED}]}, {"role": "assistant", "content": ANSWERED}],
        [("system", "你是助手"), ("user", ASKED), ("assistant", ANSWERED)],
    ],
)
def test_a_conversation_may_come_in_every_usual_form(qa: RetrievalQA, history: Any) -> None:
    messages = [message for message in read_history(history) if message.type != "system"]
    assert [message.type for message in messages] == ["human", "ai"]
    assert [message.text for message in messages] == [ASKED, ANSWERED]
    output = qa.invoke({"query": "它的保修期是多久？", "chat_history": history})
    assert output["query"] == "它的保修期是多久？"
    assert sources(output)[0] == "device.txt"
    assert "三年" in output["result"]


@pytest.mark.parametrize("history", [None, [], ()])
def test_no_conversation_is_no_conversation(qa: RetrievalQA, history: Any) -> None:
    assert qa.invoke({"query": LEAVE, "chat_history": history}) == qa.invoke(LEAVE)


@pytest.mark.parametrize(
    "history", ["年假", {"role": "user", "content": "x"}, [1], [{"role": "tool"}], [{"foo": 1}], [("only",)], 5]
)
def test_a_conversation_that_is_none_is_a_clear_error(qa: RetrievalQA, history: Any) -> None:
    with pytest.raises(RagProjError, match="chat_history"):
        qa.invoke({"query": LEAVE, "chat_history": history})


def test_a_question_without_an_answer_yet_has_none() -> None:
    """Gradio's pairs end like this while the answer is awaited."""
    assert read_history([(ASKED, None)]) == [HumanMessage(ASKED)]


def test_a_new_question_is_not_answered_with_the_old_one(qa: RetrievalQA) -> None:
    output = qa.invoke({"query": "报销应该找谁审批？", "chat_history": [(ASKED, ANSWERED)]})
    assert "李雷" in output["result"]
    assert "一万二千转" not in output["result"]


def test_a_generator_condenses_the_follow_up_and_answers_the_condensed_question(
    build: Callable[..., RetrievalQA],
) -> None:
    model = GenericFakeChatModel(messages=iter([AIMessage("XR-7 的保修期多久？"), AIMessage("三年。[1]")]))
    output = build(llm=model).invoke({"query": "那它呢？", "chat_history": [(ASKED, ANSWERED)]})
    assert output["query"] == "那它呢？"
    assert output["result"] == "三年。[1]"
    assert sources(output)[0] == "device.txt"


async def test_a_follow_up_is_condensed_in_async_too(build: Callable[..., RetrievalQA]) -> None:
    def model() -> GenericFakeChatModel:
        return GenericFakeChatModel(messages=iter([AIMessage("XR-7 的保修期多久？"), AIMessage("三年。[1]")]))

    inputs = {"query": "那它呢？", "chat_history": [(ASKED, ANSWERED)]}
    assert await build(llm=model()).ainvoke(inputs) == build(llm=model()).invoke(inputs)


def test_without_history_the_generator_is_asked_once(build: Callable[..., RetrievalQA]) -> None:
    model = counting()
    build(llm=model).invoke(LEAVE)
    assert len(model.prompts) == 1


def test_the_condensed_question_decides_about_refusing(build: Callable[..., RetrievalQA]) -> None:
    model = counting(NONSENSE)  # condenses to something the documents know nothing of
    output = build(llm=model).invoke({"query": "年假呢？", "chat_history": [("x", "y")]})
    assert output["refused"] is True
    assert model.made == []


def test_the_chosen_generator_condenses(build: Callable[..., RetrievalQA]) -> None:
    model = counting()
    chosen: Any = {"configurable": {"llm": "extractive"}}
    build(llm=model).invoke({"query": "它的保修期？", "chat_history": [(ASKED, ANSWERED)]}, chosen)
    assert model.prompts == []


# -- stopping ------------------------------------------------------------------------------------------------------


def test_closing_the_stream_stops_the_generator(build: Callable[..., RetrievalQA]) -> None:
    model = counting("字" * 1000)
    stream = build(llm=model).stream(LEAVE)
    for _ in range(4):
        next(stream)
    stream.close()  # type: ignore[attr-defined] # it is a generator
    made = len(model.made)
    assert made <= 4
    assert list(stream) == []
    assert len(model.made) == made


async def test_closing_the_async_stream_stops_the_generator(build: Callable[..., RetrievalQA]) -> None:
    model = counting("字" * 1000)
    stream: AsyncIterator[Any] = build(llm=model).astream(LEAVE)
    for _ in range(4):
        await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined] # it is a generator
    assert len(model.made) <= 6


def test_an_error_of_the_generator_comes_after_its_pieces(build: Callable[..., RetrievalQA]) -> None:
    class Failing(CountingModel):
        def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
            yield ChatGenerationChunk(message=AIMessageChunk(content="十"))
            raise ConnectionError("server gone")

    pieces = []
    with pytest.raises(RagProjError, match="server gone"):
        for piece in build(llm=Failing(made=[], prompts=[])).stream(LEAVE):
            pieces.append(piece)
    assert [piece.get("result") for piece in pieces] == [None, "十"]


# -- citations over real documents ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[RetrievalQA, None, None]:
    """Wikipedia passages (JSONL records), a long novel, Markdown, HTML, PDF and CSV of the project's data."""
    config = load_config(None, [f"kb={tmp_path_factory.mktemp('real') / 'kb'}"])
    store = build_vectorstore(config, create=True)
    fulltext = FullTextIndex(store.knowledge_base)
    docs = shared_data / "docs" / "dev"
    names = ["69_姚明.txt", "35_2. 提示原则 Guidelines.md", "75_劳动合同法(2012-12-28).md", "76_html.sample.zh.html"]
    paths = [shared_data / "cmrc2018_trial_passages.jsonl", *(docs / name for name in names), docs / "00_Comp_zh_0.pdf"]
    report = Ingestor(store, fulltext).ingest(paths)
    assert report.failed == []
    yield build_retrieval_qa(config, vectorstore=store, fulltext=fulltext)
    store.knowledge_base.close()


REAL_QUESTIONS = [
    "姚明出生在哪一年？",
    "姚明的身高是多少？",
    "劳动合同的试用期最长是多久？",
    "用人单位拖欠工资怎么办？",
    "竞业限制的期限是多久？",
    "经济补偿按什么标准支付？",
    "编写提示词的原则有哪些？",
    "为什么要给模型时间去思考？",
    "劳务派遣单位的注册资本是多少？",
    "非全日制用工的工资多久结算一次？",
]


def document_text(qa: RetrievalQA, citation: dict[str, Any]) -> str:
    retriever: Any = qa.retriever
    store = retriever.default.default.store
    return store.knowledge_base.document_text(citation["document_id"]) or ""


def test_every_quote_stands_at_its_place_in_the_document(real: RetrievalQA, shared_data: Path) -> None:
    from chains.evaluation import read_questions

    rows = read_questions(shared_data / "cmrc2018_trial.jsonl")[::12]
    questions = [*REAL_QUESTIONS, *(row.question for row in rows)]
    cited = 0
    for question in questions:
        output = real.invoke(question)
        found = {document.metadata["document_id"] for document in output["source_documents"]}
        for citation in output["citations"]:
            assert document_text(real, citation)[citation["start"] : citation["end"]] == citation["quote"]
            assert citation["document_id"] in found
            assert f"{citation['quote']} [{citation['n']}]" in output["result"]
            cited += 1
        assert output["refused"] or output["citations"]
    assert cited >= 0.9 * len(questions)


def test_source_documents_stand_at_their_place_too(real: RetrievalQA) -> None:
    for question in REAL_QUESTIONS:
        for document in real.invoke(question)["source_documents"]:
            metadata = document.metadata
            assert document_text(real, metadata)[metadata["start"] : metadata["end"]] == document.page_content


def test_a_generated_answer_is_cited_at_its_place(real: RetrievalQA) -> None:
    """The model repeats the second passage's first words and marks it."""
    first = real.invoke(REAL_QUESTIONS[2])
    text = f"{first['source_documents'][1].page_content[:40]}。[2]"
    retriever: Any = real.retriever
    qa = build_retrieval_qa(
        RagConfig(), vectorstore=retriever.default.default.store, llm=FakeListChatModel(responses=[text])
    )
    (citation,) = qa.invoke(REAL_QUESTIONS[2])["citations"]
    assert citation["n"] == 2
    assert document_text(real, citation)[citation["start"] : citation["end"]] == citation["quote"]

"""split_document: exact offsets, no text lost, whole sentences, sizes in tokens, and places carried into chunks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document

from chains.embeddings import token_counter
from chains.lexical_embeddings import LexicalEmbeddings
from loaders.config import Config
from loaders.documents import LoaderConfig, load_documents
from loaders.errors import ConfigError, LoadError
from loaders.splitters import (
    CONTEXT_TOKENS,
    SplitterConfig,
    _windows,
    context_lines,
    embedding_text,
    split_document,
)

Length = Callable[[str], int]
_LEXICAL = LexicalEmbeddings(dimensions=64)


def lexical(text: str) -> int:
    """Tokens as the embedded default counts them; white space counts for nothing."""
    return token_counter(_LEXICAL)(text)


def rounded(text: str) -> int:
    """A count that is not additive: four characters a token, rounded up."""
    return (len(text) + 3) // 4


LENGTHS = [pytest.param(function, id=function.__name__) for function in (len, lexical, rounded)]


def split(text: str, length: Length = len, **settings: int) -> list[Document]:
    return split_document(Document(page_content=text), SplitterConfig(**settings), length)


def spans(chunks: list[Document]) -> list[tuple[int, int]]:
    return [(chunk.metadata["start"], chunk.metadata["end"]) for chunk in chunks]


def assert_sound(text: str, chunks: list[Document], config: SplitterConfig, length: Length) -> None:
    """What holds for every document."""
    covered = bytearray(len(text))
    previous_start, previous_end = -1, 0
    for chunk in chunks:
        start, end = chunk.metadata["start"], chunk.metadata["end"]
        assert 0 <= start < end <= len(text)
        assert text[start:end] == chunk.page_content == chunk.page_content.strip()
        assert chunk.page_content
        assert length(chunk.page_content) <= config.chunk_size
        assert start >= previous_start
        assert end > previous_end
        if config.chunk_overlap == 0:
            assert start >= previous_end
        covered[start:end] = b"\x01" * (end - start)
        previous_start, previous_end = start, end
    lost = [offset for offset, character in enumerate(text) if not covered[offset] and not character.isspace()]
    assert lost == []


# -- offsets, coverage and size ----------------------------------------------------------------------------------

TEXTS = {
    "empty": "",
    "white space": " \n\n\t　 \n",
    "one character": "法",
    "short": "  第一条 为了规范管理，制定本办法。\n",
    "repeated sentences": "本条自发布之日起施行。" * 120,
    "repeated lines": "同一行\n" * 300,
    "repeated paragraphs": "甲方应当按时付款。乙方应当按时交货。\n\n" * 80,
    "no punctuation": "中" * 1500,
    "one long word": "a" * 3000,
    "emoji": "😀👨‍👩‍👧‍👦🇨🇳" * 120,
    "crlf": "第一行。\r\n第二行，没有句号\r\n\r\n" * 90,
    "double spaces": "词语  词语  " * 200,
    "columns of spaces": "姓名      部门        电话\n张三      财务部      12345\n" * 60,
    "tabs": "a\t\tb\t\t" * 300,
    "spaces only inside": "头" + " " * 2000 + "尾",
    "blank lines only inside": "头" + "\n" * 2000 + "尾",
    "english": "The quick brown fox jumps over the lazy dog.  It did, e.g. at 3.14 p.m.; nobody saw it! " * 50,
    "sentence ends only": "。！？……" * 200,
    "separators only": "、，；：" * 200,
    "quotes": "他说：“走吧！”她答：“好。”" * 80,
    "markdown table": "| 姓名 | 年龄 |\n|---|---|\n" + "| 张三丰 | 一百零八 |\n" * 120,
    "supplementary han": "𠀀𠀁。𪛖，" * 150,
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("overlap", [0, 20])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_no_text_is_lost_and_every_offset_is_exact(text: str, overlap: int, length: Length) -> None:
    config = SplitterConfig(chunk_size=64, chunk_overlap=overlap)
    document = Document(page_content=text)
    assert_sound(text, split_document(document, config, length), config, length)


@pytest.mark.parametrize("length", LENGTHS)
def test_generated_texts_are_split_soundly(length: Length) -> None:
    random_ = random.Random(7)
    alphabet = [
        "中",
        "文",
        "a",
        "B",
        "1",
        " ",
        "  ",
        "\n",
        "\n\n",
        "。",
        "！”",
        "，",
        "、",
        ".",
        "?",
        "😀",
        "；",
        "…",
        "\t",
    ]
    for _ in range(150):
        text = "".join(random_.choices(alphabet, k=random_.randrange(1, 400)))
        size = random_.choice([16, 17, 31, 64])
        config = SplitterConfig(chunk_size=size, chunk_overlap=random_.choice([0, 0, 5, size - 1]))
        assert_sound(text, split_document(Document(page_content=text), config, length), config, length)


def test_a_text_that_fits_is_one_chunk_without_its_margins() -> None:
    chunks = split("\n  第一条。\n第二条。 \n", chunk_size=16)
    assert [chunk.page_content for chunk in chunks] == ["第一条。\n第二条。"]
    assert spans(chunks) == [(3, 12)]


@pytest.mark.parametrize("text", ["", " ", "\n\n \t　"])
def test_a_blank_text_has_no_chunks(text: str) -> None:
    assert split(text) == []


def test_white_space_alone_never_makes_a_chunk() -> None:
    assert all(chunk.page_content.strip() for chunk in split("甲" * 40 + " " * 500 + "乙" * 40, chunk_size=32))


def test_shares_are_even_instead_of_full_chunks_and_a_crumb() -> None:
    # 70 sentences of 10 characters in chunks of 256: 3 chunks; greedy filling would leave 250, 250, 200
    sizes = [len(chunk.page_content) for chunk in split("甲乙丙丁戊己庚辛壬。" * 70, chunk_size=256)]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 60
    # 26 sentences: greedy filling would leave 250 and a crumb of 10
    sizes = [len(chunk.page_content) for chunk in split("甲乙丙丁戊己庚辛壬。" * 26, chunk_size=256)]
    assert sorted(sizes)[0] >= 100


# -- where it cuts -----------------------------------------------------------------------------------------------


def test_split_keeps_sentence_end() -> None:
    text = "今天天气很好我们去公园。" * 10 + "他问你去不去呢？" * 10 + "大家都说好极了！" * 10
    for chunk in split(text, chunk_size=40):
        assert chunk.page_content[-1] in "。？！"
        assert chunk.page_content[0] in "今他大"


def test_a_closing_quote_stays_with_its_sentence() -> None:
    chunks = split("老师说：“明天放假。”同学们都很高兴。（完。）" * 12, chunk_size=40)
    assert len(chunks) > 5
    for chunk in chunks:
        assert chunk.page_content[0] not in "”）。"
        assert chunk.page_content[-1] in "”。）"


def test_an_ellipsis_and_repeated_marks_are_not_torn() -> None:
    for chunk in split("真的吗？！他没有说话……然后走了。" * 20, chunk_size=24):
        assert chunk.page_content[0] not in "？！…。"


def test_paragraphs_are_kept_whole_where_they_fit() -> None:
    paragraphs = [f"第{number}段。" + "内容很多。" * 5 for number in range(12)]
    for chunk in split("\n\n".join(paragraphs), chunk_size=64):
        assert all(part in paragraphs for part in chunk.page_content.split("\n\n"))


def test_a_decimal_point_is_no_sentence_end() -> None:
    for chunk in split("The value of pi is 3.14159 and e is 2.71828 here. " * 20, chunk_size=60):
        assert chunk.page_content.endswith(".")
        assert chunk.page_content.startswith("The")


def test_commas_are_cut_before_words() -> None:
    for chunk in split("春天来了，" * 60, chunk_size=32):
        assert chunk.page_content.endswith("，")


# -- text without separators ---------------------------------------------------------------------------------------

STRETCHES = {
    "han": "劳动合同法规定用人单位应当依法建立和完善规章制度" * 60,
    "one word": "abcdefghij" * 300,
    "han and words": "模型ChatGLM3六十亿参数" * 90,
    "dense, then sparse": "中" * 500 + "a" * 1500 + "文" * 500,
    "emoji": "👨‍👩‍👧‍👦🇨🇳😀" * 120,
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("stretch", STRETCHES.values(), ids=STRETCHES.keys())
def test_a_stretch_without_separators_is_cut_where_the_tokens_are_full(stretch: str, length: Length) -> None:
    plain, start = [], 0  # one character more at a time
    for end in range(1, len(stretch) + 1):
        if length(stretch[start:end]) > 64:
            plain.append(stretch[start : end - 1])
            start = end - 1
    assert list(_windows(stretch, 64, length)) == [*plain, stretch[start:]]


@pytest.mark.parametrize("stretch", STRETCHES.values(), ids=STRETCHES.keys())
def test_cutting_a_stretch_counts_few_tokens_more_than_once(stretch: str) -> None:
    counted: list[int] = []

    def counting(text: str) -> int:
        counted.append(len(text))
        return lexical(text)

    text = stretch * 10
    chunks = split(text, counting, chunk_size=128)
    assert len(counted) < len(text) / 4  # LangChain's own way asks for each character, twice
    assert sum(counted) < 60 * len(text)
    assert len(counted) < 40 * len(chunks)


def test_a_character_of_more_tokens_than_fit_stands_alone() -> None:
    assert list(_windows("甲乙丙", 16, lambda text: 20 * len(text))) == ["甲", "乙", "丙"]


# -- overlap -----------------------------------------------------------------------------------------------------


def test_overlap_repeats_whole_sentences_of_the_chunk_before() -> None:
    text = "".join(f"这是第{number:03}句话内容。" for number in range(60))  # 11 characters each
    chunks = split(text, chunk_size=64, chunk_overlap=25)
    assert len(chunks) > 5
    for before, after in itertools.pairwise(chunks):
        shared = before.metadata["end"] - after.metadata["start"]
        assert shared == 22  # two sentences; a third would be 33 > 25
        assert after.page_content.startswith("这是第")


def test_overlap_is_left_out_where_no_whole_sentence_fits() -> None:
    text = "".join(f"第{number:02}句" + "长" * 36 + "。" for number in range(10))
    chunks = split(text, chunk_size=64, chunk_overlap=10)
    assert all(a.metadata["end"] <= b.metadata["start"] for a, b in itertools.pairwise(chunks))


def test_overlap_never_reaches_into_another_slide() -> None:
    text = "第一页的话。" * 10 + "第二页的话。" * 40
    marks = [{"start": 0, "slide": 1}, {"start": 60, "slide": 2}]
    document = Document(page_content=text, metadata={"marks": marks})
    for chunk in split_document(document, SplitterConfig(chunk_size=64, chunk_overlap=24), len):
        assert ("第一页" in chunk.page_content) == (chunk.metadata["slide"] == 1)
        assert ("第二页" in chunk.page_content) == (chunk.metadata["slide"] == 2)


@pytest.mark.parametrize(
    "text", ["中" * 1500, ("短。" + "长" * 60 + "。") * 10], ids=["no punctuation", "short and long"]
)
def test_overlap_never_repeats_a_whole_chunk(text: str) -> None:
    chunks = split(text, rounded if "。" not in text else len, chunk_size=64, chunk_overlap=20)
    assert len(chunks) > 5
    assert len({start for start, _ in spans(chunks)}) == len(chunks)


# -- places ------------------------------------------------------------------------------------------------------


def marked(*parts: tuple[str, dict[str, Any]], **metadata: Any) -> Document:
    """A document of consecutive parts, each under its own mark."""
    text, marks = "", []
    for part, state in parts:
        marks.append({"start": len(text), **state})
        text += part
    return Document(page_content=text, metadata={"source": "a.md", "title": "文件", **metadata, "marks": marks})


def test_metadata_is_the_documents_own_with_the_place_and_without_marks() -> None:
    document = marked(("一。" * 10, {"page": 1, "headings": ["章"]}), id="7", lang="zh")
    (chunk,) = split_document(document, SplitterConfig(), len)
    assert chunk.metadata == {
        "source": "a.md", "title": "文件", "id": "7", "lang": "zh", "page": 1, "headings": ["章"],
        "start": 0, "end": 20,
    }  # fmt: skip
    assert "marks" in document.metadata


def test_the_place_is_that_of_the_chunks_first_character() -> None:
    document = marked(("甲。" * 50, {"page": 1}), ("乙。" * 50, {"page": 2}), ("丙。" * 50, {"page": 3}))
    for chunk in split_document(document, SplitterConfig(chunk_size=32), len):
        assert chunk.metadata["page"] == {"甲": 1, "乙": 2, "丙": 3}[chunk.page_content[0]]


def test_text_before_the_first_mark_has_no_place() -> None:
    text = "甲。" * 40 + "乙。" * 40
    document = Document(page_content=text, metadata={"marks": [{"start": 80, "page": 9}]})
    for chunk in split_document(document, SplitterConfig(chunk_size=32), len):
        assert chunk.metadata.get("page") == (9 if chunk.metadata["start"] >= 80 else None)


@pytest.mark.parametrize("kind", ["sheet", "slide"])
def test_no_chunk_crosses_a_sheet_or_slide_however_short(kind: str) -> None:
    names: list[Any] = ["甲", "乙", "丙"] if kind == "sheet" else [1, 2, 3]
    document = marked(*[(f"{name}\n\n", {kind: name}) for name in names])
    chunks = split_document(document, SplitterConfig(chunk_size=256), len)
    assert [(chunk.page_content, chunk.metadata[kind]) for chunk in chunks] == [(str(name), name) for name in names]


def test_a_new_section_begins_a_new_chunk_once_the_old_one_is_worth_one() -> None:
    long, short = "正文内容。" * 10, "短。"
    document = marked((long, {"headings": ["一"]}), (short, {"headings": ["二"]}), (long, {"headings": ["三"]}))
    chunks = split_document(document, SplitterConfig(chunk_size=128), len)
    # 50 >= 128 // 4 ends at the heading; 2 characters do not, and go with the section that follows
    assert [chunk.page_content for chunk in chunks] == [long, short + long]
    assert [chunk.metadata["headings"] for chunk in chunks] == [["一"], ["二"]]


def test_a_page_break_inside_a_section_does_not_cut() -> None:
    document = marked(
        ("正文内容。" * 10, {"page": 1, "headings": ["一"]}), ("正文。" * 10, {"page": 2, "headings": ["一"]})
    )
    assert len(split_document(document, SplitterConfig(chunk_size=128), len)) == 1


def test_every_chunk_of_a_table_carries_its_header() -> None:
    header, rows = "| 姓名 | 年龄 |\n|---|---|\n", "| 张三丰 | 一百零八 |\n" * 40
    document = marked(("前言。\n\n", {}), (header + rows, {"table_header": header.strip()}), ("后记。" * 30, {}))
    chunks = split_document(document, SplitterConfig(chunk_size=100), len)
    for chunk in chunks:
        inside = 5 <= chunk.metadata["start"] < 5 + len(header + rows)
        assert ("table_header" in chunk.metadata) == inside
    later = [chunk for chunk in chunks if chunk.page_content.startswith("| 张")]
    assert later
    assert all(embedding_text(chunk).count("| 姓名 |") == 1 for chunk in later)


def test_marks_do_not_change_offsets() -> None:
    document = marked(*[(f"第{n}条 内容内容内容。\n", {"headings": [f"第{n}条"]}) for n in range(200)])
    config = SplitterConfig(chunk_size=64)
    assert_sound(document.page_content, split_document(document, config, len), config, len)


# -- what is embedded --------------------------------------------------------------------------------------------


def test_context_is_what_the_chunk_does_not_show_itself() -> None:
    chunk = Document(
        page_content="第一章 总则\n第一条 ……",
        metadata={"title": "劳动法", "sheet": "表一", "headings": ["第一章 总则", "第一条"], "table_header": "| a |"},
    )
    assert context_lines(chunk) == ["劳动法", "表一", "| a |"]
    assert embedding_text(chunk).endswith(chunk.page_content)
    assert "劳动法" in embedding_text(chunk)


def test_a_chunk_without_a_place_is_embedded_as_it_is() -> None:
    assert context_lines(Document(page_content="x")) == []
    assert embedding_text(Document(page_content="x", metadata={"title": "", "headings": []})) == "x"


def test_a_title_that_is_also_a_heading_is_named_once() -> None:
    chunk = Document(page_content="正文", metadata={"title": "总则", "headings": ["总则", "适用范围"]})
    assert context_lines(chunk) == ["总则", "适用范围"]


@pytest.mark.parametrize(
    "metadata",
    [
        {"title": 2024},
        {"sheet": 3},
        {"table_header": 5},
        {"headings": "章节"},
    ],
)
def test_metadata_from_python_callers_may_be_of_any_kind(metadata: dict[str, Any]) -> None:
    lines = embedding_text(Document(page_content="正文", metadata=metadata)).split("\n")
    assert lines[-1] == "正文"
    assert lines[:-1] in ([], [str(next(iter(metadata.values())))])


# -- config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [{"chunk_size": 15}, {"chunk_size": 9000}, {"chunk_overlap": -1}, {"chunk_size": 32, "chunk_overlap": 32}]
)
def test_sizes_that_cannot_work_are_refused(data: dict[str, int]) -> None:
    assert issubclass(SplitterConfig, Config)
    with pytest.raises(ConfigError, match="chunk_"):
        SplitterConfig.from_dict(data, where="x")


# -- real documents ----------------------------------------------------------------------------------------------


def documents(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() == ".json" or path.stat().st_size > 400_000:
            continue
        try:
            yield from load_documents(path, LoaderConfig(ocr="off"))
        except LoadError:
            continue  # encrypted, damaged, empty: the loaders' tests


def test_real_documents_are_split_soundly(shared_data: Path) -> None:
    config = SplitterConfig(chunk_size=256, chunk_overlap=32)
    total = 0
    for document in documents(shared_data / "docs" / "dev"):
        chunks = split_document(document, config, lexical)
        assert_sound(document.page_content, chunks, config, lexical)
        for chunk in chunks:
            marks = [mark for mark in document.metadata["marks"] if mark["start"] <= chunk.metadata["start"]]
            for key in ("page", "slide", "sheet", "headings", "table_header"):
                assert chunk.metadata.get(key) == (marks[-1].get(key) if marks else None)
        total += len(chunks)
    assert total > 100


def test_the_header_of_a_wide_table_leaves_room_for_its_rows() -> None:
    header = "| " + " | ".join(f"第{number}列的名称" for number in range(120)) + " |"
    metadata = {"title": "工资表", "headings": ["二〇二四年"], "table_header": header}
    texts = [embedding_text(Document(page_content=row, metadata=metadata)) for row in ("| 张三 | 9 |", "| 李四 | 7 |")]
    for text, row in zip(texts, ("| 张三 | 9 |", "| 李四 | 7 |"), strict=True):
        assert text.startswith("工资表\n二〇二四年\n| 第0列的名称 | 第1列的名称 |")
        assert text.endswith(f"\n{row}")
        assert lexical(text) <= CONTEXT_TOKENS + lexical(row)


def test_of_a_long_context_the_longest_lines_are_cut() -> None:
    metadata = {"title": "长" * 300, "headings": ["第一章 总则", "节" * 200], "table_header": "| 姓名 | 年龄 |"}
    title, chapter, section, header, text = embedding_text(Document(page_content="张三", metadata=metadata)).split("\n")
    assert (chapter, header, text) == ("第一章 总则", "| 姓名 | 年龄 |", "张三")
    # 5 tokens and 7 stand; 84 are left, by hand: 96 - 12
    assert (title, section) == ("长" * 42, "节" * 42)


def test_words_of_a_context_count_as_tokens_not_as_characters() -> None:
    title = "An introduction to retrieval augmented generation with large language models, in thirty short chapters"
    assert len(title) > CONTEXT_TOKENS
    assert embedding_text(Document(page_content="x", metadata={"title": title})) == f"{title}\nx"

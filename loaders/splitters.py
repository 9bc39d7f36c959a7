"""Document -> chunks: LangChain's recursive splitter with Chinese separators, exact offsets, sized in tokens."""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from langchain_core.documents import Document
from pydantic import Field, model_validator

from loaders.config import Config

# From coarse to fine. The sentence end stays with its sentence, a closing quote or bracket with the sentence end.
_CLOSERS = "[”’」』）)\"']*"
SEPARATORS = (
    r"\n\n+",
    r"\n",
    rf"[。！？!?…]+{_CLOSERS}",
    rf"\.{_CLOSERS}(?=\s)",
    rf"[；;]{_CLOSERS}",
    rf"[，,：:]{_CLOSERS}",
    r"、",
    r"\s",
    "",
)
_SENTENCE_END = re.compile(rf"[。！？!?…；;]+{_CLOSERS}|\.(?=\s)|\n")

Length = Callable[[str], int]


class SplitterConfig(Config):
    """How documents are cut into chunks."""

    type: Literal["recursive"] = Field(default="recursive", alias="_type")
    chunk_size: int = Field(default=256, ge=16, le=8192, description="most tokens of the embedder in a chunk")
    chunk_overlap: int = Field(
        default=0, ge=0, description="tokens of whole sentences a chunk repeats from the one before it"
    )

    @model_validator(mode="after")
    def _overlap_below_size(self) -> SplitterConfig:
        if self.chunk_overlap >= self.chunk_size:
            raise ValueError(f"chunk_overlap {self.chunk_overlap} must be below chunk_size {self.chunk_size}")
        return self


def split_document(document: Document, config: SplitterConfig, length: Length) -> list[Document]:
    """The document's chunks in order; `text[start:end] == chunk` for each.

    A chunk never crosses a sheet, a slide or a section that is worth a chunk of its own. Its metadata is the
    document's without `marks`, plus `start`, `end` and the location (page, slide, sheet, headings, table_header)
    that holds where it starts.

    Args:
        document: normalised text, with `marks` in its metadata as the loaders write them.
        config: chunk size and overlap.
        length: tokens of a text, as the embedder counts them.
    """
    text = document.page_content
    marks = document.metadata.get("marks", [])
    shared = {key: value for key, value in document.metadata.items() if key != "marks"}
    starts = [mark["start"] for mark in marks]
    chunks = []
    for low, high in _blocks(text, marks, config.chunk_size, length):
        for start, end in _spans(text, low, high, config, length):
            location = _location(marks, starts, start)
            metadata = shared | location | {"start": start, "end": end}
            chunks.append(Document(page_content=text[start:end], metadata=metadata))
    return chunks


def embedding_text(chunk: Document) -> str:
    """What is embedded and indexed for a chunk: title, sheet and headings, table header, then its text.

    The title stands in front even where the chunk opens with it: every chunk of a document then leans the same way
    (recall@1 of 128-token chunks on the CMRC training questions .955 -> .962).
    """
    return text_with_context(chunk.page_content, chunk.metadata)


def text_with_context(text: str, metadata: Mapping[str, Any]) -> str:
    """`embedding_text` of a chunk given by its parts: making a Document takes longer than this."""
    return "\n".join([*_names(metadata), *_table_header(text, metadata), text])


def context_lines(chunk: Document) -> list[str]:
    """What a reader needs to know beside the chunk: title, headings and table header that its text does not show."""
    opening = chunk.page_content[:200]
    names = [name for name in _names(chunk.metadata) if name not in opening]
    return names + _table_header(chunk.page_content, chunk.metadata)


def _names(metadata: Mapping[str, Any]) -> list[str]:
    """Title, sheet and heading path, outermost first, none twice."""
    headings = metadata.get("headings")
    names = [metadata.get("title"), metadata.get("sheet"), *(headings if isinstance(headings, list) else [])]
    return list(dict.fromkeys(name for name in names if name and isinstance(name, str)))


def _table_header(text: str, metadata: Mapping[str, Any]) -> list[str]:
    header = metadata.get("table_header")
    return [header] if isinstance(header, str) and header and not text.startswith(header) else []


def _location(marks: list[dict[str, Any]], starts: list[int], offset: int) -> dict[str, Any]:
    """The mark that holds at an offset, without its own start."""
    index = bisect.bisect_right(starts, offset) - 1
    if index < 0:
        return {}
    return {key: value for key, value in marks[index].items() if key != "start"}


def _blocks(text: str, marks: list[dict[str, Any]], size: int, length: Length) -> Iterator[tuple[int, int]]:
    """(start, end) of stretches a chunk must stay inside.

    A new sheet or slide begins one, and so does a new section, unless the stretch so far is so short (a heading with
    a line or two) that on its own it would be a poor chunk.
    """
    low, previous = 0, None
    for mark in marks:
        place = (mark.get("sheet"), mark.get("slide"))
        section = (*place, *mark.get("headings", ()))
        if previous is not None and section != previous and mark["start"] > low:
            hard = place != previous[:2]
            if hard or length(text[low : mark["start"]]) >= size // 4:
                yield low, mark["start"]
                low = mark["start"]
        previous = section
    yield low, len(text)


def _spans(text: str, low: int, high: int, config: SplitterConfig, length: Length) -> Iterator[tuple[int, int]]:
    """(start, end) of the chunks of one block, trimmed of white space, none of them blank."""
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    block = text[low:high]
    # by sentence: tokens of a whole are fewer than those of its parts, and parts are what chunks are filled with
    ends = [0, *(end.end() for end in _SENTENCE_END.finditer(block)), len(block)]
    total = sum(max(1, length(block[a:b])) for a, b in itertools.pairwise(ends) if a < b)
    pieces = [block]
    if total > config.chunk_size:
        # even shares instead of full chunks and a crumb; an eighth of slack so that sentences fit
        room = config.chunk_size - config.chunk_overlap
        share = math.ceil(total / math.ceil(total / room) * 1.125)
        splitter = RecursiveCharacterTextSplitter(
            chunk_size=min(room, share),
            chunk_overlap=0,  # overlapping pieces could not be told apart in repeated text; see _overlap
            separators=list(SEPARATORS),
            is_separator_regex=True,
            keep_separator="end",
            strip_whitespace=False,
            # LangChain repeats pieces of no length (white space) in the next chunk: give each one at least 1
            length_function=lambda piece: max(1, length(piece)) if piece else 0,
        )
        pieces = splitter.split_text(block)
        assert sum(map(len, pieces)) == len(block), "pieces must be a partition of the block"
    position = before = low
    for piece in pieces:
        start = position + len(piece) - len(piece.lstrip())
        end = position + len(piece.rstrip())
        position += len(piece)
        if start < end:
            yield _overlap(text, before, start, config.chunk_overlap, length), end
            before = start + 1  # a chunk never repeats the whole of the one before it


def _overlap(text: str, low: int, start: int, tokens: int, length: Length) -> int:
    """The start of the whole sentences before `start`, not before `low`, that fit into `tokens`."""
    if tokens == 0 or start <= low:
        return start
    window = max(low, start - 4 * tokens)
    for end in _SENTENCE_END.finditer(text, window, start):
        candidate = end.end()
        if candidate < start and length(text[candidate:start]) <= tokens:
            return candidate + len(text[candidate:start]) - len(text[candidate:start].lstrip())
    return start

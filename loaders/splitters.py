"""Document -> chunks: LangChain's recursive splitter with Chinese separators, exact offsets, sized in tokens."""

from __future__ import annotations

import bisect
import functools
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
)
CONTEXT_TOKENS = 96
"""The most that title, headings and table header take from what an embedder sees of a chunk, in tokens."""
_TOKEN = re.compile(r"[A-Za-z0-9]{1,4}|\S")  # about one of a WordPiece vocabulary
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
    (recall@1 of 128-token chunks on the CMRC training questions .955 -> .962). Together they are cut to
    `CONTEXT_TOKENS`: the header of a wide table alone would else be all that an embedder sees of each of its rows.
    """
    return text_with_context(chunk.page_content, chunk.metadata)


def text_with_context(text: str, metadata: Mapping[str, Any]) -> str:
    """`embedding_text` of a chunk given by its parts: making a Document takes longer than this."""
    return "\n".join([*_shortened([*_names(metadata), *_table_header(text, metadata)]), text])


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


def _shortened(lines: list[str]) -> list[str]:
    """The lines, the longest cut until all together have no more than `CONTEXT_TOKENS`."""
    if sum(map(len, lines)) <= CONTEXT_TOKENS:  # a token has at least one character
        return lines
    ends = [[token.end() for token in _TOKEN.finditer(line)] for line in lines]
    fitting = (most for most in range(CONTEXT_TOKENS, 0, -1) if sum(min(len(e), most) for e in ends) <= CONTEXT_TOKENS)
    most = next(fitting, 1)
    return [line if len(e) <= most else line[: e[most - 1]] for line, e in zip(lines, ends, strict=True)]


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
    block = text[low:high]
    # by sentence: tokens of a whole are fewer than those of its parts, and parts are what chunks are filled with
    ends = [0, *(end.end() for end in _SENTENCE_END.finditer(block)), len(block)]
    total = sum(max(1, length(block[a:b])) for a, b in itertools.pairwise(ends) if a < b)
    pieces = [block]
    if total > config.chunk_size:
        # even shares instead of full chunks and a crumb; an eighth of slack so that sentences fit
        room = config.chunk_size - config.chunk_overlap
        share = math.ceil(total / math.ceil(total / room) * 1.125)
        pieces = list(_pieces(block, min(room, share), length))
        assert sum(map(len, pieces)) == len(block), "pieces must be a partition of the block"
    position = before = low
    for piece in pieces:
        start = position + len(piece) - len(piece.lstrip())
        end = position + len(piece.rstrip())
        position += len(piece)
        if start < end:
            yield _overlap(text, before, start, config.chunk_overlap, length), end
            before = start + 1  # a chunk never repeats the whole of the one before it


def _pieces(block: str, size: int, length: Length) -> Iterator[str]:
    """A block cut at the coarsest separators that give pieces of at most `size` tokens."""
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    # LangChain asks for the length of each part again and again. It repeats parts of no length (white space) in the
    # next piece: give each one at least 1
    counted = functools.cache(lambda part: max(1, length(part)) if part else 0)
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=size,
        chunk_overlap=0,  # overlapping pieces could not be told apart in repeated text; see _overlap
        separators=list(SEPARATORS),
        is_separator_regex=True,
        keep_separator="end",
        strip_whitespace=False,
        length_function=counted,
    )
    for piece in splitter.split_text(block):
        if counted(piece) <= size:
            yield piece
        else:
            yield from _windows(piece, size, length)


def _windows(stretch: str, size: int, length: Length) -> Iterator[str]:
    """A stretch without separators, cut wherever `size` tokens are full; a single character is never cut.

    LangChain's own way, the separator "", counts the tokens of every character: minutes for a megabyte.
    """
    start, width = 0, size
    while start < len(stretch):
        width = _width(stretch[start : start + 16 * size], width, size, length)
        yield stretch[start : start + width]
        start += width


def _width(stretch: str, guess: int, size: int, length: Length) -> int:
    """How many of the first characters of a stretch, at least one, have `size` tokens at most.

    Found around a guess, which is the number for the piece before: neighbours mostly agree.
    """
    fits, fails, step = 1, len(stretch) + 1, 1
    width = min(guess, len(stretch))
    while fails - fits > 1:
        if length(stretch[:width]) <= size:
            fits, width = width, width + step
        else:
            fails, width = width, width - step
        step *= 2
        if not fits < width < fails:  # stepped over what is known by now
            width = (fits + fails) // 2
    return fits


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

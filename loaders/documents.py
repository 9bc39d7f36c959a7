"""Files into LangChain documents, and what counts as a file to load."""

from __future__ import annotations

import errno
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from loaders.config import Config
from loaders.errors import LoadError
from loaders.formats import (
    ebook,
    images,
    markdown,
    pdf,
    plain,
    problems,
    records,
    slides,
    spreadsheets,
    webpage,
    word,
)
from loaders.formats.blocks import Block, Content, Parsed, assemble, choose_title

if TYPE_CHECKING:
    from langchain_core.documents import Document


class LoaderConfig(Config):
    """Limits of parsing one file."""

    timeout_s: float = Field(60, gt=0)
    """seconds the parser may work without finishing another page or record"""
    total_timeout_s: float = Field(1800, gt=0)
    """seconds for the whole file"""
    memory_mb: int = Field(2048, ge=256)
    """MiB of address space of the parsing process (where the platform can limit it)"""
    ocr: Literal["auto", "off"] = "auto"
    """auto: read pictures and scanned pages where the extra [ocr] is installed"""


@dataclass(frozen=True, slots=True)
class _Format:
    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Path, LoaderConfig], Content | Iterator[Parsed]]
    """A document as content, or one finished document per record."""


_FORMATS = (
    _Format("txt", (".txt", ".text", ".log"), lambda path, _: plain.read_plain(path)),
    _Format("md", (".md", ".markdown"), lambda path, _: markdown.read_markdown(path)),
    _Format("html", (".html", ".htm", ".xhtml"), lambda path, _: webpage.read_html(path)),
    _Format("pdf", (".pdf",), lambda path, config: pdf.read_pdf(path, ocr=config.ocr)),
    _Format("docx", (".docx",), lambda path, _: word.read_docx(path)),
    _Format("pptx", (".pptx",), lambda path, _: slides.read_pptx(path)),
    _Format("xlsx", (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods"), lambda path, _: spreadsheets.read_workbook(path)),
    _Format("csv", (".csv", ".tsv"), lambda path, _: spreadsheets.read_delimited(path)),
    _Format("json", (".json",), lambda path, _: records.read_json(path)),
    _Format("jsonl", (".jsonl", ".ndjson"), lambda path, _: records.read_json_lines(path)),
    _Format("epub", (".epub",), lambda path, _: ebook.read_epub(path)),
    _Format(
        "image",
        (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"),
        lambda path, config: images.read_image(path, ocr=config.ocr),
    ),
)
_BY_SUFFIX = {suffix: format_ for format_ in _FORMATS for suffix in format_.suffixes}
SUPPORTED_SUFFIXES = frozenset(_BY_SUFFIX)
"""Lower case, with the dot."""

_SURROGATES = re.compile("[\ud800-\udfff]")  # how Python shows the bytes of a name that is not UTF-8
# a path that leads nowhere, which is no error inside a folder: anything else might be a document
_LEADS_NOWHERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_SKIPPED_NAMES = {"__MACOSX", "Thumbs.db", "desktop.ini"}


class FoundFiles(NamedTuple):
    """What a list of paths stands for."""

    files: list[Path]
    """To be loaded, sorted, none twice."""
    unsupported: list[Path]
    """Inside the folders, left out for their suffix."""
    errors: list[tuple[Path, LoadError]]
    """Paths given by name that are missing or of no supported kind, and whatever cannot be reached or read."""


def load_documents(path: Path, options: LoaderConfig | None = None) -> Iterator[Document]:
    """The documents in a file, parsed in a child process: one per file, one per record of JSON.

    `page_content` is the whole normalised text; the metadata has `source`, `title`, `format` and `marks`, a list of
    states sorted by `start`, each complete from its offset on: page, slide, sheet, headings, table_header.

    Raises:
        LoadError: the file is missing, of no supported kind, encrypted, damaged, without text, not what its name
            says, or takes more time or memory than `options` allow.
    """
    from langchain_core.documents import Document

    from loaders.sandbox import parse

    for text, metadata in parse(path, options or LoaderConfig()):
        yield Document(page_content=text, metadata=metadata)


def read_file(path: Path, options: LoaderConfig, *, on_progress: Callable[[], None] | None = None) -> Iterator[Parsed]:
    """The same in this process, without limits; `on_progress` is called after each page or similar step.

    Raises:
        LoadError: as `load_documents`. Parsers of damaged files raise anything else besides.
    """
    check_path(path)
    format_ = _BY_SUFFIX[path.suffix.lower()]
    common = {"source": str(path), "format": format_.name}
    content = format_.read(path, options)
    if not isinstance(content, Content):
        for text, metadata in content:
            yield Parsed(text, {**metadata, **common})
        return
    text, marks = assemble(_watched(content.blocks, on_progress))
    if not text:
        raise problems.no_text(path)
    yield Parsed(text, {"title": choose_title(content.titles, path.stem), **common, "marks": marks})


def check_path(path: Path) -> None:
    """Nothing, where the path is a file with a reader.

    Raises:
        LoadError: it is missing, out of reach, a folder, or of no supported kind.
    """
    if _SURROGATES.search(str(path)):
        raise problems.badly_named(path)
    mode = _mode(path)
    if not mode:
        raise problems.missing(path)
    if path.suffix.lower() not in SUPPORTED_SUFFIXES:
        raise problems.unsupported(path, " ".join(sorted(SUPPORTED_SUFFIXES)))
    if not stat.S_ISREG(mode):
        raise problems.unreadable(path, "不是普通文件 / not a regular file")


def find_files(paths: Iterable[Path]) -> FoundFiles:
    """The files the paths stand for: a file is itself, a folder everything below it.

    Inside folders hidden files, `__MACOSX`, Office lock files (`~$`) and symbolic links to folders are passed over. A
    symbolic link to a file outside the folder is an error: whoever may write there could have any file answer.
    """
    files: set[Path] = set()
    unsupported: set[Path] = set()
    errors: list[tuple[Path, LoadError]] = []
    for path in paths:
        try:
            if not stat.S_ISDIR(_mode(path)):
                check_path(path)
                files.add(path)
                continue
        except LoadError as error:
            errors.append((path, error))
            continue
        for found in _walk(path, errors):
            if found.suffix.lower() not in SUPPORTED_SUFFIXES:
                unsupported.add(found)
            elif _SURROGATES.search(str(found)):
                errors.append((found, problems.badly_named(found)))
            else:
                files.add(found)
    return FoundFiles(sorted(files), sorted(unsupported - files), errors)


def _mode(path: Path) -> int:
    """The mode of what a path leads to, 0 where that is nothing.

    Raises:
        LoadError: the operating system does not tell: no permission on the way, a name that is too long, a dead mount.
    """
    try:
        return path.stat().st_mode
    except ValueError:  # a zero byte in the name
        return 0
    except OSError as error:
        if error.errno in _LEADS_NOWHERE:
            return 0
        raise problems.unreadable(path, error.strerror or str(error)) from error


def _walk(folder: Path, errors: list[tuple[Path, LoadError]]) -> Iterator[Path]:
    stack = [folder]
    while stack:
        current = stack.pop()
        try:
            entries = sorted(current.iterdir())
        except OSError as error:
            errors.append((current, problems.unreadable(current, error.strerror or str(error))))
            continue
        for entry in entries:
            if entry.name.startswith((".", "~$")) or entry.name in _SKIPPED_NAMES:
                continue
            try:
                mode = _mode(entry)
            except LoadError as error:
                errors.append((entry, error))
                continue
            if stat.S_ISREG(mode) and entry.is_symlink() and not entry.resolve().is_relative_to(folder.resolve()):
                errors.append((entry, problems.leads_outside(entry, folder)))
            elif stat.S_ISREG(mode):
                yield entry
            elif stat.S_ISDIR(mode) and not entry.is_symlink():
                stack.append(entry)


def _watched(blocks: Iterable[Block], on_progress: Callable[[], None] | None) -> Iterator[Block]:
    for block in blocks:
        if on_progress is not None:
            on_progress()
        yield block

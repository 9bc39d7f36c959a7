"""Thousands of mutated documents: documents that can be cut, or a LoadError, in bounded time and memory.

400 by default, a quick look; CI sets RAGPROJ_MUTATIONS=5000, a minute of one core.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from langchain_core.documents import Document
from workshop import article, records

from chains.lexical_embeddings import LexicalEmbeddings
from loaders import sandbox
from loaders.documents import SUPPORTED_SUFFIXES, LoaderConfig, load_documents
from loaders.errors import LoadError
from loaders.splitters import SplitterConfig, split_document

MUTATIONS = int(os.environ.get("RAGPROJ_MUTATIONS", "400"))
CUT = SplitterConfig(chunk_size=128)
LENGTH = LexicalEmbeddings().count_tokens
OPTIONS = LoaderConfig(timeout_s=10, total_timeout_s=30, memory_mb=1024, ocr="off")
LARGEST_SAMPLE = 400_000  # bytes: larger ones only take longer
SLOW_SAMPLES = {"04_issue-67-example.pdf"}  # half a second each: as long as all the others together
REAL_SHARE, CUT_SHARE = 10, 5  # one trial in so many is of a real document, the text of one in so many is cut
NUMBERS = [b"0", b"-1", b"65536", b"2147483647", b"4294967295", b"9999999999999999999", b"1e308", b"-0.0000001", b"NaN"]

Mutation = Callable[[bytes, random.Random], bytes]


# -- small documents of every kind ---------------------------------------------------------------------------------


def small_documents() -> dict[str, bytes]:
    """One of every kind that can be written without further libraries than the loaders'."""
    found = {
        "a.txt": article("a", 20).encode(),
        "gbk.txt": article("b", 20).encode("gb18030"),
        "utf16.txt": article("c", 20).encode("utf-16"),
        "a.md": ("# 标题\n\n" + article("d") + "\n\n| 甲 | 乙 |\n|---|---|\n| 1 | 2 |\n\n```\ncode\n```\n").encode(),
        "a.html": f"<html><body><h1>标题</h1><p>{article('e')}</p><table><tr><td>1</td></tr></table></body>".encode(),
        "a.csv": ("名称,数量\n" + "\n".join(f"{article(i, 1)},{i}" for i in range(20))).encode(),
        "a.jsonl": records("f", 20).encode(),
        "a.json": json.dumps([{"id": i, "text": article(i)} for i in range(10)], ensure_ascii=False).encode(),
        "a.epub": epub(),
    }
    return {**found, "a.docx": docx(), "a.pptx": pptx(), "a.xlsx": xlsx(), "a.png": png(), "a.pdf": pdf()}


def real_documents() -> dict[str, bytes]:
    """Those of the project's data folder that are quick to read; none where it is absent."""
    shared = Path(__file__).resolve().parents[3] / "shared" / "data" / "docs" / "dev"
    paths = [path for path in shared.glob("*") if path.suffix.lower() in SUPPORTED_SUFFIXES]
    quick = [path for path in paths if path.name not in SLOW_SAMPLES and path.stat().st_size <= LARGEST_SAMPLE]
    return {path.name: path.read_bytes() for path in quick}


def docx() -> bytes:
    import docx as library

    document = library.Document()
    document.add_heading("标题", 1)
    document.add_paragraph(article("docx", 10))
    table = document.add_table(2, 2)
    table.cell(0, 0).text = "甲"
    buffer = io.BytesIO()
    document.save(buffer)
    return buffer.getvalue()


def pptx() -> bytes:
    import pptx as library

    presentation = library.Presentation()
    slide = presentation.slides.add_slide(presentation.slide_layouts[1])
    slide.shapes.title.text = "标题"
    slide.placeholders[1].text = article("pptx", 3)
    buffer = io.BytesIO()
    presentation.save(buffer)
    return buffer.getvalue()


def xlsx() -> bytes:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for number in range(20):
        book.active.append([article(number, 1), number, number / 7, None, True])
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


def epub() -> bytes:
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="c.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
    )
    package = (
        '<package xmlns="http://www.idpf.org/2007/opf"><manifest><item id="x" href="x.xhtml"'
        ' media-type="application/xhtml+xml"/></manifest><spine><itemref idref="x"/></spine></package>'
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mimetype", "application/epub+zip")
        archive.writestr("META-INF/container.xml", container)
        archive.writestr("c.opf", package)
        archive.writestr("x.xhtml", f"<html><body><h1>章</h1><p>{article('epub', 10)}</p></body></html>")
    return buffer.getvalue()


def png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (250, 250, 250)).save(buffer, "PNG")
    return buffer.getvalue()


def pdf() -> bytes:
    """One page, uncompressed, so that a mutation meets a keyword or a number."""
    stream = b"BT /F1 12 Tf 72 720 Td (Labour contract ends when its term expires.) Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length " + str(len(stream)).encode() + b" >>\nstream\n" + stream + b"\nendstream",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    body = b"%PDF-1.4\n"
    offsets = []
    for number, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += str(number).encode() + b" 0 obj\n" + content + b"\nendobj\n"
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return (
        body + b"xref\n0 6\n0000000000 65535 f \n" + table
        + b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n" + str(len(body)).encode() + b"\n%%EOF\n"
    )  # fmt: skip


# -- mutations -----------------------------------------------------------------------------------------------------


def flip_bits(data: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(chance.choice((1, 8, 64))):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def truncate(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def cut_out(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    return data[:start] + data[start + chance.randrange(1, 2000) :]


def splice(data: bytes, chance: random.Random) -> bytes:
    """A piece of itself somewhere else, many times."""
    start, place = chance.randrange(len(data)), chance.randrange(len(data))
    piece = data[start : start + chance.randrange(1, 3000)]
    return data[:place] + piece * chance.choice((1, 2, 50)) + data[place:]


def huge_number(data: bytes, chance: random.Random) -> bytes:
    """A number in the text replaced; in binary files four bytes."""
    numbers = list(re.finditer(rb"\d+", data))
    if numbers and chance.random() < 0.7:
        found = chance.choice(numbers)
        return data[: found.start()] + chance.choice(NUMBERS) + data[found.end() :]
    place = chance.randrange(len(data))
    return data[:place] + struct.pack("<I", chance.choice((0, 1, 2**31 - 1, 2**32 - 1))) + data[place + 4 :]


def nest(data: bytes, chance: random.Random) -> bytes:
    """Brackets and tags that open thousands of times."""
    place = chance.randrange(len(data))
    opened = chance.choice((b"[", b"{", b"(", b"<div>", b"<w:p>", b"<<", b"> ", b"* ", b'{"a":', b"<table><tr><td>"))
    return data[:place] + opened * chance.choice((50, 3000, 20_000)) + data[place:]


def swap_member(data: bytes, chance: random.Random) -> bytes:
    """In an archive: a member mutated and packed again, removed, doubled, made a bomb, or given another's name."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    number = chance.randrange(len(members))
    name, content = members[number]
    kind = chance.randrange(6)
    if kind <= 2 and content:
        members[number] = (name, chance.choice((flip_bits, cut_out, splice, huge_number, nest))(content, chance))
    elif kind == 3:
        del members[number]
    elif kind == 4:
        members[number] = (name, content[:100] + b" " * chance.choice((1_000_000, 60_000_000)))
    else:
        members[number] = (chance.choice(members)[0], content)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for member, inside in members:
            archive.writestr(member, inside)
    return buffer.getvalue()


MUTATIONS_OF_ALL: tuple[Mutation, ...] = (flip_bits, truncate, cut_out, splice, huge_number, nest)


def mutated(name: str, data: bytes, chance: random.Random) -> bytes:
    archive = Path(name).suffix in {".docx", ".pptx", ".xlsx", ".epub"}
    if archive and chance.random() < 0.5:
        return swap_member(data, chance)
    for _ in range(chance.choice((1, 1, 2))):
        data = chance.choice(MUTATIONS_OF_ALL)(data, chance) or b"\0"
    return data


def assert_cut_soundly(document: Document) -> None:
    """Chunks are pieces of the text, none longer than asked for, and nothing but white space is lost."""
    text = document.page_content
    chunks = split_document(document, CUT, LENGTH)
    for chunk in chunks:
        assert text[chunk.metadata["start"] : chunk.metadata["end"]] == chunk.page_content
        assert LENGTH(chunk.page_content) <= CUT.chunk_size
    assert len("".join("".join(chunk.page_content for chunk in chunks).split())) == len("".join(text.split()))


def peak_rss_mb(pid: int) -> float:
    """The most memory a process has had, from /proc; 0 where there is none."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found.group(1)) / 1024 if found else 0.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_mutated_documents_end_in_documents_or_an_error_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = small_documents()
    small = sorted(samples)
    samples |= real_documents()
    real = sorted(samples.keys() - set(small)) or small
    workers: list[sandbox._Worker] = []
    made = sandbox._Worker

    def remember(command: list[str]) -> sandbox._Worker:
        workers.append(made(command))
        return workers[-1]

    monkeypatch.setattr(sandbox, "_Worker", remember)
    monkeypatch.setattr(sandbox, "_pool", None)
    peak, slowest, read, refused = 0.0, 0.0, 0, 0
    for number in range(MUTATIONS):
        turn, is_small = divmod(number, REAL_SHARE)
        name = small[number % len(small)] if is_small else real[turn % len(real)]
        chance = random.Random(f"{number}")
        path = tmp_path / f"{number}{Path(name).suffix}"
        path.write_bytes(mutated(name, samples[name], chance))
        started = time.monotonic()
        try:
            documents = list(load_documents(path, OPTIONS))
        except LoadError as error:
            refused += 1
            assert str(path) in error.zh, (number, name, str(error))
            assert "\n" not in str(error), (number, name, str(error))
        else:
            read += 1
            for document in documents:
                assert document.page_content, (number, name)
                if number % CUT_SHARE == 0:
                    assert_cut_soundly(document)
                document.page_content.encode()  # no half surrogates: nothing could store them
                starts = [mark["start"] for mark in document.metadata.get("marks", [])]
                assert starts == sorted(starts), (number, name)
        slowest = max(slowest, time.monotonic() - started)
        assert slowest < OPTIONS.total_timeout_s + 10, (number, name)
        peak = max([peak, *(peak_rss_mb(worker._process.pid) for worker in workers[-2:])])
        path.unlink()
    assert peak < OPTIONS.memory_mb, peak
    assert read and refused
    print(f"{MUTATIONS} mutated: {read} read, {refused} refused, slowest {slowest:.1f} s, peak {peak:.0f} MB,"
          f" {len(workers)} workers")  # fmt: skip

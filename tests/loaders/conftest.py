"""Small files of every kind, built on the spot, and the shortest way to read one."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from loaders.documents import LoaderConfig, read_file
from loaders.formats.blocks import Parsed

CHINESE_FONT = (
    "<< /Type /Font /Subtype /Type0 /BaseFont /STSong-Light /Encoding /UniGB-UCS2-H /DescendantFonts [ << /Type /Font"
    " /Subtype /CIDFontType0 /BaseFont /STSong-Light /CIDSystemInfo << /Registry (Adobe) /Ordering (GB1)"
    " /Supplement 4 >> /DW 1000 /FontDescriptor << /Type /FontDescriptor /FontName /STSong-Light /Flags 6"
    " /FontBBox [0 -200 1000 900] /ItalicAngle 0 /Ascent 800 /Descent -200 /StemV 80 >> >> ] >>"
)


@dataclass
class PdfPage:
    """Texts as (x, y, size, text) and straight lines as (x0, y0, x1, y1), in points from the lower left corner."""

    texts: Sequence[tuple[float, float, float, str]] = ()
    lines: Sequence[tuple[float, float, float, float]] = ()
    rotate: int = 0
    operators: str = ""
    size: tuple[int, int] = (595, 842)
    xobjects: Mapping[str, str] = field(default_factory=dict)

    def content(self) -> str:
        drawn = [f"{x0} {y0} m {x1} {y1} l S" for x0, y0, x1, y1 in self.lines]
        shown = [
            f"BT /F1 {size} Tf 1 0 0 1 {x} {y} Tm <{text.encode('utf-16-be').hex()}> Tj ET"
            for x, y, size, text in self.texts
        ]
        return "\n".join([self.operators, *drawn, *shown])


def pdf_bytes(pages: Iterable[PdfPage], *, title: str | None = None) -> bytes:
    """A PDF written by hand: one font that has every Chinese character, nothing compressed."""
    bodies = [b"", b"", CHINESE_FONT.encode()]  # catalogue, page tree, font
    kids = []
    for page in pages:
        content = page.content().encode()
        bodies.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content))
        resources = "/Font << /F1 3 0 R >>"
        if page.xobjects:
            named = " ".join(f"/{name} {body}" for name, body in page.xobjects.items())
            resources += f" /XObject << {named} >>"
        width, height = page.size
        bodies.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {width} {height}] /Rotate {page.rotate}"
            f" /Resources << {resources} >> /Contents {len(bodies)} 0 R >>".encode()
        )
        kids.append(f"{len(bodies)} 0 R")
    bodies[0] = b"<< /Type /Catalog /Pages 2 0 R >>"
    bodies[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>".encode()
    trailer = "/Root 1 0 R"
    if title is not None:
        bodies.append(f"<< /Title <feff{title.encode('utf-16-be').hex()}> >>".encode())
        trailer += f" /Info {len(bodies)} 0 R"
    out = bytearray(b"%PDF-1.7\n")
    offsets = []
    for number, body in enumerate(bodies, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(bodies) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer << /Size %d %s >>\nstartxref\n%d\n%%%%EOF" % (len(bodies) + 1, trailer.encode(), table)
    return bytes(out)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Write a file of that name and return its path; text as UTF-8."""

    def writer(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return writer


@pytest.fixture
def make_pdf(tmp_path: Path) -> Callable[..., Path]:
    """Write a PDF of these pages (the fields of `PdfPage`) and return its path."""

    def writer(*pages: dict[str, Any], name: str = "made.pdf", title: str | None = None) -> Path:
        path = tmp_path / name
        path.write_bytes(pdf_bytes([PdfPage(**page) for page in pages], title=title))
        return path

    return writer


@pytest.fixture
def make_zip(tmp_path: Path) -> Callable[[str, Mapping[str, str | bytes]], Path]:
    """Write a deflated zip of these members and return its path."""

    def writer(name: str, members: Mapping[str, str | bytes]) -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return path

    return writer


@pytest.fixture
def read_one() -> Callable[..., Parsed]:
    """Read a file that holds one document, in this process."""

    def reader(path: Path, **options: object) -> Parsed:
        documents = list(read_file(path, LoaderConfig.model_validate(options)))
        assert len(documents) == 1
        return documents[0]

    return reader


@pytest.fixture
def state_at() -> Callable[[Parsed, str], dict[str, object]]:
    """The mark that holds where a string first stands in a document, without its offset."""

    def finder(parsed: Parsed, string: str) -> dict[str, object]:
        offset = parsed.text.index(string)
        mark = [mark for mark in parsed.metadata["marks"] if mark["start"] <= offset][-1]
        return {key: value for key, value in mark.items() if key != "start"}

    return finder

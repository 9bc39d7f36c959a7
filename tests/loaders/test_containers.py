"""What files really are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from loaders.errors import LoadError
from loaders.formats.containers import expect, kind_of_bytes, open_zip, read_text

Write = Callable[[str, str | bytes], Path]
MakeZip = Callable[[str, Mapping[str, str | bytes]], Path]
OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"", "empty"),
        (b"%PDF-1.4", "PDF"),
        (b"junk before\n%PDF-1.4", "PDF"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"PK\x03\x04", "ZIP"),
        (OLE, "OLE"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WebP"),
        (b"BM\x36\x00\x01\x00\x00\x00\x00\x00\x36\x00", "BMP"),
        (b"BMW is a car maker", "text"),
        (b"MZ\x90\x00\x03\x00\x00\x00", "Windows EXE"),
        ("知识库".encode(), "text"),
        ("知识库".encode("gbk"), "text"),
        (bytes(range(256)) * 4, "binary"),
    ],
)
def test_the_kind_is_told_by_the_first_bytes(head: bytes, kind: str) -> None:
    assert kind_of_bytes(head) == kind


def test_the_expected_kind_passes(write: Write) -> None:
    assert expect(write("a.pdf", b"%PDF-1.4"), "PDF") == "PDF"


def test_another_kind_is_refused_by_name(write: Write) -> None:
    with pytest.raises(LoadError, match=r"PNG") as caught:
        expect(write("a.pdf", b"\x89PNG\r\n\x1a\n"), "PDF")
    assert "不是 .pdf" in caught.value.zh
    assert "correct the suffix" in caught.value.en


def test_an_empty_file_has_no_text(write: Write) -> None:
    with pytest.raises(LoadError, match="没有文字"):
        expect(write("a.pdf", b""), "PDF")


def test_an_encrypted_office_file_is_called_encrypted(write: Write) -> None:
    data = OLE + "EncryptedPackage".encode("utf-16-le") + bytes(100)
    with pytest.raises(LoadError, match="加密"):
        expect(write("a.docx", data), "ZIP")


def test_an_old_office_file_is_not_called_encrypted(write: Write) -> None:
    with pytest.raises(LoadError, match="97-2003"):
        expect(write("a.docx", OLE), "ZIP")


def test_read_text_decodes(write: Write) -> None:
    assert read_text(write("a.txt", "劳动合同法的规定".encode("gbk"))) == "劳动合同法的规定"


def test_read_text_refuses_binary_data(write: Write) -> None:
    with pytest.raises(LoadError, match="binary"):
        read_text(write("a.txt", bytes(range(256)) * 20))


def test_a_zip_of_something_else_is_refused(make_zip: MakeZip) -> None:
    with pytest.raises(LoadError, match="ZIP"):
        open_zip(make_zip("a.docx", {"readme.txt": "x"}), main_part="word/")


def test_a_damaged_zip_is_refused(write: Write) -> None:
    with pytest.raises(LoadError, match="损坏"):
        open_zip(write("a.docx", b"PK\x03\x04" + bytes(200)), main_part="word/")


def test_a_zip_bomb_is_refused_without_unpacking(make_zip: MakeZip) -> None:
    path = make_zip("a.docx", {"word/document.xml": bytes(100 << 20)})
    assert path.stat().st_size < 1 << 20
    with pytest.raises(LoadError, match="上限"):
        open_zip(path, main_part="word/")


def test_a_good_zip_is_opened(make_zip: MakeZip) -> None:
    with open_zip(make_zip("a.docx", {"word/document.xml": "x"}), main_part="word/") as archive:
        assert archive.read("word/document.xml") == b"x"


def test_an_encrypted_zip_is_called_encrypted(make_zip: MakeZip) -> None:
    path = make_zip("a.docx", {"word/document.xml": "x"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag "encrypted" in the central directory
    path.write_bytes(data)
    with pytest.raises(LoadError, match="加密"):
        open_zip(path, main_part="word/")

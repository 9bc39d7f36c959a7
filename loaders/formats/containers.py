"""What a file really is, by its first bytes, and the guarded opening of zip containers."""

from __future__ import annotations

import zipfile
from pathlib import Path

from loaders import encodings
from loaders.formats import problems

_SIGNATURES = (
    (b"%PDF-", "PDF"),
    (b"\x89PNG\r\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"PK\3\4", "ZIP"),
    (b"PK\5\6", "ZIP"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "OLE"),
    (b"\x1f\x8b", "GZIP"),
    (b"Rar!", "RAR"),
    (b"7z\xbc\xaf", "7-Zip"),
    (b"\x7fELF", "ELF"),
    (b"MZ", "Windows EXE"),
    (b"{\\rtf", "RTF"),
    (b"SQLite format 3\0", "SQLite"),
)
_NAMES = {
    "ZIP": "ZIP 压缩包",
    "OLE": "旧版 Office（97-2003）文件",
    "text": "纯文本 (plain text)",
    "binary": "二进制数据 (binary)",
}
_PDF_HEAD = 1024  # readers accept junk before the header within the first kilobyte
_ENCRYPTED_OFFICE = "EncryptedPackage".encode("utf-16-le")  # stream name in the OLE directory
_MAX_UNPACKED = 1 << 30
_MAX_RATIO = 200  # deflate cannot pass 1,032; documents stay below 50


def kind_of(path: Path) -> str:
    """ "PDF", "ZIP", "OLE", "PNG" ..., "text", "binary", or "empty".

    Raises:
        LoadError: the file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8192)
    except OSError as error:
        raise problems.unreadable(path, error.strerror or str(error)) from None
    return kind_of_bytes(head)


def kind_of_bytes(head: bytes) -> str:
    """The same for the first kilobytes of a file."""
    if not head:
        return "empty"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[:2] == b"BM" and head[6:10] == bytes(4):  # two reserved words
        return "BMP"
    for signature, kind in _SIGNATURES:
        if head.startswith(signature) and (len(signature) > 2 or not encodings.is_text(head)):
            return kind
    if b"%PDF-" in head[:_PDF_HEAD]:
        return "PDF"
    return "text" if encodings.is_text(head) else "binary"


def expect(path: Path, *kinds: str) -> str:
    """The file's kind, which is one of `kinds`.

    Raises:
        LoadError: it is empty, encrypted (an Office file in an OLE container) or of another kind.
    """
    kind = kind_of(path)
    if kind == "empty":
        raise problems.no_text(path)
    if kind in kinds:
        return kind
    if kind == "OLE" and _holds_encrypted_office(path):
        raise problems.encrypted(path)
    raise problems.not_what_it_says(path, _NAMES.get(kind, kind))


def open_zip(path: Path, *, main_part: str) -> zipfile.ZipFile:
    """The opened container, which has `main_part` (a prefix of a member's name) and is no bomb.

    Raises:
        LoadError: not a zip, damaged, a zip of something else, encrypted, or larger unpacked than a document can be.
    """
    expect(path, "ZIP")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise problems.damaged(path, str(error)) from None
    members = archive.infolist()
    if not any(member.filename.startswith(main_part) for member in members):
        archive.close()
        raise problems.not_what_it_says(path, _NAMES["ZIP"])
    if any(member.flag_bits & 1 for member in members):
        archive.close()
        raise problems.encrypted(path)
    unpacked = sum(member.file_size for member in members)
    packed = sum(member.compress_size for member in members)
    if unpacked > _MAX_UNPACKED or (unpacked > 64 << 20 and unpacked > _MAX_RATIO * max(packed, 1)):
        archive.close()
        raise problems.too_large(path, f"{_MAX_UNPACKED >> 20} MB")
    return archive


def read_text(path: Path, *, declared: str | None = None) -> str:
    """The decoded content of a text file, not yet normalised.

    Raises:
        LoadError: it is empty or not text.
    """
    expect(path, "text")
    return encodings.decode(path.read_bytes(), declared=declared)[0]


def _holds_encrypted_office(path: Path) -> bool:
    return path.suffix.lower() not in {".xls"} and _ENCRYPTED_OFFICE in path.read_bytes()

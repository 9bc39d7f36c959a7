"""EPUB: the chapters of the spine, read as HTML."""

from __future__ import annotations

import posixpath
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from loaders import encodings
from loaders.formats import problems
from loaders.formats.blocks import Block, Content
from loaders.formats.containers import open_zip
from loaders.formats.webpage import html_blocks

_CONTAINER = "META-INF/container.xml"
_MAX_CHAPTER = 64 << 20  # bytes unpacked
_FONT_OBFUSCATION = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")


def read_epub(path: Path) -> Content:
    """The chapters in reading order."""
    with open_zip(path, main_part=_CONTAINER) as archive:
        if _is_protected(archive):
            raise problems.encrypted(path)
        container = _parse(archive.read(_CONTAINER))
        root_file = next((node.get("full-path") for node in container.iter("{*}rootfile")), None)
        if not root_file or root_file not in archive.namelist():
            raise problems.damaged(path, "no OPF package")
        package = _parse(archive.read(root_file))
        title = next((node.text for node in package.iter("{http://purl.org/dc/elements/1.1/}title")), None)
        blocks = list(_chapters(archive, package, posixpath.dirname(root_file), path))
    return Content(blocks, (title,))


def _chapters(archive: zipfile.ZipFile, package: Any, folder: str, path: Path) -> Iterator[Block]:
    items = {item.get("id"): item for item in package.iter("{*}item")}
    members = {member.filename: member for member in archive.infolist()}
    for reference in package.iter("{*}itemref"):
        item = items.get(reference.get("idref"))
        if item is None or "nav" in (item.get("properties") or "").split():
            continue
        member = members.get(posixpath.normpath(posixpath.join(folder, unquote(item.get("href") or ""))))
        if member is None:
            continue
        if member.file_size > _MAX_CHAPTER:
            raise problems.too_large(path, f"{_MAX_CHAPTER >> 20} MB")
        yield from html_blocks(encodings.decode(archive.read(member))[0])[0]


def _is_protected(archive: zipfile.ZipFile) -> bool:
    """Whether chapters are encrypted; obfuscated fonts are not a protection."""
    if "META-INF/encryption.xml" not in archive.namelist():
        return False
    methods = [
        node.get("Algorithm") for node in _parse(archive.read("META-INF/encryption.xml")).iter("{*}EncryptionMethod")
    ]
    return any(method not in _FONT_OBFUSCATION for method in methods)


def _parse(data: bytes) -> Any:
    import lxml.etree

    parser = lxml.etree.XMLParser(resolve_entities=False, no_network=True, recover=True)
    root = lxml.etree.fromstring(data, parser)
    return root if root is not None else lxml.etree.Element("empty")

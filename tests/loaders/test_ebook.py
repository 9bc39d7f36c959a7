"""EPUB files, zipped by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from loaders.errors import LoadError
from loaders.formats.blocks import Parsed

MakeZip = Callable[[str, Mapping[str, str | bytes]], Path]
ReadOne = Callable[..., Parsed]
StateAt = Callable[[Parsed, str], dict[str, object]]
CONTAINER = '<container><rootfiles><rootfile full-path="OEBPS/content.opf"/></rootfiles></container>'
PACKAGE = """<package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/">
<metadata><dc:title>三国演义</dc:title></metadata>
<manifest>
<item id="nav" href="nav.xhtml" properties="nav"/><item id="c2" href="text/%E7%AC%AC%E4%BA%8C.xhtml"/>
<item id="c1" href="text/one.xhtml"/><item id="lost" href="lost.xhtml"/><item id="css" href="a.css"/>
</manifest>
<spine><itemref idref="nav"/><itemref idref="c1"/><itemref idref="c2"/><itemref idref="lost"/>
<itemref idref="?"/></spine>
</package>"""


def book(**changed: str | bytes) -> dict[str, str | bytes]:
    members: dict[str, str | bytes] = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": CONTAINER,
        "OEBPS/content.opf": PACKAGE,
        "OEBPS/nav.xhtml": "<html><body><p>目录</p></body></html>",
        "OEBPS/text/one.xhtml": "<html><body><h1>第一回</h1><p>话说天下大势。</p></body></html>",
        "OEBPS/text/第二.xhtml": "<html><body><h1>第二回</h1><p>且说董卓。</p></body></html>",
    }
    return members | changed


def test_chapters_are_read_in_the_order_of_the_spine(make_zip: MakeZip, read_one: ReadOne, state_at: StateAt) -> None:
    parsed = read_one(make_zip("a.epub", book()))
    assert parsed.text == "# 第一回\n\n话说天下大势。\n\n# 第二回\n\n且说董卓。"
    assert parsed.metadata["title"] == "三国演义"
    assert state_at(parsed, "董卓") == {"headings": ["第二回"]}


def test_drm_is_called_encrypted(make_zip: MakeZip, read_one: ReadOne) -> None:
    rights = '<encryption><EncryptionMethod Algorithm="http://www.w3.org/2001/04/xmlenc#aes128-cbc"/></encryption>'
    with pytest.raises(LoadError, match="加密"):
        read_one(make_zip("a.epub", book(**{"META-INF/encryption.xml": rights})))


def test_obfuscated_fonts_are_no_obstacle(make_zip: MakeZip, read_one: ReadOne) -> None:
    fonts = '<encryption><EncryptionMethod Algorithm="http://www.idpf.org/2008/embedding"/></encryption>'
    assert "董卓" in read_one(make_zip("a.epub", book(**{"META-INF/encryption.xml": fonts}))).text


def test_a_book_without_package_is_damaged(make_zip: MakeZip, read_one: ReadOne) -> None:
    members = book()
    del members["OEBPS/content.opf"]
    with pytest.raises(LoadError, match="损坏"):
        read_one(make_zip("a.epub", members))


def test_a_zip_of_something_else_is_refused(make_zip: MakeZip, read_one: ReadOne) -> None:
    with pytest.raises(LoadError, match="ZIP"):
        read_one(make_zip("a.epub", {"readme.txt": "x"}))


def test_a_bomb_is_refused(make_zip: MakeZip, read_one: ReadOne) -> None:
    with pytest.raises(LoadError, match="上限"):
        read_one(make_zip("a.epub", book(**{"OEBPS/text/one.xhtml": bytes(80 << 20)})))


def test_entities_of_a_package_are_not_expanded(make_zip: MakeZip, read_one: ReadOne) -> None:
    evil = '<!DOCTYPE p [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + PACKAGE.replace("三国演义", "&x;")
    parsed = read_one(make_zip("a.epub", book(**{"OEBPS/content.opf": evil})))
    assert parsed.metadata["title"] == "a"
    assert "root:" not in parsed.text


def test_a_book_without_text_says_so(make_zip: MakeZip, read_one: ReadOne) -> None:
    empty = {"OEBPS/text/one.xhtml": "<html/>", "OEBPS/text/第二.xhtml": "<html/>"}
    with pytest.raises(LoadError, match="没有文字"):
        read_one(make_zip("a.epub", book(**empty)))

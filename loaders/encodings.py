"""Which encoding the bytes of a Chinese text are in, and the text they decode to."""

from __future__ import annotations

import codecs
from collections import Counter
from functools import cache

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (b"\x84\x31\x95\x33", "gb18030"),
)
_CANDIDATES = ("gb18030", "big5hkscs", "utf-16-le", "utf-16-be", "shift_jis", "euc_kr", "cp1252")  # ties: the earlier
_SAMPLE_BYTES = 64 * 1024
_MAX_BAD_UTF8 = 0.02  # share of characters: a UTF-8 file cut in the middle, or with a stray byte, is still UTF-8
_CONTROLS = bytes(set(range(32)) - {7, 8, 9, 10, 12, 13, 26, 27})  # those that text files never hold
# The most frequent characters of running text, simplified and traditional (any frequency list of modern Chinese).
_FREQUENT = set(
    "的一是不了在人有我他这中大来上个国和也子时道说出而要于就下得可你年生自会那后能对着事其里所去行过家十用发天如然作方成者多日都三小"
    "軍们二無同主經法当起与好看学进种将还分此心前面又定见只从现公开它已把关问业部理民力及第以为之到地等本工由加新高二月合市并"
    "這個國時說來們過會後對發樣經學進種將還見從現開問業關為與無當點動長實體應應產義東門機種電話"
)
_PUNCTUATION = set("，。、；：？！“”‘’（）《》「」『』【】—…·　")


def decode(data: bytes, *, declared: str | None = None) -> tuple[str, str]:
    """(text, name of the encoding); a byte-order mark is taken off.

    Tried in turn: byte-order mark, `declared` (an HTML charset) if the bytes really are that, UTF-8, then whichever of
    the candidate encodings gives the most ordinary text. Bytes that fit nowhere become U+FFFD.
    """
    for mark, name in _BOMS:
        if data.startswith(mark):
            return data[len(mark) :].decode(name, errors="replace"), name
    if declared and (text := _strict(data, _canonical(declared))) is not None:
        return text, _canonical(declared)
    name = detect(data)
    return data.decode(name, errors="replace"), name


def detect(data: bytes) -> str:
    """The most likely encoding of bytes that carry no byte-order mark; "utf-8" for nothing or ASCII."""
    if _is_utf8(data):
        return "utf-8"
    sample = data[:_SAMPLE_BYTES]
    return max(_CANDIDATES, key=lambda name: _likelihood(sample, name))  # max keeps the first of equals


def is_text(data: bytes) -> bool:
    """Whether the bytes read as text in any encoding: few control characters, or ordinary characters once decoded."""
    sample = data[:_SAMPLE_BYTES]
    if bom_encoding(sample) or len(sample) - len(sample.translate(None, _CONTROLS)) <= len(sample) // 200:
        return True
    return _likelihood(sample, detect(sample)) > 0  # random bytes: below -1; UTF-16 holds any byte


def bom_encoding(data: bytes) -> str | None:
    """The encoding a byte-order mark names, None without one."""
    return next((name for mark, name in _BOMS if data.startswith(mark)), None)


def _canonical(declared: str) -> str:
    """The superset that pages declaring an old Chinese encoding really use (as browsers do)."""
    name = declared.strip().strip("\"'").lower()
    return {"gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs"}.get(name, name)


def _strict(data: bytes, name: str) -> str | None:
    try:
        return data.decode(name)
    except (LookupError, UnicodeDecodeError):
        return None


def _is_utf8(data: bytes) -> bool:
    text = data.decode("utf-8", errors="replace")
    bad = text.count("\ufffd")
    if not bad:
        return text.count("\0") <= len(text) // 20  # UTF-16 of Latin text is valid UTF-8, half of it zeros
    beyond_ascii = sum(1 for ch in text[:_SAMPLE_BYTES] if ch > "\x7f")
    return bad <= max(1, _MAX_BAD_UTF8 * beyond_ascii) and beyond_ascii > 8 * bad


def _likelihood(sample: bytes, name: str) -> float:
    """Mean weight per byte of the characters the sample decodes to: comparable between 1- and 2-byte encodings."""
    if name.startswith("utf-16") and len(sample) % 2:
        sample = sample[:-1]
    text = sample.decode(name, errors="replace")
    if not text:
        return 0.0
    total = sum(_weight(ch, name) * count for ch, count in Counter(text).items())
    return total / len(text)


def _weight(ch: str, encoding: str) -> float:
    """How much one character speaks for ordinary text."""
    if ch in _FREQUENT:
        return 3.0
    if ch < "\x80":
        return 0.3 if ch.isprintable() or ch in "\t\r\n" else -6.0
    if ch in _PUNCTUATION:
        return 2.0
    if "\u4e00" <= ch <= "\u9fff":
        return 1.0 if ch in _common_ideographs() else -1.5
    if encoding == "shift_jis" and "\u3041" <= ch <= "\u30fe":
        return 1.2
    if encoding == "euc_kr" and "\uac00" <= ch <= "\ud7a3":
        return 0.4  # KS X 1001 covers the bytes of common simplified characters: needs more evidence
    if encoding == "cp1252" and ch.isalpha():
        return 0.2
    if ch == "\ufffd" or "\ue000" <= ch <= "\uf8ff":
        return -6.0
    if "\uff01" <= ch <= "\uff5e" or ch in "①②③④⑤⑥⑦⑧⑨℃‰→←×÷±°ⅠⅡⅢⅣ●○★■□◆":
        return 0.5
    return -2.5


@cache
def _common_ideographs() -> frozenset[str]:
    """Ideographs the makers of GB2312 and Big5 put into their first, common level (3,755 and 5,401)."""
    simplified = _code_block("gb2312", range(0xB0, 0xD8), range(0xA1, 0xFF))
    traditional = _code_block("big5", range(0xA4, 0xC7), [*range(0x40, 0x7F), *range(0xA1, 0xFF)])
    return frozenset(simplified + traditional)


def _code_block(encoding: str, leads: range, trails: range | list[int]) -> str:
    return "".join(bytes((lead, trail)).decode(encoding, errors="ignore") for lead in leads for trail in trails)

"""Plain text made uniform: widths, code points that only look right, control characters, broken lines."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from itertools import chain

# Radicals that PDF producers write in place of the ideograph they look like, and that NFKC leaves alone
# (Unicode: EquivalentUnifiedIdeograph.txt; the rarely printed ones are left out).
_RADICALS = dict(
    zip(
        "⺁⺄⺅⺆⺈⺉⺊⺌⺍⺎⺐⺒⺓⺔⺕⺖⺗⺘⺙⺛⺜⺝⺞⺠⺡⺢⺣⺤⺦⺧⺨⺩⺪⺫⺬⺭⺮⺯⺰⺱⺲⺶⺷⺸⺹⺻⺼⺽⺾⺿⻀⻁⻂⻃⻄⻅⻆⻇⻈⻉⻊⻋⻌⻍⻎⻏⻐⻑⻒⻓⻔⻕⻖⻗⻘⻙⻚⻛⻜⻝⻞⻟⻠⻡⻢⻣⻤⻥⻦⻧⻨⻩⻪⻫⻬⻭⻮⻯⻰⻱⻲",
        "厂乙亻冂刀刂卜小小兀尢巳幺彑彐忄心扌攵旡日月歺民氵氺灬爫丬牛犭王疋目示礻竹糹纟罓罒羊羊羊耂聿肉臼艹艹艹虎衤覀西见角角讠贝足车辶辶辶邑钅長镸长门阜阜雨青韦页风飞食食飠饣首马骨鬼鱼鸟卤麦黄黾斉齐歯齿竜龙龜亀",
        strict=True,
    )
)
# Symbol-font bullets (Wingdings and Symbol live at U+F020..U+F0FF in Office documents).
_BULLETS = "\uf06c\uf06e\uf075\uf076\uf0a7\uf0b7\uf0d8\uf0e8\uf0fc"
_KEPT_FULLWIDTH = set("，！？；：（）～")  # Chinese punctuation proper
_COMPATIBILITY = (
    range(0x2E80, 0x2FE0),  # radicals
    range(0xF900, 0xFB07),  # ideographs for compatibility, Latin ligatures (ﬁ, ﬂ: typeset English)
    range(0xFE30, 0xFE50),  # vertical forms
    range(0xFF01, 0xFF5F),  # full-width ASCII
    range(0x2F800, 0x2FA20),
)
# Vertical punctuation that NFKC would turn into half-width signs, and 户, whose radical NFKC maps to the 戶 of Taiwan.
_BETTER_THAN_NFKC = dict(zip("︐︑︒︓︔︕︖︵︶⼾", "，、。：；！？（）户", strict=True))
_SPACES = (*range(0x2000, 0x200B), 0xA0, 0x1680, 0x202F, 0x205F, 0x3000)
_LINE_ENDS = (0x0B, 0x0C, 0x85, 0x2028, 0x2029)
# Half-width katakana: a voiced sound mark belongs to the letter before it, so runs are normalised together.
_HALF_KATAKANA = re.compile("[\uff61-\uff9f]+")

_CJK = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_ENDS_OPEN = re.compile(rf"[{_CJK}，、；（《“‘—0-9A-Za-z%)\]）》”’,-]$")
_STARTS_OPEN = re.compile(rf"[{_CJK}（《“‘，、。；：！？）》”’0-9A-Za-z(\[]")
_STARTS_ITEM = re.compile(
    r"""\d+[.、．)）](?!\d) | \d+(?:\.\d+)*\s+[\u4e00-\u9fff] | [（(](?:\d+|[一二三四五六七八九十]+)[)）]
    | [一二三四五六七八九十]+、
    | 第[一二三四五六七八九十百千零〇\d]+[章节条款编篇部分回] | [•●○■□◆◇▪▶➢★※·*-]\s?
    | (?:图|表)\s?\d | 关\s*键\s*词 | 摘\s*要 | 附件 | (?:Fig|Table|Figure)\b | https?://""",
    re.VERBOSE,
)
_SENTENCE_END = re.compile(r"[。！？!?…：:.][”’」』）)\]]*$")
SOFT_HYPHEN = "\u00ad"
_LATIN_END, _LATIN_START = re.compile(r"[0-9A-Za-z,;.%)\]]"), re.compile(r"[0-9A-Za-z(\[]")
_FULL_LINE = 0.85  # of the widest neighbour: shorter lines end on purpose (headings, last lines of paragraphs)


# Where Unicode has control, format and surrogate characters and those that are none. To look at the million others took
# each parser process a third of a second.
_WITH_CONTROLS = (
    range(0x20000),
    range(0xE0000, 0xE1000),
    [plane << 16 | last for plane in range(0x11) for last in (0xFFFE, 0xFFFF)],
)


def normalise(text: str) -> str:
    r"""The text with one form for each character, `\n` line ends, no trailing spaces and no runs of blank lines.

    Full-width letters and digits, Kangxi radicals, compatibility ideographs and ligatures become the plain characters;
    Chinese punctuation stays as it is. Control, zero-width and surrogate characters go. Idempotent, linear in time.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_table())
    text = _HALF_KATAKANA.sub(lambda run: unicodedata.normalize("NFKC", run.group()), text)
    text = unicodedata.normalize("NFC", text)
    lines: list[str] = []
    for line in text.split("\n"):
        line = line.rstrip()
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines).strip("\n ")


def join_broken_lines(text: str) -> str:
    """The text with the line breaks taken out that a page layout put inside sentences.

    A break goes when its line is about as wide as its neighbours, ends without a sentence end, and the next line does
    not begin an item or a heading; a line that ends in a soft hyphen always goes on. Chinese is joined without, Latin
    words with a space. For PDF and OCR text only.
    """
    lines = [" ".join(line.split()) for line in text.split("\n")]
    widths = [_width(line) for line in lines]
    joined: list[str] = []
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else ""
        if before.endswith(SOFT_HYPHEN) or (continues(before, line) and _is_full(widths, number - 1)):
            joined[-1] = join_lines(joined[-1], line)
        else:
            joined.append(line)
    return "\n".join(joined)


def join_lines(line: str, following: str) -> str:
    """Both as one: a soft hyphen at the break goes, Latin words get a space between them, Chinese nothing."""
    if line.endswith(SOFT_HYPHEN):
        return line[:-1] + following
    latin = _LATIN_END.match(line[-1:]) and _LATIN_START.match(following)
    return f"{line} {following}" if latin else line + following


def continues(line: str, following: str) -> bool:
    """Whether the sentence in `line` goes on in `following`, judged by the characters at the break."""
    if not line or not following or line.isdigit() or _SENTENCE_END.search(line) or not _ENDS_OPEN.search(line):
        return False
    return bool(_STARTS_OPEN.match(following)) and not _STARTS_ITEM.match(following)


def _is_full(widths: list[int], number: int) -> bool:
    return widths[number] >= _FULL_LINE * max(widths[max(0, number - 1) : number + 2])


def _width(line: str) -> int:
    """Columns the line takes, an ideograph counting for two."""
    return sum(2 if ord(ch) > 0x2E7F else 1 for ch in line)


@cache
def _table() -> dict[int, str | None]:
    """What `str.translate` replaces; None removes."""
    table: dict[int, str | None] = {
        code: None
        for code in chain(*_WITH_CONTROLS)
        if unicodedata.category(chr(code)) in {"Cc", "Cf", "Cs"} or code & 0xFFFE == 0xFFFE
    }
    del table[ord("\t")], table[ord("\n")]
    for code in chain(*_COMPATIBILITY):
        if chr(code) not in _KEPT_FULLWIDTH and (plain := unicodedata.normalize("NFKC", chr(code))) != chr(code):
            table[code] = plain
    table.update({ord(radical): ideograph for radical, ideograph in _RADICALS.items()})
    table.update({ord(sign): better for sign, better in _BETTER_THAN_NFKC.items()})
    table.update(dict.fromkeys(map(ord, _BULLETS), "•"))
    table.update(dict.fromkeys(_SPACES, " "))
    table.update(dict.fromkeys(_LINE_ENDS, "\n"))
    return table

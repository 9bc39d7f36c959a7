"""How likely a clause holds the answer: a linear model over what it shares with the question and what kind it asks for.

The model is a conditional logit (McFadden 1974): of all clauses of the passages of a question one holds the answer, and
the probability of each is the soft-max of a weighted sum of named features. `benchmarks/fit_extraction.py` fits the
weights.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chains.analysis import fold, is_cjk, terms
from chains.clauses import Clause
from chains.information import information, question_mask

Column = NDArray[np.float64]

_NUMERAL = "0-9零一二两三四五六七八九十百千万亿几半"
_SURNAMES = (
    "王李张刘陈杨黄赵周吴徐孙朱马胡郭林何高梁郑罗宋谢唐韩曹许邓萧冯曾程蔡彭潘袁于董余苏叶吕魏蒋田杜丁沈姜范江傅钟"
    "卢汪戴崔任陆廖姚方金邱夏谭韦贾邹石熊孟秦阎薛侯雷白龙段郝孔邵史毛常万顾赖武康贺严尹钱施"
)

# What kind of answer a (folded) question wants. A question may be of several kinds.
_KINDS = {
    "date": r"什么时候|何时|哪一?[年天月日届]|几[年月号日]|什么时间|时间|日期|何年"
    r"|[哪什][个么](?:时期|时代|朝代|世纪|年代)|\bwhen\b|what (?:year|date)",
    "number": r"多少|多大|多长|多高|多远|多久|几|多重|多深|多快|\bhow (?:many|much|long|far|old|high|big)\b",
    "person": r"谁|哪位|哪些?人|什么人|何人|哪名|作者|哪几?[位名]|\bwho",
    "place": r"哪里|哪儿|何处|何地|什么地方|哪国|哪座|位于|位置"
    r"|[哪什][个么](?:国家|城市|省|市|地方|地区|县|州|洲)|\bwhere\b",
    "reason": r"为什么|为何|原因|怎么会|目的|\bwhy\b",
    "manner": r"如何|怎么|怎样|什么方[式法]|\bhow (?:to|do|does|can)\b",
    "title": r"(?:什么|哪一?[部首本张个支款篇]?|名)(?:书|电影|影片|歌|专辑|小说|作品|节目|游戏|杂志|动画|剧|片|著作)"
    r"|《",
    "name": r"叫做?什么|称[为作]什么|名[称字]?是|何名|别[名称]|原名|简称|又[称名]|称为|本名|名字|名称|叫作|\bname",
    "definition": r"(?:是|指)(?:的是)?什么[？?]?$|什么是|是指|\bwhat (?:is|are)\b",
    "list": r"哪些|哪几|有什么|分别|包括|\bwhich\b",
    "latin": r"英文|英语|外文|缩写|代号|字母",
}

# What in a (folded) clause looks like an answer of some kind.
_CUES = {
    "date": rf"\d{{4}}|[{_NUMERAL}]+[年月]|[{_NUMERAL}]+世纪|年间|时[期代]|初年|末年|朝",
    "number": rf"[{_NUMERAL}]",
    "digit": r"\d",
    "person": rf"·|[{_SURNAMES}]\w|由|先生|[子女妻母父兄弟与和]",
    "place": r"位于|在|[省市县区国州岛山河村镇路街洲湾]",
    "reason": r"因|由于|为|所以|以[致便]|导致|使|because|since|due to",
    "manner": r"通过|利用|以|用|先|然后|经|方[式法]",
    "title": r"《",
    "name": r"[称名叫即俗“「\"]",
    "list": r"[、和及与]|包括|分",
    "bracket": r"[（(]",
}

# Which cues count for which kind of question.
_CUES_OF_KIND = {
    "date": ("date", "digit"),
    "number": ("number", "digit"),
    "person": ("person",),
    "place": ("place",),
    "reason": ("reason",),
    "manner": ("manner",),
    "title": ("title",),
    "name": ("name",),
    "definition": (),
    "list": ("list",),
    "latin": ("bracket",),
}

# Cues that tell something whatever is asked.
_ALWAYS = ("title", "name")

_ASKING = re.compile(
    r"什么时候|什么样|什么|多少|哪一?[个些里儿年天位种部座家所名条次届场本首支项款]*|谁|为何|如何|怎[么样]|几"
    r"|何[时地处人年]?|多[大长高远久重]|\b(?:what|who|whom|whose|when|where|why|which|how(?: many| much| long)?)\b"
)
_ENGLISH_FUNCTION_WORDS = re.compile(
    r"\b(?:what|who|whom|whose|when|where|why|which|how|is|are|was|were|do|does|did|can|the|an?|of|in|to|for|and|on|by)\b"
)

# By how much a feature raises the logarithm of the odds; fitted, see the module's docstring.
WEIGHTS = {
    # shares of the question's information, 0 to 1; `rest`: without what the heading says
    "clause rest pairs": 1.15,
    "clause rest pairs squared": -1.95,
    "clause rest characters": 2.96,
    "clause rest characters squared": -0.59,
    "sentence pairs": 1.73,
    "sentence rest pairs": 2.68,
    "sentence rest pairs squared": -0.95,
    "sentence rest characters": 3.54,
    "sentence rest characters squared": -0.74,
    "previous clause": 0.89,
    "next clause": 0.59,
    "previous sentence": 1.24,
    "next sentence": 0.81,
    "passage pairs": 9.11,
    "passage characters": 6.16,
    # where it stands
    "second passage": -1.15,
    "later passage": -1.86,
    "first sentence": 0.96,
    "position": -1.34,
    # how much it says
    "log sentence length": -0.86,
    "log new": 0.27,
    "nothing new": -0.79,
    # what surrounds the question word
    "left of question word": 1.27,
    "left, in sentence": -0.65,
    "right of question word": 0.52,
    "right, first character": 0.21,
    # what looks like an answer: kind of question, cue in the clause
    "any: name": -0.44,
    "any: title": 0.43,
    "date: date": 2.30,
    "date: digit": 1.03,
    "definition: first": 0.26,
    "latin: bracket": 0.58,
    "list: list": 1.14,
    "manner: manner": 0.94,
    "name: name": 2.08,
    "number: digit": 1.29,
    "number: number": 1.00,
    "number: unit": 2.27,
    "person: person": 1.00,
    "place: place": 1.03,
    "reason: reason": 0.48,
    "title: title": 0.11,
}


@dataclass(frozen=True)
class Question:
    """A question taken apart: what it tells, with bits for each term, and what it asks for."""

    pairs: dict[str, float]  # Han bigrams and words
    characters: dict[str, float]  # single Han characters
    kinds: tuple[str, ...]
    left: str  # the two characters before the question word, a place where the answer often stands in a passage
    right: str  # the two behind it
    unit: str  # what is counted: 人 of 多少人


@functools.lru_cache(maxsize=64)
def read_question(question: str) -> Question:
    """`question` taken apart. Question words carry no information and are left out of its terms."""
    folded = fold(question)
    asking = list(_ASKING.finditer(folded))
    mask = question_mask(folded)
    for found in asking:  # the mask may have taken 是什么 of 是什么时候; a lone 几 may be that of 几何
        mask[found.start() : found.end()] |= len(found.group()) > 1
    told = "".join(" " if asks else character for character, asks in zip(folded, mask, strict=True))
    told = _ENGLISH_FUNCTION_WORDS.sub(" ", told)
    last = asking[-1] if asking else None
    right = _letters(folded[last.end() :])[:2] if last else ""
    return Question(
        pairs={term: information(term) for term in terms(told)},
        characters={character: information(character) for character in told if is_cjk(character)},
        kinds=tuple(kind for kind, pattern in _patterns("kinds").items() if pattern.search(folded)),
        left=_letters(folded[: last.start()])[-2:] if last else "",
        right=right,
        unit=right[:1] if last and last.group() in ("多少", "几") else "",
    )


def answer_probabilities(
    question: str,
    passages: Sequence[str],
    headings: Sequence[str],
    clauses: Sequence[Sequence[Clause]],
    *,
    above: Sequence[str] | None = None,
    quotable: Sequence[Sequence[bool]] | None = None,
) -> list[Column]:
    """Probability per clause, shape (clauses of the passage,) for each passage; over all passages they sum to 1.

    Args:
        question: in any script.
        passages: best first.
        headings: what stands over each passage.
        clauses: of each passage.
        above: the headings within each passage; none without it.
        quotable: which clauses may have a probability; all without it. Where none may, all have 0.
    """
    asked = read_question(question)
    within = [""] * len(passages) if above is None else above
    allowed = [[True] * len(pieces) for pieces in clauses] if quotable is None else quotable
    logits = []
    for rank, (passage, heading, inner, pieces) in enumerate(zip(passages, headings, within, clauses, strict=True)):
        features = clause_features(asked, passage, heading, pieces, rank, above=inner)
        weighted = (WEIGHTS[name] * column for name, column in features.items())
        logits.append(sum(weighted, start=np.zeros(len(pieces))))
    highest = max((float(values.max()) for values in logits if values.size), default=0.0)
    weights = [np.exp(values - highest) * np.array(may) for values, may in zip(logits, allowed, strict=True)]
    total = sum(float(values.sum()) for values in weights) or 1.0
    return [values / total for values in weights]


def clause_features(
    asked: Question, passage: str, heading: str, clauses: Sequence[Clause], rank: int, above: str = ""
) -> dict[str, Column]:
    """Named features, each of shape (clauses,), of the clauses of one passage that stands at `rank` (0 the best).

    `heading` is what stands over the passage, `above` the headings within it.
    """
    if not clauses:
        return {}
    text = _Text(fold(passage), clauses)
    return {
        **_overlap_features(asked, text, fold(heading), fold(above)),
        **_place_features(text, rank),
        **_length_features(asked, text),
        **_context_features(asked, text),
        **_kind_features(asked, text),
    }


class _Text:
    """A folded passage with its clauses as arrays, so that a search through it marks clauses."""

    def __init__(self, folded: str, clauses: Sequence[Clause]) -> None:
        self.folded = folded
        table = np.array(clauses, dtype=np.int64)
        self.starts, self.ends = table[:, 0], table[:, 1]
        _, self.first_clauses, self.sentence = np.unique(table[:, 2], return_index=True, return_inverse=True)

    def marks(self, places: Iterable[int]) -> Column:
        """1.0 for each clause in which one of `places` lies, shape (clauses,)."""
        marked = np.zeros(len(self.starts))
        indices = np.searchsorted(self.starts, np.fromiter(places, dtype=np.int64), side="right") - 1
        marked[indices[indices >= 0]] = 1.0
        return marked

    def where(self, term: str) -> Column:
        """1.0 for each clause that contains `term`, shape (clauses,); an empty term stands nowhere."""
        return self.marks(find_term(term, self.folded))

    def table(self, wanted: Collection[str]) -> Column:
        """1.0 where a clause contains a term, shape (clauses, terms)."""
        found = np.zeros((len(self.starts), len(wanted)))
        for number, term in enumerate(wanted):
            found[:, number] = self.where(term)
        return found

    def matches(self, pattern: re.Pattern[str]) -> Column:
        """1.0 for each clause in which `pattern` matches, shape (clauses,)."""
        return self.marks(found.start() for found in pattern.finditer(self.folded))

    def of_sentence(self, per_clause: Column) -> Column:
        """The highest value in the sentence of each clause, shape as `per_clause`: (clauses, ...)."""
        highest: Column = np.maximum.reduceat(per_clause, self.first_clauses, axis=0)[self.sentence]
        return highest

    def of_clause_beside(self, per_clause: Column, by: int) -> Column:
        """The value of the clause before (-1) or behind (1) each, 0.0 where that belongs to another sentence."""
        padded = np.concatenate([[0.0], per_clause, [0.0]])
        sentence = np.concatenate([[-1], self.sentence, [-1]])
        inner = slice(1 + by, 1 + by + len(per_clause))
        return np.where(sentence[inner] == self.sentence, padded[inner], 0.0)

    def of_sentence_beside(self, per_clause: Column, by: int) -> Column:
        """The value of the sentence before (-1) or behind (1) that of each clause, 0.0 at the ends of the passage."""
        padded = np.concatenate([[0.0], per_clause[self.first_clauses], [0.0]])
        beside: Column = padded[self.sentence + 1 + by]
        return beside


def _overlap_features(asked: Question, text: _Text, heading: str, above: str) -> dict[str, Column]:
    """Shares of the question's information in a clause and round it.

    What the heading says already (often the subject, which the text leaves out) is counted apart: `rest` is without it.
    What headings within the passage say, every clause says: they tell passages of one document apart.
    """
    features: dict[str, Column] = {}
    for kind, told in (("pairs", asked.pairs), ("characters", asked.characters)):
        bits = np.array(list(told.values()))
        in_heading = np.array([bool(find_term(term, heading)) for term in told], dtype=bool)
        in_clause = text.table(told)
        in_sentence = text.of_sentence(in_clause)
        in_passage = np.maximum(in_clause.max(axis=0), in_heading)
        rest = _shares(np.where(in_heading, 0.0, bits))
        beside, sentence_beside = in_clause @ rest, in_sentence @ rest
        said_above = np.array([bool(find_term(term, above)) for term in told], dtype=bool)
        in_clause, in_sentence = np.maximum(in_clause, said_above), np.maximum(in_sentence, said_above)
        clause, sentence = in_clause @ rest, in_sentence @ rest
        features |= {
            f"clause rest {kind}": clause,
            f"clause rest {kind} squared": clause**2,
            f"sentence rest {kind}": sentence,
            f"sentence rest {kind} squared": sentence**2,
            f"passage {kind}": np.full(len(clause), float(in_passage @ _shares(bits))),
        }
        if kind == "pairs":
            features |= {
                "sentence pairs": in_sentence @ _shares(bits),
                "previous clause": text.of_clause_beside(beside, -1),
                "previous sentence": text.of_sentence_beside(sentence_beside, -1),
                "next sentence": text.of_sentence_beside(sentence_beside, 1),
            }
        else:
            features["next clause"] = text.of_clause_beside(beside, 1)
    return features


def _place_features(text: _Text, rank: int) -> dict[str, Column]:
    """Where the clause stands: the passage among the passages, the sentence in the passage."""
    count = len(text.starts)
    last = max(1, int(text.sentence.max()))
    return {
        "second passage": np.full(count, float(rank == 1)),
        "later passage": np.full(count, float(rank > 1)),
        "first sentence": (text.sentence == 0).astype(np.float64),
        "position": text.sentence / last,
    }


def _length_features(asked: Question, text: _Text) -> dict[str, Column]:
    """How much the clause says, and how much of it the question did not say already."""
    known = asked.characters.keys() | set("".join(asked.pairs))
    new = np.array([character.isalnum() and character not in known for character in text.folded], dtype=np.int64)
    up_to = np.concatenate([[0], np.cumsum(new)])
    said = up_to[text.ends] - up_to[text.starts]
    whole = np.add.reduceat(text.ends - text.starts, text.first_clauses)[text.sentence]
    return {
        "log sentence length": np.log(whole),
        "log new": np.log1p(said),
        "nothing new": (said < 3).astype(np.float64),
    }


def _context_features(asked: Question, text: _Text) -> dict[str, Column]:
    """Whether what surrounds the question word in the question also stands in the clause or its sentence."""
    left = text.where(asked.left)
    return {
        "left of question word": left,
        "left, in sentence": text.of_sentence(left),
        "right of question word": text.where(asked.right),
        "right, first character": text.where(asked.right[:1]),
    }


def _kind_features(asked: Question, text: _Text) -> dict[str, Column]:
    """Cues in the clause for the kinds of answer the question wants, and those that count always."""
    patterns = _patterns("cues")
    wanted = {cue for kind in asked.kinds for cue in _CUES_OF_KIND[kind]}
    seen = {cue: text.matches(patterns[cue]) for cue in sorted(wanted.union(_ALWAYS))}
    features = {f"any: {cue}": seen[cue] for cue in _ALWAYS}
    features |= {f"{kind}: {cue}": seen[cue] for kind in asked.kinds for cue in _CUES_OF_KIND[kind]}
    if asked.unit:
        features["number: unit"] = text.matches(re.compile(rf"[{_NUMERAL}][余多]?{re.escape(asked.unit)}"))
    if "definition" in asked.kinds:
        features["definition: first"] = (np.arange(len(text.starts)) == 0).astype(np.float64)
    return features


def _shares(bits: Column) -> Column:
    """Bits as shares of their sum; zeros where there is nothing to share."""
    total = float(bits.sum())
    return bits / total if total else np.zeros(len(bits))


def find_term(term: str, folded: str) -> list[int]:
    """Offsets of `term` in folded text; a word or number of Latin letters and digits only where it stands by itself."""
    if not term:
        return []
    if not is_cjk(term[0]):
        return [found.start() for found in re.finditer(rf"(?<![a-z0-9]){re.escape(term)}(?![a-z0-9])", folded)]
    places = []
    place = folded.find(term)
    while place >= 0:
        places.append(place)
        place = folded.find(term, place + 1)
    return places


def _letters(text: str) -> str:
    return re.sub(r"\W", "", text)


@functools.cache
def _patterns(table: str) -> dict[str, re.Pattern[str]]:
    return {name: re.compile(pattern) for name, pattern in {"kinds": _KINDS, "cues": _CUES}[table].items()}

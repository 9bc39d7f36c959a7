"""The second look at candidates, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from chains.information import information
from chains.knowledge_base import StoredChunk
from chains.rescoring import WEIGHTS, closeness


def chunk(text: str, *, title: str = "", start: int = 100, **metadata: Any) -> StoredChunk:
    return StoredChunk(7, "k", "s", 1, start, start + len(text), text, {"title": title, **metadata}, title)


def raised(question: str, candidate: StoredChunk) -> float:
    return closeness(question, [candidate])[7]


@pytest.mark.parametrize(
    ("question", "candidate", "expected"),
    [
        ("年假几天", chunk("停车场"), 0.0),
        ("年假", chunk("年假与假年"), WEIGHTS["mentioned"]),
        ("年假", chunk("与年", title="假期"), WEIGHTS["mentioned"]),  # the title counts with the text
        ("年假", chunk("停车场", start=0), WEIGHTS["opening"]),
        ("年假制度是什么", chunk("停车场", title="年假制度"), WEIGHTS["mentioned"] + WEIGHTS["title"]),
        ("年假", chunk("停车场", title="假"), None),  # one character names nothing
        ("", chunk("年假"), 0.0),
        ("什么", chunk("年假"), 0.0),  # a question that tells nothing
    ],
)
def test_a_chunk_is_raised_by_what_it_shares(question: str, candidate: StoredChunk, expected: float | None) -> None:
    if expected is None:
        assert 0 < raised(question, candidate) < WEIGHTS["mentioned"]
    else:
        assert raised(question, candidate) == pytest.approx(expected)


def test_shares_are_counted_in_bits_of_characters_and_words() -> None:
    bits = {term: information(term) for term in ("报", "销", "chatglm3")}
    expected = WEIGHTS["mentioned"] * (bits["报"] + bits["chatglm3"]) / sum(bits.values())
    assert raised("ChatGLM3 报销", chunk("用chatglm3报数")) == pytest.approx(expected)


@pytest.mark.parametrize("question", ["離職證明", "离职证明", "离职证明？"])
def test_script_does_not_matter(question: str) -> None:
    assert raised(question, chunk("離職須知", title="离职证明")) == raised(
        "离职证明", chunk("离职须知", title="離職證明")
    )


def test_every_candidate_gets_its_own() -> None:
    other = StoredChunk(8, "k", "s", 1, 0, 2, "年假", {}, "")
    assert closeness("年假", [chunk("停车场"), other]) == pytest.approx({7: 0.0, 8: WEIGHTS["mentioned"] + 0.05})
    assert closeness("年假", []) == {}

"""Text from ids piece by piece, and stop texts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from chains.chatglm3.prompt import ChatGLM3Tokenizer
from chains.chatglm3.texts import PieceDecoder, StopFilter

pytest.importorskip("tokenizers", reason="needs the extra [models]")

SENTENCES = ["你好 😀 world\n  x繁體", "👨‍👩‍👧🇨🇳 \n\n a  b\t", "…“引号”——①", " ", "\n"]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> ChatGLM3Tokenizer:
    return ChatGLM3Tokenizer.from_directory(tiny)


def pieces(tokenizer: ChatGLM3Tokenizer, ids: list[int]) -> list[str]:
    decoder = PieceDecoder(tokenizer.tokenizer)
    return [decoder.take(number) for number in ids] + [decoder.rest()]


@pytest.mark.parametrize("text", SENTENCES)
def test_pieces_together_are_the_text(tokenizer: ChatGLM3Tokenizer, text: str) -> None:
    ids = tokenizer.encode("\n") + tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.tokenizer.decode(ids)
    assert "".join(pieces(tokenizer, ids)).endswith(text)


def test_no_piece_ends_inside_a_character(tokenizer: ChatGLM3Tokenizer) -> None:
    ids = tokenizer.encode("a𠮷b")
    assert len(ids) >= 6, "𠮷 must be four bytes here"
    assert "\ufffd" not in "".join(pieces(tokenizer, ids)[:-1])


def test_any_ids_give_text(tokenizer: ChatGLM3Tokenizer) -> None:
    """DecodeStream raises on these. Bytes (3 to 258) may come to nothing; no other piece may be lost or moved."""
    chance = random.Random(3)
    for _ in range(300):
        ids = [chance.randrange(3, 2000) for _ in range(30)]
        text = iter("".join(pieces(tokenizer, ids)))
        whole_pieces = [tokenizer.tokenizer.id_to_token(number).replace("▁", " ") for number in ids if number > 258]
        wanted = "".join(whole_pieces).strip()
        assert all(character in text for character in wanted), "must be found in order"


def test_a_character_that_is_never_completed_is_told_at_the_end(tokenizer: ChatGLM3Tokenizer) -> None:
    assert pieces(tokenizer, tokenizer.encode("𠮷")[:-1])[-1].startswith("\ufffd")


# -- stop texts ----------------------------------------------------------------------------------------------------


def filtered(stops: list[str], *taken: str) -> tuple[str, bool]:
    stop = StopFilter(stops)
    text = "".join(stop.take(piece) for piece in taken)
    return text + stop.rest(), stop.stopped


def test_text_goes_through_without_stops() -> None:
    assert filtered([], "ab", "c") == ("abc", False)


@pytest.mark.parametrize("taken", [["abSTOPcd"], ["abST", "OPcd"], ["a", "b", "S", "T", "O", "P", "c"]])
def test_text_ends_before_a_stop_however_it_is_cut(taken: list[str]) -> None:
    assert filtered(["STOP"], *taken) == ("ab", True)


def test_the_first_of_several_stops_counts() -> None:
    assert filtered(["。", "？"], "甲？乙。") == ("甲", True)


def test_what_only_began_like_a_stop_is_given_in_the_end() -> None:
    stop = StopFilter(["问题：", "\n\n"])
    assert stop.take("答案\n") == "答案"
    assert stop.take("问") == "\n"
    assert stop.take("卷") == "问卷"
    assert stop.take("问题") == ""
    assert stop.rest() == "问题"


def test_after_a_stop_nothing_comes() -> None:
    stop = StopFilter(["x"])
    assert (stop.take("ax"), stop.take("b"), stop.rest()) == ("a", "", "")

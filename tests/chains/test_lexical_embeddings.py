"""LexicalEmbeddings: LangChain's contract, determinism, folding, edges and a floor of recall."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from pydantic import ValidationError

from chains import information, lexical_embeddings
from chains.lexical_embeddings import LexicalEmbeddings

TEXTS = [
    "锣鼓经是大陆传统器乐及戏曲里面常用的打击乐记谱方法。",
    "ChatGLM3-6B 的输入长度为 8192 tokens；BGE 模型输出 768 维向量。",
    "第一条 为了惩罚犯罪，保护人民，根据宪法，制定本法。",
    "😀👍🏽 emoji and Latin text, 中英 mixed",
    "",
]
# Of the vectors of TEXTS, as first computed on x86-64 with AVX512 under Python 3.11 and numpy 2.4.
# A change means that stored vectors no longer fit: intended only together with a new fingerprint.
GOLDEN = "143976051ed6a366a5c7d9ca08425e82"


class TestUnitContract(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return LexicalEmbeddings


class TestIntegrationContract(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return LexicalEmbeddings


@pytest.fixture(scope="module")
def embeddings() -> LexicalEmbeddings:
    return LexicalEmbeddings()


def cosine(embeddings: LexicalEmbeddings, one: str, other: str) -> float:
    first, second = embeddings.embed_documents_array([one, other])
    return float(first @ second)


def test_vectors_are_those_computed_when_the_format_was_fixed(embeddings: LexicalEmbeddings) -> None:
    assert _digest(embeddings.embed_documents_array(TEXTS)) == GOLDEN


@pytest.mark.parametrize("seed", ["1", "4242"])
def test_another_process_with_another_hash_seed_computes_the_same_bits(seed: str) -> None:
    script = (
        "import hashlib, json, sys\n"
        "from chains.lexical_embeddings import LexicalEmbeddings\n"
        "embeddings = LexicalEmbeddings()\n"
        "vectors = embeddings.embed_documents_array(json.load(sys.stdin))\n"
        "print(hashlib.sha256(vectors.astype('<f4').tobytes()).hexdigest()[:32], embeddings.fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.split() == [GOLDEN, LexicalEmbeddings().fingerprint]


@pytest.mark.parametrize("dimensions", [64, 100, 257, 512, 1024])
def test_every_vector_has_unit_length_at_any_dimensions(dimensions: int) -> None:
    vectors = LexicalEmbeddings(dimensions=dimensions).embed_documents_array(TEXTS)
    assert vectors.shape == (len(TEXTS), dimensions)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-6)


@pytest.mark.parametrize("dimensions", [0, 63, -1, 8193])
def test_dimensions_out_of_range_are_refused(dimensions: int) -> None:
    with pytest.raises(ValidationError, match="dimensions"):
        LexicalEmbeddings(dimensions=dimensions)


def test_a_misspelt_option_is_refused() -> None:
    with pytest.raises(ValidationError, match="dimension"):
        LexicalEmbeddings(dimension=512)  # type: ignore[call-arg]


def test_lists_and_arrays_agree(embeddings: LexicalEmbeddings) -> None:
    array = embeddings.embed_documents_array(TEXTS)
    assert embeddings.embed_documents(TEXTS) == array.tolist()
    assert [embeddings.embed_query(text) for text in TEXTS] == array.tolist()


def test_no_texts_give_no_vectors(embeddings: LexicalEmbeddings) -> None:
    assert embeddings.embed_documents([]) == []
    assert embeddings.embed_documents_array([]).shape == (0, 1024)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("資料庫與檢索系統", "资料库与检索系统"),
        ("ChatGLM BGE", "chatglm bge"),
        ("ＣｈａｔＧＬＭ３　２０２４年", "ChatGLM3 2024年"),
        ("高血压，能吃党参吗？", "高血压 能吃党参"),
    ],
    ids=["traditional", "case", "width", "punctuation and question words"],
)
def test_forms_that_fold_to_the_same_text_have_the_same_vector(
    embeddings: LexicalEmbeddings, one: str, other: str
) -> None:
    assert embeddings.embed_query(one) == embeddings.embed_query(other)


def test_batches_and_their_order_change_no_bit(embeddings: LexicalEmbeddings, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("的中国高血压锣鼓经法律条文abc 12，。", k=draw.randrange(80))) for _ in range(200)]
    whole = embeddings.embed_documents_array(texts)
    order = draw.sample(range(200), 200)
    assert np.array_equal(embeddings.embed_documents_array([texts[i] for i in order]), whole[order])
    monkeypatch.setattr(lexical_embeddings, "BATCH_TEXTS", 7)
    monkeypatch.setattr(lexical_embeddings, "BATCH_CHARACTERS", 100)
    assert np.array_equal(embeddings.embed_documents_array(texts), whole)


def test_a_text_does_not_see_its_neighbours_in_the_batch(embeddings: LexicalEmbeddings) -> None:
    # 锣 and 鼓 meet at the border of two texts: no pair may form across it
    together = embeddings.embed_documents_array(["锣", "鼓", "ab", "cd"])
    apart = np.stack([embeddings.embed_documents_array([text])[0] for text in ("锣", "鼓", "ab", "cd")])
    assert np.array_equal(together, apart)


@pytest.mark.parametrize("text", ["", " \n\t", "，。！？", "什么？", "的", "What is it?", "----"])
def test_a_text_that_tells_nothing_has_one_fixed_unit_vector(embeddings: LexicalEmbeddings, text: str) -> None:
    vector = embeddings.embed_query(text)
    assert vector == embeddings.embed_query("")
    assert math.hypot(*vector) == pytest.approx(1)


def test_the_vector_of_nothing_is_near_no_passage(embeddings: LexicalEmbeddings) -> None:
    # two unrelated vectors: standard deviation 1 / sqrt(1024) = .03; four of them are .125
    assert all(abs(cosine(embeddings, "", text)) < 0.125 for text in TEXTS if text)


@pytest.mark.parametrize(
    "text",
    ["😀" * 50, "é" * 10, "\x00\x01", "\ud800", "\u2028行", "\U00020000", "a", "ab", "abc", "锣", "A" * 5000],
    ids=lambda text: f"{text[:1]!a} x {len(text)}",
)
def test_odd_inputs_get_a_finite_unit_vector(embeddings: LexicalEmbeddings, text: str) -> None:
    assert math.hypot(*embeddings.embed_query(text)) == pytest.approx(1, abs=1e-6)


def test_emoji_can_be_searched_for(embeddings: LexicalEmbeddings) -> None:
    assert cosine(embeddings, "😀", "今天很开心😀") > cosine(embeddings, "😀", "今天很开心👻") + 0.2


def test_a_text_of_a_million_characters_is_embedded(embeddings: LexicalEmbeddings) -> None:
    vector = embeddings.embed_query("高血压病人可以口服党参。" * 80_000)
    # the same passage once has the same terms; only their frequencies differ, by one factor but for the cap
    assert np.dot(vector, embeddings.embed_query("高血压病人可以口服党参。" * 300)) > 0.98


def test_rare_shared_terms_count_more_than_common_ones(embeddings: LexicalEmbeddings) -> None:
    question = "锣鼓经在中国的使用"
    assert cosine(embeddings, question, "锣鼓经入门教程") > cosine(embeddings, question, "产品在中国的使用情况")


def test_a_word_with_another_ending_is_still_near(embeddings: LexicalEmbeddings) -> None:
    assert cosine(embeddings, "chatglm", "chatglm3") > 0.3
    assert cosine(embeddings, "retrieval", "retrievals") > 0.3


def test_pieces_stay_inside_long_words() -> None:
    codes = information.code_points("usb retrieval")
    letters = information.character_classes(codes) == information.WORD
    parts = {kind: places for kind, places, *_ in lexical_embeddings._word_features(codes, letters)}
    assert parts[lexical_embeddings.WHOLE_WORD].tolist() == [0, 4]
    # retrieval: ret etr tri rie iev eva val at 4..10; usb is a piece by itself and has none
    assert parts[lexical_embeddings.PIECE].tolist() == [4, 5, 6, 7, 8, 9, 10]


def test_words_of_the_background_table_are_found_by_their_hash() -> None:
    codes = information.code_points("the qwxyzv 2008 baidu")
    letters = codes != ord(" ")
    hashes = lexical_embeddings._word_hashes(codes, *lexical_embeddings._word_spans(letters))
    known = information.table().words
    expected = [known["the"], information.MAX_BITS, known["2008"], known["baidu"]]
    assert lexical_embeddings._word_bits(hashes).tolist() == expected


def test_hash_is_splitmix64() -> None:
    # first two outputs of the reference splitmix64.c for seed 0: the finaliser of the increment and of twice it
    increment = 0x9E3779B97F4A7C15
    mixed = lexical_embeddings._mixed(np.array([0, increment], dtype=np.uint64))
    assert mixed.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_sketch_equals_a_plain_loop_over_features() -> None:
    packed = lexical_embeddings._features(TEXTS)
    plain = np.zeros((len(TEXTS), 100))
    counts: dict[int, int] = {}
    for feature in packed.tolist():
        counts[feature] = counts.get(feature, 0) + 1
    for feature, frequency in counts.items():
        bits = max((feature >> 2 & 63) / 4 - 1, 0)
        weight = (1.0, 1.0, 1.2, 0.8)[feature & 3] * (bits / 13) ** 0.8 * frequency**0.7
        draws = int(lexical_embeddings._mixed(np.array([feature >> 8 & 0xFFFFFFFFFF], dtype=np.uint64))[0])
        for block in range(4):
            draw = draws >> 16 * block & 0xFFFF
            sign = 1 if draw & 1 else -1
            plain[feature >> 48, 25 * block + ((draw >> 1) * 25 >> 15)] += sign * round(256 * weight)
    assert np.array_equal(lexical_embeddings._sketch(packed, len(TEXTS), 100), plain)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("知识库问答", 5),
        ("你好，世界！", 6),
        ("abcd", 1),
        ("abcde", 2),
        ("ＡＢＣＤＥ", 2),
        ("BGE 模型 768 维", 5),
        (" \n\u3000", 0),
        ("😀😀", 2),
    ],
)
def test_count_tokens_matches_a_count_by_hand(embeddings: LexicalEmbeddings, text: str, tokens: int) -> None:
    assert embeddings.count_tokens(text) == tokens


def test_max_tokens_can_be_compared_with_a_chunk_size(embeddings: LexicalEmbeddings) -> None:
    assert embeddings.max_tokens == 512


def test_fingerprint_names_kind_and_dimensions_and_is_stable(embeddings: LexicalEmbeddings) -> None:
    assert embeddings.fingerprint.startswith("lexical-1024-")
    assert embeddings.fingerprint == LexicalEmbeddings().fingerprint
    assert embeddings.fingerprint != LexicalEmbeddings(dimensions=512).fingerprint


@pytest.mark.parametrize("constant, value", [("MUTED_BITS", 2.0), ("FREQUENCY_POWER", 0.5), ("PIECE_BITS", 5.0)])
def test_fingerprint_changes_with_the_constants_that_shape_vectors(
    monkeypatch: pytest.MonkeyPatch, constant: str, value: float
) -> None:
    before = LexicalEmbeddings().fingerprint
    monkeypatch.setattr(lexical_embeddings, constant, value)
    lexical_embeddings._weights.cache_clear()
    lexical_embeddings._digest.cache_clear()
    try:
        assert LexicalEmbeddings().fingerprint != before
    finally:
        monkeypatch.undo()
        lexical_embeddings._weights.cache_clear()
        lexical_embeddings._digest.cache_clear()
    assert LexicalEmbeddings().fingerprint == before


def test_recall_on_cmrc2018_stays_above_its_floor(shared_data: Path, embeddings: LexicalEmbeddings) -> None:
    # 300 questions of cmrc2018_trial over the 256 passages they belong to, in pieces of 192 characters
    passages = _rows(shared_data / "cmrc2018_trial_passages.jsonl")
    chunks = [
        (row["id"], row["title"] + "\n" + row["text"][i : i + 192])
        for row in passages
        for i in range(0, len(row["text"]), 192)
    ]
    vectors = embeddings.embed_documents_array([text for _, text in chunks])
    questions = _rows(shared_data / "cmrc2018_trial.jsonl")[:300]
    scores = embeddings.embed_documents_array([row["question"] for row in questions]) @ vectors.T
    first, fifth = 0, 0
    for row, order in zip(questions, np.argsort(-scores, axis=1), strict=True):
        ranked = list(dict.fromkeys(chunks[place][0] for place in order))
        first += ranked[0] == row["context_id"]
        fifth += row["context_id"] in ranked[:5]
    assert first / len(questions) >= 0.95
    assert fifth / len(questions) >= 0.98


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _digest(vectors: np.ndarray) -> str:
    return hashlib.sha256(vectors.astype("<f4").tobytes()).hexdigest()[:32]

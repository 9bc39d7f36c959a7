"""The converted tokenizer against SentencePiece itself, with the toy model and the real one of ChatGLM3."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from chains.chatglm3.prompt import ChatGLM3Tokenizer, Turn, prompt_ids
from chains.chatglm3.settings import ConversionError
from chains.chatglm3.tokenizer import SURFACES, read_sentencepiece, tokenizer_json, write_tokenizer

sentencepiece = pytest.importorskip("sentencepiece", reason="needs the extra [models]")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [models]")

MODELS = {"toy": "chatglm3_golden/checkpoint", "real": "assets/chatglm3_tokenizer"}
PARTS = [
    *"的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得经",
    "，", "。", "！", "？", "《", "》", "“", "”", "——", "……", "、", "；", "：", "（", "）",
    "the", "Aesop", "people", "sop", "eop", "Hello", "world", "ChatGLM3-6B", "tokenizer", "don't", "naïve", "Übung",
    "0", "1", "42", "3.14", "2026", "１２３", "ＡＢＣ", "①", "½", "℃", "№", "㎡",
    "😀", "👨‍👩‍👧", "🇨🇳", "❤️", "𠮷", "𝄞", "繁體字", "ひらがな", "한국어", "العربية", "Ω≈ç√",
    " ", "  ", "\t", "\n", "\n\n", "\r\n", "\u3000", "\u00a0", "\u200b", "\u2028", "\ufeff", "▁",
    "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "[gMASK]", "[MASK]", "[sMASK]", "<sop>", "<eop>",
    "<s>", "</s>", "<unk>", "<0x0A>", "<", ">", "|", "[", "]", "def f():\n    return 1", "\\n", "{}", "\x00", "\x7f",
]  # fmt: skip


def strings(count: int) -> list[str]:
    """Mixed texts, the same in every run: Chinese, Latin, digits, emoji, white space, literal special tokens."""
    chance = random.Random(20261127)
    texts = ["", " ", "\n", "  x", "x  ", *SURFACES]
    while len(texts) < count:
        text = "".join(chance.choice(PARTS) for _ in range(chance.randint(1, 24)))
        if chance.random() < 0.3:  # any character at all, but no half of a surrogate pair
            text += "".join(
                chr(chance.choice([chance.randint(32, 0xD7FF), chance.randint(0xE000, 0x1FFFF)])) for _ in range(4)
            )
        texts.append(text)
    return texts


@pytest.fixture(scope="session", params=sorted(MODELS))
def folder(request: pytest.FixtureRequest, shared_data: Path) -> Path:
    return shared_data / MODELS[request.param]


@pytest.fixture(scope="session")
def reference(folder: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="session")
def converted(folder: Path) -> Any:
    """Special tokens in a text are text, as prompts are built."""
    data = tokenizer_json(read_sentencepiece(folder / "tokenizer.model"), where="tokenizer.model")
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    tokenizer.encode_special_tokens = True
    return tokenizer


def test_ten_thousand_mixed_strings_have_sentencepieces_ids(reference: Any, converted: Any) -> None:
    texts = strings(10_000)
    encodings = converted.encode_batch(texts, add_special_tokens=False)
    different = [
        text
        for text, encoding, ids in zip(texts, encodings, reference.encode(texts), strict=True)
        if encoding.ids != ids
    ]
    assert different == []


def test_every_piece_decodes_as_sentencepiece_does(reference: Any, converted: Any) -> None:
    texts = [text for text in strings(500) if text]
    ids = [reference.encode(text) for text in texts]
    assert [converted.decode(each, skip_special_tokens=False) for each in ids] == [
        reference.decode(each) for each in ids
    ]


def test_pieces_are_read_as_sentencepiece_reads_them(folder: Path, reference: Any) -> None:
    pieces = read_sentencepiece(folder / "tokenizer.model").pieces
    assert [piece.text for piece in pieces] == [reference.id_to_piece(number) for number in range(len(reference))]
    assert [piece.score for piece in pieces] == [reference.get_score(number) for number in range(len(reference))]


def test_special_tokens_follow_the_pieces(folder: Path, reference: Any, converted: Any) -> None:
    """<|user|> is 64795 in ChatGLM3, 64789 pieces and then the sixth special token."""
    first = len(reference)
    assert [converted.token_to_id(surface) for surface in SURFACES] == list(range(first, first + len(SURFACES)))
    if folder.name == "chatglm3_tokenizer":
        assert converted.token_to_id("<|user|>") == 64795


@pytest.mark.parametrize("word", ["Aesop", "people", "sop", "eop"])
def test_words_that_hold_sop_and_eop_are_words(native: Path, golden: Path, word: str) -> None:
    """Also where special tokens count, as transformers encodes by default."""
    tokenizer = tokenizers.Tokenizer.from_file(str(native / "tokenizer.json"))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(golden / "checkpoint" / "tokenizer.model"))
    assert tokenizer.encode(word, add_special_tokens=False).ids == reference.encode(word)


def test_raw_texts_have_the_golden_ids(native: Path, golden: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(native / "tokenizer.json"))
    for row in json.loads((golden / "expected_tokens.json").read_text(encoding="utf-8"))["text"]:
        assert tokenizer.encode(row["text"], add_special_tokens=False).ids == row["ids"], row["text"]


def test_transformers_chat_template_gives_the_golden_ids(native: Path, golden: Path) -> None:
    """Without special tokens in the messages: those a template cannot keep apart, see test_prompt."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [models]")
    tokenizer = transformers.AutoTokenizer.from_pretrained(native)
    rows = json.loads((golden / "expected_tokens.json").read_text(encoding="utf-8"))["chat"]
    plain = [row for row in rows if "<|" not in row["messages"][-1]["content"]]
    assert len(plain) == len(rows) - 1
    for row in plain:
        ids = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)["input_ids"]
        assert ids == row["input_ids"]


def test_the_chat_template_lists_tools_as_the_prompt_builder_does(native: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra [models]")
    tools = [{"name": "查天气", "parameters": {"city": "string"}}]
    messages = [{"role": "system", "content": "工具：", "tools": tools}, {"role": "user", "content": "?"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(native)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    turns = [Turn("system", "工具：", tools=tuple(tools)), Turn("user", "?")]
    assert ids == prompt_ids(ChatGLM3Tokenizer.from_directory(native), turns)


def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xfe\xfd not a model")
    with pytest.raises(ConversionError, match="not a SentencePiece model"):
        read_sentencepiece(tmp_path / "tokenizer.model")
    with pytest.raises(ConversionError, match="cannot read"):
        read_sentencepiece(tmp_path / "absent.model")


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    """A Unigram model with SentencePiece's default normalisation, trained here."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"知识库问答 knowledge base {n}" for n in range(200)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "unigram"), vocab_size=45, minloglevel=2
    )
    model = read_sentencepiece(tmp_path / "unigram.model")
    with pytest.raises(ConversionError, match="model_type, byte_fallback, precompiled_charsmap, remove_extra"):
        tokenizer_json(model, where="unigram.model")


def test_written_files_load_by_themselves(golden: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra [models]")
    model = read_sentencepiece(golden / "checkpoint" / "tokenizer.model")
    write_tokenizer(model, tmp_path, context=1024, where="tokenizer.model")
    shutil.copyfile(golden / "checkpoint" / "tokenizer.model", tmp_path / "unused.model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.model_max_length, tokenizer.padding_side, tokenizer.pad_token_id) == (1024, "left", 0)
    sentence = "这个样本句子里没有未知词 no unknown words"
    assert tokenizer.unk_token_id not in tokenizer(sentence)["input_ids"]

"""ChatGLM3's SentencePiece model as a tokenizer.json that gives the same ids."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chains.chatglm3.settings import BOS_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS, ConversionError

# `sop` and `eop` as bare added tokens would match inside "Aesop" and "people".
_SURFACES = {"sop": "<sop>", "eop": "<eop>"}
SURFACES = tuple(_SURFACES.get(token, token) for token in SPECIAL_TOKENS)

# What a piece is, in sentencepiece_model.proto
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE = 2

# As the original builds a prompt, message by message; for libraries that know nothing of `chains.chatglm3.prompt`.
CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages -%}
<|{{ 'observation' if message['role'] == 'tool' else message['role'] }}|>{{ message['metadata'] or '' }}
{% if message['content'] or message['tools'] %} {% endif %}
{{- message['content'] }}
{%- if message['role'] == 'system' and message['tools'] -%}
{{- '\\n' + (message['tools'] | tojson(indent=4)) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}
"""


@dataclass(frozen=True)
class Piece:
    """One entry of a SentencePiece vocabulary."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What of a SentencePiece model decides the ids of a text."""

    pieces: list[Piece]
    model_type: int
    byte_fallback: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """A SentencePiece model file, read without that library.

    Raises:
        ConversionError: the file is missing or not a SentencePiece model.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConversionError(f"无法读取 {path}：{error.strerror}", f"cannot read {path}: {error.strerror}") from error
    try:
        fields = list(_fields(data))
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer = dict(_fields(next(value for number, value in fields if number == 2)))
        normalizer = dict(_fields(next(value for number, value in fields if number == 3)))
    except (IndexError, ValueError, TypeError, StopIteration, struct.error) as error:
        raise ConversionError(f"{path} 不是 SentencePiece 模型", f"{path} is not a SentencePiece model") from error
    return SentencePieceModel(
        pieces=pieces,
        model_type=trainer.get(3, 1),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: int, 4 or 8 bytes, or bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        wire = key & 7
        if wire == 0:
            value: Any
            value, place = _varint(data, place)
        else:
            if wire == 2:
                length, place = _varint(data, place)
            else:
                length = {1: 8, 5: 4}[wire] if wire in (1, 5) else -1
            if length < 0 or place + length > len(data):
                raise ValueError("not a protobuf message")
            value, place = data[place : place + length], place + length
        yield key >> 3, value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", fields.get(2, b"\0\0\0\0"))
    return Piece(fields[1].decode("utf-8"), score, fields.get(3, _NORMAL))


def tokenizer_json(model: SentencePieceModel, *, where: str) -> dict[str, Any]:
    """tokenizer.json of the `tokenizers` library with the same ids as SentencePiece and the original's special tokens.

    Raises:
        ConversionError: the model is not of ChatGLM3's kind (BPE with byte fallback, text taken as it is).
    """
    _check(model, where)
    texts = [piece.text for piece in model.pieces]
    vocabulary = {text: number for number, text in enumerate(texts)}
    specials = [(number, texts[number]) for number, piece in enumerate(model.pieces) if piece.kind in (2, 3)]
    specials += [(len(texts) + place, surface) for place, surface in enumerate(SURFACES)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(number, text) for number, text in specials],
        # SentencePiece puts a space before every text and writes spaces as U+2581
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(text for text, piece in zip(texts, model.pieces, strict=True) if piece.kind == _UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": list(_merges(model)),
        },
    }


def _check(model: SentencePieceModel, where: str) -> None:
    wrong = [
        name
        for name, fits in {
            "model_type": model.model_type == _BPE,
            "byte_fallback": model.byte_fallback,
            "precompiled_charsmap": not model.charsmap,
            "add_dummy_prefix": model.add_dummy_prefix,
            "remove_extra_whitespaces": not model.remove_extra_whitespaces,
            "escape_whitespaces": model.escape_whitespaces,
            "user_defined_symbols": all(piece.kind != _USER_DEFINED for piece in model.pieces),
            "unk_id": any(piece.kind == _UNKNOWN for piece in model.pieces),
        }.items()
        if not fits
    ]
    if wrong:
        raise ConversionError(
            f"{where} 的 {'、'.join(wrong)} 与 ChatGLM3 的分词器不同，不能转换",
            f"{where}: {', '.join(wrong)} differ from ChatGLM3's tokenizer; it cannot be converted",
        )


def _merges(model: SentencePieceModel) -> Iterator[list[str]]:
    """Every pair of pieces that makes a piece, the best piece first: the order in which SentencePiece joins them."""
    numbers = {piece.text: number for number, piece in enumerate(model.pieces) if piece.kind == _NORMAL}
    by_score = sorted(numbers.items(), key=lambda item: (-model.pieces[item[1]].score, item[1]))
    for text, _ in by_score:
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [pair for pair in pairs if pair[0] in numbers and pair[1] in numbers]
        yield from (list(pair) for pair in sorted(known, key=lambda pair: (numbers[pair[0]], numbers[pair[1]])))


def _added(number: int, text: str) -> dict[str, Any]:
    return {
        "id": number,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def tokenizer_config(model: SentencePieceModel, context: int) -> dict[str, Any]:
    """tokenizer_config.json, for transformers' own loader.

    Args:
        model: of the tokenizer.
        context: tokens the model can read, `seq_length` of the original config.
    """
    texts = [piece.text for piece in model.pieces]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": texts[BOS_ID],
        "eos_token": texts[EOS_ID],
        "unk_token": texts[PAD_ID],
        "pad_token": texts[PAD_ID],
        "extra_special_tokens": list(SURFACES),
    }


def write_tokenizer(model: SentencePieceModel, target: Path, *, context: int, where: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into a directory."""
    contents = {
        "tokenizer.json": json.dumps(tokenizer_json(model, where=where), ensure_ascii=False, indent=1),
        "tokenizer_config.json": json.dumps(tokenizer_config(model, context), ensure_ascii=False, indent=2),
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    for name, text in contents.items():
        (target / name).write_text(text, encoding="utf-8")

"""A task that a tiny model learns from nothing in minutes: find the reference that answers, quote it, cite it, refuse.

It proves rows, labels, prompt, generation, parsing of citations and metrics together, without any weights from outside.
Benchmarks and tests train on it; it is also what to try first on a new machine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from chains.chatglm3.settings import BOS_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS, generation_config
from chains.chatglm3.tokenizer import Piece, SentencePieceModel, write_tokenizer
from chains.prompts import ANSWER_SYSTEM, REFUSAL
from finetune.data.rows import GenerationRow

_NAMES = (
    "星河", "青石", "白鹭", "红枫", "紫藤", "银杏", "翠竹", "金桂",
    "玉兰", "石榴", "山楂", "海棠", "芙蓉", "牡丹", "杜鹃", "丁香",
)  # fmt: skip
_WORDS = (
    "东风", "南山", "西湖", "北海", "长江", "黄河", "泰山", "华山",
    "衡山", "恒山", "嵩山", "天池", "洞庭", "鄱阳", "太湖", "巢湖",
)  # fmt: skip
_CODE = 2  # words of a code; no word twice in the references of a row
_MOST = len(_WORDS) // _CODE  # references of a row
_THETA = 100.0  # base of the rotary frequencies
_REACH = 4  # tokens, itself included, that the first layer looks at to begin with
_NEARNESS = 4.0  # of a bias; its square over the root of the head size is the logit of the distance preferred
_NORMAL, _UNKNOWN, _CONTROL, _BYTE, _BPE = 1, 2, 3, 6, 2


def copy_rows(
    count: int,
    *,
    seed: int,
    held_out: bool = False,
    references: tuple[int, int] = (2, 4),
    asked: int = 1,
    refusals: float = 0.25,
) -> list[GenerationRow]:
    """Rows over made-up facts; one in five facts is asked for in held-out rows alone, and shown in no other.

    A fact is a name and a code of two words. Each of its three parts stands in training, and so does each pair of them:
    what held-out rows ask for cannot be known by heart, only read.

    Args:
        count: how many.
        seed: of the draw.
        held_out: ask for facts that no other row has.
        references: fewest and most of a row.
        asked: names that a question asks for, at most.
        refusals: share of rows whose references do not answer.
    """
    draw = random.Random(seed)  # noqa: S311 a made-up task, no secret
    return [_row(draw, number, held_out, references, asked, refusals) for number in range(1, count + 1)]


def _row(
    draw: random.Random, number: int, held_out: bool, references: tuple[int, int], most: int, refusals: float
) -> GenerationRow:
    count = draw.randint(*references)
    asking = draw.randint(1, min(most, count))
    refuse = draw.random() < refusals
    names = draw.sample(range(len(_NAMES)), count + asking)
    asked, shown = names[:asking], names[asking:] if refuse else names[:count]
    draw.shuffle(shown)
    codes = _codes(draw, shown, asked if held_out else ())
    facts = {name: f"{_named(name)}{''.join(_WORDS[word] for word in codes[name])}。" for name in shown}
    question = "".join(f"{_named(name)}什么？" for name in asked)
    answer = "".join(f"{facts[name]}[{shown.index(name) + 1}]" for name in asked if name in facts)
    return GenerationRow(
        question, tuple(facts.values()), REFUSAL["zh"] if refuse else answer, refuse, file="copy_task", line=number
    )


def _named(name: int) -> str:
    return f"{_NAMES[name]}的代号是"


def _codes(draw: random.Random, names: Sequence[int], held_out: Sequence[int]) -> dict[int, list[int]]:
    """A code for each name, drawn again until those of `held_out` and no others are held out."""
    while True:
        words = draw.sample(range(len(_WORDS)), _CODE * len(names))
        codes = {name: words[_CODE * place : _CODE * (place + 1)] for place, name in enumerate(names)}
        if all(((name + sum(code)) % 5 == 0) == (name in held_out) for name, code in codes.items()):
            return codes


def build_tiny_model(
    target: Path,
    *,
    texts: Sequence[str] = (),
    hidden: int = 128,
    layers: int = 3,
    heads: int = 4,
    context: int = 512,
    seed: int = 0,
) -> Path:
    """A native ChatGLM3 directory with random weights, whose tokenizer knows the task's words and fixed sentences.

    Not random are the biases of the first layer's attention: see `_look_near`.

    Args:
        target: directory to write.
        texts: further texts whose characters it shall know.
        hidden: width; a multiple of 64 suits 4-bit weights.
        layers: of them.
        heads: of attention; there are half as many groups of keys and values.
        context: tokens it reads.
        seed: of the weights.
    """
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    vocabulary = _vocabulary(texts)
    pieces = len(vocabulary.pieces)
    first = {token: pieces + place for place, token in enumerate(SPECIAL_TOKENS)}
    settings: dict[str, Any] = {
        "vocab_size": -(-(pieces + len(SPECIAL_TOKENS)) // 64) * 64,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": hidden // heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "initializer_range": hidden**-0.5,  # transformers' 0.02 suits widths of thousands
        "attention_bias": True,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        # not 10,000: of the few frequencies of a small head enough must tell neighbours apart
        "rope_parameters": {"rope_type": "default", "rope_theta": _THETA, "partial_rotary_factor": 0.5},
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": [EOS_ID, first["<|user|>"], first["<|observation|>"]],
    }
    torch.manual_seed(seed)
    model = GlmForCausalLM(GlmConfig(**settings))
    _look_near(model)
    model.save_pretrained(target)
    (target / "generation_config.json").write_text(json.dumps(generation_config(settings)), encoding="utf-8")
    write_tokenizer(vocabulary, target, context=context, where=str(target))
    return target


def _look_near(model: Any) -> None:
    """Let the heads of the first layer begin with the token itself, the one before it, two before, three before.

    By their biases alone, which the rotary embedding turns into a preference for a distance. A token then carries what
    stands before it, as after a short convolution, and a later layer can look a fact up by its name. From random biases
    this took several times the steps: it is what comes last and at once in Olsson et al., "In-context learning and
    induction heads" (2022).
    """
    import torch

    attention = model.model.layers[0].self_attn
    rotated = model.config.head_dim // 2
    frequencies = _THETA ** (-torch.arange(0, rotated, 2) / rotated)
    with torch.no_grad():
        keys = attention.k_proj.bias.view(-1, model.config.head_dim)
        keys[:, 0:rotated:2] = _NEARNESS  # pairs of even and odd places are turned by the position (interleaved)
        for head, query in enumerate(attention.q_proj.bias.view(-1, model.config.head_dim)):
            angle = frequencies * (head % _REACH)
            query[0:rotated:2] = _NEARNESS * torch.cos(angle)
            query[1:rotated:2] = -_NEARNESS * torch.sin(angle)


def _vocabulary(texts: Sequence[str]) -> SentencePieceModel:
    """Characters, the task's words, and its fixed sentences as one piece each, so that rows are some thirty tokens.

    A name and its code stand side by side, and so do a code and its mark: what two layers of attention can bind.
    """
    numbers = range(1, _MOST + 1)
    fixed = ["▁\n", f"▁{ANSWER_SYSTEM['zh']}".replace(" ", "▁"), f"▁{REFUSAL['zh']}", "▁参考资料：\n\n[1]\n", "什么？"]
    fixed += [*(f"。\n\n[{n}]\n" for n in numbers), *(f"。[{n}]" for n in numbers), "。\n\n问题：", "\n\n问题："]
    words = [*_NAMES, *_WORDS, "的代号是"]
    chains = [text[:end] for text in [*fixed, *words] for end in range(2, len(text) + 1)]
    chains += [_named(name) for name in range(len(_NAMES))]
    characters = sorted({character for text in [*fixed, *words, *texts, "，0123456789[]▁"] for character in text})
    pieces = [Piece("<unk>", 0.0, _UNKNOWN), Piece("<s>", 0.0, _CONTROL), Piece("</s>", 0.0, _CONTROL)]
    pieces += [Piece(f"<0x{byte:02X}>", 0.0, _BYTE) for byte in range(256)]
    pieces += list(
        _normal([*dict.fromkeys(chains), *(text for text in characters if not text.isspace() or text == "\n")])
    )
    return SentencePieceModel(
        pieces=pieces,
        model_type=_BPE,
        byte_fallback=True,
        charsmap=b"",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        escape_whitespaces=True,
    )


def _normal(texts: Sequence[str]) -> Iterator[Piece]:
    """Pieces whose scores fall in their order, which is that in which they are joined."""
    return (Piece(text, -float(number), _NORMAL) for number, text in enumerate(dict.fromkeys(texts)))

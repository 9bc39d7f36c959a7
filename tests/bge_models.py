"""BGE-shaped model directories with random weights, for tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def small_vocabulary() -> list[str]:
    """A Chinese vocabulary without capitals, as BGE's: 3,000 Han characters, digits, letters and their pieces."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    marks = list("，。！？；：、（）《》“”,.!?;:()-_'\"/ %+=")
    han = [chr(0x4E00 + 7 * step) for step in range(2_000)] + list(
        "知识库的备份怎样做向量模型检索文档问题答案第一条为了"
    )
    words = [*SPECIALS, *marks, *"0123456789", *letters, *han]
    pieces = [f"##{word}" for word in [*"0123456789", *letters, *han]]
    return [word for word in dict.fromkeys([*words, *pieces]) if word.strip()]


def build_bert(
    target: Path,
    *,
    layout: Path | None = None,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 2,
    positions: int = 512,
    seed: int = 0,
    spread: float = 0.15,
    **config: Any,
) -> Path:
    """Write a BGE-shaped BERT with random weights: CLS pooling, unit length, `do_lower_case=false` as bge-small's.

    Args:
        target: directory to create.
        layout: a directory without weights whose tokenizer and modules are taken, such as bge-small's; without one a
            small vocabulary is made.
        layers, hidden, heads, positions: the shape; the feed-forward is four times as wide.
        seed: of the weights.
        spread: standard deviation of the weights; BERT's .02 gives nearly equal vectors.
        config: more of BertConfig.
    """
    import torch
    from transformers import BertConfig, BertModel

    if layout is not None:
        shutil.copytree(layout, target)
        size = json.loads((layout / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    else:
        target.mkdir(parents=True)
        size = _write_small_layout(target, hidden, positions)
    torch.manual_seed(seed)
    shape = BertConfig(
        vocab_size=size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=positions,
        initializer_range=spread,
        **config,
    )
    BertModel(shape).save_pretrained(target)
    return target


def build_xlm_roberta(target: Path, *, hidden: int = 64, layers: int = 2, heads: int = 2, seed: int = 0) -> Path:
    """Write a bge-m3-shaped XLM-RoBERTa with random weights and a small Unigram vocabulary."""
    import torch
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import Unigram
    from transformers import XLMRobertaConfig, XLMRobertaModel

    target.mkdir(parents=True)
    pieces = [word for word in small_vocabulary() if not word.startswith(("##", "["))]
    capitals = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(piece, -5.0 - index / 1000) for index, piece in enumerate([*pieces, *capitals])]
    vocabulary += [("<mask>", 0.0)]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 512, "bos_token": "<s>", "eos_token": "</s>",
        "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>",
    }  # fmt: skip
    _write_json(target / "tokenizer_config.json", settings)
    _write_modules(target, hidden, 512, lower_case=False)
    torch.manual_seed(seed)
    shape = XLMRobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        initializer_range=0.08,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    XLMRobertaModel(shape).save_pretrained(target)
    return target


def build_reranker(embedder: Path, target: Path, seed: int = 0, spread: float | None = None) -> Path:
    """Write a cross-encoder with one label and random weights, with the shape and the tokenizer of an embedder.

    Args:
        embedder: its directory.
        target: directory to create.
        seed: of the weights.
        spread: standard deviation of the weights; the embedder's without one.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    without_modules(embedder, target)
    shape = AutoConfig.from_pretrained(str(embedder), num_labels=1)
    shape.initializer_range = spread or shape.initializer_range
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(shape).save_pretrained(target)
    return target


def without_modules(source: Path, target: Path) -> Path:
    """A copy of a directory as FlagEmbedding's trainer saves one: no sentence-transformers files."""
    names = (
        "modules.json",
        "1_Pooling",
        "2_Normalize",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    )
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*names))
    return target


def _write_small_layout(target: Path, hidden: int, positions: int) -> int:
    """The tokenizer and the modules of a directory; returns the vocabulary's size."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece

    words = small_vocabulary()
    (target / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )  # fmt: skip
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": None,
        "model_max_length": positions, "tokenize_chinese_chars": True,
        "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]",
        "unk_token": "[UNK]", "mask_token": "[MASK]",
    }  # fmt: skip
    _write_json(target / "tokenizer_config.json", settings)
    _write_modules(target, hidden, positions, lower_case=True)
    return len(words)


def _write_modules(target: Path, hidden: int, limit: int, *, lower_case: bool) -> None:
    """The files of sentence-transformers as bge-small-zh-v1.5 has them."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": index, "name": str(index), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for index, (folder, kind) in enumerate(kinds.items())
    ]
    _write_json(target / "modules.json", modules)
    (target / "1_Pooling").mkdir()
    _write_json(
        target / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": hidden, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False,
            "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False,
        },
    )  # fmt: skip
    _write_json(target / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": lower_case})


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2), encoding="utf-8")

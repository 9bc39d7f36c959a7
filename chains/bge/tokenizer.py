"""BgeTokenizer: texts -> token ids, with the `tokenizers` library alone, so that it loads in a tenth of a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chains.bge.directory import ModelDirectory, ModelDirectoryError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class BgeTokenizer:
    """The tokenizer of a model directory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Args are a `tokenizers` tokenizer that adds [CLS] and [SEP] itself."""
        self._tokenizer = tokenizer
        empty = tokenizer.encode("").ids
        assert len(empty) == 2, "a BGE tokenizer puts one token before a text and one behind it"
        self.cls_id, self.sep_id = empty
        # one [SEP] between two texts in BERT, two in XLM-RoBERTa
        self._between = tokenizer.encode("", "").ids[1:-1]
        self.pad_id = _special(tokenizer, "[PAD]", "<pad>")
        self.unk_id = _special(tokenizer, "[UNK]", "<unk>")

    @classmethod
    def from_directory(cls, directory: ModelDirectory) -> BgeTokenizer:
        """The tokenizer of a directory, lower-casing where its vocabulary needs that.

        Raises:
            ModelDirectoryError: its files are damaged.
        """
        from tokenizers import Tokenizer

        text = tokenizer_json(directory)
        try:
            return cls(Tokenizer.from_str(text))
        # tokenizers raises plain Exception for whatever its file lacks
        except Exception as error:
            raise ModelDirectoryError(
                f"{directory.path} 的分词器已损坏：{error}；请重新下载",
                f"the tokenizer in {directory.path} is damaged: {error}; download it again",
            ) from error

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids of each text with [CLS] and [SEP], `max_tokens` at most; the end of a longer one is cut off."""
        return [truncated(ids, max_tokens) for ids in self.encode_whole(texts)]

    def encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with [CLS] and [SEP], nothing cut off."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], max_tokens: int, *, most_of_first: float = 0.75
    ) -> list[tuple[list[int], list[int]]]:
        """(ids, token types) of each pair, [CLS] and [SEP] included, `max_tokens` at most.

        The second text is cut; of the first no more than its share stays, so that something of the second one always
        does. So does FlagReranker, with three quarters.
        """
        tokenizer = self._tokenizer
        first_limit = int(max_tokens * most_of_first)
        firsts = tokenizer.encode_batch_fast([first for first, _ in pairs], add_special_tokens=False)
        seconds = tokenizer.encode_batch_fast([second for _, second in pairs], add_special_tokens=False)
        rows = []
        for first, second in zip(firsts, seconds, strict=True):
            head = [self.cls_id, *first.ids[:first_limit], *self._between]
            room = max_tokens - len(head) - 1
            ids = [*head, *second.ids[:room], self.sep_id]
            # the [SEP] between them belongs to the first text
            rows.append((ids, [0] * len(head) + [1] * (len(ids) - len(head))))
        return rows

    def count(self, text: str) -> int:
        """Tokens of a text, without [CLS] and [SEP]."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Share of the texts' tokens that the vocabulary does not have; 0 for no tokens."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        tokens = sum(len(encoding.ids) for encoding in encodings)
        return sum(encoding.ids.count(self.unk_id) for encoding in encodings) / max(tokens, 1)


def truncated(ids: list[int], max_tokens: int) -> list[int]:
    """The ids cut to `max_tokens`; the last one, [SEP], stays last."""
    return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]]


def tokenizer_json(directory: ModelDirectory) -> str:
    """`tokenizer.json` of a directory (made of `vocab.txt` where there is none) as its texts must be tokenized.

    Where the vocabulary has no capitals it lower-cases; truncation and padding that a trainer left in it are dropped.
    """
    file = directory.path / "tokenizer.json"
    if file.is_file():
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    else:
        data = json.loads(_from_vocabulary(directory.path))
    data |= {"truncation": None, "padding": None}
    if directory.lower_case:
        normalizer = data.get("normalizer")
        if normalizer is not None and normalizer["type"] == "BertNormalizer":
            # transformers' BertTokenizer keeps only these settings; accents stay, as lowercase=False left them
            data["normalizer"] = normalizer | {"lowercase": True, "strip_accents": bool(normalizer["strip_accents"])}
        else:
            parts = [{"type": "Lowercase"}, *([normalizer] if normalizer else [])]
            data["normalizer"] = {"type": "Sequence", "normalizers": parts}
    return json.dumps(data, ensure_ascii=False)


def _from_vocabulary(path: Path) -> str:
    """A BERT tokenizer over `vocab.txt`, with the settings of `tokenizer_config.json` (BERT's defaults without it)."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece

    settings_file = path / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    lines = (path / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocabulary = {word: index for index, word in enumerate(lines)}
    unknown = "[UNK]"
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True), strip_accents=settings.get("strip_accents")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(
        [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name in vocabulary]
    )
    return str(tokenizer.to_str())


def _special(tokenizer: Tokenizer, *names: str) -> int:
    """The id of a special token under the first of its names that the vocabulary has."""
    found = [tokenizer.token_to_id(name) for name in names]
    known = [number for number in found if number is not None]
    if not known:
        raise ModelDirectoryError(f"词表里没有 {names[0]}", f"the vocabulary has no {names[0]}")
    return int(known[0])

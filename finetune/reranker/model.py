"""The cross-encoder: (query, passage) -> one score. Read, scored and written as FlagEmbedding's rerankers are."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from chains.bge.batching import length_sorted_batches
from chains.bge.directory import ModelDirectory, ModelDirectoryError
from chains.bge.encoder import pad, quiet
from chains.bge.tokenizer import BgeTokenizer, tokenizer_json
from chains.chatglm3.checkpoints import Checkpoint
from finetune.bge.encoder import set_dropout
from finetune.directories import replaced

if TYPE_CHECKING:
    from torch import Tensor, nn

Pair = tuple[str, str]

# What turns an encoder's first state into a score: new where an embedder is made a reranker.
_HEAD = re.compile(r"(^|\.)(classifier|pooler)\.")

_EVALUATED_TOKENS, _EVALUATED_ROWS = 4_096, 64  # of one forward pass while scoring
_TOKENIZER_FILES = ("vocab.txt", "special_tokens_map.json", "added_tokens.json", "sentencepiece.bpe.model")


def load_cross_encoder(directory: ModelDirectory, *, seed: int, device: str, dropout: float | None = None) -> nn.Module:
    """The directory's encoder with a head of one score, float32, in eval mode.

    A directory without a head (a plain encoder) gets a new one, drawn from the seed.

    Raises:
        ModelDirectoryError: weights are missing or do not fit, or its head has more than one score.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    try:
        with quiet():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(directory.path), num_labels=1, dtype=torch.float32, output_loading_info=True
            )
        lost = [name for name in sorted(info["missing_keys"]) if has_head(directory) or not _HEAD.search(name)]
        if lost:  # transformers would go on with random numbers there
            raise ValueError(f"no weights for {', '.join(lost[:3])} ...")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ModelDirectoryError(
            f"无法载入重排模型 {directory.path}：{reason}", f"cannot load the reranker in {directory.path}: {reason}"
        ) from error
    if dropout is not None:
        set_dropout(model, dropout)
    return cast("nn.Module", model.to(device).eval())


def has_head(directory: ModelDirectory) -> bool:
    """Whether the directory's weights score pairs already; a plain encoder's do not."""
    return any(name.startswith("classifier.") for name in Checkpoint(directory.path).shapes)


def scores_of(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, tokenizer: BgeTokenizer, *, has_types: bool
) -> Tensor:
    """Scores of encoded pairs, (n,); differentiable, before any sigmoid.

    Args:
        model: from `load_cross_encoder`.
        input_ids: (n, tokens) padded on the right.
        attention_mask: (n, tokens); None where nothing is padded.
        tokenizer: for the ids of its special tokens.
        has_types: BERT tells query and passage apart by token type; XLM-RoBERTa does not.
    """
    types = {}
    if has_types:
        ends = (input_ids == tokenizer.sep_id).long()
        second = (ends.cumsum(dim=1) - ends > 0).long()  # all behind the first [SEP], the last one included
        types = {"token_type_ids": second if attention_mask is None else second * attention_mask}
    output = model(input_ids=input_ids, attention_mask=attention_mask, **types)
    return cast("Tensor", output.logits[:, 0])


class PairScorer:
    """Scores pairs with a cross-encoder, no gradient kept."""

    def __init__(self, model: nn.Module, directory: ModelDirectory, *, max_tokens: int, device: str) -> None:
        """A model in memory; it sees every later change of its weights."""
        self._model = model
        self._tokenizer = BgeTokenizer.from_directory(directory)
        self._has_types = directory.model_type == "bert"
        self._max_tokens = max_tokens
        self._device = device

    def score(self, pairs: Sequence[Pair]) -> npt.NDArray[np.float32]:
        """One score per (query, passage), higher is better; not between 0 and 1."""
        import torch

        rows = [ids for ids, _ in self._tokenizer.encode_pairs(list(pairs), self._max_tokens)]
        found = np.zeros(len(rows), np.float32)
        training = self._model.training
        self._model.eval()
        with torch.inference_mode():
            for batch in length_sorted_batches([len(row) for row in rows], _EVALUATED_TOKENS, _EVALUATED_ROWS):
                ids, mask = pad([rows[place] for place in batch], self._tokenizer.pad_id)
                mask = None if mask is None else mask.to(self._device)
                scores = scores_of(self._model, ids.to(self._device), mask, self._tokenizer, has_types=self._has_types)
                found[batch] = scores.float().cpu().numpy()
        self._model.train(training)
        return found


def save_cross_encoder(model: nn.Module, target: Path, directory: ModelDirectory, *, max_tokens: int) -> None:
    """Write a directory that FlagReranker and sentence-transformers' CrossEncoder open; it takes its name when whole.

    What stood there before is replaced.
    """
    import json

    settings_file = directory.path / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    settings["model_max_length"] = max_tokens
    if directory.lower_case:
        settings |= {"do_lower_case": True, "strip_accents": False}
    with replaced(target) as folder:
        cast("Any", model).save_pretrained(str(folder))
        for name in _TOKENIZER_FILES:
            if (directory.path / name).is_file():
                shutil.copyfile(directory.path / name, folder / name)
        (folder / "tokenizer.json").write_text(tokenizer_json(directory), encoding="utf-8")
        content = json.dumps(settings, ensure_ascii=False, indent=2)
        (folder / "tokenizer_config.json").write_text(content, encoding="utf-8")

"""The encoder in torch, and the one function that makes its vectors: serving, export and training share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chains.bge.directory import ModelDirectory, ModelDirectoryError
from chains.lora import with_adapter

if TYPE_CHECKING:
    import torch


def load_encoder(
    directory: ModelDirectory,
    adapter: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    merge: bool = False,
) -> torch.nn.Module:
    """The directory's BertModel or XLMRobertaModel without its pooling layer, in eval mode.

    Args:
        directory: from `read_model_directory`.
        adapter: directory of a PEFT adapter trained on it.
        dtype: of the weights; float32 without one.
        device: where they go.
        merge: add the adapter to the weights, which is faster and equal to 1e-5.

    Raises:
        ModelDirectoryError: weights are missing or do not fit, or the adapter does not.
    """
    import torch
    from transformers import AutoModel

    try:
        with quiet():
            encoder, info = AutoModel.from_pretrained(
                str(directory.path),
                dtype=dtype or torch.float32,
                add_pooling_layer=False,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        if info["missing_keys"]:  # transformers would go on with random numbers there
            raise ValueError(f"no weights for {', '.join(sorted(info['missing_keys'])[:3])} ...")
        if adapter is not None:
            encoder = with_adapter(encoder, adapter, directory.path, merge=merge)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ModelDirectoryError(
            f"无法载入模型 {directory.path}：{reason}", f"cannot load the model in {directory.path}: {reason}"
        ) from error
    return cast("torch.nn.Module", encoder.to(device).eval())


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no report on the pooling layer that is left out."""
    from transformers.utils import logging as transformers_logging

    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def embed(
    encoder: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    directory: ModelDirectory,
) -> torch.Tensor:
    """Pooled vectors (n, dimensions), of unit length where the directory says so; differentiable.

    With CLS pooling the last layer asks its query and runs its feed-forward for the first token alone; what the other
    tokens would have become in that layer reaches no vector.

    Args:
        encoder: from `load_encoder`, also with LoRA layers, in training or eval mode.
        input_ids: (n, tokens) padded on the right.
        attention_mask: (n, tokens), 1 for a token and 0 for padding; None where nothing is padded.
        directory: pooling and normalisation.
    """
    import torch

    model = cast("Any", base_model(encoder))
    mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
    states = model.embeddings(input_ids=input_ids)
    by_first_token = directory.pooling == "cls"
    layers = list(model.encoder.layer)
    for layer in layers[:-1] if by_first_token else layers:
        states = layer(states, mask)
    vectors = _first_token(layers[-1], states, mask) if by_first_token else _mean(states, attention_mask)
    return torch.nn.functional.normalize(vectors.float(), dim=-1) if directory.normalize else vectors.float()


def base_model(encoder: torch.nn.Module) -> torch.nn.Module:
    """The BertModel or XLMRobertaModel inside PEFT's wrapper (LoRA layers stay in it), or the encoder itself."""
    unwrap = getattr(encoder, "get_base_model", None)
    return encoder if unwrap is None else cast("torch.nn.Module", unwrap())


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(input_ids, attention_mask) of token ids, padded on the right; the mask is None where nothing is padded."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], dtype=torch.long)
    if min(map(len, rows)) == longest:
        return ids, None
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(longest)[None, :] < lengths[:, None]).long()


def _first_token(layer: Any, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What a BERT layer makes of the first token, (n, hidden); the same as `layer(states, mask)[:, 0]`."""
    import torch

    attention = layer.attention.self
    plain = type(attention.key) is type(attention.value) is torch.nn.Linear  # and not one with an adapter
    attend = _attend_to_states if plain else _attend_to_projections
    first = states[:, 0]
    attended = layer.attention.output(attend(attention, states, mask), first)
    return cast("torch.Tensor", layer.feed_forward_chunk(attended))


def _attend_to_states(attention: Any, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What the first token takes from all tokens, (n, hidden), without their keys and values.

    One query needs neither: q . (K x) is (q K) . x, and the mean of V x is V times the mean of x. Per text, not per
    token, the key and value matrices are used once: a tenth of the work of a model of four layers.
    """
    import torch

    heads = (attention.num_attention_heads, attention.attention_head_size)
    query = attention.query(states[:, 0]).unflatten(-1, heads) * attention.scaling  # (n, heads, size)
    key, value = attention.key, attention.value
    asked = torch.einsum("nhs,hsd->nhd", query, key.weight.unflatten(0, heads))
    scores = asked @ states.transpose(1, 2) + (query * key.bias.unflatten(0, heads)).sum(-1, keepdim=True)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, 0], float("-inf"))
    shares = attention.dropout(scores.softmax(dim=-1))  # (n, heads, tokens)
    taken = torch.einsum("nhd,hsd->nhs", shares @ states, value.weight.unflatten(0, heads))
    attended = taken + shares.sum(-1, keepdim=True) * value.bias.unflatten(0, heads)
    return cast("torch.Tensor", attended.flatten(1))


def _attend_to_projections(attention: Any, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The same through keys and values of all tokens, as an adapter on their layers needs it."""
    import torch

    def heads(projected: torch.Tensor) -> torch.Tensor:
        split = projected.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)
        return cast("torch.Tensor", split)

    # (n, heads, 1 or tokens, size)
    query, key, value = (
        heads(attention.query(states[:, :1])),
        heads(attention.key(states)),
        heads(attention.value(states)),
    )
    if attention.training and attention.dropout.p:  # by the layer's own dropout, which training may have replaced
        scores = (query * attention.scaling) @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        attended = attention.dropout(scores.softmax(dim=-1)) @ value
    else:
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=attention.scaling
        )
    return cast("torch.Tensor", attended.transpose(1, 2).flatten(1))


def _mean(states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if attention_mask is None:
        return states.mean(dim=1)
    weights = attention_mask[:, :, None].to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

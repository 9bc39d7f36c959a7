"""ChatGLM3's own config.json and GlmConfig's: one as the other, and what has no native counterpart named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loaders.errors import RagProjError

# SentencePiece leaves these out: the original tokenizer numbers them after the last piece, in this order.
SPECIAL_TOKENS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

_RENAMED = {
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "multi_query_group_num": "num_key_value_heads",
    "kv_channels": "head_dim",
    "padded_vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "attention_dropout": "attention_dropout",
}
# What GlmForCausalLM computes; a checkpoint with another value would convert into a model that says something else.
_ONLY: dict[str, tuple[Any, ...]] = {
    "add_bias_linear": (False,),
    "add_qkv_bias": (True,),
    "apply_residual_connection_post_layernorm": (False,),
    "fp32_residual_connection": (False,),
    "multi_query_attention": (True,),
    "original_rope": (True,),
    "post_layer_norm": (True,),
    "pre_seq_len": (None,),
    "prefix_projection": (False,),
    "quantization_bit": (None, 0),
    "rmsnorm": (True,),
    "tie_word_embeddings": (False,),
}


_RELATIVES = re.compile("chatglm2|codegeex2", re.IGNORECASE)


class ConversionError(RagProjError):
    """A checkpoint, tokenizer or adapter that cannot be converted."""


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is the original ChatGLM's, which transformers 5 cannot load."""
    return config.get("model_type") == "chatglm"


def native_config(original: Mapping[str, Any], *, pieces: int, where: str) -> dict[str, Any]:
    """GlmConfig's config.json for an original one.

    Args:
        original: the original config.json.
        pieces: of the SentencePiece model; the special tokens are numbered from there.
        where: name of the file, for messages.

    Raises:
        ConversionError: it is no ChatGLM config, lacks a key, or has settings that GlmForCausalLM does not know.
    """
    _check(original, where)
    refuse_relatives(original.get("_name_or_path"), where)
    first = {token: pieces + place for place, token in enumerate(SPECIAL_TOKENS)}
    return {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        **{native: original[name] for name, native in _RENAMED.items()},
        "hidden_act": "silu",
        "attention_bias": True,
        "tie_word_embeddings": False,
        "use_cache": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0 * original.get("rope_ratio", 1),
            "partial_rotary_factor": 0.5,
        },
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        # a turn ends at the end of text, or where the next one to speak is the user or a tool
        "eos_token_id": [EOS_ID, first["<|user|>"], first["<|observation|>"]],
        "dtype": original.get("torch_dtype", "float16"),
    }


def refuse_relatives(name: object, where: str) -> None:
    """Nothing, unless the name that a file gives its model is ChatGLM2's or of a model made from it.

    Only names tell them apart: settings, tensors and pieces are ChatGLM3's. But they have no tokens for roles, so that
    they would convert and then answer prompts that they have never seen.

    Raises:
        ConversionError: it is.
    """
    if isinstance(name, str) and _RELATIVES.search(name):
        raise ConversionError(
            f"{where} 说这是 {name}：ChatGLM2 没有 ChatGLM3 的对话格式，转换后不会正常回答；请换成 THUDM/chatglm3-6b",
            f"{where} says that this is {name}: ChatGLM2 does not know ChatGLM3's chat format and would not answer well"
            " when converted; use THUDM/chatglm3-6b",
        )


def generation_config(native: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json beside a native config.json: where generation ends."""
    return {key: native[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}


def _check(original: Mapping[str, Any], where: str) -> None:
    if not is_original(original):
        raise ConversionError(
            f"{where} 的 model_type 是 {original.get('model_type')!r}，不是 ChatGLM3 的 chatglm",
            f"{where}: model_type is {original.get('model_type')!r}, not chatglm as ChatGLM3's",
        )
    missing = sorted(set(_RENAMED) - set(original))
    if missing:
        raise ConversionError(
            f"{where} 缺少 {'、'.join(missing)}；这不是 ChatGLM3 的配置（ChatGLM-6B 第一代不能转换）",
            f"{where} lacks {', '.join(missing)}: not a config of ChatGLM3 (the first ChatGLM-6B cannot be converted)",
        )
    refused = [
        f"{name}={original[name]!r}"
        for name, allowed in _ONLY.items()
        if name in original and original[name] not in allowed
    ]
    if refused:
        raise ConversionError(
            f"{where} 中的 {'、'.join(refused)} 在 GlmForCausalLM 中没有对应，不能转换；"
            "量化过的或带 P-Tuning 前缀的检查点请换成原始的 fp16 检查点",
            f"{where}: GlmForCausalLM has no counterpart for {', '.join(refused)}; of quantised checkpoints and those"
            " with a P-Tuning prefix convert the fp16 original instead",
        )

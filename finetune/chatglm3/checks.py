"""What the doctor looks at before a ChatGLM3 training: labels, lengths, leaks, 4-bit sizes, memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chains.answerers import CITATION_MARK, answer_messages
from chains.chatglm3.checkpoints import read_json
from chains.chatglm3.prompt import ChatGLM3Tokenizer, prompt_ids, turns_of
from chains.chatglm3.weights import native_shapes
from chains.prompts import Language
from finetune.chatglm3.config import ChatGlm3TrainingConfig
from finetune.chatglm3.data import Example, cited_numbers, passages_of
from finetune.chatglm3.model import chosen_optimizer
from finetune.data.duplicates import text_key
from finetune.data.rows import GenerationRow
from finetune.doctor import Finding, check_labels, check_learning_rate, check_memory, check_steps
from finetune.memory import Forecast, gigabytes

# bitsandbytes' 4-bit kernels: columns and rows of a matrix must be multiples of these
_COLUMNS, _ROWS = 64, 32
# NF4 with a scale of 8 bits for each 64 weights, and a float32 one for each 256 scales: bits of a weight
_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
_FLOAT = 4


@dataclass(frozen=True)
class ModelSizes:
    """Of a native model, from its config.json."""

    shapes: Mapping[str, tuple[int, ...]]
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    cache_values: int
    """numbers kept for each token while generating"""

    @classmethod
    def of(cls, directory: Path) -> ModelSizes:
        """Of a native directory."""
        config = read_json(directory / "config.json")
        return cls(
            shapes=native_shapes(config),
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            vocabulary=config["vocab_size"],
            cache_values=2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"],
        )

    def linear(self) -> dict[str, tuple[int, ...]]:
        """The matrices that go to 4 bits: those of the layers."""
        return {name: shape for name, shape in self.shapes.items() if ".layers." in name and len(shape) == 2}

    def count(self) -> int:
        """Parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def adapter(self, rank: int, targets: Sequence[str]) -> int:
        """Parameters of an adapter: two factors for each matrix that is targeted."""
        ends = tuple(f".{target}.weight" for target in targets)
        return sum(rank * (shape[0] + shape[1]) for name, shape in self.linear().items() if name.endswith(ends))


@dataclass(frozen=True)
class Hardware:
    """What a run has to work with."""

    device: str
    """"cpu" or "cuda:0" """
    number_bytes: int
    """of a frozen weight and of an activation: 2 or 4"""
    memory: int | None
    """bytes that one process can have; None where nobody knows"""


def examine(
    config: ChatGlm3TrainingConfig,
    examples: Sequence[Example],
    dev: Sequence[GenerationRow],
    sizes: ModelSizes,
    *,
    hardware: Hardware,
    steps: int,
    prompt_tokens: int,
) -> list[Finding]:
    """Everything found about a run before it starts.

    Args:
        config: the settings.
        examples: what is trained on.
        dev: what it is judged on.
        sizes: of the model.
        hardware: what it runs on.
        steps: of the run.
        prompt_tokens: of the longest prompt of an evaluation.
    """
    labelled = sum(example.learned > 0 for example in examples)
    forecast = memory_of(config, sizes, device=hardware.device, number_bytes=hardware.number_bytes)
    return [
        *check_labels(labelled, len(examples)),
        *check_lengths(examples, config.max_tokens),
        *check_leak([example.row for example in examples], dev),
        *check_steps(steps, rows=len(examples), batch_size=config.batch_size),
        *check_learning_rate(config.learning_rate, "full" if config.method == "full" else "lora"),
        *(check_four_bit_sizes(sizes) if config.method == "qlora" else ()),
        *check_memory(forecast, hardware.memory, ways_out(config, hardware.device)),
        *check_answer_memory(config, sizes, hardware, prompt_tokens=prompt_tokens),
    ]


def check_lengths(examples: Sequence[Example], max_tokens: int) -> list[Finding]:
    """Rows that lost references to the length limit; worse where the answer cited them."""
    shortened = sum(example.dropped > 0 for example in examples)
    cited = sum(example.dropped_cited > 0 for example in examples)
    if not shortened:
        return []
    return [
        Finding(
            "truncated",
            "warning" if cited or shortened > len(examples) // 10 else "note",
            f"{len(examples)} 行中有 {shortened} 行超过 {max_tokens} 个 token，去掉了排在后面的参考资料"
            f"（其中 {cited} 行去掉的资料被答案引用）；可加大 max_tokens",
            f"{shortened} of {len(examples)} rows exceed {max_tokens} tokens and lost their lowest references"
            f" ({cited} of them one that the answer cites); raise max_tokens if memory allows",
        )
    ]


def check_leak(train: Iterable[GenerationRow], dev: Sequence[GenerationRow]) -> list[Finding]:
    """Rows of dev that are trained on: the same question with the same answer, or a reference that both cite.

    The marks in an answer do not count, since references are numbered anew in each row. Rows to be refused are no leak:
    a refusal is the same for all.
    """
    keys = [_leak_keys(row) for row in train]
    asked = {question for question, _ in keys}
    shown = set().union(*(cited for _, cited in keys))
    leaked = []
    for row in dev:
        question, cited = _leak_keys(row)
        if not row.refuse and (question in asked or not cited.isdisjoint(shown)):
            leaked.append(row)
    if not leaked:
        return []
    first = leaked[0]
    return [
        Finding(
            "dev_leak",
            "error" if len(leaked) > len(dev) // 20 else "warning",
            f"评测集的 {len(dev)} 行中有 {len(leaked)} 行的问答或引用的参考资料也在训练数据里，"
            f"例如 {first.file}:{first.line}；请按文档重新划分",
            f"{len(leaked)} of {len(dev)} dev rows are trained on, too, by question and answer or by a reference that"
            f" is cited, such as {first.file}:{first.line}; split by document",
        )
    ]


def _leak_keys(row: GenerationRow) -> tuple[tuple[int, int], frozenset[int]]:
    """((question, answer without marks), references that the answer cites), as keys of their texts."""
    question, answer = row.standalone or row.question, CITATION_MARK.sub("", row.answer)
    cited = (row.references[number - 1] for number in cited_numbers(row.answer) if 0 < number <= len(row.references))
    return (text_key(question), text_key(answer)), frozenset(map(text_key, cited))


def check_four_bit_sizes(sizes: ModelSizes) -> list[Finding]:
    """Matrices that bitsandbytes cannot compute with in 4 bits."""
    odd = {name: shape for name, shape in sizes.linear().items() if shape[1] % _COLUMNS or shape[0] % _ROWS}
    if not odd:
        return []
    name, shape = next(iter(odd.items()))
    return [
        Finding(
            "four_bit_sizes",
            "error",
            f"{len(odd)} 个矩阵不能量化为 4 位（列数须为 {_COLUMNS} 的倍数，行数须为 {_ROWS} 的倍数），"
            f"例如 {name} {shape[0]}x{shape[1]}；请用 method=lora",
            f"{len(odd)} matrices do not suit 4 bits (columns must be multiples of {_COLUMNS}, rows of {_ROWS}), such"
            f" as {name} {shape[0]}x{shape[1]}; use method=lora",
        )
    ]


def longest_prompt(
    rows: Iterable[GenerationRow], tokenizer: ChatGLM3Tokenizer, *, context: int, language: Language
) -> int:
    """Tokens of the longest prompt that an evaluation of these rows asks, at most the model's context.

    `max_tokens` bounds what is trained on and not this: an evaluation asks with as many references as the model takes.
    """
    lengths = (
        len(
            prompt_ids(
                tokenizer,
                turns_of(answer_messages(row.standalone or row.question, passages_of(row.references), language)),
            )
        )
        for row in rows
    )
    return min(max(lengths, default=0), context)


def check_answer_memory(
    config: ChatGlm3TrainingConfig, sizes: ModelSizes, hardware: Hardware, *, prompt_tokens: int
) -> list[Finding]:
    """An evaluation that will not fit beside the model: keys and values of all answers that are generated at a time.

    Rows that are generated together take the cache of the longest of them.
    """
    available = hardware.memory
    number_bytes = _FLOAT if config.method == "full" else hardware.number_bytes  # as it is trained, between two steps
    tokens = config.evaluation.concurrency * (prompt_tokens + config.evaluation.max_new_tokens)
    cache = 2 * tokens * sizes.cache_values * number_bytes  # twice: a cache is copied while a row joins or leaves
    needed = cache + weights_bytes(config, sizes, number_bytes)
    if available is None or needed <= 0.8 * available:
        return []
    return [
        Finding(
            "evaluation_memory",
            "warning" if needed <= available else "error",
            f"评测时同时生成 {config.evaluation.concurrency} 个回答，提示词最长 {prompt_tokens} 个 token，"
            f"预计需要 {gigabytes(needed)}（缓存 {gigabytes(cache)}），可用 {gigabytes(available)}；"
            "请减小 evaluation.concurrency",
            f"evaluation generates {config.evaluation.concurrency} answers at a time to prompts of up to"
            f" {prompt_tokens} tokens: forecast {gigabytes(needed)} (cache {gigabytes(cache)}) of"
            f" {gigabytes(available)} available; lower evaluation.concurrency",
        )
    ]


def weights_bytes(config: ChatGlm3TrainingConfig, sizes: ModelSizes, number_bytes: int) -> int:
    """Of the model as it is loaded."""
    total = sizes.count()
    if config.method == "full":
        return total * _FLOAT
    if config.method == "lora":
        return total * number_bytes
    linear = sum(math.prod(shape) for shape in sizes.linear().values())
    return int(linear * _NF4_BITS / 8) + (total - linear) * number_bytes


def ways_out(config: ChatGlm3TrainingConfig, device: str) -> list[str]:
    """Settings that would need less memory than these, the mildest first."""
    on_gpu = device.startswith("cuda")
    found = ["micro_batch_tokens"] if config.forward_tokens > config.max_tokens else ["max_tokens"]
    if not config.gradient_checkpointing:
        found.append("gradient_checkpointing=true")
    if on_gpu and "8bit" not in chosen_optimizer(config.optimizer, device):
        found.append("optimizer=paged_adamw_8bit")
    if config.method == "full":
        found.append("method=lora")
    return found if config.method == "qlora" else [*found, "method=qlora"]


def memory_of(config: ChatGlm3TrainingConfig, sizes: ModelSizes, *, device: str, number_bytes: int) -> Forecast:
    """What a training will take.

    Activations of a layer, per token: its input, the normed input, query with keys and values, the attention's output,
    the sum, the normed sum, gate and up before and after their product: 6 vectors of the hidden size and 4 of the
    intermediate size; with gradient checkpointing one layer's, and the inputs of all. Logits are computed for labels
    alone, taken as a quarter of the positions, in float32 with their gradient. Where all weights are trained in 16 bits
    autocast keeps a 16-bit copy of them beside the float32 ones until the end of a forward pass.
    """
    copy = number_bytes if config.method == "full" and number_bytes < _FLOAT else 0
    trained = sizes.count() if config.method == "full" else sizes.adapter(config.lora.rank, config.lora.targets)
    layer = (6 * sizes.hidden + 4 * sizes.intermediate) * number_bytes
    inputs = sizes.layers * sizes.hidden * number_bytes
    per_token = inputs + layer if config.gradient_checkpointing else sizes.layers * layer
    logits = 2 * sizes.vocabulary * _FLOAT // 4
    moments = 2 if "8bit" in chosen_optimizer(config.optimizer, device) else 2 * _FLOAT
    return Forecast(
        weights=weights_bytes(config, sizes, number_bytes)
        + trained * (copy if config.method == "full" else _FLOAT)
        + (_widest(sizes) * number_bytes if config.method == "qlora" else 0),  # one matrix at a time, dequantised
        gradients=trained * _FLOAT,
        optimizer=trained * moments,
        activations=config.forward_tokens * (per_token + logits),
    )


def _widest(sizes: ModelSizes) -> int:
    return max((math.prod(shape) for shape in sizes.linear().values()), default=0)

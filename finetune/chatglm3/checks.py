"""What the doctor looks at before a ChatGLM3 training: labels, lengths, leaks, 4-bit sizes, memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chains.chatglm3.checkpoints import read_json
from chains.chatglm3.weights import native_shapes
from finetune.chatglm3.config import ChatGlm3TrainingConfig
from finetune.chatglm3.data import Example
from finetune.data.duplicates import text_key
from finetune.data.rows import GenerationRow
from finetune.doctor import Finding, check_labels, check_learning_rate, check_memory, check_steps
from finetune.memory import Forecast, available_memory, gigabytes

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


def examine(
    config: ChatGlm3TrainingConfig,
    examples: Sequence[Example],
    dev: Sequence[GenerationRow],
    sizes: ModelSizes,
    *,
    device: str,
    number_bytes: int,
    steps: int,
) -> list[Finding]:
    """Everything found about a run before it starts.

    Args:
        config: the settings.
        examples: what is trained on.
        dev: what it is judged on.
        sizes: of the model.
        device: "cpu" or "cuda...".
        number_bytes: of a frozen weight and of an activation: 2 or 4.
        steps: of the run.
    """
    labelled = sum(example.learned > 0 for example in examples)
    return [
        *check_labels(labelled, len(examples)),
        *check_lengths(examples, config.max_tokens),
        *check_leak([example.row for example in examples], dev),
        *check_steps(steps, rows=len(examples), batch_size=config.batch_size),
        *check_learning_rate(config.learning_rate, "full" if config.method == "full" else "lora"),
        *(check_four_bit_sizes(sizes) if config.method == "qlora" else ()),
        *check_memory(memory_of(config, sizes, number_bytes=number_bytes), available_memory(device)),
        *check_answer_memory(config, sizes, available_memory(device), number_bytes=number_bytes),
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
    """Questions of dev that stand in training together with their answer."""
    known = {(text_key(row.question), text_key(row.answer)) for row in train}
    leaked = [row for row in dev if not row.refuse and (text_key(row.question), text_key(row.answer)) in known]
    if not leaked:
        return []
    first = leaked[0]
    return [
        Finding(
            "dev_leak",
            "error" if len(leaked) > len(dev) // 20 else "warning",
            f"评测集的 {len(dev)} 行中有 {len(leaked)} 行也在训练数据里，例如 {first.file}:{first.line}；"
            "请按文档重新划分",
            f"{len(leaked)} of {len(dev)} dev rows are training rows, too, such as {first.file}:{first.line}; split by"
            " document",
        )
    ]


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


def check_answer_memory(
    config: ChatGlm3TrainingConfig, sizes: ModelSizes, available: int | None, *, number_bytes: int
) -> list[Finding]:
    """An evaluation that will not fit beside the model: keys and values of all answers that are generated at a time."""
    tokens = config.evaluation.concurrency * (config.max_tokens + config.evaluation.max_new_tokens)
    cache = 2 * tokens * sizes.cache_values * number_bytes  # twice: a cache is copied while a row joins or leaves
    needed = cache + weights_bytes(config, sizes, number_bytes)
    if available is None or needed <= 0.8 * available:
        return []
    return [
        Finding(
            "evaluation_memory",
            "warning" if needed <= available else "error",
            f"评测时同时生成 {config.evaluation.concurrency} 个回答，预计需要 {gigabytes(needed)}"
            f"（缓存 {gigabytes(cache)}），可用 {gigabytes(available)}；请减小 evaluation.concurrency",
            f"evaluation generates {config.evaluation.concurrency} answers at a time: forecast {gigabytes(needed)}"
            f" (cache {gigabytes(cache)}) of {gigabytes(available)} available; lower evaluation.concurrency",
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


def memory_of(config: ChatGlm3TrainingConfig, sizes: ModelSizes, *, number_bytes: int) -> Forecast:
    """What a training will take.

    Activations of a layer, per token: its input, the normed input, query with keys and values, the attention's output,
    the sum, the normed sum, gate and up before and after their product: 6 vectors of the hidden size and 4 of the
    intermediate size; with gradient checkpointing one layer's, and the inputs of all. Logits are computed for labels
    alone, taken as a quarter of the positions, in float32 with their gradient.
    """
    trained = sizes.count() if config.method == "full" else sizes.adapter(config.lora.rank, config.lora.targets)
    layer = (6 * sizes.hidden + 4 * sizes.intermediate) * number_bytes
    inputs = sizes.layers * sizes.hidden * number_bytes
    per_token = inputs + layer if config.gradient_checkpointing else sizes.layers * layer
    logits = 2 * sizes.vocabulary * _FLOAT // 4
    moments = 2 if "8bit" in config.optimizer else 2 * _FLOAT
    return Forecast(
        weights=weights_bytes(config, sizes, number_bytes)
        + (0 if config.method == "full" else trained * _FLOAT)
        + (_widest(sizes) * number_bytes if config.method == "qlora" else 0),  # one matrix at a time, dequantised
        gradients=trained * _FLOAT,
        optimizer=trained * moments,
        activations=config.forward_tokens * (per_token + logits),
    )


def _widest(sizes: ModelSizes) -> int:
    return max((math.prod(shape) for shape in sizes.linear().values()), default=0)

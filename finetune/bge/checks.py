"""What the doctor looks at before a BGE training: rows, negatives, lengths, vocabulary, leaks, memory."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chains.bge.directory import ModelDirectory
from chains.bge.tokenizer import BgeTokenizer
from finetune.bge.config import BgeTrainingConfig, RetrievalTrainingConfig
from finetune.bge.workers import Workers
from finetune.data.rows import RetrievalRow, same_text
from finetune.doctor import (
    Finding,
    check_learning_rate,
    check_memory,
    check_precision,
    check_steps,
    check_truncated,
    in_order,
)
from finetune.evaluation import RetrievalSet
from finetune.memory import Forecast, Plan, Shape, available_memory, forecast
from finetune.precision import Precision, device_kind

_SAMPLE = 1_000  # rows whose texts are tokenized to see their lengths and unknown tokens
_UNKNOWN_SHARE, _UNKNOWN_FAR_TOO_MANY = 0.01, 0.2
_LEAK_SHARE = 0.01  # above it a gain on dev means nothing


@dataclass(frozen=True)
class Hardware:
    """What a run has to work with."""

    device: str
    """"cpu" or "cuda:0" """
    has_bf16: bool
    memory: int | None
    """bytes that one process can have"""
    processes: int = 1

    @classmethod
    def of(cls, device: str, processes: int) -> Hardware:
        """What this process finds on its machine."""
        import torch

        free = available_memory(device, processes)
        if device.startswith("cuda"):
            return cls(device, torch.cuda.is_bf16_supported(including_emulation=False), free, processes)
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        return cls(device, has_bf16, free, processes)

    @property
    def kind(self) -> str:
        """ "cpu" or "cuda"."""
        return device_kind(self.device)

    def number_bytes(self, precision: Precision) -> int:
        """Of an activation in this precision: 2 or 4."""
        automatic = precision == "auto" and (self.kind == "cuda" or self.has_bf16)
        return 2 if automatic or precision in ("bf16", "fp16") else 4


@dataclass(frozen=True)
class Lengths:
    """Token counts of a sample of rows, [CLS] and [SEP] included; queries with the instruction before them."""

    queries: tuple[int, ...]
    passages: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[RetrievalRow], tokenizer: BgeTokenizer, instruction: str) -> Lengths:
        """The lengths of these rows' texts, each distinct text once."""
        queries = dict.fromkeys((instruction if row.prompt is None else row.prompt) + row.query for row in rows)
        passages = dict.fromkeys(text for row in rows for text in (*row.pos, *row.neg))
        return cls(_lengths(tokenizer, list(queries)), _lengths(tokenizer, list(passages)))


def examine(
    config: BgeTrainingConfig,
    rows: Sequence[RetrievalRow],
    dev: RetrievalSet | None,
    directory: ModelDirectory,
    hardware: Hardware,
    *,
    steps: int,
    parameters: Parameters,
) -> list[Finding]:
    """All findings about a run that has not begun, errors first.

    Args:
        config: the settings.
        rows: what it trains on.
        dev: what it is judged on.
        directory: of the base model.
        hardware: what it runs on.
        steps: optimizer steps it will take.
        parameters: how many weights the model has and how many are trained.
    """
    tokenizer = BgeTokenizer.from_directory(directory)
    sample = sampled(rows, config.seed)
    instruction = config.query_instruction if config.query_instruction is not None else directory.query_instruction
    lengths = Lengths.of(sample, tokenizer, instruction)
    plan = memory_forecast(config, directory, hardware, lengths, parameters)
    findings = [
        *check_steps(steps, rows=len(rows), batch_size=config.batch_size),
        *check_negatives(rows, config),
        *check_duplicates(rows),
        *(check_leak(rows, dev) if dev is not None else []),
        *check_prompts(rows, instruction),
        *check_lengths(lengths, config),
        *check_vocabulary(tokenizer, [row.query for row in sample] + [text for row in sample for text in row.pos]),
        *check_learning_rate(config.learning_rate, config.method),
        *check_precision(config.precision, device=hardware.kind, has_bf16=hardware.has_bf16),
        *check_memory(plan, hardware.memory, ways_out(config)),
        *check_processes(config, hardware.processes),
    ]
    return in_order(findings)


def sampled(rows: Sequence[RetrievalRow], seed: int) -> list[RetrievalRow]:
    """A thousand of the rows, in their order, the same for a seed; all of fewer."""
    if len(rows) <= _SAMPLE:
        return list(rows)
    numbers = sorted(random.Random(seed).sample(range(len(rows)), _SAMPLE))  # noqa: S311 a sample, no secret
    return [rows[number] for number in numbers]


# --- rows -------------------------------------------------------------------------------------------------------


def check_negatives(rows: Sequence[RetrievalRow], config: RetrievalTrainingConfig) -> list[Finding]:
    """Rows with nothing, or with too little, to tell the positive from."""
    group, batch = config.group_size, config.batch_size
    without = sum(not row.neg for row in rows)
    if group > 1 and without:
        return [
            Finding(
                "no_negatives",
                "error",
                f"{len(rows)} 行中有 {without} 行没有 neg，而 group_size={group}；"
                "请用 ragproj data mine 挖掘负例，或设 group_size=1",
                f"{without} of {len(rows)} rows have no neg while group_size={group}; mine negatives with"
                " `ragproj data mine`, or set group_size=1",
            )
        ]
    if group == 1 and batch == 1:
        return [
            Finding(
                "group_of_one",
                "error",
                "group_size=1 且 batch_size=1：没有任何负例，损失恒为 0；请增大其中之一",
                "group_size=1 and batch_size=1 leave no negative at all, the loss is 0; raise one of them",
            )
        ]
    if group == 1 and without < len(rows):
        return [
            Finding(
                "group_of_one",
                "note",
                f"group_size=1：{len(rows) - without} 行的 neg 不会被用到；group_size=4 左右可用上它们",
                f"group_size=1 leaves the neg of {len(rows) - without} rows unused; a group_size of about 4 uses them",
            )
        ]
    few = sum(0 < len(row.neg) < group - 1 for row in rows)
    if few:
        return [
            Finding(
                "few_negatives",
                "note",
                f"{few} 行的 neg 少于 {group - 1} 条，会重复使用；可减小 group_size",
                f"{few} rows have fewer than {group - 1} neg and repeat them; group_size can be lower",
            )
        ]
    return []


def check_duplicates(rows: Sequence[RetrievalRow]) -> list[Finding]:
    """Rows that say the same as another: the same query with the same positives."""
    distinct = len({(same_text(row.query), *map(same_text, row.pos)) for row in rows})
    if distinct == len(rows):
        return []
    repeated = len(rows) - distinct
    return [
        Finding(
            "duplicate_rows",
            "warning" if repeated > len(rows) // 20 else "note",
            f"{repeated} 行与其他行重复（查询和正例都相同），它们会被多学几遍；建议去重",
            f"{repeated} rows repeat another (same query, same positives) and are learnt more often; remove them",
        )
    ]


def check_leak(rows: Sequence[RetrievalRow], dev: RetrievalSet) -> list[Finding]:
    """Dev questions that are trained on: the same question, or a passage that answers it as a positive."""
    queries = {same_text(row.query) for row in rows}
    positives = {same_text(text) for row in rows for text in row.pos}
    learnt = {
        passage.id
        for passage in dev.passages
        if same_text(passage.text) in positives
        or same_text(passage.embedded) in positives  # with its title, or without
    }
    asked = [same_text(question) in queries for question in dev.questions]
    shown = [not learnt.isdisjoint(gold) for gold in dev.gold]
    leaked = sum(same or found for same, found in zip(asked, shown, strict=True))
    if not leaked:
        return []
    total = len(dev.questions)
    zh = f"dev 的 {total} 个问题中有 {leaked} 个出现在训练数据里（问题相同 {sum(asked)}，答案片段相同 {sum(shown)}）"
    en = f"{leaked} of {total} dev questions are in the training rows ({sum(asked)} questions, {sum(shown)} passages)"
    return [
        Finding(
            "dev_leak",
            "error" if leaked > _LEAK_SHARE * total else "warning",
            f"{zh}，评测会虚高；请按片段划分（ragproj data rows），或从训练数据中删除它们",
            f"{en}, so dev flatters; split by passage (`ragproj data rows`), or remove them from training",
        )
    ]


def check_prompts(rows: Sequence[RetrievalRow], instruction: str) -> list[Finding]:
    """Rows whose own prompt is trained and never served: whoever searches has the instruction of the directory alone.

    Args:
        rows: what is trained on.
        instruction: what will stand before every query in use.
    """
    odd = [row for row in rows if row.prompt is not None and row.prompt != instruction]
    if not odd:
        return []
    first = odd[0]
    return [
        Finding(
            "row_prompts",
            "warning",
            f"{len(rows)} 行中有 {len(odd)} 行的 prompt 不是模型的查询指令 {instruction!r}，"
            f"例如 {first.file}:{first.line} 的 {first.prompt!r}；检索时只用模型的指令，这样训练的查询用不上；"
            "请删除 prompt，或用 query_instruction 设成同样的文字",
            f"{len(odd)} of {len(rows)} rows have a prompt other than the query instruction {instruction!r}, such as"
            f" {first.prompt!r} in {first.file}:{first.line}; what serves has that instruction alone, so queries are"
            " trained as they are never asked; remove prompt, or set query_instruction to the same text",
        )
    ]


# --- texts ------------------------------------------------------------------------------------------------------


def check_lengths(lengths: Lengths, config: BgeTrainingConfig) -> list[Finding]:
    """Texts that lose their end, where they are more than a few."""
    return [
        *check_truncated(lengths.queries, config.query_max_tokens, key="query_max_tokens", zh="查询", en="queries"),
        *check_truncated(
            lengths.passages, config.passage_max_tokens, key="passage_max_tokens", zh="片段", en="passages"
        ),
    ]


def check_vocabulary(tokenizer: BgeTokenizer, texts: Sequence[str]) -> list[Finding]:
    """Tokens that the model cannot tell from one another."""
    share = tokenizer.unknown_share(texts)
    if share <= _UNKNOWN_SHARE:
        return []
    return [
        Finding(
            "unknown_tokens",
            "error" if share > _UNKNOWN_FAR_TOO_MANY else "warning",
            f"{100 * share:.1f} % 的 token 不在词表中（[UNK]）；请检查文本的语言和编码，或换用其他模型",
            f"{100 * share:.1f} % of the tokens are not in the vocabulary ([UNK]); check the language and encoding of"
            " the texts, or take another model",
        )
    ]


def check_processes(config: BgeTrainingConfig, processes: int) -> list[Finding]:
    """Negatives asked of other processes, where there are none."""
    if processes > 1 or "cross_device_negatives" not in config.model_fields_set or not config.cross_device_negatives:
        return []
    return [
        Finding(
            "single_process",
            "note",
            "cross_device_negatives=true 但只有一个进程，没有作用；多进程请用 torchrun 启动",
            "cross_device_negatives=true has no effect in a single process; start several with torchrun",
        )
    ]


# --- memory -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """How many weights a model has."""

    total: int
    trained: int

    @classmethod
    def of(cls, config: BgeTrainingConfig, directory: ModelDirectory) -> Parameters:
        """Counted from the model's configuration, without loading it; LoRA's by the layers it is put on."""
        import torch
        from transformers import AutoConfig, AutoModel

        with torch.device("meta"):
            model: Any = AutoModel.from_config(AutoConfig.from_pretrained(str(directory.path)), add_pooling_layer=False)
        total = sum(parameter.numel() for parameter in model.parameters())
        if config.method == "full":
            return cls(total, total)
        adapted = [
            config.lora.rank * (module.in_features + module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and any(_ends_with(name, target) for target in config.lora.targets)
        ]
        return cls(total + sum(adapted), sum(adapted))


def ways_out(config: BgeTrainingConfig) -> list[str]:
    """Settings that would need less memory than these, the mildest first."""
    found = ["micro_batch_tokens", "graph_tokens"]
    if not config.gradient_checkpointing:
        found.append("gradient_checkpointing=true")
    return found if config.method == "lora" else [*found, "method=lora"]


def memory_forecast(
    config: BgeTrainingConfig,
    directory: ModelDirectory,
    hardware: Hardware,
    lengths: Lengths,
    parameters: Parameters,
) -> Forecast:
    """What one process will take: the graph of a whole step where it is small, else of one micro-batch."""
    from transformers import AutoConfig

    sizes: Any = AutoConfig.from_pretrained(str(directory.path))
    rows = max(1, config.batch_size // hardware.processes)
    query = typical(lengths.queries, config.query_max_tokens)
    passage = typical(lengths.passages, config.passage_max_tokens)
    workers = 1 if config.gradient_checkpointing else Workers.fitting(hardware.device)
    at_once = config.least_graph_tokens(hardware.device) + workers * config.tokens_at_once(hardware.device)
    dropout = sizes.attention_probs_dropout_prob if config.dropout is None else config.dropout
    texts = config.batch_size * (1 + config.group_size)
    plan = Plan(
        trainable=parameters.trained,
        tokens=min(rows * (query + config.group_size * passage), at_once),
        workers=workers,
        length=passage,
        activation_bytes=hardware.number_bytes(config.precision),
        checkpointing=config.gradient_checkpointing,
        attention_scores=hardware.kind == "cpu" and dropout > 0,
        vectors=3 * (texts * directory.dimensions + config.batch_size * config.batch_size * config.group_size),
    )
    heads, hidden = sizes.num_attention_heads, sizes.hidden_size
    shape = Shape(parameters.total, sizes.num_hidden_layers, hidden, sizes.intermediate_size, heads)
    return forecast(shape, plan)


def typical(counts: Sequence[int], limit: int) -> int:
    """Mean length after cutting, tokens; the limit where nothing is known."""
    return round(sum(min(count, limit) for count in counts) / len(counts)) if counts else limit


def _lengths(tokenizer: BgeTokenizer, texts: Sequence[str]) -> tuple[int, ...]:
    return tuple(map(len, tokenizer.encode_whole(texts)))


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")

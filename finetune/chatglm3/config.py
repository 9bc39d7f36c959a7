"""ChatGlm3TrainingConfig: everything a training of ChatGLM3 can be told, read from a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from chains.chatglm3.options import DType
from chains.prompts import Language
from finetune.doctor import DoctorConfig
from finetune.gate import GateConfig
from loaders.config import Config, apply_overrides, read_yaml

Method = Literal["qlora", "lora", "full"]
Batching = Literal["packed", "grouped"]
OptimizerName = Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"]
GenerationMetric = Literal["exact_match", "char_f1", "rouge_l"]


class AdapterSettings(Config):
    """Size of the adapter, with `method: qlora` or `lora`."""

    rank: int = Field(default=16, ge=1, description="of the two factors; more learns more and forgets more")
    alpha: float = Field(default=32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="on the adapter's input")
    targets: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
        min_length=1,
        description="linear layers that get an adapter; PEFT has no default for this model",
    )


class GenerationEvaluationConfig(Config):
    """What a generator is judged on, before, during and after its training."""

    dev: list[Path] = Field(
        default_factory=list, description="generation rows that a run must gain on; of other documents than training's"
    )
    extra: dict[str, list[Path]] = Field(
        default_factory=dict, description="further rows by name, on which forgetting shows"
    )
    metric: GenerationMetric = Field(default="char_f1", description="what the best checkpoint and the gate go by")
    every_steps: int | None = Field(
        default=None, ge=1, description="optimizer steps between evaluations; null: ten in the whole run"
    )
    patience: int | None = Field(
        default=None, ge=1, description="evaluations without a new best before the run stops; null: never stops early"
    )
    max_rows: int = Field(default=500, ge=1, description="rows of a set before and after; answering takes time")
    interval_rows: int = Field(default=50, ge=1, description="rows of dev while training")
    max_new_tokens: int = Field(default=256, ge=1, description="tokens of an answer, at most")
    concurrency: int = Field(default=8, ge=1, description="answers generated at a time")
    seed: int = Field(default=0, description="of what is sampled for an evaluation")

    @property
    def fused(self) -> bool:
        """Lexical search has no part in answers."""
        return False


class ChatGlm3TrainingConfig(Config):
    """A training run of ChatGLM3."""

    model: str = Field(min_length=1, description="directory or model id that training starts from")
    output: Path = Field(description="directory of the run: candidate, checkpoints, report")
    train: list[Path] = Field(min_length=1, description="JSONL files of question, references, answer")
    language: Language = Field(default="zh", description="of the prompt, as it will serve")
    method: Method = Field(default="qlora", description="adapter over 4-bit or 16-bit weights, or all weights")
    lora: AdapterSettings = AdapterSettings()

    epochs: float = Field(default=2.0, gt=0, description="times every row is seen")
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps instead of epochs")
    batch_size: int = Field(default=16, ge=1, description="rows per optimizer step, over all processes together")
    learning_rate: float = Field(default=2e-4, gt=0, description="highest, at the end of the warm-up")
    warmup_share: float = Field(default=0.03, ge=0, lt=1, description="share of the steps that the rate rises in")
    weight_decay: float = Field(default=0.0, ge=0, description="of matrices; biases and norms have none")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="gradients are scaled down to it; null: never")
    seed: int = Field(default=42, ge=0, description="of order, adapter and dropout")
    optimizer: OptimizerName = Field(
        default="auto", description="auto: paged 8-bit AdamW on a GPU, plain AdamW on a CPU; 8-bit saves memory"
    )

    max_tokens: int = Field(default=2048, ge=16, description="of prompt and answer; a longer row loses references")
    batching: Batching = Field(
        default="packed", description="rows end to end without padding, or padded batches of like lengths"
    )
    micro_batch_tokens: int | None = Field(
        default=None, ge=16, description="positions in one forward pass; null: max_tokens; more is faster on a GPU"
    )
    gradient_checkpointing: bool = Field(default=True, description="recompute layers: a third slower, far less memory")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1 ...")
    dtype: DType = Field(default="auto", description="of frozen weights and of the computation")

    checkpoint_steps: int | None = Field(
        default=None, ge=1, description="steps between resumable checkpoints; null: ten in the whole run"
    )
    log_steps: int = Field(default=10, ge=1, description="steps between log lines")
    evaluation: GenerationEvaluationConfig = GenerationEvaluationConfig()
    gate: GateConfig = GateConfig()
    doctor: DoctorConfig = DoctorConfig()

    @property
    def forward_tokens(self) -> int:
        """Positions in one forward pass."""
        return self.micro_batch_tokens or self.max_tokens

    @model_validator(mode="after")
    def _rows_fit_a_forward_pass(self) -> ChatGlm3TrainingConfig:
        if self.forward_tokens < self.max_tokens:
            raise ValueError(
                f"micro_batch_tokens {self.forward_tokens} is below max_tokens {self.max_tokens}: a row may be longer"
                f" than a batch; raise it or lower max_tokens / micro_batch_tokens 小于 max_tokens，请调大"
            )
        return self


def load_chatglm3_training_config(path: Path | None, overrides: Sequence[str] = ()) -> ChatGlm3TrainingConfig:
    """The config of a YAML file with `key=value` overrides laid over it.

    Raises:
        ConfigError: lists every problem.
    """
    data = {} if path is None else read_yaml(path)
    where = "command line" if path is None else str(path)
    return ChatGlm3TrainingConfig.from_dict(apply_overrides(data, overrides), where=where)

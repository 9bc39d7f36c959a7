"""ChatGlm3TrainingConfig: everything a training of ChatGLM3 can be told, read from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from chains.chatglm3.options import DType
from chains.prompts import Language
from finetune.lora import LoraSettings, Targets
from finetune.training_config import Epochs, JudgingConfig, LearningRate, TrainingConfig, WarmupShare, WeightDecay

Method = Literal["qlora", "lora", "full"]
Batching = Literal["packed", "grouped"]
OptimizerName = Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"]
GenerationMetric = Literal["exact_match", "char_f1", "rouge_l"]


class ChatGlm3Lora(LoraSettings):
    """Size and place of the adapter, with `method: qlora` or `lora`."""

    targets: Targets = Field(default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"])


class GenerationEvaluationConfig(JudgingConfig):
    """What a generator is judged on, before, during and after its training."""

    choosing: ClassVar[frozenset[str]] = JudgingConfig.choosing | {"interval_rows", "max_new_tokens"}

    metric: GenerationMetric = Field(default="char_f1", description="what the best checkpoint and the gate go by")
    dev: list[Path] = Field(
        default_factory=list, description="generation rows that a run must gain on; of other documents than training's"
    )
    extra: dict[str, list[Path]] = Field(
        default_factory=dict, description="further rows by name, on which forgetting shows"
    )
    max_rows: int = Field(default=500, ge=1, description="rows of a set before and after; answering takes time")
    interval_rows: int = Field(default=50, ge=1, description="rows of dev while training")
    max_new_tokens: int = Field(default=256, ge=1, description="tokens of an answer, at most")
    concurrency: int = Field(default=8, ge=1, description="answers generated at a time")


class ChatGlm3TrainingConfig(TrainingConfig):
    """A training run of ChatGLM3."""

    free: ClassVar[frozenset[str]] = TrainingConfig.free | {"gradient_checkpointing"}

    language: Language = Field(default="zh", description="of the prompt, as it will serve")
    method: Method = Field(default="qlora", description="adapter over 4-bit or 16-bit weights, or all weights")
    lora: ChatGlm3Lora = ChatGlm3Lora()

    epochs: Epochs = 2.0
    learning_rate: LearningRate = 2e-4
    warmup_share: WarmupShare = 0.03
    weight_decay: WeightDecay = 0.0
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
    dtype: DType = Field(default="auto", description="of frozen weights and of the computation")
    evaluation: GenerationEvaluationConfig = GenerationEvaluationConfig()

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

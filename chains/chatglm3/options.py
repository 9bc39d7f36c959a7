"""What can be set of a model that runs in this process: the fields its config section and its LangChain class share."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

Quantization = Literal["none", "nf4", "int8"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


class LocalModelOptions(BaseModel):
    """Which model, how it is loaded, and how it generates."""

    model: str = Field(min_length=1, description="directory of the model, or its id on the hub")
    adapter: str | None = Field(default=None, description="directory of a LoRA adapter")
    quantization: Quantization = Field(default="none", description="4-bit (nf4) or 8-bit weights, by bitsandbytes")
    device: str = Field(default="auto", description="auto: the GPU where there is one; cpu, cuda:0 ...")
    dtype: DType = Field(default="auto", description="of the weights; auto: what the device computes fast")
    temperature: float = Field(default=0.1, ge=0, le=2, description="0: always the likeliest token")
    top_p: float = Field(default=0.8, gt=0, le=1, description="of the likeliest tokens that reach this together")
    top_k: int = Field(default=0, ge=0, description="of so many likeliest tokens; 0: no limit")
    repetition_penalty: float = Field(default=1.0, gt=0, description="above 1: tokens said before are less likely")
    max_new_tokens: int = Field(default=1024, ge=1, description="tokens of an answer, at most")
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="the same seed gives the same answer")
    stop: list[str] = Field(default_factory=list, description="texts that end an answer; not part of it")
    max_rows: int = Field(default=16, ge=1, description="answers generated at a time; further ones wait their turn")

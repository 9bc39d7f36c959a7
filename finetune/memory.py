"""How much memory a training of a transformer will take, by arithmetic, and how much there is."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn

_FLOAT = 4  # bytes of a float32, which weights, gradients and AdamW's moments are kept in
# Python with torch, transformers and their buffers, before any model: measured at 0.4 to 0.6 GB on Linux.
_PROCESS = 500_000_000
_GIVEN_AWAY = 0.8  # of a GPU's free memory, to graphs


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer that decide its memory."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int


@dataclass(frozen=True)
class Plan:
    """How it will be trained."""

    trainable: int
    """parameters that get gradients"""
    tokens: int
    """positions whose activations are held at once, padding included"""
    length: int
    """of the longest sequence among them, in tokens"""
    activation_bytes: int = _FLOAT
    """of one activation: 4 in fp32, 2 under bf16 or fp16 autocast"""
    checkpointing: bool = False
    """layers are recomputed in the backward pass"""
    attention_scores: bool = False
    """attention probabilities are kept, as torch's plain attention does: on a CPU with dropout"""
    workers: int = 1
    """threads with gradients of their own"""
    vectors: int = 0
    """floats of the batch's vectors and of its similarity matrix"""


@dataclass(frozen=True)
class Forecast:
    """Bytes of one process."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    process: int = _PROCESS

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.process

    @property
    def zh(self) -> str:
        """The parts, in Chinese."""
        return (
            f"权重 {gigabytes(self.weights)}，梯度 {gigabytes(self.gradients)}，优化器 {gigabytes(self.optimizer)}，"
            f"激活 {gigabytes(self.activations)}"
        )

    @property
    def en(self) -> str:
        """The parts, in English."""
        return (
            f"weights {gigabytes(self.weights)}, gradients {gigabytes(self.gradients)}, optimizer"
            f" {gigabytes(self.optimizer)}, activations {gigabytes(self.activations)}"
        )


def forecast(shape: Shape, plan: Plan) -> Forecast:
    """What a training will take: AdamW over float32 weights, activations of the graph that is alive at once."""
    copies = 1 if plan.activation_bytes == _FLOAT else 1 + plan.activation_bytes / _FLOAT  # autocast's 16-bit weights
    return Forecast(
        weights=int(shape.parameters * _FLOAT * copies),
        gradients=plan.trainable * _FLOAT * plan.workers,
        optimizer=2 * plan.trainable * _FLOAT,
        activations=activations(shape, plan) + plan.vectors * _FLOAT,
    )


def activations(shape: Shape, plan: Plan) -> int:
    """Bytes that a forward pass keeps for its backward pass.

    Counted over what each operation of a BERT layer saves, per token: the layer's input, query, key, value, the
    attention's output, the sum that the first norm sees, its output, the feed-forward before and after its
    activation, and the sum that the second norm sees: 7 vectors of the hidden size and 2 of the intermediate size; two
    dropout masks of a byte each. (Korthikanti et al. 2022, section 4, count the same for another layout.)
    """
    layer = (7 * shape.hidden + 2 * shape.intermediate) * plan.activation_bytes + 2 * shape.hidden
    if plan.attention_scores:
        layer += shape.heads * plan.length * (2 * plan.activation_bytes + 1)
    embeddings = 3 * shape.hidden * _FLOAT
    if plan.checkpointing:
        per_token = embeddings + shape.layers * shape.hidden * plan.activation_bytes + layer
    else:
        per_token = embeddings + shape.layers * layer
    return plan.tokens * per_token


def graph_tokens_that_fit(model: nn.Module, device: str, *, checkpointing: bool = False) -> int:
    """Positions whose graph a GPU can hold beside all else of a training of a BERT; call it with the model in place.

    Every activation is counted with four bytes: autocast keeps what goes through a norm in float32. What is left out
    of account (the vectors, the casts, the pieces between freed blocks) has the share that is not given away.
    """
    free = available_memory(device)
    sizes = cast("Any", model).config
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    shape = Shape(0, sizes.num_hidden_layers, sizes.hidden_size, sizes.intermediate_size, sizes.num_attention_heads)
    a_token = activations(shape, Plan(trained, tokens=1, length=1, checkpointing=checkpointing))
    to_come = trained * _FLOAT * (3 + 1)  # gradients, two moments, autocast's casts
    return max(0, int(_GIVEN_AWAY * ((free or 0) - to_come) / a_token))


def available_memory(device: str, processes: int = 1) -> int | None:
    """Bytes that this process can still have on a device ("cpu" or "cuda..."); None where it cannot be known.

    On a CPU the least of the machine's available memory, the control group's limit and the process's own. Processes
    that train together share the machine's; each has a GPU of its own.
    """
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    limits = [*_machine(Path("/proc/meminfo")), *_control_group(Path("/sys/fs/cgroup"))]
    limits = [limit // processes for limit in limits]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    return min(limits, default=None)


def _machine(meminfo: Path) -> list[int]:
    if not meminfo.is_file():
        return []
    lines = meminfo.read_text(encoding="utf-8").splitlines()
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]


def _control_group(folder: Path) -> list[int]:
    """What version 2 of control groups leaves, seen from inside a container."""
    limit, used = folder / "memory.max", folder / "memory.current"
    if not limit.is_file() or not used.is_file():
        return []
    most = limit.read_text(encoding="utf-8").strip()
    return [] if most == "max" else [max(0, int(most) - int(used.read_text(encoding="utf-8")))]


def gigabytes(size: float) -> str:
    """A size as a reader takes it in: 1.5 GB, 30 MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"

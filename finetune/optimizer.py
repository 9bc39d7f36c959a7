"""AdamW over the parameters that are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.training_config import TrainingConfig

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def adamw(model: nn.Module, config: TrainingConfig, *, embedding_rate: float = 1.0) -> Optimizer:
    """torch's AdamW with the rate and the weight decay of a config."""
    import torch

    groups = decay_groups(model, config.weight_decay, embedding_rate=embedding_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def decay_groups(model: nn.Module, weight_decay: float, *, embedding_rate: float = 1.0) -> list[dict[str, Any]]:
    """Trained parameters as optimizer groups: matrices decay, vectors (biases, norms) do not.

    `rate` of a group is what its learning rate is multiplied by: `embedding_rate` for a BERT's embeddings, else 1.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = embedding_rate if "embeddings." in name else 1.0
            decay = weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": parameters, "rate": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]

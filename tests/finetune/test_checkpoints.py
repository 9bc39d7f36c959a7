"""What a checkpoint keeps of an optimizer, and how directories take their names."""

from __future__ import annotations

from pathlib import Path

from finetune.checkpoints import Checkpoints, State


def test_a_checkpoint_keeps_the_plain_numbers_of_an_optimizer(tmp_path: Path) -> None:
    """bitsandbytes' 8-bit optimizers count steps in an int and keep moments in bytes."""
    import torch

    layer = torch.nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.state[layer.weight] = {"step": 7, "state1": torch.tensor([[1, 2], [3, 255]], dtype=torch.uint8)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(State(7, {}, {}, {}, ()), layer, optimizer, best_step=None)
    fresh = torch.optim.SGD(layer.parameters(), lr=0.1)
    checkpoint = checkpoints.newest({})
    assert checkpoint is not None
    checkpoints.load(checkpoint, layer, fresh)
    state = fresh.state[layer.weight]
    assert state["step"] == 7
    assert type(state["step"]) is int
    assert state["state1"].tolist() == [[1, 2], [3, 255]]

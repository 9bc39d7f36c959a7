"""Device and numbers of a training."""

from __future__ import annotations

import pytest
import torch

from finetune.precision import PrecisionError, choose_device, choose_numbers


def test_float16_needs_a_gpu() -> None:
    with pytest.raises(PrecisionError, match="precision=auto"):
        choose_numbers("fp16", "cpu")


def test_each_precision_has_its_type() -> None:
    assert choose_numbers("fp32", "cpu").dtype is None
    assert choose_numbers("bf16", "cpu").dtype is torch.bfloat16
    assert choose_numbers("fp16", "cuda:0").scaled
    assert not choose_numbers("bf16", "cuda:0").scaled


def test_bfloat16_is_automatic_only_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert choose_numbers("auto", "cpu").dtype is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert choose_numbers("auto", "cpu").dtype is torch.bfloat16


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(PrecisionError):
        choose_device("cuda")

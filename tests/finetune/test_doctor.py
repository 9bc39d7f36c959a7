"""Findings that hold for any training, before it and during it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from finetune.doctor import (
    NAMES,
    DoctorConfig,
    DoctorError,
    Finding,
    Monitor,
    check_labels,
    check_learning_rate,
    check_memory,
    check_precision,
    check_steps,
    settle,
)
from finetune.memory import Forecast
from loaders.errors import ConfigError

ERROR = Finding("dev_leak", "error", "泄漏", "leak")
WARNING = Finding("truncated", "warning", "截断", "cut")


def severities(findings: list[Finding]) -> list[str]:
    return [finding.severity for finding in findings]


def test_an_error_stops_the_run_and_says_how_to_let_it_pass() -> None:
    with pytest.raises(DoctorError, match=r"\[dev_leak\] 泄漏.*doctor\.ignore=\[dev_leak\]"):
        settle([WARNING, ERROR], DoctorConfig())


def test_an_ignored_error_is_kept_as_a_warning() -> None:
    kept = settle([WARNING, ERROR], DoctorConfig(ignore=["dev_leak"]))
    assert [(finding.name, finding.severity) for finding in kept] == [("truncated", "warning"), ("dev_leak", "warning")]


def test_a_name_that_is_no_finding_cannot_be_ignored() -> None:
    with pytest.raises(ConfigError, match="dev_leak"):
        DoctorConfig.from_dict({"ignore": ["dev_leek"]}, where="test")


@pytest.mark.parametrize(
    ("rate", "method", "expected"),
    [
        (2e-5, "full", []),
        (2e-4, "lora", []),
        (2e-4, "full", ["warning"]),
        (1e-7, "full", ["warning"]),
        (1e-2, "full", ["error"]),
        (2e-6, "lora", ["warning"]),
        (1e-3, "lora", ["warning"]),
        (1e-1, "lora", ["error"]),
    ],
)
def test_learning_rates_far_from_what_is_used_are_found(rate: float, method: str, expected: list[str]) -> None:
    assert severities(check_learning_rate(rate, method)) == expected


@pytest.mark.parametrize(
    ("precision", "device", "has_bf16", "expected"),
    [
        ("fp16", "cpu", True, ["error"]),
        ("fp16", "cuda", False, []),
        ("bf16", "cuda", False, ["error"]),
        ("bf16", "cpu", False, ["warning"]),
        ("bf16", "cuda", True, []),
        ("auto", "cpu", False, []),
        ("fp32", "cuda", False, []),
    ],
)
def test_a_precision_the_hardware_lacks_is_found(
    precision: str, device: str, has_bf16: bool, expected: list[str]
) -> None:
    assert severities(check_precision(precision, device=device, has_bf16=has_bf16)) == expected


def test_a_run_without_a_step_is_an_error_and_a_short_one_a_warning() -> None:
    assert severities(check_steps(0, rows=3, batch_size=8)) == ["error"]
    assert severities(check_steps(9, rows=72, batch_size=8)) == ["warning"]
    assert check_steps(10, rows=80, batch_size=8) == []


def test_a_forecast_above_what_is_there_is_an_error_with_its_parts() -> None:
    forecast = Forecast(weights=2 * 10**9, gradients=10**9, optimizer=10**9, activations=5 * 10**8)  # 5 GB in all
    ways_out = ["max_tokens", "method=qlora"]
    assert check_memory(forecast, 10 * 10**9, ways_out) == []
    assert severities(check_memory(forecast, 55 * 10**8, ways_out)) == ["warning"]
    (finding,) = check_memory(forecast, 4 * 10**9, ways_out)
    assert finding.severity == "error"
    assert "5.0 GB" in finding.zh
    assert "优化器 1.0 GB" in finding.zh
    assert "4.0 GB" in finding.zh
    assert "max_tokens、method=qlora" in finding.zh
    assert "lower or set max_tokens, method=qlora" in finding.en
    assert check_memory(forecast, None, ways_out) == []


def test_rows_without_a_label_are_counted() -> None:
    assert check_labels(10, 10) == []
    assert severities(check_labels(9, 10)) == ["warning"]
    assert severities(check_labels(0, 10)) == ["error"]


# --- during


def names(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_an_error_at_once(loss: float) -> None:
    monitor = Monitor()
    assert monitor.observe(step=1, loss=1.0, gradient_norm=1.0) == []
    (finding,) = monitor.observe(step=2, loss=loss)
    assert (finding.name, finding.severity) == ("not_a_number", "error")
    assert "第 2 步" in finding.zh


def test_a_gradient_that_is_no_number_is_found_too() -> None:
    assert names(Monitor().observe(step=1, loss=1.0, gradient_norm=math.inf)) == ["not_a_number"]


def test_a_loss_of_zero_from_the_start_is_found_but_not_one_that_fell_to_zero() -> None:
    monitor = Monitor()
    assert [names(monitor.observe(step=step, loss=0.0, gradient_norm=0.0)) for step in (1, 2, 3, 4)] == [
        [],
        [],
        ["zero_loss"],
        [],
    ]
    fell = Monitor()
    for step, loss in enumerate([0.5, 0.0, 0.0, 0.0, 0.0], 1):
        assert fell.observe(step=step, loss=loss, gradient_norm=0.1) == []


def test_twelve_overflows_in_a_row_are_an_error_and_single_ones_are_none() -> None:
    monitor = Monitor()
    for step in range(1, 12):
        assert monitor.observe(step=step, loss=1.0, gradient_norm=math.inf, overflowed=True) == []
    assert names(monitor.observe(step=12, loss=1.0, gradient_norm=math.inf, overflowed=True)) == ["overflow"]
    now_and_then = Monitor()
    for step in range(1, 60):
        assert now_and_then.observe(step=step, loss=1.0 / step, gradient_norm=1.0, overflowed=step % 10 == 0) == []


def test_a_gradient_that_stays_zero_is_found() -> None:
    monitor = Monitor()
    for step in (1, 2):
        assert monitor.observe(step=step, loss=1.0, gradient_norm=0.0) == []
    assert names(monitor.observe(step=3, loss=1.0, gradient_norm=0.0)) == ["no_gradient"]


def test_a_loss_that_does_not_fall_is_named_once_and_one_that_falls_never() -> None:
    monitor, falling = Monitor(), Monitor()
    found = [name for step in range(1, 700) for name in names(monitor.observe(step=step, loss=2.0))]
    assert found == ["flat_loss"]
    assert not [name for step in range(1, 700) for name in names(falling.observe(step=step, loss=2.0 - step / 700))]
    assert names(monitor.findings) == ["flat_loss"]


def test_a_monitor_goes_on_from_its_state_as_if_it_had_not_stopped() -> None:
    whole, broken = Monitor(), Monitor()
    for step in range(1, 350):
        for monitor in (whole, broken):
            monitor.observe(step=step, loss=2.0, gradient_norm=1e-12 if step == 349 else 1.0)
    state = json.loads(json.dumps(broken.state()))
    resumed = Monitor()
    resumed.restore(state)
    for step in range(350, 600):
        expected = whole.observe(step=step, loss=2.0, gradient_norm=0.0)
        assert resumed.observe(step=step, loss=2.0, gradient_norm=0.0) == expected
    assert names(whole.findings) == ["no_gradient", "flat_loss"]  # three steps from 349 on, and at step 400
    assert resumed.findings == whole.findings


def test_the_manual_names_every_finding_of_a_bge_training_with_its_way_out() -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "training_bge.md").read_text(encoding="utf-8")
    listed = {name for name in re.findall(r"^\| (\w+) \| .+? \| .+? \|$", page, re.MULTILINE) if name in NAMES}
    code = [root / "finetune" / "doctor.py", root / "finetune" / "bge" / "checks.py"]
    found = re.findall(r'Finding\(\s*"(\w+)"', "".join(path.read_text(encoding="utf-8") for path in code))
    assert len(found) > 15
    assert set(found) <= listed

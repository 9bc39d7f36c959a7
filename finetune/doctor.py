"""Doctor: names what is wrong with a training run, before it starts and while it goes on, and says the way out.

A finding that is an error stops the run, unless the configuration ignores it by name; the others are shown and kept in
the run's report. What belongs to one kind of training alone stands with it (`finetune.bge.checks`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import Field

from finetune.memory import Forecast, gigabytes
from loaders.config import Config
from loaders.errors import RagProjError

Severity = Literal["error", "warning", "note"]
Name = Literal[
    "no_negatives",
    "group_of_one",
    "few_negatives",
    "duplicate_rows",
    "dev_leak",
    "truncated",
    "unknown_tokens",
    "learning_rate",
    "precision",
    "memory",
    "few_steps",
    "single_process",
    "not_a_number",
    "zero_loss",
    "overflow",
    "flat_loss",
    "no_gradient",
    "no_labels",
    "four_bit_sizes",
    "evaluation_memory",
    "unanswered",
    "row_prompts",
]
NAMES: tuple[str, ...] = get_args(Name)

# Highest rates that trainings of BERT-sized encoders and of LoRA adapters report: BERT's and BGE's recipes stand at
# 1e-5 to 5e-5, LoRA's (Hu et al. 2021) at 1e-4 to 5e-4. From random weights BERT was trained at 1e-4 and small models
# at up to 1e-3. (least, most, above this it diverges)
_RATES = {"full": (1e-6, 1e-4, 2e-3), "lora": (1e-5, 5e-4, 5e-3)}

_CUT_SHARE = 0.05  # of texts that may lose their end unnoticed
_ZERO = 1e-9
_FIRST_STEPS = 3  # a loss of zero in all of these was zero from the start
_OVERFLOWS = 12  # in a row: the scale has then fallen from 65,536 to 16 and the next step will not do either
_FLAT_STEPS = 200  # losses averaged at the start and at the end, to see whether it falls
_FLAT_SHARE = 0.995


class DoctorConfig(Config):
    """What the doctor is told to let pass."""

    ignore: list[Name] = Field(default_factory=list, description="names of findings that shall not stop the run")


@dataclass(frozen=True)
class Finding:
    """Something about a run that its owner should know."""

    name: Name
    severity: Severity
    zh: str
    en: str

    def __str__(self) -> str:
        """One line, Chinese first."""
        return f"[{self.name}] {self.zh} / {self.en}"

    def as_dict(self) -> dict[str, str]:
        """For a report."""
        return {"name": self.name, "severity": self.severity, "zh": self.zh, "en": self.en}


class DoctorError(RagProjError):
    """Findings that stop a run."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        names = ", ".join(finding.name for finding in findings)
        zh = "；".join(f"[{finding.name}] {finding.zh}" for finding in findings)
        en = "; ".join(f"[{finding.name}] {finding.en}" for finding in findings)
        super().__init__(
            f"训练检查发现 {len(findings)} 个问题：{zh}。确认无妨时可设 doctor.ignore=[{names}]",
            f"{len(findings)} finding(s) stop the training: {en}. If you know better, set doctor.ignore=[{names}]",
        )
        self.findings = tuple(findings)


def settle(findings: Iterable[Finding], config: DoctorConfig) -> list[Finding]:
    """The findings to show and keep; errors that are ignored by name become warnings.

    Raises:
        DoctorError: an error is left.
    """
    kept = [
        Finding(finding.name, "warning", finding.zh, finding.en)
        if finding.severity == "error" and finding.name in config.ignore
        else finding
        for finding in findings
    ]
    errors = [finding for finding in kept if finding.severity == "error"]
    if errors:
        raise DoctorError(errors)
    return kept


# --- before any training ----------------------------------------------------------------------------------------


def check_learning_rate(rate: float, method: str) -> list[Finding]:
    """A rate that is far from what such trainings use.

    Args:
        rate: the highest of the schedule.
        method: "full" or "lora".
    """
    least, most, diverges = _RATES[method]
    if least <= rate <= most:
        return []
    usual_zh, usual_en = f"{method} 训练常用 {least:g} 到 {most:g}", f"{method} training uses {least:g} to {most:g}"
    if rate > diverges:
        zh, en = f"过高，几乎必然发散；{usual_zh}", f"diverges almost certainly; {usual_en}"
        return [Finding("learning_rate", "error", f"学习率 {rate:g} {zh}", f"a learning rate of {rate:g} {en}")]
    if rate > most:
        zh, en = f"偏高，只适合从随机权重开始；{usual_zh}", f"suits only a start from random weights; {usual_en}"
    else:
        zh, en = f"过低，模型几乎不会变化；{usual_zh}", f"hardly changes the model; {usual_en}"
    return [Finding("learning_rate", "warning", f"学习率 {rate:g} {zh}", f"a learning rate of {rate:g} {en}")]


def check_precision(precision: str, *, device: str, has_bf16: bool) -> list[Finding]:
    """A precision that the hardware does not have.

    Args:
        precision: "auto", "fp32", "bf16" or "fp16".
        device: "cpu" or "cuda".
        has_bf16: whether the hardware computes in bf16.
    """
    if precision == "fp16" and device == "cpu":
        return [
            Finding(
                "precision",
                "error",
                "CPU 不支持 fp16 训练；请设 precision=auto 或 fp32",
                "fp16 training needs a GPU; set precision=auto or fp32",
            )
        ]
    if precision == "bf16" and not has_bf16:
        return [
            Finding(
                "precision",
                "warning" if device == "cpu" else "error",
                f"这个 {device} 不支持 bf16，会更慢或失败；请设 precision=auto",
                f"this {device} has no bf16, which makes it slower or fail; set precision=auto",
            )
        ]
    return []


def check_steps(steps: int, *, rows: int, batch_size: int) -> list[Finding]:
    """A run too short to train anything."""
    figures = f"{rows} / {batch_size} → {steps}"
    if steps < 1:
        return [
            Finding(
                "few_steps",
                "error",
                f"数据不足一步（行数 / batch_size → 步数：{figures}）；请减小 batch_size 或增大 epochs",
                f"not one step to train (rows / batch_size -> steps: {figures}); lower batch_size or raise epochs",
            )
        ]
    if steps < 10:
        return [
            Finding(
                "few_steps",
                "warning",
                f"只有 {steps} 步（行数 / batch_size → 步数：{figures}），难有效果；请增加数据或 epochs",
                f"only {steps} steps (rows / batch_size -> steps: {figures}), hardly enough; add rows or epochs, or"
                " lower batch_size",
            )
        ]
    return []


def check_memory(forecast: Forecast, available: int | None, ways_out: Sequence[str]) -> list[Finding]:
    """A forecast that does not fit, with what takes most of it.

    Args:
        forecast: bytes of one process.
        available: bytes that it can have; None where nobody knows.
        ways_out: settings that need less, as they are written on the command line; a bare name is to be lowered.
    """
    if available is None or forecast.total <= 0.8 * available:
        return []
    fits = forecast.total <= available
    zh = (
        f"预计需要 {gigabytes(forecast.total)}（{forecast.zh}），可用 {gigabytes(available)}；"
        f"请减小或改用：{'、'.join(ways_out)}"
    )
    en = (
        f"forecast {gigabytes(forecast.total)} ({forecast.en}) of {gigabytes(available)} available; lower or set"
        f" {', '.join(ways_out)}"
    )
    return [Finding("memory", "warning" if fits else "error", zh, en)]


def check_labels(labelled: int, rows: int) -> list[Finding]:
    """Rows of which no token is trained on, as when a prompt fills the whole length.

    Args:
        labelled: rows with at least one label that is not masked.
        rows: all of them.
    """
    if labelled == rows:
        return []
    return [
        Finding(
            "no_labels",
            "error" if labelled == 0 else "warning",
            f"{rows} 行中有 {rows - labelled} 行的标签全部被遮蔽，不参与训练；请加大长度上限或缩短参考资料",
            f"{rows - labelled} of {rows} rows have every label masked and train nothing; raise the length limit or"
            " shorten the references",
        )
    ]


def check_truncated(counts: Sequence[int], limit: int, *, key: str, zh: str, en: str) -> list[Finding]:
    """Texts that lose their end, where they are more than a few.

    Args:
        counts: tokens of each text.
        limit: most tokens that are read.
        key: the setting that says so.
        zh, en: what the texts are called.
    """
    cut = sum(count > limit for count in counts)
    if cut <= _CUT_SHARE * len(counts):
        return []
    share = f"{100 * cut / len(counts):.0f} %"
    return [
        Finding(
            "truncated",
            "warning",
            f"{share} 的{zh}超过 {key}={limit} 个 token，结尾被截掉（最长 {max(counts)}）；请加大它",
            f"{share} of the {en} are longer than {key}={limit} tokens and lose their end (longest {max(counts)});"
            " raise it, or split shorter",
        )
    ]


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, then warnings, then notes."""
    return sorted(findings, key=lambda finding: get_args(Severity).index(finding.severity))


# --- while training ---------------------------------------------------------------------------------------------


class Monitor:
    """Watches the steps of a run; `observe` returns what it finds, each finding once."""

    def __init__(self) -> None:
        """A fresh record."""
        self.findings: list[Finding] = []
        self._steps = 0
        self._zeros = 0
        self._overflows = 0
        self._still = 0
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=_FLAT_STEPS)

    def observe(
        self, *, step: int, loss: float, gradient_norm: float | None = None, overflowed: bool = False
    ) -> list[Finding]:
        """New findings about a step.

        Args:
            step: its number, for the message.
            loss: mean over the batch.
            gradient_norm: before clipping, where it is known.
            overflowed: fp16 gradients were infinite and the step was skipped.
        """
        found = list(self._at(step, loss, gradient_norm, overflowed))
        known = {finding.name for finding in self.findings}
        new = [finding for finding in found if finding.name not in known]
        self.findings += new
        return new

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain JSON values."""
        return {
            "findings": [finding.as_dict() for finding in self.findings],
            "counts": [self._steps, self._zeros, self._overflows, self._still],
            "first": self._first,
            "last": list(self._last),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: what was found before is neither forgotten nor found again."""
        self.findings = [Finding(**finding) for finding in state["findings"]]
        self._steps, self._zeros, self._overflows, self._still = state["counts"]
        self._first = list(state["first"])
        self._last = deque(state["last"], maxlen=_FLAT_STEPS)

    def _at(self, step: int, loss: float, gradient_norm: float | None, overflowed: bool) -> Iterable[Finding]:
        self._steps += 1
        self._overflows = self._overflows + 1 if overflowed else 0
        if self._overflows >= _OVERFLOWS:
            yield _overflow(step)
        if overflowed:
            return
        if not math.isfinite(loss) or (gradient_norm is not None and not math.isfinite(gradient_norm)):
            yield _not_a_number(step, loss)
            return
        self._zeros += abs(loss) < _ZERO
        if self._zeros == self._steps and self._zeros >= _FIRST_STEPS:
            yield _zero_loss(step)
        self._still = self._still + 1 if gradient_norm is not None and gradient_norm < _ZERO else 0
        if self._still >= _FIRST_STEPS and self._zeros < self._steps:
            yield _no_gradient(step)
        yield from self._flat(step, loss)

    def _flat(self, step: int, loss: float) -> Iterable[Finding]:
        if len(self._first) < _FLAT_STEPS:
            self._first.append(loss)
            return
        self._last.append(loss)
        if len(self._last) == _FLAT_STEPS:
            before, now = sum(self._first) / _FLAT_STEPS, sum(self._last) / _FLAT_STEPS
            if now > _FLAT_SHARE * before:
                yield _flat_loss(step, before, now)


def _overflow(step: int) -> Finding:
    return Finding(
        "overflow",
        "error",
        f"到第 {step} 步，fp16 梯度连续 {_OVERFLOWS} 步溢出；请改用 precision=bf16 或 fp32，或降低 learning_rate",
        f"by step {step} fp16 gradients overflowed {_OVERFLOWS} times in a row; use precision=bf16 or fp32, or lower"
        " learning_rate",
    )


def _not_a_number(step: int, loss: float) -> Finding:
    return Finding(
        "not_a_number",
        "error",
        f"第 {step} 步的损失是 {loss} 或梯度不是有效数值；请降低 learning_rate，或改用 precision=fp32",
        f"at step {step} the loss is {loss} or its gradient is not finite; lower learning_rate, or use precision=fp32",
    )


def _zero_loss(step: int) -> Finding:
    return Finding(
        "zero_loss",
        "error",
        f"前 {step} 步的损失都是 0：没有负例可比；请设 in_batch_negatives=true，或让 group_size≥2 且数据含 neg",
        f"the loss was 0 in all {step} steps: there is nothing to tell apart; set in_batch_negatives=true, or"
        " group_size of 2 or more over rows with neg",
    )


def _no_gradient(step: int) -> Finding:
    return Finding(
        "no_gradient",
        "error",
        f"到第 {step} 步梯度一直是 0，没有权重在更新；请检查 lora.targets 是否与模型的层名一致",
        f"by step {step} the gradient stays 0, nothing is trained; check that lora.targets name layers of the model",
    )


def _flat_loss(step: int, before: float, now: float) -> Finding:
    return Finding(
        "flat_loss",
        "warning",
        f"到第 {step} 步损失没有下降（{before:.4f} → {now:.4f}）；请检查数据是否错配，或提高 learning_rate",
        f"by step {step} the loss has not fallen ({before:.4f} -> {now:.4f}); check that positives belong to their"
        " queries, or raise learning_rate",
    )

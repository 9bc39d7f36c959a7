"""What a training run leaves for its reader: ragproj.json (written last), report.md and curves.png.

They stand in the model directory. Serving reads of `ragproj.json` what base an adapter belongs to, and refuses others,
and which lengths of vectors were trained; a directory without it works too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from chains.bge.directory import MANIFEST
from chains.caches import beside
from finetune.doctor import Finding
from finetune.evaluation import FusedScores, Scores
from finetune.gate import Comparison, Verdict, compare

PAGE = "report.md"
CURVES = "curves.png"

_FORMAT = 1
_PACKAGES = (
    "ragproj",
    "torch",
    "transformers",
    "peft",
    "sentence-transformers",
    "FlagEmbedding",
    "tokenizers",
    "numpy",
)
_POINTS = 500  # of a curve that are kept
_SEVERITIES = {"error": "错误 / error", "warning": "警告 / warning", "note": "提示 / note"}


@dataclass(frozen=True)
class DataFile:
    """A file a run was trained on."""

    path: str
    sha256: str
    rows: int


@dataclass(frozen=True)
class SetReport:
    """A set before and after."""

    before: Scores
    after: Scores
    sampled: bool = False
    """whether questions or passages were drawn from more"""

    def comparison(self, metric: str, seed: int) -> Comparison:
        """Of one metric."""
        return compare(self.before.by_metric[metric], self.after.by_metric[metric], seed=seed)


@dataclass(frozen=True)
class FusedReport:
    """Dev together with lexical search, before and after; the lexical leg alone is the same in both."""

    before: FusedScores
    after: FusedScores

    def against_lexical(self, metric: str, seed: int) -> Comparison:
        """Fused after training, against lexical search alone."""
        return compare(self.after.lexical.by_metric[metric], self.after.fused.by_metric[metric], seed=seed)

    def against_before(self, metric: str, seed: int) -> Comparison:
        """Fused after training, against fused before it."""
        return compare(self.before.fused.by_metric[metric], self.after.fused.by_metric[metric], seed=seed)


@dataclass(frozen=True)
class Blend:
    """Mixtures with the base that were tried, and the one that was taken."""

    tried: tuple[tuple[float, float, bool], ...]
    """(share of the fine-tuned weights, dev mean, whether the gate lets it pass)"""
    share: float | None
    """the one that the model has; None: none passed, the candidate is as it was trained"""


@dataclass(frozen=True)
class RunReport:
    """A finished run."""

    kind: str
    """"bge" or "reranker" """
    method: str
    base: str
    base_digest: str
    digest: str
    verdict: Verdict
    metric: str
    sets: Mapping[str, SetReport]
    data: Sequence[DataFile]
    settings: Mapping[str, Any]
    seed: int
    steps: int
    planned_steps: int
    best_step: int | None
    seconds: float
    rows_per_s: float
    losses: Sequence[float]
    scores: Sequence[tuple[int, float]]
    findings: Sequence[Finding] = ()
    fused: FusedReport | None = None
    prefixes: Mapping[int, SetReport] = field(default_factory=dict)
    """dev by the first numbers of each vector alone, by how many they are"""
    found: Mapping[str, Scores] = field(default_factory=dict)
    """of a reranker's candidates in the order they were found in, by set"""
    blend: Blend | None = None
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def promoted(self) -> bool:
        """Whether it passed the gate."""
        return self.verdict.promoted

    def as_dict(self) -> dict[str, Any]:
        """The content of `ragproj.json`, plain JSON values."""
        return {
            "format": _FORMAT,
            "kind": self.kind,
            "method": self.method,
            "created": self.created,
            "promoted": self.promoted,
            "verdict": {
                "zh": self.verdict.zh,
                "en": self.verdict.en,
                "reasons": [vars(reason) for reason in self.verdict.reasons],
            },
            "base": {"model": self.base, "digest": self.base_digest},
            "digest": self.digest,
            "metric": self.metric,
            "metrics": {name: self._set(found) for name, found in self.sets.items()},
            "fused": self._fused(),
            "prefixes": {str(length): self._set(found) for length, found in self.prefixes.items()} or None,
            "against_found": self._against_found(),
            "blend": None if self.blend is None else {"share": self.blend.share, "tried": list(self.blend.tried)},
            "training": {
                "steps": self.steps,
                "planned_steps": self.planned_steps,
                "best_step": self.best_step,
                "seconds": round(self.seconds, 1),
                "rows_per_s": round(self.rows_per_s, 2),
                "losses": thinned(self.losses),
                "scores": [[step, round(score, 6)] for step, score in self.scores],
            },
            "findings": [finding.as_dict() for finding in self.findings],
            "data": [vars(file) for file in self.data],
            "settings": dict(self.settings),
            "seed": self.seed,
            "versions": versions(),
        }

    def _set(self, found: SetReport) -> dict[str, Any]:
        figures = {metric: figures_of(found.comparison(metric, self.seed)) for metric in found.after.by_metric}
        counts = {"questions": found.after.questions, "passages": found.after.passages, "sampled": found.sampled}
        return {**counts, **figures}

    def against_found(self, name: str, metric: str) -> Comparison:
        """One metric of a set after training, against the candidates in the order they were found in."""
        return compare(self.found[name].by_metric[metric], self.sets[name].after.by_metric[metric], seed=self.seed)

    def _against_found(self) -> dict[str, Any] | None:
        figures = {
            name: {metric: figures_of(self.against_found(name, metric)) for metric in scores.by_metric}
            for name, scores in self.found.items()
        }
        return figures or None

    def _fused(self) -> dict[str, Any] | None:
        if self.fused is None:
            return None
        metrics = self.fused.after.fused.by_metric
        return {
            "lexical": self.fused.after.lexical.means(),
            "before": self.fused.before.fused.means(),
            "after": self.fused.after.fused.means(),
            "against_lexical": {m: figures_of(self.fused.against_lexical(m, self.seed)) for m in metrics},
            "against_before": {m: figures_of(self.fused.against_before(m, self.seed)) for m in metrics},
        }


def write_report(folder: Path, report: RunReport, *, run: Mapping[str, Any] | None = None) -> None:
    """Write curves, page and, last of all, the manifest into the model directory; each takes its place when whole.

    Args:
        folder: the model directory.
        report: what to write.
        run: all that decided the run, kept as `run`, by which a finished one is recognised.
    """
    with beside(folder / CURVES) as path:
        path.write_bytes(curves(report))
    with beside(folder / PAGE) as path:
        path.write_text(page(report), encoding="utf-8")
    with beside(folder / MANIFEST) as path:
        content = {**report.as_dict(), "run": run}
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `ragproj.json` of a model directory says; None where there is none, or none that can be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def file_of(path: Path, rows: int) -> DataFile:
    """A data file with its hash."""
    with path.open("rb") as file:
        return DataFile(str(path), hashlib.file_digest(file, "sha256").hexdigest(), rows)


def versions() -> dict[str, str]:
    """The installed versions of what a run depends on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def figures_of(comparison: Comparison) -> dict[str, float]:
    """A comparison as numbers of four decimals."""
    gain = comparison.difference
    values = {"before": comparison.before, "after": comparison.after}
    values |= {"difference": gain.mean, "low": gain.low, "high": gain.high}
    return {key: round(value, 4) for key, value in values.items()}


def thinned(losses: Sequence[float]) -> list[list[float]]:
    """A curve of at most 500 points, [step, mean of the losses up to it]; steps count from 1."""
    width = -(-len(losses) // _POINTS) or 1
    pieces = [losses[start : start + width] for start in range(0, len(losses), width)]
    return [[min(len(losses), (n + 1) * width), round(sum(p) / len(p), 6)] for n, p in enumerate(pieces)]


# --- for a reader -----------------------------------------------------------------------------------------------


def page(report: RunReport) -> str:
    """The report in Markdown, Chinese first."""
    promoted = "通过，可以使用 / promoted" if report.promoted else "未通过，不应替换原模型 / refused"
    lines = [
        f"# 训练报告 / Training report: {report.kind}, {report.method}",
        "",
        f"**结论 / verdict：{promoted}**",
        "",
        *(f"- {'✓' if reason.passed else '✗'} {reason.zh}  \n  *{reason.en}*" for reason in report.verdict.reasons),
        *([] if (parts := report.verdict.parts) is None else [f"- {parts.zh}  \n  *{parts.en}*"]),
        "",
        "## 效果 / Effect",
        "",
        "差值的区间是对问题配对重抽样（bootstrap）的 95 % 区间；区间不含 0 才算有差别。",
        "*Intervals are 95 % paired bootstrap over the questions; one that contains 0 shows no difference.*",
        "",
        *_table(_rows(report)),
        "",
        *_sizes(report),
        "",
        *_prefix_lines(report),
        *_fused_lines(report),
        *_found_lines(report),
        *_blend_lines(report),
        "## 过程 / Course",
        "",
        f"![loss and {report.metric}]({CURVES})",
        "",
        f"- 步数 / steps：{report.steps} / {report.planned_steps}"
        + ("" if report.best_step is None else f"，采用第 {report.best_step} 步 / best step {report.best_step}"),
        f"- 用时 / time：{report.seconds:.0f} s，{report.rows_per_s:.1f} 行/秒 / rows/s",
        f"- 底座 / base：`{report.base}` ({report.base_digest})",
        *(f"- 数据 / data：`{file.path}`，{file.rows} 行 / rows，sha256 {file.sha256[:16]}…" for file in report.data),
        "",
        "## 检查 / Doctor",
        "",
        *(_findings(report) or ["没有发现问题。 *Nothing found.*"]),
        "",
        "## 设置 / Settings",
        "",
        "```json",
        json.dumps(report.settings, ensure_ascii=False, indent=1),
        "```",
        "",
        "版本 / versions：" + "，".join(f"{name} {number}" for name, number in versions().items()),
    ]
    return "\n".join(lines) + "\n"


def _rows(report: RunReport) -> list[tuple[str, str, Comparison]]:
    return [
        (name, metric, found.comparison(metric, report.seed))
        for name, found in report.sets.items()
        for metric in found.after.by_metric
    ]


def _table(
    rows: Sequence[tuple[str, str, Comparison]], *, first: str = "训练前 / before", second: str = "训练后 / after"
) -> list[str]:
    lines = [
        f"| 评测集 / set | 指标 / metric | {first} | {second} | 差 / difference | 95 % |",
        "|---|---|---|---|---|---|",
    ]
    for name, metric, found in rows:
        gain = found.difference
        figures = f"{found.before:.4f} | {found.after:.4f} | {gain.mean:+.4f} | {gain.low:+.4f} … {gain.high:+.4f}"
        lines.append(f"| {name} | {metric} | {figures} |")
    return lines


def _sizes(report: RunReport) -> list[str]:
    lines = []
    for name, found in report.sets.items():
        drawn = "，抽样 / sampled" if found.sampled else ""
        counts = f"{found.after.questions} 个问题 / questions，{found.after.passages} 个片段 / passages"
        lines.append(f"- {name}：{counts}{drawn}")
    return lines


def _prefix_lines(report: RunReport) -> list[str]:
    if not report.prefixes:
        return []
    rows = [
        (f"dev，{length} 维", metric, found.comparison(metric, report.seed))
        for length, found in report.prefixes.items()
        for metric in _main(report)
    ]
    return [
        "### 截短的向量 / Shortened vectors",
        "",
        "只用向量的前若干维检索（embeddings.dimensions）；判定不看这些数字。",
        "*Searched by the first numbers of each vector alone (embeddings.dimensions); the gate looks at none of it.*",
        "",
        *_table(rows),
        "",
    ]


def _fused_lines(report: RunReport) -> list[str]:
    if report.fused is None:
        return []
    chosen = _main(report)
    against_lexical = [("dev", metric, report.fused.against_lexical(metric, report.seed)) for metric in chosen]
    against_before = [("dev", metric, report.fused.against_before(metric, report.seed)) for metric in chosen]
    return [
        "### 与关键词检索合并 / Fused with lexical search",
        "",
        "系统实际使用的是混合检索：先与只用关键词（BM25）相比，再与训练前的混合检索相比。",
        "*What serves is the hybrid: against lexical search (BM25) alone, then against the hybrid before training.*",
        "",
        *_table(against_lexical, first="关键词 / lexical", second="混合 / hybrid"),
        "",
        *_table(against_before, first="混合，训练前 / hybrid before", second="混合，训练后 / hybrid after"),
        "",
    ]


def _found_lines(report: RunReport) -> list[str]:
    if not report.found:
        return []
    rows = [(name, metric, report.against_found(name, metric)) for name in report.found for metric in _main(report)]
    return [
        "### 与重排前的顺序相比 / Against the order before reranking",
        "",
        "没有重排模型时候选片段的顺序：来自 questions 的是 BM25 的顺序，来自 rows 的没有先后，按随机顺序计。",
        "*How candidates stand without a reranker: those of questions in BM25's order, those of rows in a random one.*",
        "",
        *_table(rows, first="原来的顺序 / as found", second="重排后 / reranked"),
        "",
    ]


def _main(report: RunReport) -> list[str]:
    return list(dict.fromkeys(["recall@1", "recall@10", report.metric]))


def _blend_lines(report: RunReport) -> list[str]:
    if report.blend is None:
        return []
    taken = "没有一个通过 / none passed" if report.blend.share is None else f"采用 / taken：{report.blend.share:g}"
    return [
        "### 与底座权重混合 / Mixed with the base's weights",
        "",
        f"出现遗忘，尝试了混合。{taken}。 *Forgetting showed, so mixtures were tried.*",
        "",
        f"| 微调权重的比例 / share | dev {report.metric} | 通过 / passes |",
        "|---|---|---|",
        *(f"| {share:g} | {dev:.4f} | {'✓' if passed else '✗'} |" for share, dev, passed in report.blend.tried),
        "",
    ]


def _findings(report: RunReport) -> list[str]:
    return [
        f"- {_SEVERITIES[finding.severity]} `{finding.name}`：{finding.zh}  \n  *{finding.en}*"
        for finding in report.findings
    ]


def curves(report: RunReport) -> bytes:
    """The loss and the dev metric over the steps as a PNG; labels are Latin, since no font here need have Chinese."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    points = thinned(report.losses)
    left.plot([step for step, _ in points], [loss for _, loss in points], color="#3b6fb6", linewidth=1.2)
    left.set(title="training loss", xlabel="step")
    right.plot([step for step, _ in report.scores], [score for _, score in report.scores], "o-", color="#2f8f5b")
    right.set(title=f"dev {report.metric} while training", xlabel="step")
    if report.best_step is not None:
        right.axvline(report.best_step, color="#999999", linestyle="--", linewidth=1)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()

"""What the actions of `ragproj finetune` do; `ui.cli` names them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from finetune.run import Outcome
    from finetune.training_config import TrainingConfig
    from finetune.training_loop import TrainingEvent


def finetune_bge(arguments: argparse.Namespace) -> int:
    """Train a BGE retriever; 1 when the gate refuses it."""
    from finetune.bge.config import BgeTrainingConfig

    config = BgeTrainingConfig.read(Path(arguments.config), arguments.overrides)
    from finetune.bge.run import finetune_bge as run  # torch takes seconds to import

    return _finetune(arguments, config, run)


def finetune_reranker(arguments: argparse.Namespace) -> int:
    """Train a reranker; 1 when the gate refuses it."""
    from finetune.reranker.config import RerankerTrainingConfig

    config = RerankerTrainingConfig.read(Path(arguments.config), arguments.overrides)
    from finetune.reranker.run import finetune_reranker as run

    return _finetune(arguments, config, run)


def finetune_chatglm3(arguments: argparse.Namespace) -> int:
    """Train ChatGLM3 to answer from references; 1 when the gate refuses it."""
    from finetune.chatglm3.config import ChatGlm3TrainingConfig

    config = ChatGlm3TrainingConfig.read(Path(arguments.config), arguments.overrides)
    from finetune.chatglm3.run import finetune_chatglm3 as run

    return _finetune(arguments, config, run)


def _finetune(arguments: argparse.Namespace, config: TrainingConfig, run: Callable[..., Outcome | None]) -> int:
    """The exit code of a run; 1 when the gate refuses what it trained."""
    with _Progress(config.evaluation.metric) as progress:
        outcome = run(config, observe=progress.observe, tell=progress.tell)
    if outcome is None:  # another process of torchrun reports
        return 0
    _report(arguments, outcome.model, outcome.manifest, already=outcome.already)
    return 0 if outcome.promoted else 1


class _Progress:
    """A bar of the steps on the error stream, and lines above it."""

    def __init__(self, metric: str) -> None:
        self._bar: tqdm[Any] = tqdm(desc="finetune", unit="step", delay=1, file=sys.stderr)
        self._metric = metric
        self._shown: dict[str, str] = {}

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def tell(self, line: str) -> None:
        self._bar.write(line, file=sys.stderr)

    def observe(self, event: TrainingEvent) -> None:
        self._bar.total = event.steps
        self._bar.update(event.step - self._bar.n)
        if event.score is not None:
            self._shown[self._metric] = f"{event.score:.4f}"
            self.tell(f"{event.step}/{event.steps}  {self._metric} {event.score:.4f}")
        elif event.loss is not None:
            self._shown["loss"] = f"{event.loss:.4f}"
        self._bar.set_postfix(self._shown, refresh=False)


def _report(arguments: argparse.Namespace, model: Path, manifest: Mapping[str, Any], *, already: bool) -> None:
    """The verdict and the figures: one JSON object, or a table."""
    if arguments.json:
        print(json.dumps({"model": str(model), "already": already, **manifest}, ensure_ascii=False))
        return
    if already:
        print("这次训练已经完成，结果如下 / this run is finished already, with this result")
    for name, metrics in manifest["metrics"].items():
        print(f"{name}：{metrics['questions']} 个问题 / questions，{metrics['passages']} 个候选 / candidates")
        for metric, figures in metrics.items():
            if isinstance(figures, dict):
                print(
                    f"  {metric:<10} {figures['before']:.4f} → {figures['after']:.4f}"
                    f"  {figures['difference']:+.4f}  95 % [{figures['low']:+.4f}, {figures['high']:+.4f}]"
                )
    for reason in manifest["verdict"]["reasons"]:
        print(f"{'✓' if reason['passed'] else '✗'} {reason['zh']} / {reason['en']}")
    verdict = "通过 / promoted" if manifest["promoted"] else "未通过，不应替换原模型 / refused"
    print(f"{verdict}: {model}（report.md, curves.png, ragproj.json）")

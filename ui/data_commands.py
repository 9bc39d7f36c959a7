"""What `ragproj data …` does: training data made, mined and reported; `ui.cli` names the functions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from loaders.config import apply_overrides, read_yaml


def multi_doc_qa(arguments: argparse.Namespace) -> int:
    """Convert Multi-Doc-QA-Chinese into rows for retriever and generator."""
    from finetune.data.multi_doc_qa import MultiDocQAConfig, convert

    config = MultiDocQAConfig.from_dict(_settings(arguments), where=_where(arguments))
    with _stages("question") as progress:
        report = convert(
            [Path(path) for path in arguments.raw],
            Path(arguments.out),
            config,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    for problem in report["bad_records"]["first"]:
        print(f"✗ {problem}", file=sys.stderr)
    return _tell(arguments, report)


def rows(arguments: argparse.Namespace) -> int:
    """Make rows of questions whose passages are known."""
    from finetune.data.questions import QuestionRowsConfig, convert_questions

    config = QuestionRowsConfig.from_dict(_settings(arguments), where=_where(arguments))
    report = convert_questions(
        Path(arguments.questions),
        [Path(path) for path in arguments.passages],
        Path(arguments.out),
        config,
        overwrite=arguments.overwrite,
    )
    return _tell(arguments, report)


def generation(arguments: argparse.Namespace) -> int:
    """Make rows for the generator: citations, distractors, refusals, follow-ups."""
    from finetune.data.generation import GenerationDataConfig, make_generation_rows

    config = GenerationDataConfig.from_dict(_settings(arguments), where=_where(arguments))
    paths = [Path(path) for path in arguments.rows]
    with _stages("row") as progress:
        report = make_generation_rows(
            paths, Path(arguments.out), config, overwrite=arguments.overwrite, progress=progress
        )
    return _tell(arguments, report)


def mine(arguments: argparse.Namespace) -> int:
    """Mine hard negatives for rows."""
    from finetune.data.mine import MiningConfig
    from finetune.data.mine import mine as run

    config = MiningConfig.from_dict(_settings(arguments), where=_where(arguments))
    with _stages("row") as progress:
        report = run(
            [Path(path) for path in arguments.rows],
            Path(arguments.out),
            config,
            passages=[Path(path) for path in arguments.passages],
            overwrite=arguments.overwrite,
            progress=progress,
        )
    return _tell(arguments, report)


def _tell(arguments: argparse.Namespace, report: Mapping[str, Any]) -> int:
    """Print the report, as one object or as lines."""
    if arguments.json:
        print(json.dumps(report, ensure_ascii=False))
        return 0
    for line in _lines(report, skip={"config", "first", "files"}):
        print(line)
    print(f"结果在 / results in {arguments.out}")
    return 0


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The plain data of the config file, if there is one, with the overrides."""
    data = read_yaml(Path(arguments.config)) if arguments.config else {}
    return apply_overrides(data, arguments.overrides)


def _where(arguments: argparse.Namespace) -> str:
    return arguments.config or "命令行 (command line)"


@contextmanager
def _stages(unit: str) -> Iterator[Callable[[int, str], None]]:
    """A progress bar that names the stage."""
    with tqdm(unit=unit, delay=1, file=sys.stderr) as bar:

        def progress(done: int, stage: str) -> None:
            bar.set_description_str(stage, refresh=False)
            bar.n = done  # another stage begins anew
            bar.update(0)

        yield progress


def _lines(report: Mapping[str, Any], *, skip: set[str], indent: str = "") -> Iterator[str]:
    """The report as lines for a person."""
    for key, value in report.items():
        if key in skip:
            continue
        if not isinstance(value, Mapping):
            yield f"{indent}{key}: {value}"
        elif any(isinstance(part, Mapping) for part in value.values()):
            yield f"{indent}{key}:"
            yield from _lines(value, skip=skip, indent=indent + "  ")
        else:
            parts = ", ".join(f"{name} {part}" for name, part in value.items() if name not in skip)
            yield f"{indent}{key}: {parts}"

"""Report: what a benchmark measured, on which machine, with which versions, against which bars."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = (
    *("faiss-cpu", "faiss-gpu", "tantivy", "numpy", "langchain-core", "langchain-community"),
    *(
        "torch",
        "transformers",
        "tokenizers",
        "sentence-transformers",
        "FlagEmbedding",
        "onnxruntime",
        "openvino",
        "peft",
    ),
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """A promise, and what was measured."""

    what: str
    measured: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the promise holds."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return (
            f"{'met   ' if self.met else 'MISSED'} {self.what}: {self.measured:g} {self.unit} ({sign} {self.limit:g})"
        )


@dataclass
class Report:
    """Tables and bars, printed while they come and written at the end, also of a run that broke off."""

    name: str
    options: Row
    folder: Path = RESULTS
    machine: Row = field(default_factory=lambda: describe_machine())
    tables: dict[str, list[Row]] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    error: str = ""

    def __enter__(self) -> Self:
        print(json.dumps(self.machine | self.options, ensure_ascii=False, default=str), flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self.error = repr(error)
        path = self.save()
        print(f"{path} and .json")

    def add(self, table: str, **row: Any) -> None:
        """A row of a table. The load average tells a disturbed measurement from a quiet one."""
        row = {key: _rounded(value) for key, value in row.items()} | {"load": round(os.getloadavg()[0], 1)}
        self.tables.setdefault(table, []).append(row)
        print(f"{table}: " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    def bar(self, what: str, measured: float, limit: float, unit: str, *, at_least: bool = False) -> None:
        """A promise judged."""
        self.bars.append(Bar(what, _rounded(measured), limit, unit, at_least))
        print(self.bars[-1], flush=True)

    def save(self) -> Path:
        """The Markdown file written, its JSON beside it; an earlier run of the same day stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self.name}-{self.machine['date'][:10]}"
        number = 1
        while (path := self.folder / f"{stem}{f'-{number}' if number > 1 else ''}.md").exists():
            number += 1
        bars = [vars(bar) | {"met": bar.met} for bar in self.bars]
        record = {"name": self.name, "machine": self.machine, "options": self.options, "error": self.error}
        content = json.dumps(record | {"tables": self.tables, "bars": bars}, ensure_ascii=False, indent=1, default=str)
        path.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
        path.write_text(self._markdown(), encoding="utf-8")
        return path

    def _markdown(self) -> str:
        facts = [f"{key}: {value}" for key, value in (self.machine | self.options).items()]
        lines = [f"# {self.name}, {self.machine['date'][:10]}", "", *(f"- {fact}" for fact in facts), ""]
        if self.error:
            lines += [f"The run broke off: {self.error}", ""]
        for title, rows in self.tables.items():
            lines += [f"## {title}", "", *_markdown_table(rows), ""]
        if self.bars:
            lines += ["## Bars", "", *(f"- {bar}" for bar in self.bars), ""]
        return "\n".join(lines)


def describe_machine() -> Row:
    """Date, processor, memory, load, commit and versions."""
    packages = {name: _version(name) for name in _PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "load": [round(load, 1) for load in os.getloadavg()],
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: number for name, number in packages.items() if number},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni"} & set(facts.get("flags", "").split())
    name = facts.get("model name", platform.machine())
    return f"{name} ({' '.join(sorted(flags))})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit the code stands at, with a + where files differ from it."""
    root = Path(__file__).parent
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _rounded(value: Any) -> Any:
    """A float with four digits, or whole from a thousand on."""
    return float(f"{value:.4g}") if isinstance(value, float) and abs(value) < 1000 else _whole(value)


def _whole(value: Any) -> Any:
    return round(value) if isinstance(value, float) else value


def _markdown_table(rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return head + ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]

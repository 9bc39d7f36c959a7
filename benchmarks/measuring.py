"""How benchmarks measure: latencies, and time and memory of work done in a child process."""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

_T = TypeVar("_T")

_SAMPLE_S = 0.05
_RESULT = "RESULT "


@dataclass(frozen=True)
class Latency:
    """Milliseconds of many calls."""

    p50: float
    p95: float


@dataclass(frozen=True)
class ChildRun:
    """What a child process returned, its wall time from start to end, and what its tree took.

    Processor time hardly depends on what else the machine does, wall time does.
    """

    result: Any
    seconds: float
    cpu_s: float
    peak_mb: float


def latency(function: Callable[[_T], object], arguments: Sequence[_T], *, warm_up: int = 5, rounds: int = 3) -> Latency:
    """How long calls take, one after another: the quietest of several rounds, after some calls that do not count."""
    for argument in arguments[:warm_up]:
        function(argument)
    measured = []
    for _ in range(rounds):
        times = [1e3 * seconds(functools.partial(function, argument)) for argument in arguments]
        measured.append(Latency(float(np.percentile(times, 50)), float(np.percentile(times, 95))))
    return min(measured, key=lambda round_: round_.p95)


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, as the file system allots them."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def run_child(module: str, task: str, *, python: str = sys.executable, **arguments: Any) -> ChildRun:
    """Run `TASKS[task](**arguments)` of a benchmark module in a process of its own.

    Raises:
        RuntimeError: the child failed; its last words are in the message.
    """
    request = json.dumps({"task": task, "arguments": arguments}, default=str)
    started, spent = time.perf_counter(), _children_cpu_s()
    child = subprocess.Popen(
        [python, "-m", module, "--child", request], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak = 0
    while child.poll() is None:
        peak = max(peak, _tree_resident(child.pid))
        time.sleep(_SAMPLE_S)
    took, spent = time.perf_counter() - started, _children_cpu_s() - spent
    output = child.stdout.read() if child.stdout is not None else ""
    answers = [line for line in output.splitlines() if line.startswith(_RESULT)]
    if child.returncode or not answers:
        raise RuntimeError(f"{module} {task}: exit {child.returncode}: {output[-2000:]}")
    return ChildRun(json.loads(answers[-1][len(_RESULT) :]), took, spent, peak / 1e6)


def serve_child(arguments: Sequence[str], tasks: dict[str, Callable[..., Any]]) -> bool:
    """Do what `run_child` asks of this process; False where it was started by a person."""
    if list(arguments[:1]) != ["--child"]:
        return False
    request = json.loads(arguments[1])
    print(_RESULT + json.dumps(tasks[request["task"]](**request["arguments"])), flush=True)
    return True


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _tree_resident(root: int) -> int:
    """Resident bytes of a process and its descendants; shared pages count once in each."""
    parents: dict[int, int] = {}
    resident: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        parents[int(entry.name)] = int(fields[1])
        resident[int(entry.name)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return sum(resident.get(pid, 0) for pid in tree)

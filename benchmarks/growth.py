"""What a knowledge base costs as it grows from 1k to 1M chunks: time, memory, disk, latency; drawn as a plot.

    python -m benchmarks.growth                                    # 20 minutes, 8 GB of disk
    python -m benchmarks.growth --sizes 1000 3000 10000 --work DIR

One knowledge base takes one more file at each step, each in a process of its own, so that every row tells what adding
to a knowledge base of that size costs. Memory is the peak of the process and its children. The questions then run in
another fresh process. Writes growth-DATE.svg beside the results.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.line_plots import Panel, draw
from benchmarks.machine import RESULTS, Report, Row
from benchmarks.material import GivenVectors, questions
from benchmarks.measuring import folder_bytes, latency, run_child, serve_child
from benchmarks.stores import opened, part_of

SIZES = (1_000, 3_000, 10_000, 30_000, 118_000, 300_000, 1_000_000)
MODULE = "benchmarks.growth"


def ingest(path: str, source: str) -> dict[str, Any]:
    """Add a file; seconds without the imports, so that small steps tell something too."""
    with opened(Path(path)) as kb:
        report = kb.ingest([Path(source)])
        return {"chunks": report.chunks, "seconds": report.seconds}


def start() -> None:
    """Nothing: what the imports cost is taken off."""


def ask(path: str) -> dict[str, Any]:
    """Ask every question, with its vector given."""
    asked = questions()
    with opened(Path(path), GivenVectors(asked)) as kb:
        retriever = kb.hybrid()
        took = latency(retriever.invoke, asked)
        return {"p50_ms": took.p50, "p95_ms": took.p95, "chunks": kb.knowledge_base.chunk_count()}


def grow(report: Report, path: Path, work: Path, first: int, last: int, *, idle_cpu_s: float) -> None:
    """Add the passages from `first` to `last` and measure."""
    source = part_of(work, first, last)
    added = run_child(MODULE, "ingest", path=path, source=source)
    asked = run_child(MODULE, "ask", path=path)
    source_bytes = source.stat().st_size
    source.unlink()
    chunks = asked.result["chunks"]
    took = added.result["seconds"]
    row: Row = {"ingest_s": took, "s_per_1k_chunks": 1e3 * took / added.result["chunks"]}
    row |= {"cpu_s_per_1k_chunks": 1e3 * (added.cpu_s - idle_cpu_s) / added.result["chunks"]}
    row |= {"ingest_peak_mb": added.peak_mb, "query_p50_ms": asked.result["p50_ms"]}
    row |= {"query_p95_ms": asked.result["p95_ms"], "query_peak_mb": asked.peak_mb}
    row |= {
        "kb_per_chunk": folder_bytes(path) / chunks / 1e3,
        "source_kb_per_chunk": source_bytes / 1e3 / (last - first),
    }
    report.add("growth", chunks=chunks, added=added.result["chunks"], **row)


def plot(rows: list[Row], title: str) -> str:
    """The four costs over the number of chunks, as SVG."""
    sizes = [row["chunks"] for row in rows]
    panels = [
        Panel(name, unit, [(label, [row[key] for row in rows]) for label, key in lines])
        for name, unit, lines in (
            (
                "seconds per 1,000 chunks ingested",
                "s",
                [("wall", "s_per_1k_chunks"), ("processor", "cpu_s_per_1k_chunks")],
            ),
            ("hybrid query", "ms", [("p95", "query_p95_ms"), ("p50", "query_p50_ms")]),
            ("peak memory", "MB", [("ingest", "ingest_peak_mb"), ("query", "query_peak_mb")]),
            ("disk per chunk", "kB", [("all files", "kb_per_chunk"), ("source", "source_kb_per_chunk")]),
        )
    ]
    return draw(title, sizes, panels)


def main() -> None:
    """Grow, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="chunks, ascending")
    parser.add_argument("--work", type=Path, help="keeps the knowledge base, as kb-SIZE, for search_latency")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        path = work / "growing"
        report = Report("growth", {"sizes": options.sizes}, options.results)
        idle = run_child(MODULE, "start").cpu_s
        with report:
            for first, last in zip([0, *options.sizes], options.sizes, strict=False):
                grow(report, path, work, first, last, idle_cpu_s=idle)
        if not (kept := work / f"kb-{options.sizes[-1]}").exists():
            path.rename(kept)
    machine = report.machine
    title = f"ragproj, {machine['date'][:10]}, {machine['cores']} cores of {machine['processor']}"
    drawing = options.results / f"growth-{machine['date'][:10]}.svg"
    drawing.write_text(plot(report.tables["growth"], title), encoding="utf-8")
    print(drawing)


if __name__ == "__main__" and not serve_child(sys.argv[1:], {"start": start, "ingest": ingest, "ask": ask}):
    main()

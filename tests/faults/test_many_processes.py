"""Eight processes ingest into one knowledge base while four ask: nobody fails, nothing is lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from workshop import Home, Nursery, article, lines_of

WRITERS, FILES, READERS = 8, 200, 4


@pytest.mark.slow
def test_eight_processes_ingest_while_four_ask(tmp_path: Path, nursery: Nursery) -> None:
    kb, stop = tmp_path / "kb", tmp_path / "stop"
    texts = {}
    for writer in range(WRITERS):
        folder = tmp_path / f"docs{writer}"
        folder.mkdir()
        for number in range(FILES):
            path = folder / f"{number:03}.txt"
            texts[str(path)] = [article(f"{writer}-{number}", 3)]
            path.write_text(texts[str(path)][0], encoding="utf-8")
    Home(kb, create=True).kb.close()
    started = time.monotonic()
    asking = [nursery.start("ask", kb=kb, stop=stop, asked=tmp_path / f"asked{i}") for i in range(READERS)]
    ingesting = [nursery.start("ingest_parsed", kb=kb, docs=tmp_path / f"docs{i}") for i in range(WRITERS)]
    for worker in ingesting:
        worker.succeed(300)
    print(f"{WRITERS * FILES} files in {time.monotonic() - started:.1f} s")
    stop.touch()
    for worker in asking:
        worker.succeed()
    for reader in range(READERS):
        assert int(lines_of(tmp_path / f"asked{reader}")[-1]) > 0
    with Home(kb) as home:
        assert home.texts() == texts
        assert home.problems() == []
        assert home.ask("第5-77号", 1)[0].metadata["source"].startswith(str(tmp_path))

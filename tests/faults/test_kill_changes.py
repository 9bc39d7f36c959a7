"""kill -9 at any moment of remove and reembed: nothing committed is lost, and the rest can be resumed."""

from __future__ import annotations

import os

import pytest
from trials import Trial, check_versions
from workshop import GATE_WORD, SMALL_BATCH, Home, SlowEmbeddings, Worker, lines_of

from chains.knowledge_base import FingerprintError


@pytest.mark.slow
def test_remove_killed_at_any_moment_forgets_what_it_reported_and_keeps_the_rest(trial: Trial) -> None:
    trial.write_documents(1)
    trial.nursery.start("ingest", kb=trial.kb, docs=trial.docs, done=trial.done).succeed()
    before = trial.expected()
    trial.base()
    removed = [source for number, source in enumerate(sorted(before)) if number % 8 == 1]
    after = {source: texts for source, texts in before.items() if source not in removed}

    def start(lane: Trial) -> Worker:
        return lane.nursery.start("remove", kb=lane.kb, sources=removed, done=lane.done)

    whole, seconds = trial.unbroken(start)
    assert whole["texts"] == after

    def play(lane: Trial, moment: float) -> bool:
        done = lane.killed(start, moment)
        with Home(lane.kb) as home:
            assert home.problems() == [], moment
            check_versions(home, before, after, [line for line in done if line != "end"])
        start(lane).succeed()
        lane.holds(whole, moment)
        return "end" not in done

    trial.at_every_moment("remove", seconds, play)


@pytest.mark.slow
def test_reembed_killed_at_any_moment_answers_and_resumes_without_embedding_what_it_had(trial: Trial) -> None:
    trial.write_documents(1)
    trial.nursery.start("ingest", kb=trial.kb, docs=trial.docs, done=trial.done).succeed()
    trial.base()

    def start(lane: Trial) -> Worker:
        # the delay stands for a model: most kills then fall where the time of a real run goes
        return lane.nursery.start("reembed", kb=lane.kb, done=lane.done, log=lane.log, delay_s=0.005)

    whole, seconds = trial.unbroken(start, "two")
    total = len(whole["chunks"])

    def play(lane: Trial, moment: float) -> bool:
        lane.log.unlink(missing_ok=True)
        done = lane.killed(start, moment)
        stored = max((int(line) for line in done if line.isdigit()), default=0)
        with Home(lane.kb) as home:
            switched = home.kb.generation().fingerprint == SlowEmbeddings("two").fingerprint  # type: ignore[union-attr]
            assert switched or "switched" not in done, moment
            assert len(home.kb.generations()) <= 2, moment
            made = home.kb._number("SELECT COUNT(*) FROM vectors") - total
            assert made >= stored, moment
        with Home(lane.kb, SlowEmbeddings("two" if switched else "one")) as home:
            assert home.problems() == [], moment
            assert home.ask("第3-1号：合同")
        start(lane).succeed()
        assert len(lines_of(lane.log)) <= total + (0 if switched else SMALL_BATCH), moment
        lane.holds(whole, moment, "two")
        return "end" not in done

    trial.at_every_moment("reembed", seconds, play)


def test_while_another_process_reembeds_this_one_answers_ingests_and_removes(trial: Trial) -> None:
    trial.write_documents(1)
    secret, gate, log = trial.docs / "longer.txt", trial.folder / "gate", trial.folder / "embedded"
    secret.write_text("关于" + GATE_WORD + "的规定", encoding="utf-8")
    trial.nursery.start("ingest", kb=trial.kb, docs=trial.docs, done=trial.done).succeed()
    os.mkfifo(gate)
    worker = trial.nursery.start("reembed", kb=trial.kb, done=trial.done, log=log, gate=gate)
    assert gate.read_text() == "reached"  # some of it is made, and it stands still
    with Home(trial.kb) as home:
        assert 0 < len(lines_of(log)) < home.kb.chunk_count()
        assert home.ask("关于绝密的规定", 1)[0].metadata["source"] == str(secret)
        (trial.docs / "late.txt").write_text("重新生成期间才来的文件", encoding="utf-8")
        (trial.docs / "05.txt").unlink()
        report = home.ingestor().ingest([trial.docs], sync=True)
        assert (report.added, report.removed) == (1, 1)
        assert home.ask("重新生成期间才来的文件", 1)[0].metadata["source"] == str(trial.docs / "late.txt")
        assert home.problems() == []
    worker.kill()
    assert worker.wait() == -9
    embedded = lines_of(log)
    trial.nursery.start("reembed", kb=trial.kb, done=trial.done, log=log).succeed()
    with Home(trial.kb, SlowEmbeddings("two")) as home:
        assert home.problems() == []
        assert home.ask("重新生成期间才来的文件", 1)[0].metadata["source"] == str(trial.docs / "late.txt")
    assert not set(embedded) & set(lines_of(log)[len(embedded) :])  # nothing twice
    with Home(trial.kb) as home, pytest.raises(FingerprintError, match="fault-test/two"):
        (trial.docs / "after.txt").write_text("切换以后才来的文件", encoding="utf-8")
        home.ingestor().ingest([trial.docs])
    trial.nursery.start("reembed", kb=trial.kb, done=trial.done, model="one", rollback=True).succeed()
    with Home(trial.kb) as home:
        assert home.problems() == []
        assert str(trial.docs / "05.txt") not in home.kb.source_names()

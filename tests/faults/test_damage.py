"""Damaged files: caches are made again without embedding anything, a damaged database is named and left alone."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from workshop import Home, article

from chains.knowledge_base import KnowledgeBaseError
from loaders.errors import RagProjError

QUESTION = "第7号：工资合同赔偿"
Damage = Callable[[Path], None]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def noise(path: Path) -> None:
    path.write_bytes(random.Random(path.name).randbytes(max(64, path.stat().st_size)))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 4
    path.write_bytes(data)


def delete(path: Path) -> None:
    path.unlink()


def overwrite_in_place(path: Path) -> None:
    """What a process that maps the file sees at once."""
    with path.open("r+b") as file:
        file.write(random.Random(path.name).randbytes(path.stat().st_size))


def swap(path: Path) -> None:
    """Noise put in its place by renaming, as a restored backup or a copy is."""
    beside = path.with_name("beside")
    beside.write_bytes(b"noise" * 100)
    beside.replace(path)


DAMAGES = (truncate, zero, noise, flip_a_bit, delete)
# what a process that maps or holds the old file survives; nobody survives a mapped file cut short in place (SIGBUS)
DAMAGES_WHILE_RUNNING = (delete, swap)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A knowledge base with all caches written."""
    docs = tmp_path / "docs"
    docs.mkdir()
    for number in range(12):
        (docs / f"{number:02}.txt").write_text(article(number, 4 + 3 * number), encoding="utf-8")
    with Home(tmp_path / "kb", create=True) as home:
        assert home.ingestor().ingest([docs]).added == 12
    return tmp_path


def caches(kb: Path) -> list[Path]:
    found = [path for path in [*kb.glob("faiss-*"), *kb.glob("fulltext*"), *kb.glob("fulltext/**/*")] if path.is_file()]
    return sorted(path for path in found if path.suffix != ".lock")


def groups(kb: Path) -> list[list[Path]]:
    """Each cache file alone, then all of a kind, then all."""
    files = caches(kb)
    kinds = [[path for path in files if path.relative_to(kb).parts[0].startswith(kind)] for kind in ("faiss", "full")]
    return [[path] for path in files] + [*kinds, files]


def answers(home: Home) -> tuple[object, object]:
    return home.both_legs(QUESTION), [document.id for document in home.ask(QUESTION)]


def test_there_are_caches_of_both_indexes(folder: Path) -> None:
    names = {path.name for path in caches(folder / "kb")}
    assert {"faiss-1.index", "faiss-1.state", "fulltext.state", "meta.json"} <= names
    assert len(names) > 6


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_rebuilt_when_opened_without_embedding_again(folder: Path, damage: Damage) -> None:
    with Home(folder / "kb") as home:
        right = answers(home)
    shutil.copytree(folder / "kb", folder / "whole")
    for number in range(len(groups(folder / "kb"))):
        shutil.rmtree(folder / "kb")
        shutil.copytree(folder / "whole", folder / "kb")
        files = groups(folder / "kb")[number]
        for file in files:
            damage(file)
        with Home(folder / "kb") as home:
            assert answers(home) == right, files
            assert home.problems() == [], files
            home.ingestor().save_caches()
            assert home.embedder.texts == [], files
        with Home(folder / "kb") as home:  # and what was rebuilt is whole
            assert home.problems() == [], files


@pytest.mark.parametrize("damage", DAMAGES_WHILE_RUNNING)
@pytest.mark.parametrize("moment", ["at once", "after a change", "after another process's change"])
def test_a_service_goes_on_when_its_caches_are_damaged(folder: Path, damage: Damage, moment: str) -> None:
    new = folder / "new.txt"
    new.write_text("唯一的新文件说独角兽。", encoding="utf-8")
    shutil.copytree(folder / "kb", folder / "whole")
    for number in range(len(groups(folder / "kb"))):
        shutil.rmtree(folder / "kb")
        shutil.copytree(folder / "whole", folder / "kb")
        with Home(folder / "kb") as home:
            right = answers(home)
            files = groups(folder / "kb")[number]
            for file in files:
                damage(file)
            if moment == "at once":
                assert answers(home) == right, files
                assert home.problems() == [], files
                assert home.embedder.texts == [], files
                continue
            if moment == "after a change":
                home.ingestor().ingest([new])
                assert len(home.embedder.texts) == 1, files
            else:
                with Home(folder / "kb") as other:
                    other.ingestor().ingest([new])
                    assert len(other.embedder.texts) == 1, files
            dense, lexical = home.both_legs("唯一的新文件说独角兽。", 1)
            assert (dense, lexical) == (["唯一的新文件说独角兽。"],) * 2, files
            assert home.problems() == [], files
        with Home(folder / "kb") as home:
            assert home.problems() == [], files


@pytest.mark.parametrize("damage", [truncate, zero, noise])
def test_a_service_survives_an_index_written_over_in_place(folder: Path, damage: Damage) -> None:
    """FAISS is read whole into memory; nothing that happens to its files reaches a running service."""
    with Home(folder / "kb") as home:
        right = answers(home)
        for file in (folder / "kb").glob("faiss-*"):
            damage(file)
        assert answers(home) == right
        home.kb.writer().remove_sources([str(folder / "docs" / "03.txt")])
        home.ingestor().save_caches()
        assert home.problems() == []
    with Home(folder / "kb") as home:
        assert home.problems() == []


def test_a_service_survives_full_text_files_overwritten_in_place(folder: Path) -> None:
    with Home(folder / "kb") as home:
        right = answers(home)
        for file in caches(folder / "kb"):
            overwrite_in_place(file)
        assert home.ask(QUESTION)
        home.kb.writer().remove_sources([str(folder / "docs" / "11.txt")])
        home.ingestor().save_caches()
        assert home.problems() == []
    with Home(folder / "kb") as home:
        assert answers(home)[0] != ([], [])
        assert right[0] != ([], [])
        assert home.problems() == []


# -- the database --------------------------------------------------------------------------------------------------


def use(kb: Path) -> tuple[object, object, list[str]]:
    """Everything a reader does."""
    with Home(kb) as home:
        home.kb.sources()
        problems = home.problems()
        return answers(home), home.texts(), problems


def tell(kb: Path) -> tuple[object, object, list[str]] | str:
    """What `use` gives, or the sentence of the error it ends in."""
    try:
        return use(kb)
    except RagProjError as error:
        return str(error)


def places(size: int, count: int) -> list[tuple[int, int]]:
    """(offset, length) of damages, one in each of `count` equal parts: bytes, sectors, pages."""
    chance = random.Random(20)
    return [
        (int(size * (number + chance.random()) / count), chance.choice([1, 64, 4096, 16384])) for number in range(count)
    ]


@pytest.mark.parametrize("kind", ["noise", "zeros"])
def test_a_database_damaged_anywhere_is_named_or_answers_right_and_stays_as_it_is(folder: Path, kind: str) -> None:
    kb = folder / "kb"
    right_answers, right_texts, problems = use(kb)
    assert problems == []
    shutil.copytree(kb, folder / "whole")
    database = kb / "kb.sqlite"
    size = database.stat().st_size
    named = 0
    for offset, length in places(size, 20):
        shutil.rmtree(kb)
        shutil.copytree(folder / "whole", kb)
        with database.open("r+b") as file:
            file.seek(offset)
            piece = random.Random(offset).randbytes(length) if kind == "noise" else bytes(length)
            file.write(piece[: size - offset])
        before = database.read_bytes()
        told = tell(kb)
        assert database.read_bytes() == before, (offset, length)
        if isinstance(told, str):
            named += 1
            assert "kb" in told and "\n" not in told, told
        else:
            found, texts, problems = told
            assert problems or (found, texts) == (right_answers, right_texts), (offset, length)
            named += bool(problems)
    assert named >= 3


@pytest.mark.parametrize("length", [0, 10, 1_000, 5_000, 40_000])
def test_a_truncated_database_is_named_and_not_written_over(folder: Path, length: int) -> None:
    database = folder / "kb" / "kb.sqlite"
    data = database.read_bytes()[:length]
    database.write_bytes(data)
    with pytest.raises(KnowledgeBaseError):
        use(folder / "kb")
    assert database.read_bytes() == data
    if not length:
        return  # SQLite's own beginning: a database that was never written is made anew by ingest
    with pytest.raises(KnowledgeBaseError), Home(folder / "kb", create=True) as home:
        home.ingestor().ingest([folder / "docs"])
    assert database.read_bytes() == data


@pytest.mark.parametrize(("offset", "value"), [(60, b"\0\0\0\0"), (60, b"\xff\xff\xff\xff"), (68, b"\0\0\0\0")])
def test_a_damaged_version_or_name_in_the_header_is_named(folder: Path, offset: int, value: bytes) -> None:
    # https://www.sqlite.org/fileformat.html: user_version at 60, application_id at 68
    database = folder / "kb" / "kb.sqlite"
    with database.open("r+b") as file:
        file.seek(offset)
        file.write(value)
    before = database.read_bytes()
    with pytest.raises(KnowledgeBaseError):
        use(folder / "kb")
    assert database.read_bytes() == before


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("UPDATE documents SET metadata = '{broken' WHERE id = 3", "JSON"),
        ("UPDATE chunks SET metadata = x'00ff' WHERE id = 3", "JSON that is bytes"),
        ("UPDATE chunks SET text = CAST(x'ff61' AS TEXT) WHERE id = 3", "UTF-8"),
        ("UPDATE chunks SET start = 'x' WHERE id = 3", "a number"),
        ("UPDATE vectors SET vector = x'00' WHERE key % 1048576 = 3", "a vector's length"),
        ("UPDATE vectors SET vector = zeroblob(4) WHERE key % 1048576 = 3", "a vector's dimensions"),
        ("UPDATE meta SET value = 'x' WHERE key = 'generation'", "the generation"),
        ("UPDATE generations SET probe = x'00'", "the probe"),
        ("UPDATE generations SET embedder = '{'", "the embedder"),
        ("UPDATE documents SET characters = 'x' WHERE id = 3", "a count"),
    ],
)
def test_a_damaged_value_is_named_not_a_traceback(folder: Path, statement: str, what: str) -> None:
    with sqlite3.connect(folder / "kb" / "kb.sqlite") as connection:
        connection.execute(statement)
    connection.close()
    for file in caches(folder / "kb"):
        if file.name.startswith("f"):
            file.unlink()
    told = tell(folder / "kb")
    if not isinstance(told, str):
        assert told[2] or what in {"a count", "the embedder"}, what

"""Directories are replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.directories import replaced


def test_a_directory_takes_the_place_of_the_one_before_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    for content in ("old", "new"):
        with replaced(target) as folder:
            (folder / content).touch()
            assert not (target / content).exists()
        assert [path.name for path in target.iterdir()] == [content]
    assert list(target.parent.iterdir()) == [target]


def test_a_directory_stays_as_it_was_where_writing_fails(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(OSError, match="full"), replaced(target) as folder:
        (folder / "new").touch()
        raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "old").exists()


def test_what_a_kill_left_half_written_is_no_part_of_the_next(tmp_path: Path) -> None:
    (tmp_path / ".model").mkdir()
    (tmp_path / ".model" / "half").touch()
    with replaced(tmp_path / "model") as folder:
        (folder / "whole").touch()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["whole"]

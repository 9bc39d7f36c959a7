"""Cache files: replaced at once, never trusted when damaged."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from chains.caches import read_cache, write_cache

HEADER = {"revision": "abc", "generation": 1, "name": "中文"}
PAYLOAD = bytes(range(256)) * 4


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    path = tmp_path / "x.index"
    write_cache(path, HEADER, PAYLOAD)
    return path


def test_what_was_written_is_read_back(cache: Path) -> None:
    found = read_cache(cache)
    assert found is not None
    header, payload = found
    assert payload == PAYLOAD
    assert HEADER.items() <= header.items()


@pytest.mark.parametrize("payload", [b"", b"\n", b"RAGPROJ-CACHE-1\n{}\n"])
def test_any_payload_can_be_kept(tmp_path: Path, payload: bytes) -> None:
    write_cache(tmp_path / "c", {}, payload)
    found = read_cache(tmp_path / "c")
    assert found is not None
    assert found[1] == payload


def test_a_missing_cache_is_none_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_cache(tmp_path / "none") is None
    assert caplog.records == []


def test_a_second_write_replaces_the_first_and_leaves_nothing_beside(cache: Path) -> None:
    write_cache(cache, {"revision": "def"}, b"new")
    found = read_cache(cache)
    assert found is not None
    assert (found[0]["revision"], found[1]) == ("def", b"new")
    assert [path.name for path in cache.parent.iterdir()] == ["x.index"]


@pytest.mark.parametrize("keep", [0, 1, 15, 16, 17, 60, -1, -300])
def test_a_truncated_cache_is_none_and_says_so(cache: Path, keep: int, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_bytes(cache.read_bytes()[:keep])
    with caplog.at_level(logging.WARNING):
        assert read_cache(cache) is None
    assert "x.index" in caplog.text


def test_a_longer_cache_is_none(cache: Path) -> None:
    cache.write_bytes(cache.read_bytes() + b"\0")
    assert read_cache(cache) is None


def test_no_flipped_bit_goes_unnoticed(cache: Path) -> None:
    original = cache.read_bytes()
    logging.disable(logging.WARNING)
    try:
        for place in range(len(original)):
            damaged = bytearray(original)
            damaged[place] ^= 1 << (place % 8)
            cache.write_bytes(damaged)
            assert read_cache(cache) is None, f"byte {place}: {original[place]:#x}"
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("noise", [b"\0" * 900, b"\xff" * 900, b"RAGPROJ-CACHE-1\n[1]\n", b"RAGPROJ-CACHE-1\nnull\n"])
def test_noise_is_none(cache: Path, noise: bytes) -> None:
    cache.write_bytes(noise)
    assert read_cache(cache) is None


def test_a_folder_in_its_place_is_none(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    assert read_cache(tmp_path / "c") is None


def test_a_failed_write_leaves_the_old_file_and_nothing_beside(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_cache(cache, {"revision": "new"}, b"new")
    found = read_cache(cache)
    assert found is not None
    assert found[1] == PAYLOAD
    assert [path.name for path in cache.parent.iterdir()] == ["x.index"]

"""Paths into documents: which files, which metadata, which errors."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from langchain_core.documents import Document

from loaders.documents import SUPPORTED_SUFFIXES, LoaderConfig, find_files, load_documents, read_file
from loaders.errors import ConfigError, LoadError

Write = Callable[[str, str | bytes], Path]


def test_a_file_is_one_langchain_document(write: Write) -> None:
    path = write("制度.md", "# 总则\n\n正文")
    documents = list(load_documents(path, LoaderConfig()))
    assert documents == [
        Document(
            page_content="# 总则\n\n正文",
            metadata={
                "source": str(path),
                "title": "总则",
                "format": "md",
                "marks": [{"start": 0, "headings": ["总则"]}],
            },
        )
    ]


def test_the_source_is_the_path_as_given(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write("库/a.txt", "文字")
    monkeypatch.chdir(tmp_path)
    assert next(load_documents(Path("库/a.txt"))).metadata["source"] == "库/a.txt"


def test_errors_name_the_path_as_given(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write("a.txt", b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match=r"^a\.txt：文件里没有文字"):
        list(load_documents(Path("a.txt")))


def test_suffixes_are_compared_without_case(write: Write) -> None:
    assert next(load_documents(write("A.TXT", "文字"))).metadata["format"] == "txt"


def test_the_promised_suffixes_are_supported() -> None:
    promised = "txt md markdown html htm pdf docx pptx xlsx csv tsv json jsonl epub png jpg jpeg bmp tiff webp"
    assert {f".{suffix}" for suffix in promised.split()} <= SUPPORTED_SUFFIXES


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="找不到这个文件"):
        list(load_documents(tmp_path / "无.txt"))


def test_an_unsupported_suffix_lists_the_supported_ones(write: Write) -> None:
    with pytest.raises(LoadError, match=r"不支持 \.exe.*\.docx"):
        list(load_documents(write("a.exe", b"MZ")))


def test_a_folder_with_a_suffix_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(LoadError, match="不是普通文件"):
        list(load_documents(tmp_path / "a.txt"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(LoadError, match="不是普通文件"):
        list(load_documents(tmp_path / "a.txt"))


@pytest.mark.parametrize("suffix", sorted(SUPPORTED_SUFFIXES))
def test_an_empty_file_of_any_kind_has_no_text(suffix: str, write: Write) -> None:
    with pytest.raises(LoadError, match="没有文字"):
        list(load_documents(write(f"a{suffix}", b"")))


@pytest.mark.parametrize("suffix", sorted(SUPPORTED_SUFFIXES - {".txt", ".text", ".log"}))
def test_binary_noise_under_any_name_is_a_clear_error(suffix: str, write: Write) -> None:
    noise = bytes((i * 7919 + i * i * 31) % 256 for i in range(5000))
    with pytest.raises(LoadError, match="不是"):
        list(load_documents(write(f"a{suffix}", noise)))


@pytest.mark.parametrize("suffix", [".pdf", ".docx", ".pptx", ".xlsx", ".epub", ".png"])
def test_a_text_under_a_binary_name_is_a_clear_error(suffix: str, write: Write) -> None:
    with pytest.raises(LoadError, match="plain text"):
        list(load_documents(write(f"a{suffix}", "这只是一段文字")))


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_an_unreadable_file_says_so(write: Write) -> None:
    path = write("a.txt", "文字")
    path.chmod(0)
    with pytest.raises(LoadError, match="无法打开"):
        list(load_documents(path))


def test_loading_is_lazy_until_the_first_document(tmp_path: Path) -> None:
    documents = load_documents(tmp_path / "missing.txt")  # raises nothing yet
    with pytest.raises(LoadError, match="missing"):
        next(documents)


def test_strange_file_names_work(write: Write) -> None:
    for name in ("空 格.txt", "引'号\".txt", "新\n行.txt", "表情😀.txt", "-rf.txt"):
        assert next(load_documents(write(name, "文字"))).page_content == "文字"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems demand Unicode names")
def test_a_file_name_that_is_not_utf8_is_an_error_that_can_be_printed(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + "/中文.txt".encode("gbk")
    path = Path(os.fsdecode(raw))
    path.write_text("文字", encoding="utf-8")
    with pytest.raises(LoadError, match="重命名") as caught:
        list(load_documents(path))
    assert str(caught.value).encode()
    found = find_files([tmp_path])
    assert found.files == []
    assert [bad for bad, _ in found.errors] == [path]


def test_reading_here_gives_the_same_as_in_a_worker(write: Write) -> None:
    path = write("a.html", "<h1>题</h1><table><tr><td>a<td>b<tr><td>1<td>2</table>")
    here = [(parsed.text, parsed.metadata) for parsed in read_file(path, LoaderConfig())]
    there = [(document.page_content, document.metadata) for document in load_documents(path)]
    assert here == there


def test_progress_is_reported_per_block(write: Write) -> None:
    calls: list[None] = []
    list(read_file(write("a.md", "# 一\n甲\n# 二\n乙"), LoaderConfig(), on_progress=lambda: calls.append(None)))
    assert len(calls) >= 4


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="timeout_s"):
        LoaderConfig.from_dict({"timeout_s": 0}, where="test")
    with pytest.raises(ConfigError, match="ocr"):
        LoaderConfig.from_dict({"ocr": "yes"}, where="test")


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_a_folder_is_searched_below_and_sorted(write: Write, tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.pdf", "a/b/c.md", "x.exe", "a/y.zip"):
        write(name, "x")
    found = find_files([tmp_path])
    assert names(found.files) == ["c.md", "z.pdf", "b.txt"]
    assert names(found.unsupported) == ["y.zip", "x.exe"]
    assert found.errors == []


def test_what_programs_leave_behind_is_passed_over(write: Write, tmp_path: Path) -> None:
    for name in (".hidden.txt", ".git/a.txt", "__MACOSX/a.txt", "~$报告.docx", "Thumbs.db", "好.txt"):
        write(name, "x")
    found = find_files([tmp_path])
    assert names(found.files) == ["好.txt"]
    assert found.unsupported == []


def test_paths_given_by_name_are_reported_when_missing_or_unsupported(write: Write, tmp_path: Path) -> None:
    good, bad = write("a.txt", "x"), write("a.exe", "x")
    found = find_files([tmp_path / "missing.txt", bad, good])
    assert found.files == [good]
    assert [path for path, _ in found.errors] == [tmp_path / "missing.txt", bad]
    assert "找不到" in found.errors[0][1].zh
    assert "不支持" in found.errors[1][1].zh


def test_a_file_given_twice_is_found_once(write: Write, tmp_path: Path) -> None:
    path = write("a.txt", "x")
    assert find_files([path, tmp_path, path]).files == [path]


def test_an_empty_folder_is_nothing(tmp_path: Path) -> None:
    assert find_files([tmp_path]) == ([], [], [])


def test_links_to_folders_do_not_loop(write: Write, tmp_path: Path) -> None:
    write("a/b.txt", "x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert names(find_files([tmp_path]).files) == ["b.txt"]


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Without the rights of root, who may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter; pytest's own are for its user alone."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
@pytest.mark.parametrize("mode", [0o000, 0o444], ids=["cannot be listed", "can be listed, not entered"])
def test_a_folder_without_permission_is_one_error_and_the_others_are_found(mode: int, open_folder: Path) -> None:
    for name in ("closed/a.txt", "open/b.txt"):
        (open_folder / name).parent.mkdir()
        (open_folder / name).write_text("文字", encoding="utf-8")
    closed = open_folder / "closed"
    closed.chmod(mode)
    try:
        with nobody():
            found = find_files([open_folder])
            named = find_files([closed / "a.txt", open_folder / "open"])
    finally:
        closed.chmod(0o755)
    assert names(found.files) == names(named.files) == ["b.txt"]
    assert [path for path, _ in found.errors] == [closed if mode == 0 else closed / "a.txt"]
    assert [path for path, _ in named.errors] == [closed / "a.txt"]
    assert all("无法打开" in error.zh for _, error in [*found.errors, *named.errors])


def test_a_name_that_is_too_long_for_the_system_is_an_error_of_its_own(write: Write, tmp_path: Path) -> None:
    good, long = write("a.txt", "x"), tmp_path / ("长" * 200 + ".txt")
    found = find_files([long, good])
    assert found.files == [good]
    assert [path for path, _ in found.errors] == [long]


def test_a_link_to_nothing_is_nothing(write: Write, tmp_path: Path) -> None:
    good = write("a.txt", "x")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "circle.txt").symlink_to(tmp_path / "circle.txt")
    assert find_files([tmp_path]) == ([good], [], [])
    assert "找不到" in find_files([tmp_path / "a\0b.txt"]).errors[0][1].zh


def test_a_link_out_of_the_folder_is_an_error_and_one_inside_it_a_file(write: Write, tmp_path: Path) -> None:
    outside, inside = write("secret.txt", "x"), write("docs/a.txt", "x")
    (tmp_path / "docs" / "out.txt").symlink_to(outside)
    (tmp_path / "docs" / "sub").mkdir()
    (tmp_path / "docs" / "sub" / "in.txt").symlink_to(Path("..") / "a.txt")
    found = find_files([tmp_path / "docs"])
    assert names(found.files) == ["a.txt", "in.txt"]
    ((path, error),) = found.errors
    assert path == tmp_path / "docs" / "out.txt"
    assert str(outside) in error.zh
    assert str(outside) in error.en
    assert find_files([path]).files == [path], "who names the link means the file"
    (tmp_path / "docs-link").symlink_to(inside.parent, target_is_directory=True)
    assert "a.txt" in names(find_files([tmp_path / "docs-link"]).files), "the folder itself may be a link"

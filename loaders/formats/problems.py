"""The errors a document can end in, each worded once."""

from __future__ import annotations

import os
from pathlib import Path

from loaders.errors import LoadError


def missing(path: Path) -> LoadError:
    """The path does not exist."""
    return LoadError(f"{path}：找不到这个文件，请检查路径", f"{path}: no such file; check the path")


def badly_named(path: Path) -> LoadError:
    """The name is no text, so that nothing could store or show it."""
    shown = os.fsencode(path).decode("utf-8", errors="replace")
    return LoadError(f"{shown}：文件名不是 UTF-8 编码，请重命名", f"{shown}: the file name is not UTF-8; rename it")


def unreadable(path: Path, detail: str) -> LoadError:
    """The operating system refuses to open the path."""
    return LoadError(f"{path}：无法打开（{detail}）", f"{path}: cannot be opened ({detail})")


def leads_outside(path: Path, folder: Path) -> LoadError:
    """A link inside a folder to a file that is not in it."""
    return LoadError(
        f"{path}：符号链接指向文件夹 {folder} 之外，没有导入；需要的话请直接给出 {path.resolve()}",
        f"{path}: this symbolic link leads out of the folder {folder} and was left out; if it is wanted, give"
        f" {path.resolve()} itself",
    )


def unsupported(path: Path, supported: str) -> LoadError:
    """No reader for the suffix."""
    suffix = path.suffix or path.name
    return LoadError(
        f"{path}：不支持 {suffix} 格式，支持：{supported}", f"{path}: {suffix} is not supported; supported: {supported}"
    )


def not_what_it_says(path: Path, found: str) -> LoadError:
    """The content is of another kind than the suffix."""
    return LoadError(
        f"{path}：文件内容不是 {path.suffix} 格式，而像是 {found}；请改正扩展名或重新导出",
        f"{path}: the content is not {path.suffix} but looks like {found}; correct the suffix or export it again",
    )


def encrypted(path: Path) -> LoadError:
    """A password is needed."""
    return LoadError(
        f"{path}：文件已加密，请用密码打开并另存为不加密的副本后再导入",
        f"{path}: the file is encrypted; open it with its password, save a copy without one and load that",
    )


def damaged(path: Path, detail: str) -> LoadError:
    """The parser gave up."""
    return LoadError(
        f"{path}：文件已损坏或不完整，请重新导出（{detail}）",
        f"{path}: the file is damaged or incomplete; export it again ({detail})",
    )


def no_text(path: Path) -> LoadError:
    """Readable, but nothing in it."""
    return LoadError(f"{path}：文件里没有文字", f"{path}: the file has no text")


def needs_ocr(path: Path) -> LoadError:
    """Only pictures in it, and nothing installed that reads them."""
    return LoadError(
        f'{path}：内容是图片，需要文字识别，请先运行 pip install "ragproj[ocr]"',
        f'{path}: the content is an image and needs OCR; run pip install "ragproj[ocr]" first',
    )


def ocr_is_off(path: Path) -> LoadError:
    """Only pictures in it, and the config forbids reading them."""
    return LoadError(
        f"{path}：内容是图片，而配置关闭了文字识别（ocr: off），请改为 ocr: auto",
        f"{path}: the content is an image and the config turns OCR off; set ocr: auto",
    )


def too_large(path: Path, limit: str) -> LoadError:
    """Unpacked or parsed it passes a limit."""
    return LoadError(
        f"{path}：文件展开后超过上限 {limit}，请拆分后再导入，或在配置中调大 memory_mb",
        f"{path}: unpacked, the file passes the limit of {limit}; split it or raise memory_mb in the config",
    )


def too_slow(path: Path, seconds: float) -> LoadError:
    """The parser ran into its time limit."""
    return LoadError(
        f"{path}：解析超过 {seconds:g} 秒，已停止；请拆分文件，或在配置中调大 timeout_s",
        f"{path}: parsing took over {seconds:g} s and was stopped; split the file or raise timeout_s in the config",
    )


def crashed(path: Path, cause: str) -> LoadError:
    """The parsing process died."""
    return LoadError(
        f"{path}：解析进程意外退出（{cause}），文件可能已损坏，或展开后过大；请重新导出或拆分",
        f"{path}: the parser died ({cause}); the file may be damaged or too large; export it again or split it",
    )

"""Pictures of text; the recogniser itself runs only where the extra [ocr] is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loaders.errors import LoadError
from loaders.formats import images
from loaders.formats.blocks import Parsed

Write = Callable[[str, str | bytes], Path]
ReadOne = Callable[..., Parsed]
MakePdf = Callable[..., Path]
needs_ocr = pytest.mark.skipif(not images.ocr_installed(), reason="needs the extra [ocr]")


@pytest.fixture
def picture(tmp_path: Path) -> Callable[[str], Path]:
    def maker(name: str) -> Path:
        Image.new("RGB", (64, 32), "white").save(tmp_path / name)
        return tmp_path / name

    return maker


@pytest.fixture
def no_ocr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "ocr_installed", lambda: False)


@pytest.fixture
def fake_ocr(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recogniser that always reads the same: the way to it is under test, not the model."""
    monkeypatch.setattr(images, "ocr_installed", lambda: True)
    monkeypatch.setattr(images, "recognise", lambda image: f"认出 {image.width} 点宽")


def rendered_page(make_pdf: MakePdf, text: str) -> Image.Image:
    import pypdfium2

    path = make_pdf({"texts": [(40, 60, 28, text)], "size": (600, 120)}, name="source.pdf")
    with pypdfium2.PdfDocument(path) as document:
        return document[0].render(scale=2).to_pil()


@pytest.mark.usefixtures("no_ocr")
@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "tiff", "webp"])
def test_without_the_extra_an_image_says_what_to_install(suffix: str, picture: Any, read_one: ReadOne) -> None:
    with pytest.raises(LoadError, match=r'pip install "ragproj\[ocr\]"'):
        read_one(picture(f"a.{suffix}"))


def test_with_ocr_off_an_image_says_so(picture: Any, read_one: ReadOne) -> None:
    with pytest.raises(LoadError, match="ocr: off"):
        read_one(picture("a.png"), ocr="off")


@pytest.mark.usefixtures("fake_ocr")
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "webp"])
def test_every_kind_of_image_reaches_the_recogniser(suffix: str, picture: Any, read_one: ReadOne) -> None:
    assert read_one(picture(f"a.{suffix}")).text == "认出 64 点宽"


@pytest.mark.usefixtures("fake_ocr")
def test_the_frames_of_a_tiff_are_pages(tmp_path: Path, read_one: ReadOne) -> None:
    frames = [Image.new("RGB", (width, 20), "white") for width in (30, 40)]
    frames[0].save(tmp_path / "a.tiff", save_all=True, append_images=frames[1:])
    parsed = read_one(tmp_path / "a.tiff")
    assert parsed.text == "认出 30 点宽\n\n认出 40 点宽"
    assert [mark["page"] for mark in parsed.metadata["marks"]] == [1, 2]


@pytest.mark.usefixtures("fake_ocr")
def test_an_image_of_absurd_size_is_refused(monkeypatch: pytest.MonkeyPatch, picture: Any, read_one: ReadOne) -> None:
    monkeypatch.setattr(images, "_MAX_PIXELS", 100)
    with pytest.raises(LoadError, match="上限"):
        read_one(picture("a.png"))


@pytest.mark.usefixtures("fake_ocr")
def test_a_pdf_page_without_text_is_recognised_and_others_are_read(make_pdf: MakePdf, read_one: ReadOne) -> None:
    scan = {"lines": [(10, 10, 500, 500)]}
    parsed = read_one(make_pdf({"texts": [(72, 700, 12, "有文字层的第一页。")]}, scan))
    assert parsed.text.startswith("有文字层的第一页。\n\n认出")
    assert [mark["page"] for mark in parsed.metadata["marks"]] == [1, 2]


@pytest.mark.usefixtures("no_ocr")
def test_without_the_extra_a_pdf_with_some_text_loads_that(make_pdf: MakePdf, read_one: ReadOne) -> None:
    path = make_pdf({"texts": [(72, 700, 12, "有文字层的第一页。")]}, {"lines": [(10, 10, 500, 500)]})
    assert read_one(path).text == "有文字层的第一页。"


@pytest.mark.usefixtures("no_ocr")
def test_without_the_extra_a_scanned_pdf_says_what_to_install(make_pdf: MakePdf, read_one: ReadOne) -> None:
    with pytest.raises(LoadError, match=r'pip install "ragproj\[ocr\]"'):
        read_one(make_pdf({"lines": [(10, 10, 500, 500)]}))


def test_with_ocr_off_a_scanned_pdf_says_so(make_pdf: MakePdf, read_one: ReadOne) -> None:
    with pytest.raises(LoadError, match="ocr: off"):
        read_one(make_pdf({"lines": [(10, 10, 500, 500)]}), ocr="off")


def test_pieces_beside_each_other_make_one_line() -> None:
    def box(left: float, top: float) -> np.ndarray[Any, Any]:
        return np.array([[left, top], [left + 50, top], [left + 50, top + 20], [left, top + 20]])

    found = [(box(100, 12), "右"), (box(0, 50), "下"), (box(0, 10), "左")]
    assert images._rows(found) == ["左 右", "下"]


def test_a_damaged_image_is_no_text(write: Write, read_one: ReadOne, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "ocr_installed", lambda: True)
    with pytest.raises(LoadError, match="损坏"):
        read_one(write("a.png", b"\x89PNG\r\n\x1a\n" + bytes(50)))


@needs_ocr
@pytest.mark.slow
def test_chinese_print_is_recognised(make_pdf: MakePdf, tmp_path: Path, read_one: ReadOne) -> None:
    image = rendered_page(make_pdf, "劳动合同法 2023")
    if np.asarray(image.convert("L")).min() > 128:
        pytest.skip("no Chinese font on this machine to draw the test image with")
    image.save(tmp_path / "a.png")
    assert "2023" in read_one(tmp_path / "a.png").text.replace(" ", "")

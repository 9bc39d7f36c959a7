"""Pictures of text, read by RapidOCR where the extra [ocr] is installed."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from loaders.formats import problems
from loaders.formats.blocks import Block, Content
from loaders.formats.containers import expect
from loaders.text import join_broken_lines

_KINDS = ("PNG", "JPEG", "BMP", "TIFF", "WebP", "GIF")
_MAX_PIXELS = 100_000_000
_MAX_FRAMES = 200  # pages of a TIFF
_MIN_SCORE = 0.5  # RapidOCR's own default for a line


def read_image(path: Path, *, ocr: str) -> Content:
    """One block per frame (a TIFF may hold many pages)."""
    from PIL import Image, ImageSequence, UnidentifiedImageError

    expect(path, *_KINDS)
    if ocr == "off":
        raise problems.ocr_is_off(path)
    if not ocr_installed():
        raise problems.needs_ocr(path)
    try:
        opened = Image.open(path)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise problems.damaged(path, str(error).replace(str(path), path.name)) from None
    with opened as image:
        if image.width * image.height > _MAX_PIXELS:
            raise problems.too_large(path, f"{_MAX_PIXELS // 1_000_000} megapixels")
        frames = getattr(image, "n_frames", 1)
        blocks = []
        for number, frame in enumerate(ImageSequence.Iterator(image), start=1):
            if number > _MAX_FRAMES or (number > 1 and image.format == "GIF"):
                break
            blocks.append(Block(recognise(frame), place={"page": number} if frames > 1 else {}))
    return Content(blocks)


def ocr_installed() -> bool:
    """Whether the extra [ocr] is there."""
    return all(importlib.util.find_spec(name) is not None for name in ("rapidocr", "onnxruntime"))


def recognise(image: Any) -> str:
    """The text of a PIL image, lines from top to bottom, broken sentences joined."""
    import numpy as np

    result = _engine()(np.asarray(image.convert("RGB"))[:, :, ::-1])  # RapidOCR takes BGR
    if result.txts is None:
        return ""
    lines = zip(result.boxes, result.txts, result.scores, strict=True)
    found = [(box, text) for box, text, score in lines if score >= _MIN_SCORE]
    return join_broken_lines("\n".join(_rows(found)))


def _rows(found: list[tuple[Any, str]]) -> list[str]:
    """Texts that stand beside each other on one line, joined by a space; lines from top to bottom."""
    rows: list[tuple[float, list[tuple[float, str]]]] = []
    for box, text in sorted(found, key=lambda item: float(item[0][:, 1].mean())):
        middle, height = float(box[:, 1].mean()), float(box[:, 1].max() - box[:, 1].min())
        left = float(box[:, 0].min())
        if rows and middle - rows[-1][0] < height / 2:
            rows[-1][1].append((left, text))
        else:
            rows.append((middle, [(left, text)]))
    return [" ".join(text for _, text in sorted(row)) for _, row in rows]


@cache
def _engine() -> Any:
    from rapidocr import RapidOCR

    return RapidOCR()

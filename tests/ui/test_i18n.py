from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

from ui.i18n import STRINGS, Text, other, tr

UI = Path(__file__).resolve().parents[2] / "ui"


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize("key", STRINGS)
def test_every_string_exists_in_both_languages_with_the_same_placeholders(key: str) -> None:
    text = STRINGS[key]
    assert text.zh.strip()
    assert text.en.strip()
    assert placeholders(text.zh) == placeholders(text.en)


@pytest.mark.parametrize("key", sorted(set(STRINGS) - {"other_language"}))
def test_english_has_no_chinese_and_chinese_is_chinese(key: str) -> None:
    assert not re.search(r"[一-鿿。，：？]", STRINGS[key].en)
    assert re.search(r"[一-鿿]", STRINGS[key].zh)


@pytest.mark.parametrize("key", STRINGS)
def test_every_string_is_used(key: str) -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in UI.glob("*.py") if path.name != "i18n.py")
    assert re.search(rf"""["']{key}["']""", code)


def test_placeholders_are_filled() -> None:
    assert tr("page", "zh", page=3) == "第 3 页"
    assert tr("page", "en", page=3) == "page 3"


def test_the_switch_leads_to_the_other_language_and_names_it() -> None:
    assert other("zh") == "en"
    assert other("en") == "zh"
    assert STRINGS["other_language"] == Text("English", "中文")

"""Config classes: every problem at once, with its place and what is allowed there; overrides laid over a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, SecretStr, field_validator

from loaders.config import Config, apply_overrides, read_yaml
from loaders.errors import ConfigError, LoadError, RagProjError, UsageError


class Circle(Config):
    type: Literal["circle"] = Field(default="circle", alias="_type")
    radius: float = Field(default=1, gt=0)


class Square(Config):
    type: Literal["square"] = Field(default="square", alias="_type")
    side: int = 1
    key: SecretStr | None = None


Shape = Annotated[Circle | Square, Field(discriminator="type")]


class Frame(Config):
    colour: Literal["red", "blue"] = "red"
    inner: Shape = Field(default_factory=Circle)


class Picture(Config):
    name: str = Field(min_length=1)
    shape: Shape = Field(default_factory=Circle)
    frame: Frame = Field(default_factory=Frame)
    more: dict[str, Shape] = Field(default_factory=dict)
    folder: Path = Path("here")

    @field_validator("name")
    @classmethod
    def _no_braces(cls, value: str) -> str:
        if "{" in value:
            raise ValueError(f"{value} must not hold a brace")
        return value


def problems(data: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Picture.from_dict(data, where="my.yaml")
    return caught.value


# -- from_dict ---------------------------------------------------------------------------------------------------


def test_a_valid_config_is_frozen_and_filled_with_defaults() -> None:
    picture = Picture.from_dict({"name": "a", "shape": {"_type": "square", "side": 3}}, where="x")
    assert picture.shape == Square(side=3)
    assert picture.frame.inner == Circle()
    assert picture.folder == Path("here")
    with pytest.raises(ValueError, match="frozen"):
        picture.name = "b"  # type: ignore[misc]


def test_component_fields_can_be_given_by_their_python_name_too() -> None:
    assert Square(type="square", side=2) == Square.model_validate({"_type": "square", "side": 2})


def test_every_problem_is_reported_at_once_with_its_place() -> None:
    error = problems(
        {
            "shape": {"_type": "circle", "radius": -1},
            "frame": {"colour": "green", "inner": {"_type": "square", "side": "many"}},
            "extra": 1,
        }
    )
    for text in (error.zh, error.en):
        assert "my.yaml" in text
        for place in ("name", "shape.radius", "frame.colour", "frame.inner.side", "extra"):
            assert f"{place}：" in text or f"{place}: " in text
    assert error.en.startswith("5 error(s)")
    assert "有 5 处错误" in error.zh


def test_an_unknown_key_lists_the_keys_of_its_own_level() -> None:
    assert "extra: unknown key; known keys: folder, frame, more, name, shape" in problems({"name": "a", "extra": 1}).en
    nested = problems({"name": "a", "frame": {"inner": {"_type": "square", "radius": 2}}})
    assert nested.en.endswith("frame.inner.radius: unknown key; known keys: _type, key, side")
    assert nested.zh.endswith("frame.inner.radius：没有这个键，可用的键：_type, key, side")


def test_an_unknown_type_lists_the_components() -> None:
    error = problems({"name": "a", "shape": {"_type": "line"}})
    assert "shape: _type is 'line'; allowed: circle, square" in error.en
    assert "可用的值：circle, square" in error.zh


def test_a_missing_type_lists_the_components_where_there_is_no_default() -> None:
    error = problems({"name": "a", "more": {"mine": {"side": 2}}})
    assert "more.mine: " in error.en
    assert "circle, square" in error.en


def test_a_missing_type_is_the_defaults() -> None:
    picture = Picture.from_dict({"name": "a", "shape": {"radius": 2}, "frame": {"inner": {"radius": 3}}}, where="x")
    assert picture.shape == Circle(radius=2)
    assert picture.frame.inner == Circle(radius=3)
    other = problems({"name": "a", "shape": {"side": 2}, "frame": {"inner": {"side": 2}}})
    for place in ("shape", "frame.inner"):
        assert f"{place}: _type is missing; allowed: circle, square" in other.en


def test_a_missing_type_of_a_required_component_is_named() -> None:
    class Needs(Config):
        shape: Shape

    with pytest.raises(ConfigError, match="circle, square"):
        Needs.from_dict({"shape": {"radius": 2}}, where="x")


def test_a_value_outside_its_list_shows_the_list() -> None:
    error = problems({"name": "a", "frame": {"colour": "green"}})
    assert "frame.colour: 'green' is not" in error.en
    assert error.en.endswith("'red' or 'blue'")
    assert "frame.colour：值为 'green'，可用的值：'red' or 'blue'" in error.zh


@pytest.mark.parametrize(
    ("data", "place", "zh"),
    [
        ({"name": ""}, "name", "至少 1 个字符"),
        ({"name": 5}, "name", "应为字符串"),
        ({"name": "a", "shape": {"_type": "circle", "radius": 0}}, "shape.radius", "应大于 0.0"),
        ({"name": "a", "shape": {"_type": "circle", "radius": "wide"}}, "shape.radius", "应为数字"),
        ({"name": "a", "shape": {"_type": "square", "side": 1.5}}, "shape.side", "应为整数"),
        ({"name": "a", "shape": {"_type": "square", "side": "{}"}}, "shape.side", "应为整数"),
        ({"name": "a", "folder": 3}, "folder", "应为路径"),
        ({"name": "a", "frame": "red"}, "frame", "应为键值对"),
        ({"name": "a", "frame": None}, "frame", "应为键值对"),
        ({"name": "a", "shape": "circle"}, "shape", "应为键值对"),
        ({}, "name", "缺少这个键"),
    ],
)
def test_common_mistakes_are_named_in_chinese(data: dict[str, Any], place: str, zh: str) -> None:
    error = problems(data)
    assert f"{place}：" in error.zh
    assert zh in error.zh
    assert f"{place}: " in error.en


@pytest.mark.parametrize("name", ["mine", "circle", "square"])
def test_a_problem_below_a_named_component_keeps_the_name(name: str) -> None:
    error = problems({"name": "a", "more": {name: {"_type": "circle", "side": 1}}})
    assert f"more.{name}.side: unknown key; known keys: _type, radius" in error.en


def test_a_validators_message_may_hold_braces() -> None:
    assert "{red} must not hold a brace" in problems({"name": "{red}"}).en


@pytest.mark.parametrize(
    "shape",
    [
        {"side": 2, "key": "sk-secret"},
        {"_type": "square", "key": ["sk-secret"]},
        {"_type": "circle", "key": "sk-secret"},
        {"_type": "line", "key": "sk-secret"},
    ],
)
def test_a_secret_is_never_printed(shape: dict[str, Any]) -> None:
    error = problems({"name": "a", "shape": shape})
    assert "sk-secret" not in str(error)


def test_keys_that_are_no_strings_are_named() -> None:
    assert "1: " in problems({"name": "a", 1: 2}).en  # type: ignore[dict-item]


def test_errors_are_kinds_of_usage_error_and_carry_both_languages() -> None:
    error = problems({})
    assert isinstance(error, UsageError)
    assert str(error) == f"{error.zh} / {error.en}"
    assert issubclass(LoadError, RagProjError)
    assert not issubclass(LoadError, UsageError)


# -- read_yaml ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", {}),
        ("# only a comment\n", {}),
        ("a: 1\nb: {c: 中文}\n", {"a": 1, "b": {"c": "中文"}}),
        ("\ufeffa: 1\n", {"a": 1}),  # Windows Notepad
        ("a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
    ],
)
def test_a_mapping_is_read(tmp_path: Path, content: str, expected: dict[str, Any]) -> None:
    (tmp_path / "c.yaml").write_text(content, encoding="utf-8", newline="")
    assert read_yaml(tmp_path / "c.yaml") == expected


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"找不到配置文件 .*none\.yaml"):
        read_yaml(tmp_path / "none.yaml")


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"- 1\n- 2\n", "must be a mapping, got list"),
        (b"just text", "must be a mapping, got str"),
        (b"a: [1\n", "not valid YAML"),
        (b"a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        (b"a: &x {b: *y}\n", "not valid YAML"),
        (b"a: \x00\n", "not valid YAML"),
        ("名: 值".encode("gbk"), "cannot read"),
        (b"when: 2024-13-45\n", "not valid YAML"),
        (b"n: !!int many\n", "not valid YAML"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused_by_name(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_yaml(path)
    assert str(path) in caught.value.zh
    assert str(path) in caught.value.en


# -- apply_overrides ---------------------------------------------------------------------------------------------


def test_overrides_are_yaml_values_laid_over_a_copy() -> None:
    data = {"a": 1, "b": {"c": 2, "d": 3}}
    merged = apply_overrides(data, ["a=2", "b.c=true", "e.f.g=[x, 中]", "h=", "u=http://x:1/v1?k=v", 's="5"'])
    assert merged == {
        "a": 2,
        "b": {"c": True, "d": 3},
        "e": {"f": {"g": ["x", "中"]}},
        "h": None,
        "u": "http://x:1/v1?k=v",
        "s": "5",
    }
    assert data == {"a": 1, "b": {"c": 2, "d": 3}}


def test_a_later_override_wins() -> None:
    assert apply_overrides({}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


def test_another_type_drops_the_fields_of_the_old_one() -> None:
    data = {"shape": {"_type": "circle", "radius": 2}}
    assert apply_overrides(data, ["shape._type=square"]) == {"shape": {"_type": "square"}}
    assert apply_overrides(data, ["shape._type=square", "shape.side=3"]) == {"shape": {"_type": "square", "side": 3}}


def test_the_same_type_again_keeps_the_fields() -> None:
    data = {"shape": {"_type": "circle", "radius": 2}}
    assert apply_overrides(data, ["shape._type=circle"]) == data


def test_the_order_of_type_and_field_overrides_does_not_matter() -> None:
    data = {"shape": {"_type": "circle", "radius": 2}}
    assert apply_overrides(data, ["shape.side=3", "shape._type=square"]) == {"shape": {"_type": "square", "side": 3}}


def test_an_override_through_a_plain_value_replaces_it() -> None:
    assert apply_overrides({"a": 1}, ["a.b=2"]) == {"a": {"b": 2}}


def test_every_malformed_override_is_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides({}, ["good=1", "bare", "=1", "a..b=1", ".a=1", "x=[1", "y={"])
    for text in (caught.value.zh, caught.value.en):
        for wrong in ("'bare'", "'=1'", "'a..b=1'", "'.a=1'", "'x=[1'", "'y={'"):
            assert wrong in text
        assert "good" not in text


def test_an_override_that_yaml_reads_as_an_impossible_date_is_listed() -> None:
    with pytest.raises(ConfigError, match="2024-13-45"):
        apply_overrides({}, ["folder=2024-13-45"])


def test_no_overrides_give_an_equal_copy() -> None:
    data = {"a": {"b": [1]}}
    copy = apply_overrides(data, [])
    assert copy == data
    copy["a"]["b2"] = 1
    assert "b2" not in data["a"]

"""Config classes and the YAML they are read from: strict, frozen, every problem reported at once."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from loaders.errors import ConfigError


# pydantic's error types in Chinese; its own English message stands beside
_EXPECTED = {
    "bool_parsing": "应为 true 或 false",
    "bool_type": "应为 true 或 false",
    "dict_type": "应为键值对",
    "float_parsing": "应为数字",
    "float_type": "应为数字",
    "greater_than": "应大于 {gt}",
    "greater_than_equal": "应不小于 {ge}",
    "int_from_float": "应为整数",
    "int_parsing": "应为整数",
    "int_type": "应为整数",
    "less_than": "应小于 {lt}",
    "less_than_equal": "应不大于 {le}",
    "model_attributes_type": "应为键值对",
    "model_type": "应为键值对",
    "path_type": "应为路径",
    "string_too_short": "至少 {min_length} 个字符",
    "string_type": "应为字符串",
}


class Config(BaseModel):
    """Base of every config class: frozen, unknown keys are errors, `_type` names the component."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, validate_default=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str) -> Self:
        """The validated config.

        Args:
            data: plain YAML data.
            where: file name or other origin, for messages.

        Raises:
            ConfigError: lists every problem, each with its place, its value and what is allowed there.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = [_describe(cls, dict(item)) for item in error.errors(include_url=False)]
        zh = "；".join(zh for zh, _ in problems)
        en = "; ".join(en for _, en in problems)
        raise ConfigError(
            f"配置 {where} 有 {len(problems)} 处错误：{zh}", f"{len(problems)} error(s) in config {where}: {en}"
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file (empty for an empty file).

    Raises:
        ConfigError: the file is missing, not UTF-8, not YAML, or its top level is not a mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"找不到配置文件 {path}，请检查路径", f"config file {path} does not exist; check the path"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"无法读取配置文件 {path}：{error}", f"cannot read config file {path}: {error}") from None
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise ConfigError(
            f"配置文件 {path} 不是合法的 YAML：{detail}", f"config file {path} is not valid YAML: {detail}"
        ) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"配置文件 {path} 的最外层应为键值对，实际是 {type(data).__name__}",
            f"the top level of config file {path} must be a mapping, got {type(data).__name__}",
        )
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with `key.sub=value` overrides laid over it; values are read as YAML.

    Raises:
        ConfigError: an override has no "=", an empty key, or a value that is not YAML; all are listed.
    """
    merged = _copy(data)
    problems: list[str] = []
    for override in overrides:
        key, equals, raw = override.partition("=")
        names = key.split(".")
        if not equals or not all(names):
            problems.append(f"{override!r}: key.sub=value")
            continue
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError as error:
            problems.append(f"{override!r}: {' '.join(str(error).split())}")
            continue
        node = merged
        for name in names[:-1]:
            child = node.get(name)
            if not isinstance(child, dict):
                child = node[name] = {}
            node = child
        if names[-1] == "_type" and node.get("_type") != value:
            node.clear()  # another component has other fields
        node[names[-1]] = value
    if problems:
        listed = "; ".join(problems)
        raise ConfigError(
            f"命令行覆盖项写法应为 键.子键=值：{listed}", f"overrides are written key.sub=value: {listed}"
        )
    return merged


def _copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in data.items()}


def _describe(model: type[BaseModel], error: dict[str, Any]) -> tuple[str, str]:
    """One pydantic problem as (Chinese, English), with the values allowed at its place."""
    place, fields = _locate(model, error["loc"])
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = ", ".join(sorted(fields))
        return f"{place}：没有这个键，可用的键：{allowed}", f"{place}: unknown key; known keys: {allowed}"
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        allowed = context.get("expected_tags", "").replace("'", "") or "_type"
        given = context.get("tag", value)
        return (
            f"{place}：_type 为 {given!r}，可用的值：{allowed}",
            f"{place}: _type is {given!r}; allowed: {allowed}",
        )
    if kind == "missing":
        return f"{place}：缺少这个键", f"{place}: required key is missing"
    if kind == "literal_error":
        return (
            f"{place}：值为 {value!r}，可用的值：{context['expected']}",
            f"{place}: {value!r} is not one of {context['expected']}",
        )
    zh = _EXPECTED.get(kind, error["msg"]).format(**context)
    return f"{place}：值为 {value!r}，{zh}", f"{place}: {value!r}: {error['msg']}"


def _locate(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, set[str]]:
    """Dotted place of a problem (union tags left out) and the field names known beside it."""
    names: list[str] = []
    current: type[BaseModel] | None = model
    known = _field_names(model)
    candidates: dict[str, type[BaseModel]] = {}
    for part in loc:
        if part in candidates:  # the tag pydantic inserts for a discriminated union
            current, candidates = candidates[str(part)], {}
            known = _field_names(current)
            continue
        names.append(str(part))
        known = _field_names(current) if current is not None else known
        field = _field(current, str(part))
        candidates = _models_in(field)
        current = next(iter(candidates.values())) if len(candidates) == 1 else None
    return ".".join(names) or "(top)", known


def _field_names(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def _field(model: type[BaseModel] | None, key: str) -> FieldInfo | None:
    if model is None:
        return None
    return next((f for name, f in model.model_fields.items() if key in (name, f.alias)), None)


def _models_in(field: FieldInfo | None) -> dict[str, type[BaseModel]]:
    """Config classes a field may hold, by their `_type` tag (or class name without one)."""
    if field is None:
        return {}
    members = [field.annotation]
    found: dict[str, type[BaseModel]] = {}
    while members:
        member = members.pop()
        if typing.get_origin(member) in {typing.Union, types.UnionType, typing.Annotated, list, tuple, dict}:
            members.extend(typing.get_args(member))
        elif isinstance(member, type) and issubclass(member, BaseModel):
            tag = member.model_fields.get("type")
            found[str(tag.default) if tag is not None else member.__name__] = member
    return found

"""Config classes and the YAML they are read from: strict, frozen, every problem reported at once."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError, model_validator
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

    @model_validator(mode="before")
    @classmethod
    def _default_types(cls, data: Any) -> Any:
        """A section without `_type` means the default component: one key of it can be set alone."""
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        for name, field in cls.model_fields.items():
            section = data.get(field.alias or name)
            if not isinstance(section, dict) or "_type" in section:
                continue
            if field.discriminator and not field.is_required():
                default = field.get_default(call_default_factory=True, validated_data={})
                if set(section) <= _field_names(type(default)):
                    filled[field.alias or name] = {"_type": default.type, **section}
        return filled

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
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
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
    # `_type` first: it clears the fields of the component it replaces
    for override in sorted(overrides, key=lambda text: not text.partition("=")[0].endswith("_type")):
        key, equals, raw = override.partition("=")
        names = key.split(".")
        if not equals or not all(names):
            problems.append(f"{override!r}: key.sub=value")
            continue
        try:
            value = yaml.safe_load(raw)
        except (yaml.YAMLError, ValueError) as error:
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


@dataclass(frozen=True)
class _Place:
    """Where in a config a problem stands."""

    name: str
    """dotted keys"""
    keys: set[str]
    """known beside it"""
    tags: list[str]
    """allowed as `_type`, where it holds a union"""
    secret: bool
    """whether its value must not be shown"""


def _describe(model: type[BaseModel], error: dict[str, Any]) -> tuple[str, str]:
    """One pydantic problem as (Chinese, English), with the values allowed at its place."""
    place = _locate(model, error["loc"])
    name, kind, context = place.name, error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = ", ".join(sorted(place.keys))
        return f"{name}：没有这个键，可用的键：{allowed}", f"{name}: unknown key; known keys: {allowed}"
    if kind == "union_tag_not_found":
        allowed = ", ".join(place.tags)
        return f"{name}：缺少 _type，可用的值：{allowed}", f"{name}: _type is missing; allowed: {allowed}"
    if kind == "union_tag_invalid":
        tag, allowed = context["tag"], ", ".join(place.tags)
        return f"{name}：_type 为 {tag!r}，可用的值：{allowed}", f"{name}: _type is {tag!r}; allowed: {allowed}"
    if kind == "missing":
        return f"{name}：缺少这个键", f"{name}: required key is missing"
    value = _shown(error["input"], place.secret)
    if kind == "literal_error":
        return f"{name}：值为 {value}，可用的值：{context['expected']}", f"{name}: {value} is not {context['expected']}"
    zh = _EXPECTED[kind].format(**context) if kind in _EXPECTED else error["msg"]
    return f"{name}：值为 {value}，{zh}", f"{name}: {value}: {error['msg']}"


def _shown(value: object, secret: bool) -> str:
    """A value for a message: passwords and keys, which may also stand inside a mapping, are never shown."""
    if secret:
        return "******"
    return "{…}" if isinstance(value, dict | list) else repr(value)


def _locate(model: type[BaseModel], loc: tuple[int | str, ...]) -> _Place:
    names: list[str] = []
    current: type[BaseModel] | None = model
    keys = _field_names(model)
    candidates: dict[str, type[BaseModel]] = {}
    secret = by_name = False
    for part in loc:
        if by_name:  # the name of an entry of dict[str, Config]; its value is one of the candidates
            by_name = False
        elif part in candidates:  # the tag pydantic inserts for a discriminated union
            current, candidates = candidates[str(part)], {}
            keys = _field_names(current)
            continue
        else:
            field = _field(current, str(part))
            candidates = _models_in(field)
            secret = field is not None and SecretStr in _members(field.annotation)
            by_name = field is not None and any(typing.get_origin(m) is dict for m in _members(field.annotation))
        names.append(str(part))
        if current is not None:
            keys = _field_names(current)
        current = next(iter(candidates.values())) if len(candidates) == 1 and not by_name else None
    return _Place(".".join(names) or "(top)", keys, sorted(candidates), secret)


def _field_names(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def _field(model: type[BaseModel] | None, key: str) -> FieldInfo | None:
    if model is None:
        return None
    return next((f for name, f in model.model_fields.items() if key in (name, f.alias)), None)


def _models_in(field: FieldInfo | None) -> dict[str, type[BaseModel]]:
    """Config classes a field may hold, by their `_type` tag (or class name without one)."""
    found: dict[str, type[BaseModel]] = {}
    for member in _members(None if field is None else field.annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            tag = member.model_fields.get("type")
            found[str(tag.default) if tag is not None else member.__name__] = member
    return found


def _members(annotation: Any) -> list[Any]:
    """An annotation and everything it is made of: unions, `Annotated`, containers."""
    return [annotation, *(inner for part in typing.get_args(annotation) for inner in _members(part))]

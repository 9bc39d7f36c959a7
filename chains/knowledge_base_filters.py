"""Metadata filters: which chunks a search may find, by what their documents and they themselves say of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loaders.errors import UsageError

MetadataFilter = Mapping[str, Any] | Callable[[Mapping[str, Any]], bool]


def matches(metadata: Mapping[str, Any], condition: MetadataFilter) -> bool:
    """Whether metadata matches a filter.

    A mapping asks for equality; a list of values for any of them; a metadata list matches where it holds one.
    """
    if callable(condition):
        return bool(condition(metadata))
    for key, value in condition.items():
        held = metadata.get(key)
        values = held if isinstance(held, list) else [held]
        if key not in metadata or not set(allowed_values(key, value)) & {
            v for v in values if isinstance(v, str | int | float)
        }:
            return False
    return True


def holds(column: str, values: Sequence[Any]) -> str:
    """The condition, in SQL, that a column of JSON has a key with one of the values; binds the key, then the values."""
    return (
        f"EXISTS (SELECT 1 FROM json_each({column}) field,"
        " json_each(CASE field.type WHEN 'array' THEN field.value ELSE json_array(field.value) END) entry"
        f" WHERE field.key = ? AND entry.value IN ({','.join('?' * len(values))}))"
    )


def allowed_values(key: str, value: object) -> list[str | int | float]:
    """The values a filter's key may have.

    Raises:
        UsageError: one is no string, number or boolean.
    """
    values = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
    usable = [entry for entry in values if isinstance(entry, str | int | float)]
    if len(usable) < len(values):
        raise UsageError(
            f"过滤条件 {key} 的值应为字符串、数字或布尔值，实际是 {value!r}",
            f"the value of filter {key} must be a string, number or boolean, got {value!r}",
        )
    return usable

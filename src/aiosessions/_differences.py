"""The difference between a value and the value that its encoded form decodes to."""

import dataclasses
from collections.abc import Iterable
from datetime import datetime, time
from typing import Any, cast


def change(before: Any, after: Any) -> tuple[str, str] | None:
    """Find the first change in a value that has come back, and its path.

    Returns None for values that are unequal only because a list stands for a tuple, because a NaN
    does not equal itself, or because their type has no equality.

    The path has names of fields and indices of lists. It has `[...]` for the key of a dict, as
    msgspec does, because a key is payload: it may be an e-mail address or a token.
    """
    if type(before) is tuple and isinstance(after, list):
        before = list(before)
        if before == after:  # in C, for the sake of long lists of tuples
            return None
    parts = _parts(before, after)
    if parts is None:
        if _is_same(before, after):
            return None
        return f"`{type(before).__name__}` comes back as `{type(after).__name__}`", ""
    if isinstance(before, dict):
        for key in before:
            if key not in after:
                return f"a key of type `{type(key).__name__}` does not come back", ""
    for step, old, new in parts:
        if old != new and (found := change(old, new)) is not None:
            what, path = found
            return what, f"[{step}]{path}" if isinstance(step, int) else f"{step}{path}"
    return None


def _parts(before: Any, after: Any) -> Iterable[tuple[str | int, Any, Any]] | None:
    """Pair the parts of two values of the same type, each with its step of the path."""
    if isinstance(before, list | tuple) and isinstance(before, type(after)):
        return zip(range(len(before)), before, after, strict=True)
    if isinstance(before, dict) and isinstance(before, type(after)):
        return (("[...]", value, after[key]) for key, value in before.items())
    fields = field_names(type(before)) if type(before) is type(after) else None
    if fields is None:
        return None
    return ((f".{name}", getattr(before, name), getattr(after, name)) for name in fields)


def field_names(kind: Any) -> tuple[str, ...] | None:
    """The names of the fields of a struct, a dataclass or an attrs class, else None."""
    if hasattr(kind, "__struct_fields__"):
        return cast("tuple[str, ...]", kind.__struct_fields__)
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    if hasattr(kind, "__attrs_attrs__"):
        return tuple(attribute.name for attribute in kind.__attrs_attrs__)
    return None


def _is_same(before: Any, after: Any) -> bool:
    """Whether a value without parts has come back as it was, although the two are unequal."""
    if type(before) is not type(after):
        return False
    if isinstance(before, datetime):
        # In the hour that a change of clocks repeats, == is always false; see PEP 495.
        return not before - after
    # A NaN does not equal itself, and a data type may recompute its fields when it is decoded.
    return not isinstance(before, set | frozenset | time)

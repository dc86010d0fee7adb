"""Fields of stored data that a data type does not know, because a newer release has written them.

A release that saves a session writes the fields that it knows. This module adds the other ones,
from the payload that the session was decoded from.

Invariants:

- Only objects of structs, dataclasses, TypedDicts and attrs classes have unknown fields. Each key
  of a dict is known, so a key that an application has removed stays removed.
- A part that the application has not changed keeps its stored bytes. Values of unknown fields keep
  theirs everywhere, so numbers, timestamps and extension types stay exact.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from msgspec import Raw, inspect


@dataclass(slots=True)
class Shape:
    """The places in a type where stored data may have unknown fields.

    A type has a shape if it contains a struct, a dataclass, a TypedDict or an attrs class. msgspec
    allows one object-like and one array-like type in a union, and several structs with tags.

    Attributes:
        tag_field: The field with the tag of a struct, if it has one.
        structs: For each tag (None without one), the names of the fields and their shapes.
        values: The shape of the values of a dict.
        items: The shape of the items of a list.
        positions: The shapes of the items of a tuple with a fixed length.
    """

    tag_field: str | None = None
    structs: dict[Any, dict[str, "Shape | None"]] = field(default_factory=dict)
    values: "Shape | None" = None
    items: "Shape | None" = None
    positions: list["Shape | None"] = field(default_factory=list)


def shape_of(data_type: object) -> Shape | None:
    """The shape of a type, or None if nothing in it can have unknown fields."""
    return _shape(inspect.type_info(data_type), {})


def _shape(info: Any, known: dict[int, dict[str, Shape | None]]) -> Shape | None:
    shape = Shape()
    _add(shape, info, known)
    parts = (shape.values, shape.items, *shape.positions)
    return shape if shape.structs or any(part is not None for part in parts) else None


def _add(shape: Shape, info: Any, known: dict[int, dict[str, Shape | None]]) -> None:
    """Add the places of one type to a shape; `known` has the fields of types, some recursive."""
    if isinstance(info, inspect.Metadata):
        _add(shape, info.type, known)
    elif isinstance(info, inspect.UnionType):
        for each in info.types:
            _add(shape, each, known)
    elif isinstance(info, inspect.DataclassType | inspect.TypedDictType | inspect.StructType):
        if getattr(info, "array_like", False):
            return
        if id(info) not in known:
            fields = known[id(info)] = {}
            for one in info.fields:
                fields[one.encode_name] = _shape(one.type, known)
        shape.tag_field = getattr(info, "tag_field", None)
        shape.structs[getattr(info, "tag", None)] = known[id(info)]
    else:
        _add_items(shape, info, known)


def _add_items(shape: Shape, info: Any, known: dict[int, dict[str, Shape | None]]) -> None:
    # Sets are left out, because their order says nothing about their items.
    if isinstance(info, inspect.ListType | inspect.VarTupleType):
        shape.items = _shape(info.item_type, known)
    elif isinstance(info, inspect.TupleType):
        shape.positions = [_shape(each, known) for each in info.item_types]
    elif isinstance(info, inspect.NamedTupleType):
        shape.positions = [_shape(each.type, known) for each in info.fields]
    elif hasattr(info, "value_type"):  # dicts of any kind
        shape.values = _shape(info.value_type, known)


class _Decoder(Protocol):
    def decode(self, buf: Raw, /) -> Any: ...


class Keeper:
    """Adds the unknown fields of an old payload to a new one.

    Args:
        shape: The shape of the payloads.
        decoder: Decodes an object or an array, one level deep, to `Raw` values.
        decode: Decodes a value to builtins.
        encode: Encodes dicts and lists of `Raw` values.
    """

    def __init__(
        self,
        shape: Shape,
        decoder: _Decoder,
        decode: Callable[[Raw], Any],
        encode: Callable[[Any], bytes],
    ) -> None:
        self._shape = shape
        self._decoder = decoder
        self._decode = decode
        self._encode = encode

    def keep(self, old: bytes, known: bytes, new: bytes) -> bytes:
        """Return the new payload with the unknown fields of the old one.

        Args:
            old: The payload that the session was decoded from.
            known: The known part of `old`: decoded and encoded again.
            new: The payload of the changed session.
        """
        return bytes(self._merge(self._shape, Raw(old), Raw(known), Raw(new)))

    def _merge(self, shape: Shape, old: Raw, known: Raw, new: Raw) -> Raw:
        if known == new:
            return old
        try:
            parts = [self._decoder.decode(each) for each in (old, known, new)]
        except msgspec.ValidationError:  # neither objects nor arrays: nothing inside
            return new
        merge: Callable[..., dict[Any, Raw] | list[Raw] | None]
        if all(isinstance(each, dict) for each in parts):
            merge = self._merge_structs if shape.structs else self._merge_dicts
        elif all(isinstance(each, list) for each in parts) and len(parts[0]) == len(parts[1]):
            merge = self._merge_lists
        else:
            return new
        return Raw(self._encode(merged)) if (merged := merge(shape, *parts)) else new

    def _merge_structs(
        self, shape: Shape, old: dict[str, Raw], known: dict[str, Raw], new: dict[str, Raw]
    ) -> dict[str, Raw] | None:
        tag = None
        if shape.tag_field is not None:
            if known.get(shape.tag_field) != new.get(shape.tag_field):
                return None  # another struct, which has other fields
            tag = self._decode(known[shape.tag_field])
        fields = shape.structs[tag]
        merged = dict(new)
        for name, value in old.items():
            if name not in fields:
                merged.setdefault(name, value)
            elif name in new and name in known and (inner := fields[name]) is not None:
                merged[name] = self._merge(inner, value, known[name], new[name])
        return merged

    def _merge_dicts(
        self, shape: Shape, old: dict[Any, Raw], known: dict[Any, Raw], new: dict[Any, Raw]
    ) -> dict[Any, Raw] | None:
        if shape.values is None:
            return None
        return {
            key: self._merge(shape.values, old[key], known[key], value)
            if key in old and key in known
            else value
            for key, value in new.items()
        }

    def _merge_lists(
        self, shape: Shape, old: list[Raw], known: list[Raw], new: list[Raw]
    ) -> list[Raw] | None:
        merged = list(new)
        if shape.items is not None:
            for index, before in _partners(known, new).items():
                merged[index] = self._merge(shape.items, old[before], known[before], new[index])
        else:
            # The lengths differ where fields of a named tuple have their defaults.
            places = zip(shape.positions, old, known, new, strict=False)
            for index, (inner, *values) in enumerate(places):
                if inner is not None:
                    merged[index] = self._merge(inner, *values)
        return merged


def _partners(old: list[Raw], new: list[Raw]) -> dict[int, int]:
    """Map the indices of new items to those of old ones: equal items first, then by place."""
    pairs = enumerate(zip(old, new, strict=False))
    partners = {index: index for index, (before, after) in pairs if before == after}
    free: dict[bytes, list[int]] = {}
    for index in reversed(range(len(old))):
        if index not in partners:
            free.setdefault(bytes(old[index]), []).append(index)
    for index, item in enumerate(new):
        if index not in partners and (equal := free.get(bytes(item))):
            partners[index] = equal.pop()
    if len(old) == len(new):
        rest = set(range(len(old))).difference(partners.values())
        partners |= {index: index for index in rest if index not in partners}
    return partners

"""The changes that a request makes to a session, found by comparing encodings.

Data is compared by its top-level parts: the keys of a dict, or the fields of a struct, a dataclass
or an attrs class. Other data is one part. A nested change is a change of its part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgspec

_WHOLE = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The encoded parts of a session's data and metadata at one moment."""

    data: Mapping[str, bytes]
    metadata: Mapping[str, bytes]

    @classmethod
    def of(cls, data: Any, metadata: Mapping[str, str]) -> "Snapshot":
        """Take the snapshot of data and metadata."""
        return cls(_encoded(_parts(data)), _encoded(metadata))


class Changes:
    """The parts that were set or removed since a snapshot.

    Args:
        before: The snapshot.
        data: The data now.
        metadata: The metadata now.
    """

    def __init__(self, before: Snapshot, data: Any, metadata: dict[str, str]) -> None:
        now = Snapshot.of(data, metadata)
        self._data, self._metadata = data, metadata
        self._set = _different(now.data, before.data)
        self._removed = before.data.keys() - now.data.keys()
        self._metadata_set = _different(now.metadata, before.metadata)
        self._metadata_removed = before.metadata.keys() - now.metadata.keys()

    def __bool__(self) -> bool:
        return bool(self._set or self._removed or self._metadata_set or self._metadata_removed)

    def apply(self, data: Any, metadata: dict[str, str]) -> Any:
        """Set and remove the same parts in other data, and return that data."""
        for key in self._metadata_set:
            metadata[key] = self._metadata[key]
        for key in self._metadata_removed:
            metadata.pop(key, None)
        if _WHOLE in self._set or type(data) is not type(self._data):
            return self._data if self._set or self._removed else data
        parts = _parts(self._data)
        for key in self._set:
            if isinstance(data, dict):
                data[key] = parts[key]
            else:
                setattr(data, key, parts[key])
        for key in self._removed:
            if isinstance(data, dict):
                data.pop(key, None)
        return data


def _parts(data: Any) -> Mapping[str, Any]:
    if isinstance(data, dict):
        keys = data
        if all(isinstance(key, str) and key for key in keys):
            return cast("dict[str, Any]", data)
    for names in ("__struct_fields__", "__dataclass_fields__"):
        if hasattr(data, names):
            return {name: getattr(data, name) for name in getattr(data, names)}
    if hasattr(data, "__attrs_attrs__"):
        return {each.name: getattr(data, each.name) for each in data.__attrs_attrs__}
    return {_WHOLE: data}


def _encoded(parts: Mapping[str, Any]) -> dict[str, bytes]:
    return {key: _encode(value) for key, value in parts.items()}


def _encode(value: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(value)
    except Exception:  # noqa: BLE001 - the codec, not this comparison, says if it can be stored
        return repr(value).encode(errors="surrogatepass")


def _different(now: Mapping[str, bytes], before: Mapping[str, bytes]) -> set[str]:
    return {key for key, value in now.items() if before.get(key) != value}

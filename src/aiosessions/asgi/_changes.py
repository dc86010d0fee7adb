"""The changes that a request makes to a session, found by comparing encodings.

Data is compared by its top-level parts: the keys of a dict, or the fields of a struct, a dataclass
or an attrs class. Other data is one part. A nested change is a change of its part.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from .._differences import field_names
from ..errors import SessionConflict
from ..record import CHANGED

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
        self._before, self._data, self._metadata = before, data, metadata
        self._changed = _different(before.data, now.data)
        self._metadata_changed = _different(before.metadata, now.metadata)

    def __bool__(self) -> bool:
        return bool(self._changed or self._metadata_changed)

    def apply(
        self, data: Any, metadata: dict[str, str], read: AbstractSet[str] | None = frozenset()
    ) -> Any:
        """Set and remove the same parts in data that another request has changed.

        Args:
            data: The fresh data. It is changed in place where its type allows that.
            metadata: The fresh metadata, which is changed in place.
            read: The parts that this request has read; None for all.

        Returns:
            The merged data.

        Raises:
            SessionConflict: The other request has changed a part that this request has read and
                changed.
        """
        theirs = _different(self._before.data, _encoded(_parts(data)))
        is_whole = type(data) is not type(self._data) or _WHOLE in self._changed | theirs
        both = theirs if is_whole and self._changed else theirs & self._changed
        if both if read is None else both & read:
            raise SessionConflict(CHANGED)
        _assign(metadata, self._metadata, self._metadata_changed)
        if is_whole:
            return self._data if self._changed else data
        try:
            _assign(data, self._data, self._changed)
        except AttributeError:  # the type is frozen, so its parts cannot be merged
            raise SessionConflict(CHANGED) from None
        return data


def refill(target: Any, source: Any) -> Any:
    """Give the top-level parts of `source` to `target`, so that references to it stay valid.

    Returns:
        `target`, or `source` if that is impossible.
    """
    mine, theirs = _parts(target), _parts(source)
    if type(target) is not type(source) or _WHOLE in mine or _WHOLE in theirs:
        return source
    try:
        _assign(target, source, mine.keys() | theirs.keys())
    except AttributeError:  # the type is frozen
        return source
    return target


def _assign(target: Any, source: Any, keys: AbstractSet[str]) -> None:
    parts = _parts(source)
    for key in keys:
        if not isinstance(target, dict):
            setattr(target, key, parts[key])
        elif key in parts:
            target[key] = parts[key]
        else:
            target.pop(key, None)


def _parts(data: Any) -> Mapping[str, Any]:
    if isinstance(data, dict):
        if all(isinstance(key, str) and key for key in data):
            return cast("dict[str, Any]", data)
        return {_WHOLE: data}
    names = field_names(type(data))
    return {name: getattr(data, name) for name in names} if names else {_WHOLE: data}


def _encoded(parts: Mapping[str, Any]) -> dict[str, bytes]:
    return {key: _encode(value) for key, value in parts.items()}


def _encode(value: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(value)
    except Exception:  # noqa: BLE001 - the codec, not this comparison, says if it can be stored
        return repr(value).encode(errors="surrogatepass")


def _different(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> AbstractSet[str]:
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}

"""`scope["session"]`: the data of a session as frameworks expect it."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, Generic, Self, cast

from ..session import D
from ._work import Work


class SessionMapping(MutableMapping[str, Any], Generic[D]):
    """The data of a session, if it is a dict.

    It notes the keys that the application reads. A key that was only set can be set again after a
    conflict, without a loss.
    """

    __slots__ = ("_work",)  # `request.session.principal = name` is an error

    def __init__(self, work: Work[D]) -> None:
        self._work = work

    def _data(self, *reads: str) -> dict[str, Any]:
        data = self._work.touch().data
        if not isinstance(data, dict):
            message = f"the session's data is a {type(data).__name__}"
            raise TypeError(f"{message}; use get_session(request).data")
        if self._work.read is not None:
            self._work.read.update(reads)
        return cast("dict[str, Any]", data)

    def _all(self) -> dict[str, Any]:
        data = self._data()
        self._work.read = None
        return data

    def __getitem__(self, key: str) -> Any:
        return self._data(key)[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._data()[key] = value

    def __delitem__(self, key: str) -> None:
        del self._data()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __ior__(self, other: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Self:
        self._data().update(other)
        return self

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return self._all() | dict(other)

    def clear(self) -> None:
        """Remove every key."""
        self._data().clear()

    def popitem(self) -> tuple[str, Any]:
        """Remove the latest item and return it, as a dict does."""
        return self._all().popitem()

    def copy(self) -> dict[str, Any]:
        """Return a shallow copy of the data."""
        return self._all().copy()

    def __repr__(self) -> str:
        return "<the data of a session>"

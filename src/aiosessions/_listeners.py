"""The listeners of a storage that announces changes.

Invariant: an error in a listener is logged. It disturbs neither the storage, whose change has
happened, nor the other listeners.
"""

import logging
from collections.abc import Callable
from functools import partial

from .storage import StorageListener

_log = logging.getLogger("aiosessions")


class Listeners(StorageListener):
    """Any number of listeners, as one."""

    def __init__(self) -> None:
        self._listeners: dict[object, StorageListener] = {}

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def add(self, listener: StorageListener, *, complete: bool | None) -> Callable[[], None]:
        """Add a listener, and return the function that removes it.

        Args:
            listener: The listener.
            complete: Whether each change is announced at present; None if that is not known yet.
        """
        token = object()
        self._listeners[token] = listener
        if complete is not None:
            _tell(listener.resumed if complete else listener.interrupted)
        return partial(self._remove, token)

    def _remove(self, token: object) -> None:
        self._listeners.pop(token, None)

    def changed(self, digest: str, revision: str) -> None:
        """See `StorageListener.changed`."""
        for listener in tuple(self._listeners.values()):
            _tell(partial(listener.changed, digest, revision))

    def interrupted(self) -> None:
        """See `StorageListener.interrupted`."""
        for listener in tuple(self._listeners.values()):
            _tell(listener.interrupted)

    def resumed(self) -> None:
        """See `StorageListener.resumed`."""
        for listener in tuple(self._listeners.values()):
            _tell(listener.resumed)


def _tell(method: Callable[[], None]) -> None:
    try:
        method()
    except Exception:  # noqa: BLE001 - the application's own
        _log.exception("a listener of changes has failed")

"""A listener that records announcements and interruptions."""

from typing import Any

from aiosessions.storage import AnnouncingStorage, StorageListener
from tests.support.proxy import until


class Listener(StorageListener):
    """Records announcements and interruptions.

    Args:
        storage: The storage to listen to.

    Attributes:
        stop: Stops listening.
        changes: The digests and revisions, in order.
        states: "interrupted" and "resumed", in order.
    """

    def __init__(self, storage: AnnouncingStorage[Any]) -> None:
        self.changes: list[tuple[str, str]] = []
        self.states: list[str] = []
        self.stop = storage.listen(self)

    def changed(self, digest: str, revision: str) -> None:
        """Record a change."""
        self.changes.append((digest, revision))

    def interrupted(self) -> None:
        """Record an interruption."""
        self.states.append("interrupted")

    def resumed(self) -> None:
        """Record the end of an interruption."""
        self.states.append("resumed")

    async def until(self, *states: str) -> None:
        """Wait until the last states are these."""
        await until(lambda: tuple(self.states[-len(states) :]) == states)

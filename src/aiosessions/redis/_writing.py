"""The write of a record: one command, or two where a cluster keeps an index elsewhere.

Invariants:

- No write is applied twice. After a lost connection, a compare-and-set is sent again, because it
  cannot succeed twice. Any other write is not: the storage looks for its revision on the server,
  which is there if only the reply was lost.
- If the revision is not there, because another client may have written or deleted the session
  since, the error says that the write is in doubt.
- A session of a principal is never written before its entry in the index.
"""

import asyncio
from typing import Any

from ..errors import SessionError, StorageUnavailable
from ..record import PLAIN, owner_of, revision_of
from ..storage import When
from . import _commands as commands
from . import _scripts as scripts
from ._index import Index
from ._routing import Router
from ._time import ServerTime


class Writer:
    """The writes of one storage.

    Args:
        router: Sends the commands.
        index: The indexes of principals.
        ttl: The TTL of the sessions in milliseconds.
        time: The time.
    """

    def __init__(self, router: Router, index: Index[Any], *, ttl: int, time: ServerTime) -> None:
        self._router = router
        self._index = index
        self._ttl = ttl
        self._time = time

    async def write(
        self, deadline: float, key: bytes, record: bytes, expected: str, when: When
    ) -> None:
        """Write a record.

        Args:
            deadline: The deadline of the verb.
            key: The session's key.
            record: The record.
            expected: The revision to replace, for `When.UNCHANGED`.
            when: The condition.

        Raises:
            SessionError: See `Storage.store`.
        """
        command = await self._script(deadline, key, record, expected, when)
        try:
            reply = await self._router.call(command)
            if reply == scripts.NOT_INDEXED:
                command = await self._script(deadline, key, record, expected, when, enter=True)
                reply = await self._router.call(command)
        except StorageUnavailable as error:
            if not error.in_doubt or not await self._is_in_place(deadline, key, record):
                raise
            return
        # The write may have been applied before, and overwritten or deleted since.
        if reply != scripts.DONE:
            if command.in_doubt:
                text = "a reply was lost; the write may have been applied"
                raise StorageUnavailable(text, in_doubt=True)
            raise scripts.refusal(reply)

    async def _script(
        self,
        deadline: float,
        key: bytes,
        record: bytes,
        expected: str,
        when: When,
        *,
        enter: bool = False,
    ) -> commands.Command:
        script = scripts.STORE_UNCHANGED if when is When.UNCHANGED else scripts.STORE
        ttl, revision = b"%d" % self._ttl, expected.encode("ascii", "replace")
        words = scripts.CONDITIONS[when], record, ttl, self._time.offset(), revision
        if record[:1] == PLAIN:
            return script.plain.fill(deadline, key, *words)
        if self._index.on_one_server:
            return script.owned.fill(deadline, key, self._index.key(owner_of(record)), *words)
        # A session that exists has an entry, in most cases; the script tells if it needs one.
        lease = b""
        if enter or when in (When.ALWAYS, When.ABSENT):
            lease = await self._index.enter(deadline, key, record)
        # The clocks of two servers may differ, so the second attempt does not compare them.
        left = b"0" if enter else self._index.fresh
        return script.leased.fill(deadline, key, *words, lease, left)

    async def _is_in_place(self, deadline: float, key: bytes, record: bytes) -> bool:
        """Whether a write without a reply has been applied, as far as its revision tells."""
        if asyncio.get_running_loop().time() >= deadline:
            return False
        try:
            found = await self._router.call(commands.REVISION.fill(deadline, key))
        except SessionError:
            return False
        return bool(found == revision_of(record).encode())

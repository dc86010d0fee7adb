"""Tests of `revoke`, `revoke_all` and `trim`."""

from collections.abc import Callable
from typing import Any

import pytest

from ..errors import CorruptSession, InvalidSessionId, SessionError, SessionNotFound
from ..record import ROTATED_KEY
from ..session import Session, new_session_id
from ..storage import IndexedStorage, When
from ._harness import is_gone, new_session, unchanged
from ._indexing import ALICE, BOB, Indexing, listed, stored, unreadable
from ._spoiling import reader_of_floats
from ._storing import ABSENT_STATES, NEEDS_ONE, absent

Revoke = Callable[[IndexedStorage[Any], Session[Any]], Any]
_REVOCATIONS: dict[str, Revoke] = {
    "revoke": lambda storage, session: storage.revoke(ALICE, session.digest),
    "revoke_all": lambda storage, _: storage.revoke_all(ALICE),
}
_NO_DIGESTS: dict[str, Callable[[Session[Any]], str]] = {
    "unknown": lambda _: "0" * 32,
    "empty": lambda _: "",
    "id": lambda session: session.id,
    "upper-case": lambda session: session.digest.upper(),
    "shortened": lambda session: session.digest[:-1],
    "trailing-newline": lambda session: session.digest + "\n",
    "wildcard": lambda _: "*",
    "long": lambda _: "a" * 10_000,
    "lone-surrogate": lambda _: "\ud800",
}
_revocations = pytest.mark.parametrize("revoke", _REVOCATIONS.values(), ids=_REVOCATIONS)


class Revoking(Indexing):
    """`revoke`, `revoke_all` and `trim`."""

    async def test_revoke_deletes_one_session(self) -> None:
        """`revoke` returns True once, and leaves the other sessions of the principal alone."""
        views = await self._indexes()
        session, other = await stored(views[0], ALICE, 2)

        results = [await views[-1].revoke(ALICE, session.digest) for _ in range(2)]

        assert results == [True, False]
        assert await is_gone(views[0], session)
        assert await listed(views[0], ALICE) == {other.digest}

    async def test_revoke_checks_the_owner(self) -> None:
        """It deletes no session of another principal, and none without a principal."""
        storage = await self._index()
        (hers,), (ownerless,) = await stored(storage, ALICE, 1), await stored(storage, None, 1)

        for principal in (BOB, "", "None", ALICE.upper()):
            for session in (hers, ownerless):
                assert await storage.revoke(principal, session.digest) is False
        assert await storage.revoke(ALICE, ownerless.digest) is False

        assert not await is_gone(storage, hers)
        assert not await is_gone(storage, ownerless)

    @pytest.mark.parametrize("digest", _NO_DIGESTS.values(), ids=_NO_DIGESTS)
    async def test_other_strings_revoke_nothing(
        self, digest: Callable[[Session[Any]], str]
    ) -> None:
        """`revoke` returns False for an unknown digest, and for a string that is not one."""
        storage = await self._index()
        (session,) = await stored(storage, ALICE, 1)

        assert await storage.revoke(ALICE, digest(session)) is False

        assert await listed(storage, ALICE) == {session.digest}

    @pytest.mark.parametrize("digest", [None, 1, b"0" * 32], ids=repr)
    async def test_digest_that_is_not_a_string_is_refused(self, digest: Any) -> None:
        """Such a digest is a `TypeError`."""
        storage = await self._index()

        with pytest.raises(TypeError):
            await storage.revoke(ALICE, digest)

    @pytest.mark.parametrize("state", ABSENT_STATES)
    async def test_absent_session_is_not_revoked(self, state: str) -> None:
        """A session that cannot be loaded counts as absent, for each reason."""
        storage = await self._index(ttl=self.ttl)
        session = await absent(self, storage, state, principal=ALICE)

        assert await storage.revoke(ALICE, session.digest) is False
        assert await storage.revoke_all(ALICE) == 0

    async def test_revoke_all_deletes_every_session(self) -> None:
        """It returns their number, and leaves other principals alone."""
        views = await self._indexes()
        hers = [*await stored(views[0], ALICE, 3), *await stored(views[-1], ALICE, 3)]
        others = [*await stored(views[0], BOB, 2), *await stored(views[0], None, 1)]

        counts = [await view.revoke_all(ALICE) for view in (views[-1], views[0])]

        assert counts == [6, 0]
        assert all([await is_gone(views[0], session) for session in hers])
        assert await listed(views[0], ALICE) == set()
        assert not any([await is_gone(views[0], session) for session in others])

    async def test_revoke_all_keeps_the_given_session(self) -> None:
        """`keep` is an id. The id of an absent or a foreign session keeps nothing."""
        storage = await self._index()
        (foreign,) = await stored(storage, BOB, 1)
        first, kept, last = await stored(storage, ALICE, 3)

        assert await storage.revoke_all(ALICE, keep=kept.id) == 2
        assert [await is_gone(storage, each) for each in (first, kept, last)] == [True, False, True]
        assert await listed(storage, ALICE) == {kept.digest}

        await storage.store(first)
        assert await storage.revoke_all(ALICE, keep=foreign.id) == 2
        await storage.store(first)
        assert await storage.revoke_all(ALICE, keep=new_session_id()) == 1
        assert not await is_gone(storage, foreign)

    async def test_wrong_arguments_delete_nothing(self) -> None:
        """A malformed `keep` is `InvalidSessionId`; `most` is a positive int."""
        storage = await self._index()
        sessions = await stored(storage, ALICE, 2)

        for malformed in ("", "a b", "a" * 257):
            with pytest.raises(InvalidSessionId):
                await storage.revoke_all(ALICE, keep=malformed)
            with pytest.raises(InvalidSessionId):
                await storage.trim(ALICE, 1, keep=malformed)
        wrong: Any
        for wrong in (1, b"id"):
            with pytest.raises(TypeError):
                await storage.revoke_all(ALICE, keep=wrong)
        for wrong, kind in ((0, ValueError), (-1, ValueError), ("1", TypeError), (1.5, TypeError)):
            with pytest.raises(kind):
                await storage.trim(ALICE, wrong, keep=sessions[0].id)

        assert await listed(storage, ALICE) == {session.digest for session in sessions}

    @_revocations
    @pytest.mark.parametrize("when", NEEDS_ONE)
    async def test_revoked_session_is_not_revived(self, when: When, revoke: Revoke) -> None:
        """A save of a copy that was loaded before raises `SessionNotFound`."""
        views = await self._indexes()
        (session,) = await stored(views[0], ALICE, 1)
        copy = await views[-1].load(session.id)

        await revoke(views[0], session)

        with unchanged(copy), pytest.raises(SessionNotFound):
            await views[-1].store(copy, when=when)
        assert await is_gone(views[0], session)
        assert await listed(views[0], ALICE) == set()

    @unreadable
    async def test_unreadable_session_stops_no_revocation(
        self, spoil: Callable[[Session[Any]], bytes]
    ) -> None:
        """The others are deleted; it is deleted too, or leads to `CorruptSession`."""
        codec = reader_of_floats()
        storage = await self._index(codec=codec)
        sessions = [new_session(principal=ALICE, data=1.5) for _ in range(3)]
        for session, codec.spoil in zip(sessions, (None, spoil, None), strict=True):
            await storage.store(session)

        left: type[SessionError] = SessionNotFound
        try:
            await storage.revoke_all(ALICE)
        except CorruptSession:
            left = CorruptSession

        kinds: list[type[SessionError]] = [SessionNotFound, left, SessionNotFound]
        for session, kind in zip(sessions, kinds, strict=True):
            with pytest.raises(kind):
                await storage.load(session.id)

    async def test_trim_deletes_the_longest_unused(self) -> None:
        """It leaves `most` sessions of the principal. A load or a store is use; a list is not."""
        storage = await self._index()
        await stored(storage, BOB, 3)
        loaded, written, unused, idle, new = sessions = [
            new_session(principal=ALICE) for _ in range(5)
        ]
        for session in sessions:
            await storage.store(session, when=When.ABSENT)
            await self.advance(self.tick)
        await storage.load(loaded.id)
        await self.advance(self.tick)
        await storage.store(written, when=When.UNCHANGED)
        await storage.list(ALICE)

        assert await storage.trim(ALICE, 5, keep=new.id) == 0
        assert await storage.trim(ALICE, 3, keep=new.id) == 2

        assert await is_gone(storage, unused)
        assert await is_gone(storage, idle)
        assert await listed(storage, ALICE) == {loaded.digest, written.digest, new.digest}
        assert await storage.count(BOB) == 3

    async def test_trim_keeps_the_given_session(self) -> None:
        """It keeps `keep` even if that is the longest unused one."""
        storage = await self._index()
        kept, *others = [new_session(principal=ALICE) for _ in range(4)]
        for session in (kept, *others):
            await storage.store(session, when=When.ABSENT)
            await self.advance(self.tick)

        number = await storage.trim(ALICE, 2, keep=kept.id)

        # A storage that cannot see all sessions in one step may leave one more.
        assert number in (1, 2)
        assert await listed(storage, ALICE) == {each.digest for each in (kept, *others[number:])}

    async def test_rotated_session_is_revoked_unlisted(self) -> None:
        """An id that was rotated away is neither listed, counted nor trimmed, but revoked."""
        storage = await self._index()
        old = new_session(principal=ALICE)
        await storage.store(old)
        old.metadata[ROTATED_KEY] = "random"
        await storage.store(old, when=When.UNCHANGED)
        (session,) = await stored(storage, ALICE, 1)

        assert await listed(storage, ALICE) == {session.digest}
        assert await storage.trim(ALICE, 1, keep=session.id) == 0
        assert not await is_gone(storage, old)

        assert await storage.revoke_all(ALICE) == 1
        assert await is_gone(storage, old)
        assert await is_gone(storage, session)

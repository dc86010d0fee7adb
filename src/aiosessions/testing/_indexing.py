"""Tests of the index of principals: `list` and `count`."""

import logging
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ..codec import Codec, JsonCodec, MsgpackCodec
from ..errors import StorageClosed
from ..session import Session, SessionInfo, new_session_id
from ..storage import IndexedStorage, When
from ._harness import Harness, content, is_gone, new_session
from ._spoiling import UNREADABLE, SpyingCodec, reader_of_floats
from ._storing import ABSENT_STATES, CREATES, OVERWRITES, WHENS, absent

ALICE, BOB = "alice", "bob"
IndexedVerb = Callable[..., Coroutine[Any, Any, object]]
# Each takes a storage, a principal, and a session.
INDEXED_VERBS: dict[str, IndexedVerb] = {
    "list": lambda storage, principal, _: storage.list(principal),
    "count": lambda storage, principal, _: storage.count(principal),
    "revoke": lambda storage, principal, session: storage.revoke(principal, session.digest),
    "revoke_all": lambda storage, principal, _: storage.revoke_all(principal),
    "trim": lambda storage, principal, session: storage.trim(principal, 1, keep=session.id),
}
PRINCIPALS = [
    "",
    " ",
    "a",
    "A",
    "a ",
    "a\n",
    "a\0b",
    "a:b",
    "{a}",
    "*",
    "[a-z]?",
    "None",
    "caf\xe9",
    "cafe\u0301",
    "\U0001f98a",
    "x" * 5_000,
    "x" * 4_999 + "y",
]
"""Principals that a careless key or pattern would take for each other."""

verbs = pytest.mark.parametrize("verb", INDEXED_VERBS.values(), ids=INDEXED_VERBS)
unreadable = pytest.mark.parametrize("spoil", UNREADABLE.values(), ids=UNREADABLE)


def info_of(session: Session[Any]) -> SessionInfo[Any]:
    """Return the entry that a list has for a session."""
    fields = (name for name in SessionInfo.__struct_fields__)
    return SessionInfo(**{name: getattr(session, name) for name in fields})


async def stored(
    storage: IndexedStorage[Any], principal: str | None, count: int
) -> list[Session[Any]]:
    """Store new sessions of a principal, and return them."""
    sessions = [new_session(principal=principal) for _ in range(count)]
    for session in sessions:
        await storage.store(session)
    return sessions


async def listed(storage: IndexedStorage[Any], principal: str) -> set[str]:
    """Return the digests of a principal's sessions, after a comparison with their number."""
    digests = [info.digest for info in await storage.list(principal)]
    assert await storage.count(principal) == len(digests)
    assert len(set(digests)) == len(digests)
    return set(digests)


class Indexing(Harness):
    """`list` and `count`."""

    async def _indexes(
        self, *, ttl: float = 60.0, codec: Codec[Any] | None = None
    ) -> list[IndexedStorage[Any]]:
        """Open the storages that a test uses side by side."""
        views = await self._views(ttl=ttl, codec=codec)
        indexes: list[IndexedStorage[Any]] = [
            view for view in views if isinstance(view, IndexedStorage)
        ]
        assert indexes == views, "the storage has no list, count, revoke, revoke_all or trim"
        return indexes

    async def _index(
        self, *, ttl: float = 60.0, codec: Codec[Any] | None = None
    ) -> IndexedStorage[Any]:
        """Open one storage."""
        return (await self._indexes(ttl=ttl, codec=codec))[0]

    @pytest.mark.parametrize("when", WHENS)
    async def test_stored_session_is_listed(self, when: When) -> None:
        """A write through one replica is in the next list of each, once."""
        views = await self._indexes()
        session = new_session(principal=ALICE, data="first")
        if when is not When.ABSENT:
            await views[0].store(session)
        session.data = "second"

        await views[0].store(session, when=when)

        for view in views:
            assert await view.list(ALICE) == [info_of(session)]
            assert await listed(view, ALICE) == {session.digest}

    @pytest.mark.parametrize("codec", [None, JsonCodec(), MsgpackCodec()], ids=repr)
    async def test_listed_session_has_every_field(self, codec: Codec[Any] | None) -> None:
        """It equals the stored one, field for field, with each codec."""
        storage = await self._index(codec=codec)
        session = new_session(
            kind="web",
            principal="Ada L\xf8velace <ada@example.com>",
            metadata={"user-agent": "tests/1.0", "": "empty key"},
            data={"list": [1, 2.5, None, True, "\xfc"]},
            created_at=datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC),
            updated_at=datetime(2025, 1, 1, 0, 0, 0, 1, tzinfo=UTC),
            expires_at=datetime(2999, 12, 31, 12, 34, 56, 789_000, tzinfo=UTC),
        )

        await storage.store(session)

        assert session.principal is not None
        assert await storage.list(session.principal) == [info_of(session)]

    async def test_listed_session_holds_no_id(self) -> None:
        """No field is the id, and the `repr` shows neither id, principal, metadata nor data."""
        storage = await self._index()
        session = new_session(principal=ALICE, metadata={"a": "hush"}, data="hush")
        await storage.store(session)

        (info,) = await storage.list(ALICE)

        assert type(info) is SessionInfo
        assert session.id not in [getattr(info, name) for name in info.__struct_fields__]
        assert [each for each in (session.id, "hush", ALICE) if each in repr(info)] == []

    async def test_latest_update_is_listed_first(self) -> None:
        """The order is that of `updated_at`, and not that of the writes."""
        storage = await self._index()
        start = self.now()
        ages = [3, 0, 4, 1, 2]
        sessions = [
            new_session(principal=ALICE, updated_at=start - timedelta(seconds=age)) for age in ages
        ]
        for session in sessions:
            await storage.store(session)

        sessions.sort(key=lambda session: session.updated_at, reverse=True)
        assert [info.digest for info in await storage.list(ALICE)] == [
            session.digest for session in sessions
        ]

    @pytest.mark.parametrize("principal", ["nobody", "\ud800"], ids=["nobody", "lone-surrogate"])
    async def test_unknown_principal_has_no_sessions(self, principal: str) -> None:
        """Its list is empty, also if no session could ever have this principal."""
        storage = await self._index()
        await storage.store(new_session(principal=ALICE))

        assert await listed(storage, principal) == set()
        assert await storage.revoke_all(principal) == 0

    async def test_principals_do_not_mix(self) -> None:
        """A principal is any text, compared exactly; no principal differs from an empty one."""
        storage = await self._index()
        ownerless = new_session()
        sessions = {principal: new_session(principal=principal) for principal in PRINCIPALS}
        for session in (ownerless, *sessions.values()):
            await storage.store(session, when=When.ABSENT)

        for principal, session in sessions.items():
            assert await listed(storage, principal) == {session.digest}
            assert await storage.revoke_all(principal) == 1
        assert not await is_gone(storage, ownerless)

    @pytest.mark.parametrize("when", [None, *OVERWRITES])
    async def test_session_in_use_stays_listed(self, when: When | None) -> None:
        """It is listed for many TTLs, to its end, if loads or writes keep it alive."""
        views = await self._indexes(ttl=self.ttl)
        session = new_session(principal=ALICE)
        await views[0].store(session, when=When.ABSENT)

        for turn in range(10):
            await self.advance((1 + turn % 2) * self.unit)
            assert await listed(views[-1], ALICE) == {session.digest}
            view = views[turn // 2 % len(views)]
            await (view.store(session, when=when) if when else view.load(session.id))
        await self.advance(self.ttl - self.tick)
        assert await listed(views[-1], ALICE) == {session.digest}
        await self.advance(self.tick)

        assert await listed(views[-1], ALICE) == set()

    @pytest.mark.parametrize("when", WHENS)
    async def test_session_is_listed_until_its_deadline(self, when: When) -> None:
        """It is listed just before `expires_at`, and not at it."""
        storage = await self._index(ttl=self.ttl)
        session = new_session(principal=ALICE)
        if when is not When.ABSENT:
            await storage.store(session)
        session.expires_at = self.now() + timedelta(seconds=4 * self.unit)
        await storage.store(session, when=when)

        await self.advance(2 * self.unit)
        await storage.load(session.id)
        await self.advance(2 * self.unit - self.tick)
        assert await listed(storage, ALICE) == {session.digest}
        await self.advance(self.tick)

        assert await listed(storage, ALICE) == set()

    async def test_listing_renews_nothing(self) -> None:
        """Neither `list` nor `count` counts as use."""
        storage = await self._index(ttl=self.ttl)
        session = new_session(principal=ALICE)
        await storage.store(session)

        await self.advance(self.ttl - self.unit)
        assert await listed(storage, ALICE) == {session.digest}
        await self.advance(self.unit)

        assert await is_gone(storage, session)

    @pytest.mark.parametrize("state", ABSENT_STATES)
    async def test_absent_session_is_not_listed(self, state: str) -> None:
        """A session that cannot be loaded is not listed, for each reason."""
        storage = await self._index(ttl=self.ttl)
        await absent(self, storage, state, principal=ALICE)

        assert await listed(storage, ALICE) == set()

    @pytest.mark.parametrize("when", CREATES)
    @pytest.mark.parametrize("state", ABSENT_STATES)
    async def test_recreated_session_has_the_new_owner(self, state: str, when: When) -> None:
        """A session under the id of an absent one is listed for the new principal only."""
        storage = await self._index(ttl=self.ttl)
        session = await absent(self, storage, state, principal=ALICE)
        session.principal = BOB

        await storage.store(session, when=when)

        assert await listed(storage, ALICE) == set()
        assert await listed(storage, BOB) == {session.digest}

    @pytest.mark.parametrize("when", OVERWRITES)
    async def test_overwritten_session_has_the_new_owner(self, when: When) -> None:
        """A write with another principal, or with none, moves the session to another list."""
        views = await self._indexes()
        session = new_session(principal=ALICE)
        await views[0].store(session)

        for turn, owner in enumerate((BOB, None, BOB, ALICE, None, ALICE)):
            session.principal = owner
            await views[turn % len(views)].store(session, when=when)

            for principal in (ALICE, BOB):
                found = await listed(views[-1], principal)
                assert found == ({session.digest} if principal == owner else set())

    async def test_listed_session_is_a_copy(self) -> None:
        """A change of its metadata or data reaches neither the next list nor a load."""
        storage = await self._index()
        session = new_session(principal=ALICE, metadata={"a": "1"}, data={"list": [1]})
        await storage.store(session)

        (info,) = await storage.list(ALICE)
        info.metadata["b"] = "2"
        info.data["list"].append(2)

        assert await storage.list(ALICE) == [info_of(session)]
        assert content(await storage.load(session.id)) == content(session)

    async def test_codec_sees_no_id(self) -> None:
        """A codec gets the digest in place of the id, in sessions and in payloads."""
        codec = SpyingCodec()
        storage = await self._index(codec=codec)
        session = new_session(principal=ALICE, data="data")

        for when in (When.ABSENT, When.PRESENT, When.UNCHANGED, When.ALWAYS):
            await storage.store(session, when=when)
        assert (await storage.load(session.id)).id == session.id
        for verb in INDEXED_VERBS.values():
            await verb(storage, ALICE, session)

        assert codec.ids == {session.digest}
        assert [each for each in codec.payloads if session.id.encode() in each] == []

    @unreadable
    async def test_unreadable_session_is_not_listed(
        self, spoil: Callable[[Session[Any]], bytes], caplog: pytest.LogCaptureFixture
    ) -> None:
        """The others are. The log holds no id and no content."""
        caplog.set_level(logging.DEBUG)
        codec = reader_of_floats()
        storage = await self._index(codec=codec)
        readable, spoiled = (new_session(principal=ALICE, data=1.5) for _ in range(2))
        await storage.store(readable)
        codec.spoil = spoil
        await storage.store(spoiled)

        assert await storage.list(ALICE) == [info_of(readable)]

        assert [each for each in (spoiled.id, ALICE, "no number") if each in caplog.text] == []

    @verbs
    @pytest.mark.parametrize("principal", [None, 1, b"alice"], ids=repr)
    async def test_principal_that_is_not_a_string_is_refused(
        self, principal: Any, verb: IndexedVerb
    ) -> None:
        """Such a principal is a `TypeError`."""
        storage = await self._index()

        with pytest.raises(TypeError):
            await verb(storage, principal, new_session())

    @verbs
    async def test_closed_index_refuses_every_verb(self, verb: IndexedVerb) -> None:
        """Each verb raises `StorageClosed`."""
        storage = await self._index()
        session = new_session(principal=ALICE)
        await storage.store(session)

        await storage.aclose()

        with pytest.raises(StorageClosed):
            await verb(storage, ALICE, session)

    async def test_expired_sessions_do_not_hide_new_ones(self) -> None:
        """A principal who returns after many TTLs has a list of the new sessions only."""
        storage = await self._index(ttl=self.ttl)
        for _ in range(3):
            for _ in range(6):
                await storage.store(new_session(principal=ALICE), when=When.ABSENT)
            await self.advance(2 * self.ttl)

        session = Session[Any](id=new_session_id(), principal=ALICE)
        await storage.store(session, when=When.ABSENT)

        assert await listed(storage, ALICE) == {session.digest}

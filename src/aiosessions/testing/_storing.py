"""Tests of storing and loading: fields, types, copies, revisions, and conditional writes."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest

from ..codec import Codec, JsonCodec, MsgpackCodec
from ..errors import SessionConflict, SessionExists, SessionNotFound
from ..session import Session, new_session_id
from ..storage import Storage, When
from ._harness import Harness, content, new_session, unchanged

WHENS = [pytest.param(when, id=when.name) for when in When]
OVERWRITES = [
    pytest.param(when, id=when.name) for when in (When.ALWAYS, When.PRESENT, When.UNCHANGED)
]
CREATES = [pytest.param(when, id=when.name) for when in (When.ALWAYS, When.ABSENT)]
NEEDS_ONE = [pytest.param(when, id=when.name) for when in (When.PRESENT, When.UNCHANGED)]
ABSENT_STATES = ["never-stored", "deleted", "idle", "past-deadline", "stored-past-deadline"]

_VISIBLE = "".join(map(chr, range(0x21, 0x7F)))


class Address(msgspec.Struct):
    """A nested part of `Profile`."""

    street: str
    number: int


class Profile(msgspec.Struct):
    """An application's data, of many types."""

    name: str
    joined: datetime
    token: bytes
    tags: set[str]
    size: tuple[int, float]
    homes: dict[str, Address]
    parent: "Profile | None" = None


async def begin(storage: Storage[Any], when: When) -> Session[Any]:
    """Make a session that can be stored with `when`; store it first if `when` needs one."""
    session = new_session(data="first")
    if when is not When.ABSENT:
        await storage.store(session)
    return session


async def absent(
    harness: Harness, storage: Storage[Any], state: str, **fields: Any
) -> Session[Any]:
    """Make a session that is absent, for the reason that `state` names."""
    session = new_session(data="first", **fields)
    if state == "past-deadline":
        session.expires_at = harness.now() + timedelta(seconds=harness.unit)
    if state == "stored-past-deadline":
        session.expires_at = harness.now() - timedelta(seconds=1)
    if state != "never-stored":
        await storage.store(session)
    if state == "deleted":
        await storage.delete(session.id)
    if state == "idle":
        await harness.advance(harness.ttl)
    if state == "past-deadline":
        await harness.advance(harness.unit)
    session.expires_at = None
    return session


class Storing(Harness):
    """Storing and loading, apart from expiry."""

    @pytest.mark.parametrize("codec", [None, JsonCodec(), MsgpackCodec()], ids=repr)
    async def test_every_field_comes_back(self, codec: Codec[Any] | None) -> None:
        """A loaded session equals the stored one, field for field, with each codec."""
        storage = await self.open(codec=codec)
        session = Session(
            id=new_session_id(),
            kind="streamable",
            principal="Ada Løvelace <ada@example.com>",
            metadata={"user-agent": "tests/1.0", "": "empty key", "emoji": "🦊", "nul": "a\0b"},
            data={"list": [1, 2.5, None, True, "ü"], "nested": {"deep": [{"er": []}]}},
            created_at=datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC),
            updated_at=datetime(2025, 1, 1, 0, 0, 0, 1, tzinfo=UTC),
            expires_at=datetime(2999, 12, 31, 12, 34, 56, 789_000, tzinfo=UTC),
        )

        await storage.store(session)

        assert await storage.load(session.id) == session

    async def test_defaults_come_back(self) -> None:
        """A session that has only an id comes back with its defaults, not with nulls."""
        storage = await self.open()
        session = new_session()

        await storage.store(session)
        loaded = await storage.load(session.id)

        assert loaded == session
        assert loaded.revision
        assert (loaded.kind, loaded.principal, loaded.metadata, loaded.data) == ("", None, {}, None)
        assert loaded.expires_at is None

    @pytest.mark.parametrize(
        "data",
        [None, False, 0, "", [], {}, -(2**63), 2**63, 0.1, 1e300, "\0\r\n\t", "😀", "x" * 500_000],
        ids=lambda data: f"{type(data).__name__}-{str(data)[:8]!a}",
    )
    async def test_data_comes_back_unchanged(self, data: object) -> None:
        """Falsy, extreme and large data come back as the same value of the same type."""
        storage = await self.open()
        session = new_session(data=data)

        await storage.store(session)
        loaded = await storage.load(session.id)

        assert loaded.data == data
        assert type(loaded.data) is type(data)

    @pytest.mark.parametrize("codec", [JsonCodec(Profile), MsgpackCodec(Profile)], ids=repr)
    async def test_typed_data_comes_back_typed(self, codec: Codec[Any]) -> None:
        """Data of a codec's data type comes back as that type, nested parts included."""
        storage = await self.open(codec=codec)
        parent = Profile("B", datetime(1950, 1, 1, tzinfo=UTC), b"", set(), (0, 0.0), {})
        profile = Profile(
            name="A",
            joined=datetime(2020, 5, 17, 1, 2, 3, 4, tzinfo=UTC),
            token=bytes(range(256)),
            tags={"x", "y"},
            size=(3, 4.5),
            homes={"summer": Address("Elm", 7)},
            parent=parent,
        )
        session = new_session(data=profile)

        await storage.store(session)
        loaded = await storage.load(session.id)

        assert isinstance(loaded.data, Profile)
        assert loaded.data == profile

    @pytest.mark.parametrize(
        "id",
        [
            pytest.param("~", id="one-character"),
            pytest.param("a" * 256, id="256-characters"),
            pytest.param(_VISIBLE, id="all-visible-ascii"),
            pytest.param("{a}:{b}", id="braces"),
            pytest.param("../../*?[a-z]%00%n", id="wildcards"),
            pytest.param("';DROP/**/TABLE/**/sessions;--", id="quotes"),
        ],
    )
    async def test_every_valid_id_works(self, id: str) -> None:
        """Ids are 1 to 256 visible ASCII characters, without any special ones."""
        storage = await self.open()
        session = Session(id=id, data="mine")

        await storage.store(session)

        assert content(await storage.load(session.id)) == content(session)
        assert await storage.delete(session.id) is True

    async def test_ids_match_exactly(self) -> None:
        """Ids that differ in case, or by a suffix, are different sessions."""
        storage = await self.open()
        id = new_session_id() + "aA"
        sessions = [Session(id=one, data=one) for one in (id, id.swapcase(), id + "a", id[:-1])]

        for session in sessions:
            await storage.store(session, when=When.ABSENT)

        assert [(await storage.load(session.id)).data for session in sessions] == [
            session.data for session in sessions
        ]

    async def test_dates_come_back_in_utc(self) -> None:
        """A date in another zone comes back as the same moment in UTC."""
        storage = await self.open()
        zone = timezone(timedelta(hours=-5, minutes=-30))
        session = new_session(
            created_at=datetime(2024, 12, 31, 23, 0, 0, 1, tzinfo=zone),
            updated_at=datetime(2025, 6, 1, 12, tzinfo=zone),
            expires_at=datetime(2999, 1, 1, tzinfo=zone),
        )

        await storage.store(session)
        loaded = await storage.load(session.id)

        dates = [loaded.created_at, loaded.updated_at, loaded.expires_at]
        assert dates == [session.created_at, session.updated_at, session.expires_at]
        assert [date and date.utcoffset() for date in dates] == [timedelta(0)] * 3

    async def test_each_load_returns_a_copy(self) -> None:
        """A change of a loaded session does not reach the next caller."""
        storage = await self.open()
        session = new_session(metadata={"a": "1"}, data={"list": [1]})
        await storage.store(session)

        first = await storage.load(session.id)
        first.kind = "changed"
        first.metadata["b"] = "2"
        first.data["list"].append(2)

        assert content(await storage.load(session.id)) == content(session)

    async def test_store_keeps_a_copy(self) -> None:
        """A change of the caller's object after the store does not reach the storage."""
        storage = await self.open()
        data = {"list": [1]}
        session = new_session(kind="web", metadata={"a": "1"}, data=data)

        await storage.store(session)
        session.kind = "changed"
        session.metadata["b"] = "2"
        data["list"].append(2)
        loaded = await storage.load(session.id)

        assert (loaded.kind, loaded.metadata, loaded.data) == ("web", {"a": "1"}, {"list": [1]})

    async def test_overwriting_replaces_every_field(self) -> None:
        """Nothing of the earlier session remains."""
        storage = await self.open()
        session = new_session(
            kind="web", principal="someone", metadata={"a": "1", "b": "2"}, data={"c": 3}
        )
        await storage.store(session)
        replacement = Session(id=session.id, metadata={"a": "4"})

        await storage.store(replacement)

        assert content(await storage.load(session.id)) == content(replacement)

    @pytest.mark.parametrize("when", WHENS)
    async def test_store_stamps_a_fresh_revision(self, when: When) -> None:
        """Every write stamps the caller's object with a new revision, the stored one."""
        storage = await self.open()
        session = await begin(storage, when)
        before = session.revision

        await storage.store(session, when=when)

        assert isinstance(session.revision, str)
        assert session.revision not in ("", before)
        assert (await storage.load(session.id)).revision == session.revision

    @pytest.mark.parametrize("when", WHENS)
    async def test_store_changes_only_the_revision(self, when: When) -> None:
        """A write changes no other field of the caller's object."""
        storage = await self.open()
        session = await begin(storage, when)
        before = msgspec.structs.asdict(session)

        await storage.store(session, when=when)

        assert msgspec.structs.asdict(session) == before | {"revision": session.revision}

    async def test_revisions_never_repeat(self) -> None:
        """Equal content gets another revision, and so does another session."""
        storage = await self.open()
        first, second = new_session(), new_session()
        revisions: list[str] = []

        for session in [first, second] * 10:
            await storage.store(session)
            revisions.append(session.revision)

        assert len(set(revisions)) == len(revisions)

    async def test_load_keeps_the_revision(self) -> None:
        """A load does not change the revision that `UNCHANGED` compares."""
        storage = await self.open()
        session = await begin(storage, When.UNCHANGED)

        revisions = [(await storage.load(session.id)).revision for _ in range(3)]
        await storage.store(session, when=When.UNCHANGED)

        assert set(revisions) != {session.revision}
        assert len(set(revisions)) == 1

    async def test_load_of_an_unknown_id_is_not_found(self) -> None:
        """It raises `SessionNotFound` and does not make an empty session."""
        storage = await self.open()

        with pytest.raises(SessionNotFound):
            await storage.load(new_session_id())

    @pytest.mark.parametrize("when", CREATES)
    @pytest.mark.parametrize("state", ABSENT_STATES)
    async def test_absent_session_can_be_created(self, state: str, when: When) -> None:
        """`ALWAYS` and `ABSENT` write where a session is absent, for each reason."""
        storage = await self.open(ttl=self.ttl)
        session = await absent(self, storage, state)
        session.data = "second"

        await storage.store(session, when=when)

        assert content(await storage.load(session.id)) == content(session)

    @pytest.mark.parametrize("when", NEEDS_ONE)
    @pytest.mark.parametrize("state", ABSENT_STATES)
    async def test_absent_session_cannot_be_overwritten(self, state: str, when: When) -> None:
        """`PRESENT` and `UNCHANGED` do not revive a session that is absent, for each reason."""
        storage = await self.open(ttl=self.ttl)
        session = await absent(self, storage, state)

        with unchanged(session), pytest.raises(SessionNotFound):
            await storage.store(session, when=when)

        with pytest.raises(SessionNotFound):
            await storage.load(session.id)

    @pytest.mark.parametrize("when", OVERWRITES)
    async def test_present_session_can_be_overwritten(self, when: When) -> None:
        """`ALWAYS`, `PRESENT` and `UNCHANGED` write over the caller's last write."""
        storage = await self.open()
        session = await begin(storage, when)

        for data in ("second", "third"):
            session.data = data
            await storage.store(session, when=when)

        assert content(await storage.load(session.id)) == content(session)

    async def test_absent_refuses_a_present_session(self) -> None:
        """`ABSENT` raises `SessionExists`, also for the stored object itself."""
        storage = await self.open()
        session = await begin(storage, When.ALWAYS)
        stored = await storage.load(session.id)
        session.data = "second"

        with unchanged(session), pytest.raises(SessionExists):
            await storage.store(session, when=When.ABSENT)

        assert content(await storage.load(session.id)) == content(stored)

    async def test_unchanged_refuses_a_rewritten_session(self) -> None:
        """`UNCHANGED` raises `SessionConflict`, so no update is lost silently."""
        storage = await self.open()
        stale = await begin(storage, When.UNCHANGED)
        other = await storage.load(stale.id)
        other.data = "other"
        await storage.store(other, when=When.UNCHANGED)
        stale.data = "ours"

        with unchanged(stale), pytest.raises(SessionConflict):
            await storage.store(stale, when=When.UNCHANGED)

        assert content(await storage.load(stale.id)) == content(other)

    async def test_unchanged_compares_revisions_not_content(self) -> None:
        """A session that was written again with equal content has another revision."""
        storage = await self.open()
        stale = await begin(storage, When.UNCHANGED)
        await storage.store(await storage.load(stale.id))

        with unchanged(stale), pytest.raises(SessionConflict):
            await storage.store(stale, when=When.UNCHANGED)

    async def test_unchanged_refuses_a_recreated_session(self) -> None:
        """A session that was deleted and created again has another revision."""
        storage = await self.open()
        stale = await begin(storage, When.UNCHANGED)
        await storage.delete(stale.id)
        anew = Session(id=stale.id, data="anew")
        await storage.store(anew, when=When.ABSENT)

        with unchanged(stale), pytest.raises(SessionConflict):
            await storage.store(stale, when=When.UNCHANGED)

        assert content(await storage.load(stale.id)) == content(anew)

    async def test_unchanged_refuses_an_unstored_object(self) -> None:
        """An empty revision matches no stored session."""
        storage = await self.open()
        stored = await begin(storage, When.UNCHANGED)
        stranger = Session(id=stored.id, data="stranger")

        with unchanged(stranger), pytest.raises(SessionConflict):
            await storage.store(stranger, when=When.UNCHANGED)

        assert content(await storage.load(stored.id)) == content(stored)

    @pytest.mark.parametrize("when", [When.ALWAYS, When.PRESENT], ids=lambda when: when.name)
    async def test_unconditional_writes_ignore_the_revision(self, when: When) -> None:
        """`ALWAYS` and `PRESENT` overwrite a session that was written since it was loaded."""
        storage = await self.open()
        stale = await begin(storage, when)
        await storage.store(await storage.load(stale.id))
        stale.data = "ours"

        await storage.store(stale, when=when)

        assert content(await storage.load(stale.id)) == content(stale)

    async def test_writes_leave_other_sessions_alone(self) -> None:
        """Overwriting or deleting one session does not change another."""
        storage = await self.open()
        bystander = await begin(storage, When.ALWAYS)
        session = await begin(storage, When.ALWAYS)

        await storage.store(session, when=When.PRESENT)
        await storage.delete(session.id)

        assert content(await storage.load(bystander.id)) == content(bystander)

    async def test_delete_returns_whether_it_removed_a_session(self) -> None:
        """True for the call that removed it; False afterwards, and for an unknown id."""
        storage = await self.open()
        session = await begin(storage, When.ALWAYS)

        assert await storage.delete(session.id) is True
        assert await storage.delete(session.id) is False
        assert await storage.delete(new_session_id()) is False
        with pytest.raises(SessionNotFound):
            await storage.load(session.id)

    @pytest.mark.parametrize("state", ABSENT_STATES)
    async def test_delete_of_an_absent_session_returns_false(self, state: str) -> None:
        """A session that cannot be loaded counts as absent, for each reason."""
        storage = await self.open(ttl=self.ttl)
        session = await absent(self, storage, state)

        assert await storage.delete(session.id) is False

"""`SessionManager`: the sessions of a principal, listed, counted and revoked."""

from datetime import timedelta
from typing import Any

import msgspec
import pytest

from aiosessions import (
    InvalidSessionId,
    LocalStorage,
    Session,
    SessionInfo,
    SessionManager,
    SessionNotFound,
    Storage,
)
from tests.support.loops import on_both
from tests.support.storages import (
    IndexedReplicas,
    InterceptedStorage,
    every_grace,
    every_point,
)


def nothing(_: Session[Any]) -> None:
    """A change that leaves the session as it is."""


@every_grace
@on_both
async def test_rotated_session_is_listed_once(grace: float) -> None:
    """The list has the new id, and not the one that was rotated away."""
    r = IndexedReplicas(grace=grace)
    session = await r.sessions.create(principal="alice")

    for _ in range(3):
        session = await r.sessions.rotate(session)

    assert [info.digest for info in await r.sessions.list("alice")] == [session.digest]
    assert await r.sessions.count("alice") == 1
    assert await r.sessions.revoke_all("alice") == 1
    assert await r.count() == 0


@on_both
async def test_list_shows_sessions_without_ids() -> None:
    """The latest update is first, and the sessions of others are left out."""
    r = IndexedReplicas()
    first = await r.sessions.create(
        principal="alice", kind="web", metadata={"a": "b"}, data=["tea"]
    )
    r.clock.advance(1)
    second = await r.sessions.create(principal="alice")
    for other in (None, "", "bob"):
        await r.sessions.create(principal=other)
    r.clock.advance(1)
    await r.sessions.save(first)

    infos = await r.sessions.list("alice")

    shown = {name: getattr(first, name) for name in SessionInfo.__struct_fields__}
    assert msgspec.structs.asdict(infos[0]) == shown
    assert [info.digest for info in infos] == [first.digest, second.digest]
    assert await r.sessions.list("nobody") == await r.sessions.list("\ud800") == []
    text = repr(infos[0])
    assert first.digest[:8] in text
    assert "web" in text
    assert not any(each in text for each in (first.id, first.digest, "alice", "tea", "'b'"))


@on_both
async def test_list_renews_nothing() -> None:
    """Neither a list nor a count is use."""
    r = IndexedReplicas(ttl=10)
    await r.sessions.create(principal="alice")
    r.clock.advance(9.999)

    assert len(await r.sessions.list("alice")) == await r.sessions.count("alice") == 1
    r.clock.advance(0.001)

    assert await r.sessions.list("alice") == []
    assert await r.sessions.count("alice") == 0


@on_both
async def test_list_respects_the_longest_lifetime() -> None:
    """Each listed session shows its end, even if it was stored without one."""
    r = IndexedReplicas(max_lifetime=20)
    for id, age, end in (("x", 0, None), ("y", 5, None), ("z", 0, 7)):
        await r.storage.store(
            Session(
                id=id,
                principal="alice",
                created_at=r.clock.now() - timedelta(seconds=age),
                expires_at=None if end is None else r.clock.now() + timedelta(seconds=end),
            )
        )
    start = r.clock.now()

    for moment, expected in ((0, [20, 15, 7]), (14.999, [20, 15]), (15, [20]), (20, [])):
        r.clock.advance(moment - (r.clock.now() - start).total_seconds())
        ends = {info.expires_at for info in await r.sessions.list("alice")}
        assert ends == {start + timedelta(seconds=each) for each in expected}


@on_both
async def test_one_session_is_revoked_by_its_digest() -> None:
    """Only for its owner, and once. Any other string names no session."""
    r = IndexedReplicas()
    one, other = [await r.sessions.create(principal="alice") for _ in range(2)]

    for principal, digest in (("bob", one.digest), ("alice", one.id), ("alice", "")):
        assert await r.sessions.revoke(principal, digest) is False
    assert await r.sessions.revoke("alice", one.digest) is True
    assert await r.sessions.revoke("alice", one.digest) is False

    assert await r.lives(other.id)
    assert not await r.lives(one.id)


@on_both
async def test_every_other_session_is_revoked() -> None:
    """Sign out everywhere else, then everywhere; sessions of others stay."""
    r = IndexedReplicas()
    mine = [await r.sessions.create(principal="alice") for _ in range(3)]
    others = [await r.sessions.create(principal=each) for each in (None, "", "bob")]

    with pytest.raises(InvalidSessionId):
        await r.sessions.revoke_all("alice", keep="a b")
    assert await r.sessions.revoke_all("alice", keep=mine[1].id) == 2
    assert [await r.lives(each.id) for each in mine] == [False, True, False]
    assert await r.sessions.revoke_all("alice", keep=others[0].id) == 1
    assert await r.sessions.revoke_all("alice") == 0

    assert await r.count() == len(others)


@every_grace
@every_point
@pytest.mark.parametrize("change", [None, nothing])
@on_both
async def test_rotation_does_not_survive_revoke_all(point: int, grace: float, change: Any) -> None:
    """At whatever step the sign-out comes, both ids are gone."""
    r = IndexedReplicas(grace=grace)
    session = await r.sessions.create(principal="alice")
    revoked: list[int] = []

    async def revoke(number: int, _: str) -> None:
        if number == point:
            revoked.append(await r.rival.revoke_all("alice"))

    r.storage.intercept(revoke)
    try:
        await r.sessions.rotate(session, change)
    except SessionNotFound:
        assert revoked
    else:
        assert revoked in ([], [1])

    if revoked:
        assert await r.sessions.list("alice") == []
        assert await r.count() == 0


@pytest.mark.parametrize("call", ["list", "count", "revoke_all"])
@on_both
async def test_principal_of_wrong_type_is_refused(call: str) -> None:
    """None does not mean the sessions without an owner."""
    r = IndexedReplicas()

    for principal in (None, b"alice"):
        with pytest.raises(TypeError, match="a principal is a str, not "):
            await getattr(r.sessions, call)(principal)


# Storages without an index


@on_both
async def test_storage_without_index_is_named() -> None:
    """The calls that need an index raise `NotImplementedError`; the owner check works."""
    storage: Storage[Any] = InterceptedStorage(LocalStorage[Any](ttl=60))
    sessions = SessionManager(storage)
    session = await sessions.create(principal="alice")

    for call in (
        lambda: sessions.list("alice"),
        lambda: sessions.count("alice"),
        lambda: sessions.revoke("alice", session.digest),
        lambda: sessions.revoke_all("alice", keep=session.id),
    ):
        with pytest.raises(NotImplementedError, match="InterceptedStorage has no index"):
            await call()
    with pytest.raises(NotImplementedError, match=r"InterceptedStorage .* max_per_principal"):
        SessionManager(storage, max_per_principal=1)
    assert await sessions.get(session.id, principal="alice") == session

"""`SessionManager` and the owner of a session: it is checked, and it does not change."""

import copy
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from aiosessions import (
    InvalidSession,
    JsonCodec,
    Session,
    SessionConflict,
    SessionManager,
    SessionNotFound,
)
from aiosessions.testing import FakeClock
from tests.support.loops import on_both
from tests.support.storages import (
    Backend,
    Entry,
    IndexedReplicas,
    ReferenceStorage,
    Replicas,
    every_grace,
    fields,
)

Call = Callable[..., Awaitable[Session[Any]]]


def nothing(_: Session[Any]) -> None:
    """A change that leaves the session as it is."""


def give_to(principal: str | None) -> Callable[[Session[Any]], None]:
    """A change of the principal."""
    return lambda session: setattr(session, "principal", principal)


# Checks of the owner

CHECKED: dict[str, Call] = {
    "get": lambda sessions, id, **owner: sessions.get(id, **owner),
    "mutate": lambda sessions, id, **owner: sessions.mutate(id, nothing, **owner),
    "rotate": lambda sessions, id, **owner: sessions.rotate(id, **owner),
}
every_check = pytest.mark.parametrize("call", CHECKED.values(), ids=CHECKED)


@every_check
@pytest.mark.parametrize("owner", [None, "", "alice", "zoë"])
@on_both
async def test_owner_gets_the_session(call: Call, owner: str | None) -> None:
    """The owner may be named or not. None names a session without an owner."""
    r = Replicas()
    session = await r.sessions.create(principal=owner, data="tea")

    for named in ({}, {"principal": owner}):
        session = await call(r.sessions, session.id, **named)

        assert (session.principal, session.data) == (owner, "tea")


@every_check
@pytest.mark.parametrize(
    ("owner", "caller"),
    [
        ("alice", "bob"),
        ("alice", "alice2"),
        ("alice", "Alice"),
        ("alice", None),
        ("alice", ""),
        ("", None),
        (None, ""),
        (None, "alice"),
        ("e\u0301", "é"),
        ("alice", "\ud800"),
    ],
)
@on_both
async def test_session_of_another_is_not_found(
    call: Call, owner: str | None, caller: str | None
) -> None:
    """The error is that of an absent session, and nothing is written."""
    r = Replicas()
    session = await r.sessions.create(principal=owner)
    r.storage.intercept()

    with pytest.raises(SessionNotFound) as refused:
        await call(r.sessions, session.id, principal=caller)
    assert r.storage.calls == ["load"]
    with pytest.raises(SessionNotFound) as absent:
        await call(r.sessions, "absent", principal=caller)

    assert type(refused.value) is type(absent.value)
    assert str(refused.value) == str(absent.value)
    assert refused.value.__context__ is None
    assert await r.rival.get(session.id) == session


@every_check
@on_both
async def test_rotated_id_of_another_is_not_found(call: Call) -> None:
    """Others do not learn that an id was rotated away."""
    r = Replicas()
    old = await r.sessions.create(principal="alice")
    await r.sessions.rotate(old)

    with pytest.raises(SessionNotFound):
        await call(r.sessions, old.id, principal="bob")


@every_check
@pytest.mark.parametrize("principal", [b"alice", 1, False, ["alice"]])
@on_both
async def test_owner_of_wrong_type_is_refused(call: Call, principal: Any) -> None:
    """`TypeError` comes before the first call of the storage."""
    r = Replicas()

    with pytest.raises(TypeError, match=f"a principal is a str, not {type(principal).__name__}"):
        await call(r.sessions, "absent", principal=principal)

    assert r.storage.calls == []


async def test_owners_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hmac.compare_digest` compares them."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return True

    monkeypatch.setattr("aiosessions._principals.compare_digest", compare)
    r = Replicas()
    session = await r.sessions.create(principal="zoë")

    await r.sessions.get(session.id, principal="bob")

    assert compared == [("zoë".encode(), b"bob")]


@pytest.mark.parametrize("verb", ["mutate", "rotate"])
@on_both
async def test_owner_is_checked_at_each_attempt(verb: str) -> None:
    """Between two attempts, the id may become the session of another owner."""
    r = Replicas()
    await r.sessions.create(id="x", principal="alice")
    runs = 0

    async def change(_: Session[Any]) -> None:
        nonlocal runs
        runs += 1
        await r.rival.delete("x")
        await r.rival.create(id="x", principal="bob")

    with pytest.raises(SessionNotFound):
        await getattr(r.sessions, verb)("x", change, principal="alice")

    assert runs == 1
    assert (await r.rival.get("x")).principal == "bob"
    assert await r.count() == 1


# A session keeps its owner

every_move = pytest.mark.parametrize(
    ("before", "after"), [("alice", "bob"), (None, "alice"), ("alice", None), ("alice", "")]
)


def assigned(session: Session[Any], principal: str | None) -> Session[Any]:
    """The same object, with another principal."""
    session.principal = principal
    return session


def copied(session: Session[Any], principal: str | None) -> Session[Any]:
    """A copy with another principal."""
    return assigned(copy.copy(session), principal)


def replaced(session: Session[Any], principal: str | None) -> Session[Any]:
    """A copy by msgspec with another principal."""
    return msgspec.structs.replace(session, principal=principal)


@every_move
@pytest.mark.parametrize("moved", [assigned, copied, replaced])
@on_both
async def test_save_refuses_another_owner(
    before: str | None,
    after: str | None,
    moved: Callable[[Session[Any], str | None], Session[Any]],
) -> None:
    """`InvalidSession`, and nothing is written. With its owner, the same object is saved."""
    r = Replicas()
    session = moved(await r.sessions.create(principal=before, data="tea"), after)
    content = fields(session)
    r.storage.intercept()

    with pytest.raises(InvalidSession, match="`rotate`"):
        await r.sessions.save(session)

    assert r.storage.calls in ([], ["load"])
    assert fields(session) == content
    assert (await r.rival.get(session.id)).principal == before
    session.principal = before
    await r.sessions.save(session)


@on_both
async def test_own_revision_tells_the_owner_without_a_load() -> None:
    """A save of an unchanged owner costs one store."""
    r = Replicas()
    session = await r.sessions.create(principal="alice")
    r.storage.intercept()

    await r.sessions.save(session)

    assert r.storage.calls == ["store unchanged"]


@every_move
@on_both
async def test_empty_revision_saves_no_owner(before: str | None, after: str | None) -> None:
    """Without a revision, each save is a conflict."""
    r = Replicas()
    session = await r.sessions.create(principal=before)
    session.principal, session.revision = after, ""

    with pytest.raises(SessionConflict):
        await r.sessions.save(session)

    assert (await r.rival.get(session.id)).principal == before


class Numbering(ReferenceStorage):
    """A third-party storage without an index, which numbers its revisions in a format."""

    def __init__(self, form: str) -> None:
        super().__init__(Backend(), 60, JsonCodec[Any](), FakeClock())
        self.form = form
        self.writes = 0

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        """Return the next number in place of the revision."""
        self.writes += 1
        _, deadline, record = super().seal(session)
        return self.form.format(self.writes), deadline, record

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        """Return the session under its number."""
        session = super().unseal(entry, id)
        session.revision = entry.revision
        return session


@every_move
@pytest.mark.parametrize("form", ["{}", "v-{:014}", "{:011}.0000"])
@on_both
async def test_foreign_revision_is_looked_up(
    form: str, before: str | None, after: str | None
) -> None:
    """The stored session tells its owner, even if a revision looks like one of this package."""
    storage = Numbering(form)
    sessions = SessionManager(storage, clock=storage.clock)
    session = await sessions.create(principal=before)
    await sessions.save(session)

    session.principal = after
    with pytest.raises(InvalidSession):
        await sessions.save(session)

    assert storage.writes == 2
    assert (await sessions.get(session.id, principal=before)).revision == session.revision
    await storage.delete(session.id)
    with pytest.raises(SessionNotFound):
        await sessions.save(session)


@every_move
@on_both
async def test_mutate_refuses_another_owner(before: str | None, after: str | None) -> None:
    """`InvalidSession`, without another attempt and without a write."""
    r = Replicas()
    session = await r.sessions.create(principal=before)
    r.storage.intercept()

    with pytest.raises(InvalidSession, match="`rotate`"):
        await r.sessions.mutate(session, give_to(after))

    assert r.storage.calls == ["load"]
    assert await r.rival.get(session.id) == session


@every_move
@every_grace
@on_both
async def test_rotation_may_change_the_owner(
    before: str | None, after: str | None, grace: float
) -> None:
    """Only the new id has the new owner, whose list has it at once."""
    r = IndexedReplicas(grace=grace)
    old = await r.sessions.create(principal=before)

    new = await r.sessions.rotate(old, give_to(after), principal=before)

    assert (await r.sessions.get(new.id, principal=after)).principal == after
    if grace:
        await r.sessions.get(old.id, principal=before)
    with pytest.raises(SessionNotFound):
        await r.sessions.get(old.id, principal=after)
    for principal, digests in ((before, []), (after, [new.digest])):
        if principal is not None:
            assert [each.digest for each in await r.sessions.list(principal)] == digests
            assert await r.sessions.count(principal) == len(digests)

"""Two requests at once. The second one runs inside the page of the first, so no test waits."""

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from aiosessions import LocalStorage, SessionManager
from aiosessions.asgi import SessionMiddleware, WebSession
from aiosessions.testing import FakeClock
from tests.support.web import (
    Answer,
    Client,
    Handler,
    answer_into,
    mapping,
    page,
    setting,
    signing_in,
)

from .conftest import TTL


def deleting(session: WebSession[Any]) -> None:
    """A page that signs out."""
    _ = session.delete()


def around(first: Handler, client: Client, second: Handler, status: int = 200) -> Handler:
    """A page during which another tab completes a request."""

    async def handler(session: WebSession[Any]) -> None:
        assert session.data is not None
        first(session)
        other = client.copy()
        assert (await other.get(second)).status == status

    return handler


async def test_different_keys_are_merged(client: Client) -> None:
    """Both requests are answered with 200, and both changes are stored."""
    await client.get(setting(a=0))
    answer = await client.get(around(setting(b=1), client, setting(c=2)))
    assert answer.status == 200
    assert await client.data() == ({"a": 0, "b": 1, "c": 2}, None)


async def test_change_of_the_same_key_is_a_conflict(client: Client) -> None:
    """A request that has read the key cannot repeat its change: 409, and the other change stays."""
    await client.get(setting(items=[]))
    add: Callable[[int], Handler] = lambda item: lambda session: session.data["items"].append(item)  # noqa: E731
    answer = await client.get(around(add(1), client, add(2)))
    assert (answer.status, answer.all("set-cookie")) == (409, [])
    assert await client.data() == ({"items": [2]}, None)


async def test_key_that_was_only_set_is_set_again(client: Client) -> None:
    """Without a read there is nothing to lose: the later request wins."""
    await client.get(setting(seen=0))

    async def change(session: Any) -> None:
        session["seen"] = 1
        await client.copy().get(setting(seen=2, b=1))

    assert (await client.call(mapping(change))).status == 200
    assert await client.data() == ({"seen": 1, "b": 1}, None)


async def test_mutate_repeats_a_change(client: Client) -> None:
    """Parallel additions to one list all arrive."""
    await client.get(setting(items=[]))

    async def add(session: WebSession[Any], item: int) -> None:
        await session.mutate(lambda stored: stored.data["items"].append(item))

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(client.copy().get, lambda session, item=number: add(session, item))
    data, _ = await client.data()
    assert sorted(data["items"]) == list(range(8))


@pytest.mark.parametrize("handler", [setting(b=1), signing_in("bob"), lambda s: s.rotate()])
async def test_conflict_is_an_error_if_configured(client: Client, handler: Handler) -> None:
    """With `on_conflict="error"`, nothing is merged."""
    client.settings["on_conflict"] = "error"
    await client.get(setting(a=0))
    assert (await client.get(around(handler, client, setting(a=1)))).status == 409
    assert await client.data() == ({"a": 1}, None)


@pytest.mark.parametrize("first", [setting(a=1), deleting, signing_in("bob"), lambda s: s.rotate()])
async def test_faster_sign_in_is_not_lost(client: Client, first: Handler) -> None:
    """A slower request with the old id gets 409, and sends no cookie."""
    await client.get(setting(a=0))
    tab = client.copy()

    async def handler(session: WebSession[Any]) -> None:
        first(session)
        await tab.get(signing_in("alice"))

    answer = await client.get(handler)
    assert (answer.status, answer.all("set-cookie")) == (409, [])
    assert await tab.data() == ({"a": 0}, "alice")


async def test_slower_sign_in_keeps_a_change(client: Client) -> None:
    """The change of a faster request moves to the new id."""
    await client.get(setting(a=0))
    answer = await client.get(around(signing_in("alice"), client, setting(b=1)))
    assert answer.status == 200
    assert await client.data() == ({"a": 0, "b": 1}, "alice")


async def test_slow_read_does_not_undo_a_sign_in(client: Client, clock: FakeClock) -> None:
    """A page that began before the sign-in does not send the old id again, even if that is due."""
    await client.get(setting(a=0))
    clock.advance(TTL * 0.6)
    tab = client.copy()

    async def handler(session: WebSession[Any]) -> None:
        assert session.data
        await tab.get(signing_in("alice"))

    answer = await client.get(handler)
    assert (answer.status, answer.all("set-cookie")) == (200, [])


@pytest.mark.parametrize("first", [setting(b=1), lambda s: s.rotate(), signing_in(None)])
async def test_deleted_session_stays_deleted(
    client: Client, sessions: SessionManager[Any], local: LocalStorage[Any], first: Handler
) -> None:
    """A change, or a rotation, of a session that another request has deleted is answered 409."""
    await client.get(setting(a=0))
    await client.get(signing_in("alice"))

    async def handler(session: WebSession[Any]) -> None:
        first(session)
        await sessions.revoke_all("alice")

    answer = await client.get(handler)
    assert (answer.status, answer.all("set-cookie")) == (409, [])
    assert await sessions.count("alice") == 0
    assert await client.data() == ({}, None)
    assert local.statistics().sessions == 1  # the mark of the first id


async def test_sign_in_survives_a_deletion(client: Client) -> None:
    """It is newer than the deletion. It gets the id that it has announced, and its own changes."""
    await client.get(setting(a=0))
    ids: list[str] = []

    def first(session: WebSession[Any]) -> None:
        session.principal = "alice"
        session.data["b"] = 1
        ids.append(session.id)

    answer = await client.get(around(first, client, deleting))
    assert (answer.status, [client.cookie]) == (200, ids)
    assert await client.data() == ({"b": 1}, "alice")


async def test_change_during_a_sign_out(client: Client) -> None:
    """The session is deleted with a change that came first."""
    await client.get(setting(a=0))
    tab = client.copy()
    assert (await client.get(around(deleting, client, setting(b=1)))).status == 200
    assert (await tab.data()) == ({}, None)


async def test_sign_out_repeats_after_a_change(
    client: Client, sessions: SessionManager[Any], local: LocalStorage[Any]
) -> None:
    """A write between the load and the removal does not keep the session."""
    await client.get(setting(a=0))
    load, id = local.load, client.cookie or ""

    async def load_before_a_write(id: str) -> Any:
        local.load = load  # type: ignore[method-assign]
        found = await load(id)
        await sessions.mutate(id, lambda stored: stored.data.update(a=1))
        return found

    def handler(session: WebSession[Any]) -> None:
        deleting(session)
        local.load = load_before_a_write  # type: ignore[method-assign]

    assert (await client.get(handler)).status == 200
    assert not await sessions.delete(id)


async def test_references_stay_valid_after_a_merge(client: Client) -> None:
    """An object that the application got before a save may be changed after it."""
    await client.get(setting(a=0))

    async def handler(session: WebSession[Any]) -> None:
        data = session.data
        data["list"] = items = [1]
        await client.copy().get(setting(b=1))
        await session.save()
        assert data["b"] == 1
        items.append(2)
        data["c"] = 1

    await client.get(handler)
    assert await client.data() == ({"a": 0, "b": 1, "c": 1, "list": [1, 2]}, None)


async def test_one_middleware_serves_requests_at_once(sessions: SessionManager[Any]) -> None:
    """Requests of different clients share nothing."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await anyio.lowlevel.checkpoint()
        number = int(scope["path"])
        await page(setting(number=number), [])(scope, receive, send)

    shared = SessionMiddleware(app, sessions)
    clients = [Client(sessions) for _ in range(10)]

    async def visit(number: int) -> None:
        client, answer = clients[number], Answer()
        await shared(client.scope(path=str(number)), client.receive(()), answer_into(answer))
        client.learn(answer)

    async with anyio.create_task_group() as group:
        for number in range(10):
            group.start_soon(visit, number)
    assert [(await client.data())[0]["number"] for client in clients] == list(range(10))

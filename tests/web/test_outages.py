"""Storages that fail, records that cannot be read, and requests that end early."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from aiosessions import (
    CorruptSession,
    InvalidSession,
    LocalStorage,
    SessionManager,
    StorageClosed,
    StorageUnavailable,
)
from aiosessions.asgi import WebSession
from aiosessions.testing import FakeClock
from tests.support.web import Answer, Client, page, setting, signing_in

from .conftest import TTL

Break = Callable[[str, Exception], None]


def deleting(session: WebSession[Any]) -> None:
    """A page that signs out."""
    _ = session.delete()


@pytest.fixture
def local(clock: FakeClock) -> LocalStorage[Any]:
    """A storage with verbs that can be broken."""

    class Breakable(LocalStorage[Any]):
        """A storage with an error for each verb."""

        errors: dict[str, Exception] = {}  # noqa: RUF012 - replaced below

        async def load(self, id: str) -> Any:
            if "load" in self.errors:
                raise self.errors["load"]
            return await super().load(id)

        async def store(self, session: Any, **when: Any) -> None:
            if "store" in self.errors:
                raise self.errors["store"]
            await super().store(session, **when)

    storage = Breakable(ttl=TTL, clock=clock)
    storage.errors = {}
    return storage


@pytest.mark.parametrize("error", [StorageUnavailable("down"), StorageClosed("closed")])
@pytest.mark.parametrize(
    ("verb", "handler"),
    [
        ("load", setting()),
        ("store", setting(b=1)),
        ("store", signing_in("alice")),
        ("store", deleting),
    ],
)
async def test_outage_is_answered_with_503(
    client: Client, local: Any, verb: str, handler: Any, error: Exception
) -> None:
    """The visitor is never anonymous for that reason, and the application's answer is dropped."""
    await client.get(setting(a=1))
    before = client.cookie
    local.errors = {verb: error}
    answer = await client.get(handler)
    assert (answer.status, answer.all("retry-after")) == (503, ["1"])
    assert len(answer.messages) == 2
    assert client.cookie == before
    local.errors = {}
    assert await client.data() == ({"a": 1}, None)


@pytest.mark.parametrize("handles", [False, True])
async def test_error_in_the_application_keeps_its_status(
    client: Client, local: Any, *, handles: bool
) -> None:
    """An error of an awaited call becomes 503 or 409, where the framework would answer 500."""
    await client.get(setting(a=1))

    async def handler(session: WebSession[Any]) -> int:
        session.data["a"] = 2
        local.errors = {"store": StorageUnavailable("down")}
        try:
            await session.save()
        except StorageUnavailable:
            if not handles:
                raise
        return 500

    if handles:
        assert (await client.get(handler)).status == 503
    else:
        answer = Answer()
        with pytest.raises(StorageUnavailable):
            await client.call(page(handler, []), answer=answer)
        assert answer.status == 503


async def test_corrupt_record_is_logged_by_its_digest(
    client: Client, local: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer is 500, or a fresh session."""
    await client.get(setting(a=1))
    local.errors = {"load": CorruptSession("unreadable")}
    answer = await client.get(setting())
    assert answer.status == 500
    assert client.cookie
    assert client.cookie not in caplog.text
    assert caplog.records[0].levelno == logging.ERROR
    client.settings["on_corrupt"] = "fresh"
    before = client.cookie
    assert (await client.get(setting(b=2))).status == 200
    assert client.cookie != before
    local.errors = {}
    assert await client.data() == ({"b": 2}, None)


async def test_unencodable_data_is_an_error_of_the_application(client: Client) -> None:
    """The framework can still answer, with a status that stores nothing."""
    with pytest.raises(InvalidSession):
        await client.get(setting(a=object()))
    assert client.cookie is None


async def test_failed_deletion_does_not_hide_an_exception(client: Client, local: Any) -> None:
    """The exception of the application reaches the server."""
    await client.get(setting(a=1))

    def handler(session: WebSession[Any]) -> None:
        _ = session.delete()
        local.errors = {"load": StorageUnavailable("down")}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await client.get(handler)


async def test_outage_delays_a_due_cookie(client: Client, local: Any, clock: FakeClock) -> None:
    """The page was read, so it is answered; a later one sends the cookie."""
    await client.get(setting(a=1))
    clock.advance(TTL * 0.6)

    def handler(session: WebSession[Any]) -> None:
        assert session.data
        local.errors = {"store": StorageUnavailable("down")}

    answer = await client.get(handler)
    assert (answer.status, answer.all("set-cookie")) == (200, [])


async def test_record_that_became_corrupt_is_deleted(client: Client, local: Any) -> None:
    """Nothing but its id is needed for that."""
    await client.get(setting(a=1))

    def handler(session: WebSession[Any]) -> None:
        deleting(session)
        local.errors = {"load": CorruptSession("unreadable")}

    assert (await client.get(handler)).status == 200
    assert local.statistics().sessions == 0


async def test_response_without_a_head_stores_nothing(client: Client) -> None:
    """The server answers with an error then; only a deletion holds."""
    await client.get(setting(a=1))

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        scope["session"]["a"] = 2

    await client.call(app)
    assert await client.data() == ({"a": 1}, None)


async def test_cancelled_request_stores_nothing(client: Client) -> None:
    """The cancellation passes through as it is."""
    await client.get(setting(a=1))

    async def handler(session: WebSession[Any]) -> None:
        session.data["a"] = 2
        session.principal = "alice"
        scope.cancel()
        await anyio.lowlevel.checkpoint()

    with anyio.CancelScope() as scope:
        await client.get(handler)
    assert scope.cancelled_caught
    assert await client.data() == ({"a": 1}, None)


async def test_storage_without_ttl_gives_a_cookie_without_end(clock: FakeClock) -> None:
    """Not every storage tells its TTL."""

    class Plain(LocalStorage[Any]):
        """A storage that does not."""

        ttl: Any = None

    sessions = SessionManager[Any](Plain(ttl=TTL, clock=clock), clock=clock)
    answer: Awaitable[Any] = Client(sessions).get(setting(a=1))
    assert "Max-Age" not in (await answer).all("set-cookie")[0]

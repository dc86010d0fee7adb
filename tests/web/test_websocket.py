"""WebSockets and streams: the origin, saves, the keep-alive, and the end of the session."""

from collections.abc import Callable, Sequence
from typing import Any

import anyio
import pytest

from aiosessions import LocalStorage, SessionManager, StorageUnavailable
from aiosessions.asgi import HeaderTransport, SessionMiddleware, WebSession, get_session
from tests.support.web import Answer, Client, answer_into, setting, signing_in

CONNECT = {"type": "websocket.connect"}
GONE = {"type": "websocket.disconnect", "code": 1001}
Change = Callable[[WebSession[Any]], Any]


def socket(before: Change | None = None, after: Change | None = None) -> Any:
    """An application that accepts, and waits for the end."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = get_session(scope)
        await receive()
        if before:
            await (before(session) or anyio.lowlevel.checkpoint())
        await send({"type": "websocket.accept", "headers": [(b"a", b"b")]})
        if after:
            await (after(session) or anyio.lowlevel.checkpoint())
        while (await receive())["type"] != "websocket.disconnect":
            pass

    return app


async def connect(
    client: Client,
    app: Any,
    messages: Sequence[dict[str, Any]] = (CONNECT, GONE),
    **scope: Any,
) -> Answer:
    """Open a WebSocket."""
    answer = Answer()
    middleware = SessionMiddleware(app, client.sessions, **client.settings)
    full = client.scope(**{"type": "websocket", **scope})
    try:
        await middleware(full, client.receive(messages), answer_into(answer))
    finally:
        client.learn(answer)
    return answer


def last(answer: Answer) -> tuple[str, int]:
    """The last message, and its code or status."""
    message = answer.messages[-1]
    return message["type"], message.get("code", message.get("status", 0))


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        (None, "example.com", True),
        ("https://example.com", "example.com", True),
        ("https://EXAMPLE.com", "example.com:443", True),
        ("http://example.com", "example.com:80", True),
        ("http://localhost:8000", "localhost:8000", True),
        ("https://partner.example", "example.com", True),
        ("https://example.com:8443", "example.com", False),
        ("https://example.com", "example.com:8443", False),
        ("https://evil.example", "example.com", False),
        ("https://example.com.evil.example", "example.com", False),
        ("null", "example.com", False),
        ("null", "", False),
        ("https://", "", False),
    ],
)
async def test_origin_is_checked(
    client: Client, origin: str | None, host: str, *, allowed: bool
) -> None:
    """Browsers send cookies with WebSockets of every site, but not the header of a transport."""
    client.settings["origins"] = ["https://Partner.example"]
    headers = [(b"host", host.encode())]
    if origin is not None:
        headers.append((b"origin", origin.encode()))
    answer = await connect(client, socket(), headers=headers)
    assert (last(answer)[0] == "websocket.accept") is allowed
    client.settings["transport"] = HeaderTransport("x-session")
    assert last(await connect(client, socket(), headers=headers))[0] == "websocket.accept"


async def test_refusal_uses_the_denial_response(client: Client) -> None:
    """A server with the extension sends a status; another one closes with a code."""
    foreign = [(b"origin", b"https://evil.example")]
    assert last(await connect(client, socket(), headers=foreign)) == ("websocket.close", 1008)
    answer = await connect(
        client, socket(), headers=foreign, extensions={"websocket.http.response": {}}
    )
    assert answer.status == 403


async def test_changes_are_stored_at_accept_and_at_the_end(client: Client) -> None:
    """A change before `accept` may create a session; a later one needs a stored session."""
    app = socket(setting(a=1), setting(b=2))
    answer = await connect(client, app)
    assert answer.all("a") == ["b"]
    assert await client.data() == ({"a": 1, "b": 2}, None)
    await connect(client, socket(lambda session: session.save(), lambda session: session.delete()))
    assert await client.data() == ({}, None)
    client.cookie = None
    with pytest.raises(RuntimeError, match="has left"):
        await connect(client, socket(None, setting(b=2)))
    with pytest.raises(RuntimeError, match="has left"):
        await connect(client, socket(None, signing_in("alice")))


@pytest.mark.parametrize("closes", [False, True])
async def test_exception_of_the_application_stores_nothing(client: Client, *, closes: bool) -> None:
    """Frameworks also raise an exception for the end of the connection, which is none."""
    await client.get(setting(a=1))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        scope["session"]["a"] = 2
        if closes:
            await receive()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await connect(client, app, [GONE])
    assert await client.data() == ({"a": 2 if closes else 1}, None)


@pytest.mark.parametrize("denial", ["websocket.close", "websocket.http.response.start"])
async def test_denied_websocket_gives_no_rights(client: Client, denial: str) -> None:
    """The application has refused the WebSocket, so the client is not signed in."""
    await client.get(setting(a=1))

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        get_session(scope).principal = "mallory"
        await send({"type": denial, "status": 401, "headers": []})

    await connect(client, app)
    assert await client.data() == ({"a": 1}, None)


async def test_change_is_stored_before_the_close(client: Client) -> None:
    """A client that sees the close finds the change."""
    await client.get(setting(a=1))

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        scope["session"]["a"] = 2
        await send({"type": "websocket.close"})
        assert await client.data() == ({"a": 2}, None)

    await connect(client, app)


async def test_conflict_at_accept_ends_the_websocket(client: Client) -> None:
    """The application receives a disconnect."""
    await client.get(setting(a=1))
    old = client.copy()
    await client.get(signing_in("alice"))
    answer = await connect(old, socket(setting(a=2)), [CONNECT])
    assert last(answer) == ("websocket.close", 1008)


@pytest.mark.parametrize("kind", ["websocket", "http"])
async def test_revocation_ends_a_stream(client: Client, kind: str) -> None:
    """The application is cancelled, and a WebSocket is closed with 1008."""
    client.settings["keep_alive"] = 0.001
    await client.get(signing_in("alice"))

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        if kind == "http":
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body", "more_body": True})
        else:
            await send({"type": "websocket.accept"})
        await client.sessions.revoke_all("alice")
        scope["session"]["a"] = 2
        await anyio.sleep_forever()

    answer = await connect(client, app, type=kind)
    if kind == "websocket":
        assert last(answer) == ("websocket.close", 1008)
    else:
        assert last(answer) == ("http.response.body", 0)
    assert await client.data() == ({}, None)


async def test_stream_renews_its_session(client: Client, local: LocalStorage[Any]) -> None:
    """Its session is loaded at the interval, also across an outage."""
    client.settings["keep_alive"] = 0.001
    await client.get(setting(a=1))
    loads: list[str] = []
    enough, load = anyio.Event(), local.load

    async def counted(id: str) -> Any:
        loads.append(id)
        if len(loads) == 2:
            raise StorageUnavailable("down")
        if len(loads) == 4:
            enough.set()
        return await load(id)

    local.load = counted  # type: ignore[method-assign]

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await enough.wait()

    await connect(client, app)
    assert set(loads) == {client.cookie}


def test_keep_alive_is_shorter_than_the_ttl() -> None:
    """Half a TTL is the longest interval."""
    sessions = SessionManager[Any](LocalStorage(ttl=10))
    middleware = SessionMiddleware(socket(), sessions, keep_alive=60)
    assert middleware._keep_alive == 5

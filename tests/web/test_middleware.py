"""Requests one after another: the stored sessions, and the headers of the responses."""

import re
from typing import Any

import anyio
import msgspec
import pytest

from aiosessions import JsonCodec, LocalStorage, Session, SessionManager
from aiosessions.asgi import (
    CookieTransport,
    HeaderTransport,
    SessionMiddleware,
    WebSession,
    get_session,
)
from aiosessions.testing import FakeClock
from tests.support.proxy import Counts, FaultProxy
from tests.support.web import Answer, Client, answer_into, mapping, page, setting, signing_in

from .conftest import TTL


def nothing(_session: WebSession[Any]) -> None:
    """A page without a session."""


def reading(session: WebSession[Any]) -> None:
    """A page that reads."""
    assert session.data is not None


def deleting(session: WebSession[Any], status: int = 200) -> int:
    """A page that signs out."""
    _ = session.delete()
    return status


def failing(_session: WebSession[Any]) -> int:
    """A page with a bug."""
    raise ZeroDivisionError


async def test_untouched_session_leaves_no_trace(client: Client, local: LocalStorage[Any]) -> None:
    """No record, no cookie, and no header for caches; reading alone stores nothing either."""
    answer = await client.get(nothing)
    assert answer.messages[0]["headers"] == []
    answer = await client.get(reading)
    assert (answer.all("cache-control"), answer.all("vary")) == (["private"], ["Cookie"])
    assert (client.cookie, local.statistics().sessions) == (None, 0)


async def test_cost_in_commands(proxy: FaultProxy, storage: Any) -> None:
    """A load is one GETEX, and a change one more round trip."""
    client = Client(SessionManager(storage))
    costs: list[tuple[dict[str, int], Any]] = [
        ({}, nothing),
        ({}, reading),
        ({"EVALSHA": 1}, setting(a=1)),
        ({"GETEX": 1}, nothing),
        ({"GETEX": 1}, reading),
        ({"GETEX": 1}, setting(a=1)),
        ({"GETEX": 1, "EVALSHA": 1}, setting(a=2)),
        ({"GETEX": 2, "EVALSHA": 2}, signing_in("alice")),
        ({"GETEX": 2, "EVALSHA": 1}, deleting),
    ]
    warm = Client(SessionManager(storage))
    for handler in (setting(a=1), setting(a=2), signing_in("bob"), deleting):
        await warm.get(handler)
    for expected, handler in costs:
        proxy.counts = Counts()
        await client.get(handler)
        assert proxy.counts.requests == expected
    assert proxy.counts.round_trips == 3


@pytest.mark.parametrize("id", ["planted", "a b", "x" * 300, "", "\xe9"])
async def test_unknown_id_is_cleared_and_never_used(
    client: Client, local: LocalStorage[Any], id: str
) -> None:
    """The visitor is anonymous, and gets an id from the server when something is set."""
    client.cookie = id
    answer = await client.copy().get(reading)
    assert answer.all("set-cookie")[0].startswith("session=; Max-Age=0;")
    assert local.statistics().sessions == 0
    await client.get(setting(a=1))
    assert client.cookie is not None
    assert re.fullmatch(r"[\w-]{43}", client.cookie)


async def test_late_response_clears_no_cookie(client: Client, clock: FakeClock) -> None:
    """A sign-in may have replaced the cookie since the load."""
    client.cookie = "unknown"
    answer = await client.get(lambda _session: clock.advance(1.1))
    assert answer.all("set-cookie") == []


async def test_id_is_known_before_the_response(client: Client) -> None:
    """A new session, a signed-in one and a replaced one have the id that they announce."""
    announced: list[Any] = []
    for change in (setting(a=1), signing_in("alice"), deleting):

        def handler(session: WebSession[Any], change: Any = change) -> None:
            change(session)
            session.data["b"] = 1
            announced.append(session.id)

        await client.get(handler)
        assert client.cookie == announced[-1]
    assert len(set(announced)) == 3


@pytest.mark.parametrize(
    ("change", "after"),
    [
        (lambda s: s["list"].append(2), {"list": [1, 2], "a": 1}),
        (lambda s: s.update(a=2), {"list": [1], "a": 2}),
        (lambda s: s.__ior__({"b": 3}), {"list": [1], "a": 1, "b": 3}),
        (lambda s: s.pop("a"), {"list": [1]}),
        (lambda s: s.__delitem__("a"), {"list": [1]}),
        (lambda s: s.setdefault("c", 4), {"list": [1], "a": 1, "c": 4}),
        (lambda s: s.popitem(), {"list": [1]}),
        (lambda s: s.clear(), {}),
        (lambda s: (s.get("a"), len(s), list(s), s | {"z": 1}, s.copy()), {"list": [1], "a": 1}),
    ],
)
async def test_mapping_changes_are_stored(client: Client, change: Any, after: Any) -> None:
    """`scope["session"]` behaves like a dict, and nested changes count."""
    await client.get(setting(list=[1], a=1))
    await client.call(mapping(change))
    assert await client.data() == (after, None)


@pytest.mark.parametrize("found", [{"b": 2}, None])
async def test_replaced_mapping_is_stored(client: Client, found: Any) -> None:
    """Litestar puts another object in place of `scope["session"]`; all but a mapping is empty."""
    await client.get(setting(a=1))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["session"] = found
        await mapping(lambda _: None)({**scope}, receive, send)

    await client.call(app)
    assert await client.data() == (found or {}, None)


async def test_sign_in_gives_a_new_id(client: Client, sessions: SessionManager[Any]) -> None:
    """The old id keeps its rights for the grace, and accepts no writes."""
    await client.get(setting(a=1))
    old = client.copy()
    await client.get(signing_in("alice"))
    assert client.cookie != old.cookie
    assert await client.data() == ({"a": 1}, "alice")
    assert await old.data() == ({"a": 1}, None)
    assert (await old.get(setting(a=2))).status == 409
    assert (await old.get(deleting)).status == 409
    assert await sessions.count("alice") == 1


@pytest.mark.parametrize("status", [400, 401, 404, 500])
async def test_failed_response_gives_no_rights(client: Client, status: int) -> None:
    """From 400 on the principal stays; from 500 on the data stay, too. A deletion holds."""

    def handler(session: WebSession[Any]) -> int:
        session.data["a"] = 2
        session.principal = "mallory"
        _ = session.rotate()
        return status

    await client.get(setting(a=1))
    before = client.cookie
    assert (await client.get(handler)).status == status
    assert client.cookie == before
    assert await client.data() == ({"a": 2 if status < 500 else 1}, None)
    await client.get(signing_in("alice"))
    await client.get(signing_in(None, status))
    assert (await client.data())[1] is None
    await client.get(lambda session: deleting(session, status))
    assert client.cookie is None


async def test_exception_reaches_the_server_as_it_is(client: Client) -> None:
    """It is not in a group. Nothing is stored, but a deletion holds."""
    await client.get(setting(a=1))

    def handler(session: WebSession[Any]) -> None:
        session.data["a"] = 2
        failing(session)

    with pytest.raises(ZeroDivisionError):
        await client.get(handler)
    assert await client.data() == ({"a": 1}, None)
    with pytest.raises(ZeroDivisionError):
        await client.get(lambda session: [deleting(session), failing(session)])
    assert await client.data() == ({}, None)


async def test_deleted_session_may_be_replaced(
    client: Client, sessions: SessionManager[Any]
) -> None:
    """Things set after `delete` are in a new session, without the old data and principal."""
    await client.get(setting(a=1))
    await client.get(signing_in("alice"))
    old = client.copy()

    async def handler(session: WebSession[Any]) -> None:
        _ = session.delete()
        assert (session.data, session.principal, session.is_new) == ({}, None, True)
        session.data["flash"] = "bye"

    await client.get(handler)
    assert await client.data() == ({"flash": "bye"}, None)
    assert await old.data() == ({}, None)
    assert await sessions.count("alice") == 0


async def test_calls_that_are_awaited_act_at_once(
    client: Client, sessions: SessionManager[Any]
) -> None:
    """`save`, `rotate` and `delete` do not wait for the response."""

    async def handler(session: WebSession[Any]) -> int:
        session.data["a"] = 1
        await session.save()
        await session.save()
        first = session.id
        assert (await sessions.get(first)).data == {"a": 1}
        session.principal = "alice"
        await session.rotate()
        assert session.id != first
        assert (await sessions.get(session.id)).principal == "alice"
        await session.mutate(lambda stored: stored.data.update(b=2))
        return 400

    await client.get(handler)
    assert await client.data() == ({"a": 1, "b": 2}, "alice")

    async def delete(session: WebSession[Any]) -> None:
        await session.delete()
        assert await sessions.count("alice") == 0

    await client.get(delete)
    assert client.cookie is None


async def test_mutate_creates_a_session(client: Client) -> None:
    """A visitor without a session gets one with the change."""
    await client.get(lambda session: session.mutate(lambda new: new.data.update(a=1)))
    assert await client.data() == ({"a": 1}, None)


async def test_sign_out_everywhere(client: Client, sessions: SessionManager[Any]) -> None:
    """All sessions of the principal end, or all but this one."""
    phone = client.copy()
    for each in (client, phone):
        await each.get(signing_in("alice"))

    async def others(session: WebSession[Any]) -> None:
        assert await session.revoke_all(keep=True) == 1

    await client.get(others)
    assert ((await client.data())[1], (await phone.data())[1]) == ("alice", None)
    await phone.get(signing_in("alice"))
    await client.get(lambda session: session.revoke_all())
    assert (client.cookie, await sessions.count("alice")) == (None, 0)
    await client.get(lambda session: session.revoke_all())


async def test_cookie_slides_when_due(client: Client, clock: FakeClock) -> None:
    """It is sent again once half of a TTL has passed, and lives no longer than the session."""
    answer = await client.get(setting(a=1))
    assert f"Max-Age={TTL};" in answer.all("set-cookie")[0]
    for seconds, handler, is_sent in (
        (40, setting(a=2), False),
        (20, nothing, False),
        (0, reading, True),
        (0, setting(a=3), False),
        (30, reading, False),
        (20, setting(a=4), True),
    ):
        clock.advance(seconds)
        answer = await client.get(handler)
        assert bool(answer.all("set-cookie")) is is_sent
    for _ in range(9):
        clock.advance(90)
        answer = await client.get(reading)
    assert "Max-Age=80;" in answer.all("set-cookie")[0]  # max_lifetime is near
    assert answer.all("cache-control") == ["no-store"]


@pytest.mark.parametrize(
    ("theirs", "cache", "vary"),
    [
        ([(b"Cache-Control", b"public, max-age=60")], ["no-store"], ["Cookie"]),
        ([(b"Cache-Control", b"Private")], ["Private"], ["Cookie"]),
        ([(b"VARY", b"Accept, cookie")], ["no-store"], ["Accept, cookie"]),
        ([(b"vary", b"*")], ["no-store"], ["*"]),
        ([(b"vary", b"Accept")], ["no-store"], ["Accept", "Cookie"]),
    ],
)
async def test_headers_of_the_application_survive(
    client: Client, theirs: Any, cache: list[str], vary: list[str]
) -> None:
    """Only a policy that lets caches share a cookie is replaced."""
    own = [*theirs, (b"set-cookie", b"a=1"), (b"Set-Cookie", b"b=2")]
    answer = await client.get(setting(a=1), own)
    assert (answer.all("cache-control"), answer.all("vary")) == (cache, vary)
    assert answer.all("set-cookie")[:2] == ["a=1", "b=2"]
    assert client.cookie is not None
    answer = await client.get(reading, own)
    policies = [value.decode() for name, value in theirs if name == b"Cache-Control"]
    assert answer.all("cache-control") == (policies or ["private"])


async def test_change_after_the_head_is_an_error(client: Client) -> None:
    """A nested change is found when the response ends; a new id is refused at once."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await page(setting(a=[]), [])(scope, receive, send)
        scope["session"]["a"].append(1)
        with pytest.raises(RuntimeError, match="has left"):
            get_session(scope).principal = "alice"
        with pytest.raises(RuntimeError, match="has left"):
            _ = get_session(scope).rotate()

    with pytest.raises(RuntimeError, match="is not stored"):
        await client.call(app)
    assert await client.data() == ({"a": []}, None)


async def test_lazy_session_is_loaded_on_request(client: Client) -> None:
    """Without `load`, using the session is an error, and looking away costs nothing."""
    await client.get(setting(a=1))
    client.settings["lazy"] = True
    answer = await client.get(nothing)
    assert answer.messages[0]["headers"] == []
    with pytest.raises(RuntimeError, match="load"):
        await client.get(reading)

    async def handler(session: WebSession[Any]) -> None:
        assert (await session.load()).data == {"a": 1}

    await client.get(handler)


async def test_other_scopes_and_skipped_requests_pass(client: Client) -> None:
    """The application gets them unchanged, without a session."""
    client.settings["skip"] = lambda scope: scope["path"] == "/static"

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        assert "session" not in scope
        with pytest.raises(RuntimeError, match="SessionMiddleware"):
            get_session(scope)

    await client.call(app, type="lifespan")
    await client.call(app, path="/static")
    with pytest.raises(RuntimeError, match="SessionMiddleware"):
        get_session(object())


async def test_nested_middlewares_keep_apart(sessions: SessionManager[Any]) -> None:
    """A mounted application has a second session; the outer one gets the first one back."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        outer = get_session(scope)
        outer.data["outer"] = 1
        inner = page(setting(inner=1), [])
        await SessionMiddleware(inner, sessions, transport=CookieTransport("inner"))(
            scope, receive, send
        )
        seen.append(get_session(scope) is outer)

    answer = await Client(sessions).call(app)
    names = {line.partition("=")[0] for line in answer.all("set-cookie")}
    assert (names, seen) == ({"session", "inner"}, [True])


class Cart(msgspec.Struct):
    """Typed data."""

    items: list[str] = []


async def test_typed_data(clock: FakeClock) -> None:
    """The handle has the typed object; the mapping says so."""
    storage = LocalStorage(ttl=60, codec=JsonCodec(Cart), clock=clock)
    sessions = SessionManager(storage, clock=clock)
    with pytest.raises(TypeError, match="pass empty="):
        SessionMiddleware(page(nothing, []), sessions)
    client = Client(sessions, empty=Cart)
    await client.get(lambda session: session.data.items.append("tea"))
    assert await client.data() == (Cart(["tea"]), None)
    with pytest.raises(TypeError, match="Cart"):
        await client.call(mapping(lambda session: session.get("a")))


@pytest.mark.parametrize(
    "settings",
    [
        {"on_conflict": "last"},
        {"on_corrupt": "ignore"},
        {"sessions": "redis://localhost"},
        {"origins": "https://example.com"},
        {"origins": ["example.com"]},
        {"keep_alive": 0},
    ],
)
def test_wrong_setting_is_refused(sessions: SessionManager[Any], settings: dict[str, Any]) -> None:
    """A mistake shows when the application starts."""
    with pytest.raises((TypeError, ValueError)):
        SessionMiddleware(page(nothing, []), **{"sessions": sessions, **settings})


async def test_header_transport(sessions: SessionManager[Any]) -> None:
    """A new id is in the header of the response, and an unknown one is anonymous."""
    app = SessionMiddleware(
        page(setting(a=1), []), sessions, transport=HeaderTransport("Mcp-Session-Id")
    )
    answer = Answer()
    await app({"type": "http", "headers": [(b"mcp-session-id", b"?")]}, None, answer_into(answer))  # type: ignore[arg-type]
    assert (await sessions.get(answer.all("mcp-session-id")[0])).data == {"a": 1}
    assert answer.all("vary") == ["Mcp-Session-Id"]


def test_runs_on_trio(clock: FakeClock) -> None:
    """Sign in and out, and stream, under trio."""

    async def stream(scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "more_body": True})
        await send({"type": "http.response.body"})
        assert scope["session"]["a"] == 1

    async def main() -> None:
        storage = LocalStorage[Any](ttl=60, clock=clock)
        client = Client(SessionManager(storage, clock=clock))
        for handler in (setting(a=1), signing_in("alice")):
            await client.get(handler)
        await client.call(stream)
        assert await client.data() == ({"a": 1}, "alice")
        await client.get(deleting)
        assert client.cookie is None

    anyio.run(main, backend="trio")


async def test_no_id_in_reprs(client: Client) -> None:
    """Reprs of the session and of its mapping hold neither the id nor the data."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await page(setting(secret="secret"), [])(scope, receive, send)
        for each in (get_session(scope), scope["session"], Session(id=get_session(scope).id)):
            assert get_session(scope).id not in repr(each)
            assert "secret" not in repr(each)

    await client.call(app)

"""Behaviours of other middlewares, here or explained in docs/web-migration.md."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import litestar
import pytest
from litestar.middleware import DefineMiddleware
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from aiosessions import LocalStorage, SessionManager
from aiosessions.asgi import CookieTransport, SessionMiddleware, get_session


async def show(request: Request) -> Response:
    """Show the data."""
    return JSONResponse(dict(request.session))


async def update(request: Request) -> Response:
    """Change the data, and answer with a status."""
    request.session.update(await request.json())
    return Response(status_code=int(request.query_params.get("status", "200")))


async def clear(request: Request) -> Response:
    """Empty the data."""
    request.session.clear()
    return Response()


async def replace(request: Request) -> Response:
    """Put a dict in the place of the session."""
    request.scope["session"] = await request.json()
    return Response()


async def late(request: Request) -> Response:
    """Change the data after the head of the response."""

    async def body() -> AsyncIterator[bytes]:
        yield b"begin"
        request.session["late"] = True

    class Streaming(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            del scope, receive
            await send({"type": "http.response.start", "status": 200, "headers": []})
            async for part in body():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    return Streaming()


ROUTES = [
    Route("/show", show),
    *(Route(f"/{each.__name__}", each, methods=["POST"]) for each in (update, clear, replace)),
    Route("/late", late, methods=["POST"]),
]


def client_of(app: Any) -> httpx.AsyncClient:
    """A browser of an application."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://test.example")


def starlette_client(transport: CookieTransport | None = None) -> httpx.AsyncClient:
    """A browser of a Starlette application, which is also mounted at /second."""
    app = Starlette(routes=[*ROUTES, Mount("/second", Starlette(routes=ROUTES))])
    sessions = SessionManager(LocalStorage[Any](ttl=600))
    app.add_middleware(SessionMiddleware, sessions=sessions, transport=transport)
    return client_of(app)


@pytest.mark.parametrize(
    ("transport", "attributes"),
    [
        (CookieTransport(), {"Path=/", "Max-Age=600", "Secure", "HttpOnly", "SameSite=Lax"}),
        (CookieTransport(path="/second"), {"Path=/second"}),
        (CookieTransport(domain=".test.example"), {"Domain=.test.example"}),
        (CookieTransport(same_site="none", partitioned=True), {"SameSite=None", "Partitioned"}),
    ],
)
async def test_cookie_has_configured_attributes(
    transport: CookieTransport, attributes: set[str]
) -> None:
    """Also in a mounted application."""
    async with starlette_client(transport) as client:
        response = await client.post("/second/update", json={"some": "data"})
        assert attributes <= {*response.headers["set-cookie"].split("; ")}
        assert (await client.get("/second/show")).json() == {"some": "data"}


async def test_cleared_data_keeps_the_session() -> None:
    """`clear` is a change; only `delete` ends the session."""
    async with starlette_client() as client:
        await client.post("/update", json={"some": "data"})
        before = client.cookies["session"]
        await client.post("/clear")
        assert (await client.get("/show")).json() == {}
        assert client.cookies["session"] == before


async def test_clear_without_session_stores_nothing() -> None:
    """Empty data is the data of a visitor without a session."""
    async with starlette_client() as client:
        assert "set-cookie" not in (await client.post("/clear")).headers


async def test_invalid_cookie_is_cleared() -> None:
    """It is not an error."""
    async with starlette_client() as client:
        client.cookies.set("session", "invalid", domain="test.example")
        response = await client.get("/show")
        assert response.json() == {}
        assert "Max-Age=0" in response.headers["set-cookie"]


@pytest.mark.parametrize(("status", "stored"), [(302, True), (404, True), (500, False)])
async def test_broken_response_stores_nothing(status: int, stored: bool) -> None:  # noqa: FBT001
    """Other statuses store the data."""
    async with starlette_client() as client:
        await client.post(f"/update?status={status}", json={"some": "data"})
        assert (await client.get("/show")).json() == ({"some": "data"} if stored else {})


async def test_replaced_session_is_stored() -> None:
    """A dict in `scope["session"]` takes the place of the data."""
    async with starlette_client() as client:
        await client.post("/update", json={"old": 1})
        await client.post("/replace", json={"new": 2})
        assert (await client.get("/show")).json() == {"new": 2}


async def test_change_after_the_head_is_an_error() -> None:
    """It would be lost."""
    async with starlette_client() as client:
        await client.post("/update", json={"some": "data"})
        with pytest.raises(RuntimeError, match="after the head"):
            await client.post("/late")
        assert (await client.get("/show")).json() == {"some": "data"}


@litestar.post("/set")
async def set_session(request: litestar.Request[Any, Any, Any]) -> None:
    """Replace the data as Litestar does."""
    request.set_session(await request.json())


@litestar.post("/clear")
async def clear_session(request: litestar.Request[Any, Any, Any]) -> None:
    """Empty the data as Litestar does."""
    request.clear_session()


@litestar.get("/show")
async def show_session(request: litestar.Request[Any, Any, Any]) -> list[Any]:
    """Show the data, and whether it is stored."""
    return [dict(request.session), get_session(request).is_new]


async def test_methods_of_litestar_work() -> None:
    """`set_session` replaces the data, and `clear_session` empties it."""
    middleware: Any = SessionMiddleware
    sessions = SessionManager(LocalStorage[Any](ttl=600))
    app = litestar.Litestar(
        [set_session, clear_session, show_session],
        middleware=[DefineMiddleware(middleware, sessions=sessions)],
    )
    async with client_of(app) as client:
        await client.post("/set", json={"a": 1})
        await client.post("/set", json={"b": 2})
        assert (await client.get("/show")).json() == [{"b": 2}, False]
        await client.post("/clear")
        assert (await client.get("/show")).json() == [{}, False]
